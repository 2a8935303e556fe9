//! The ternary folder beside its weights.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use ternoss_model::{
    Checkpoint,
    checkpoint::{CONFIG_FILE, FolderWriter},
    config::{FORMAT_VERSION, Quantization, TERNOSS, TernaryQuantization},
};
use ternoss_quant::TernaryConfig;

use crate::{
    CalibError, Method, Report,
    picture::{PICTURE_FILE, picture},
    report::REPORT_FILE,
};

/// Files beside the weights that a ternary folder keeps.
pub(crate) const COMPANIONS: [&str; 7] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "LICENSE",
    "USAGE_POLICY",
];

/// Refuses a model that is ternary, and an output that would take the model's place.
pub(crate) fn check_folders(checkpoint: &Checkpoint, output: &Path) -> Result<(), CalibError> {
    if matches!(checkpoint.config().quantization, Quantization::Ternary(_)) {
        return Err(CalibError::AlreadyTernary { folder: checkpoint.folder().display().to_string() });
    }
    let model = checkpoint.folder().canonicalize().ok();
    let takes_its_place =
        |path: &Path| path.canonicalize().ok().zip(model.as_ref()).is_some_and(|(a, b)| b.starts_with(a));
    if takes_its_place(output) || takes_its_place(&FolderWriter::partial_of(output)) {
        return Err(CalibError::OutputIsInput { folder: output.display().to_string() });
    }
    Ok(())
}

/// Writes what stands beside the weights, and makes the folder a model.
pub(crate) fn finish(
    checkpoint: &Checkpoint,
    mut config: Value,
    report: &Report,
    writer: FolderWriter,
) -> Result<(), CalibError> {
    for name in COMPANIONS {
        writer.copy(checkpoint.folder(), name)?;
    }
    writer.file(REPORT_FILE, format!("{:#}\n", json!(report)).as_bytes())?;
    writer.file(PICTURE_FILE, picture(report).as_bytes())?;
    if let Some(reduction) = &report.reduction {
        config["num_local_experts"] = json!(reduction.experts_kept);
    }
    config["quantization_config"] =
        json!(quantization_config(report.method, &report.ternary, report.planes, report.bits_per_weight));
    Ok(writer.finish(&config)?)
}

/// How the ternary tensors of a folder are to be read.
pub(crate) fn quantization_config(
    method: Method,
    ternary: &TernaryConfig,
    planes: usize,
    bits_per_weight: f64,
) -> TernaryQuantization {
    TernaryQuantization {
        quant_method: TERNOSS.into(),
        version: FORMAT_VERSION,
        method: method.to_string(),
        format: ternary.format,
        group_size: ternary.granularity.group_size(),
        rotation: ternary.rotation,
        planes,
        activation_bits: 8,
        bits_per_weight,
    }
}

/// The model's `config.json` as it is, so that keys this project does not know survive.
pub(crate) fn read_config(checkpoint: &Checkpoint) -> Result<Value, CalibError> {
    let path = checkpoint.folder().join(CONFIG_FILE);
    let broken = || CalibError::Config { path: path.display().to_string() };
    let text = std::fs::read_to_string(&path).map_err(|_| broken())?;
    let config: Value = serde_json::from_str(&text).map_err(|_| broken())?;
    match config.is_object() {
        true => Ok(config),
        false => Err(broken()),
    }
}

/// A path with something behind its name.
pub(crate) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or(path.as_os_str()).to_owned();
    name.push(suffix);
    path.with_file_name(name)
}

/// Bytes of the files in a folder.
pub(crate) fn bytes_in(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.metadata().ok()).map(|file| file.len()).sum()
}
