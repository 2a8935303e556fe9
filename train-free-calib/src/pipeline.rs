//! The streaming pipeline: checkpoint in, ternary folder out.

use std::path::Path;

use serde_json::{Value, json};
use ternoss_backends::{Rotation, TernaryBackend};
use ternoss_model::{
    Checkpoint,
    checkpoint::{CONFIG_FILE, FolderWriter},
    config::{FORMAT_VERSION, Quantization, TERNOSS, TernaryQuantization},
};
use ternoss_quant::{Granularity, TernaryConfig};

use crate::{
    CalibError, Calibration, Method, Reduction, Report, Steps,
    layer::Activations,
    levels::MAX_PLANES,
    report::REPORT_FILE,
    size::{bytes_in, layer_weights, table_weights, warning},
    step::{Done, Job, activations_file},
    ternarize::Recipe,
};

/// What to do with a checkpoint.
#[derive(Clone, Copy, Debug)]
pub struct QuantizeOptions {
    /// Quantization method.
    pub method: Method,
    /// Its steps, some perhaps left out.
    pub steps: Steps,
    /// Granularity of the scales and packing of the trits. The rotation is the steps' to say.
    pub ternary: TernaryConfig,
    /// Trits a weight is the sum of: 1 to 3 for ternoss, 1 for the others.
    pub planes: usize,
    /// Planes of embedding and output layer, 1 to 3; `None` leaves them as the checkpoint has them.
    pub table_planes: Option<usize>,
    /// Experts that each layer keeps, the most important ones on the calibration text; `None` for all.
    pub keep_experts: Option<usize>,
    /// Bytes that the whole folder may take: see [`resolved`](Self::resolved).
    pub target_size: Option<u64>,
    /// Whether an existing output may be replaced.
    pub overwrite: bool,
}

impl QuantizeOptions {
    /// A method with all its steps, one plane.
    pub fn new(method: Method) -> Self {
        Self {
            method,
            steps: method.steps(),
            ternary: TernaryConfig::default(),
            planes: 1,
            table_planes: None,
            keep_experts: None,
            target_size: None,
            overwrite: false,
        }
    }
}

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

/// Weights of attention and experts, which a quantization of all of them makes ternary.
pub fn ternary_weights(checkpoint: &Checkpoint) -> usize {
    checkpoint.config().num_hidden_layers() * layer_weights(checkpoint, None)
}

/// Makes a checkpoint ternary and writes it to `output`, one weight file a layer; `progress` hears how many weights
/// became ternary since its last call. Methods that look at a text need `calibration`, and so does leaving out experts.
///
/// Peak memory without a text is one layer's packed weights and four expert matrices in f32 with their temporaries:
/// 0.8 GB for gpt-oss-20b. With a text it is a layer's packed weights, four experts in f32, and eight or nine
/// copies of the text's residual stream. Ternary tables are in memory packed while they are written. Every tensor is scanned for NaN and infinity. The output is whole or not there (see [`FolderWriter`]).
/// A run that was killed goes on at the first layer that was not done, and gives the same bytes.
///
/// # Errors
/// [`CalibError`], naming the file, the tensor, and what was expected.
pub fn quantize<B: TernaryBackend>(
    checkpoint: &Checkpoint,
    output: &Path,
    options: &QuantizeOptions,
    calibration: Option<&Calibration>,
    device: &B::Device,
    progress: &(dyn Fn(usize) + Sync),
) -> Result<Report, CalibError> {
    check_folders(checkpoint, output)?;
    let options = &options.resolved(checkpoint)?;
    let recipe = recipe(options)?;
    let job = Job::<B> { checkpoint, recipe, device, progress };
    job.check_layout()?;
    let calibration = calibration.filter(|_| options.look_at_text());
    let mut activations = match (calibration, options.keep_experts) {
        (Some(calibration), _) => Some(Activations::embed(checkpoint, calibration, device)?),
        (None, _) if recipe.steps.look_at_text() => return Err(CalibError::NoText { method: options.method }),
        (None, Some(keep)) => return Err(CalibError::NoTextToChoose { keep }),
        (None, None) => None,
    };
    if let (Some(activations), false) = (&mut activations, recipe.steps.look_at_text()) {
        // Only the full-precision stream goes through the layers.
        activations.student.clear();
    }
    let config = read_config(checkpoint)?;
    let settings = json!({
        "program": env!("CARGO_PKG_VERSION"),
        "method": recipe.method,
        "steps": recipe.steps,
        "scales and packing": recipe.ternary,
        "planes": recipe.planes,
        "planes of the tables": recipe.table_planes,
        "experts kept": recipe.keep_experts,
        "calibration text": calibration.map(Calibration::fingerprint),
        "model": checkpoint.stamp(),
    });
    let layers = checkpoint.config().num_hidden_layers();
    let (mut writer, mut done) = FolderWriter::resume::<Done>(output, layers + 1, options.overwrite, &settings)?;
    let layers_done = done.len().saturating_sub(1);
    if let (Some(activations), 1..) = (&mut activations, layers_done) {
        let name = activations_file(layers_done);
        if !activations.set_bytes(&writer.read(&name)?) {
            return Err(CalibError::Activations { name });
        }
    }
    progress(layer_weights(checkpoint, options.keep_experts) * layers_done);
    if !done.is_empty() && options.table_planes.is_some() {
        progress(table_weights(checkpoint));
    }
    for step in done.len()..=layers {
        let finished = job.step(step, activations.as_mut(), &mut writer)?;
        writer.commit(step, &json!(finished))?;
        writer.remove(&activations_file(step.saturating_sub(1)));
        done.push(finished);
    }
    // Any of them may be left of a run that was killed.
    (0..=layers).for_each(|layers| writer.remove(&activations_file(layers)));
    let report = report(checkpoint, options, &recipe, calibration.map_or(0, Calibration::tokens), done);
    finish(checkpoint, config, &report, writer)?;
    let found = bytes_in(output);
    match options.target_size.filter(|target| found > *target) {
        Some(target) => Err(CalibError::TargetMissed { folder: output.display().to_string(), target, found }),
        None => Ok(report),
    }
}

fn check_folders(checkpoint: &Checkpoint, output: &Path) -> Result<(), CalibError> {
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

fn report(
    checkpoint: &Checkpoint,
    options: &QuantizeOptions,
    recipe: &Recipe,
    tokens: usize,
    mut done: Vec<Done>,
) -> Report {
    let config = checkpoint.config();
    let ternary_weights = config.num_hidden_layers() * layer_weights(checkpoint, recipe.keep_experts);
    let (table_planes, kept) = (recipe.table_planes, recipe.keep_experts.unwrap_or(config.num_local_experts));
    let smaller = table_planes.is_some() || recipe.keep_experts.is_some();
    let reduction = (smaller || options.target_size.is_some()).then(|| Reduction {
        target_bytes: options.target_size,
        table_planes,
        table_bytes: done.iter().map(|step| step.table_bytes).sum(),
        tables: done.iter_mut().flat_map(|step| std::mem::take(&mut step.tables)).collect(),
        experts_kept: kept,
        experts_before: config.num_local_experts,
        importance_tokens: recipe.keep_experts.map_or(0, |_| tokens),
        warning: warning(table_planes, kept, config.num_local_experts),
    });
    let ternary_bytes = done.iter().map(|step| step.ternary_bytes).sum();
    Report {
        method: recipe.method,
        steps: recipe.steps,
        ternary: recipe.ternary,
        planes: recipe.planes,
        calibration_tokens: if recipe.steps.look_at_text() { tokens } else { 0 },
        ternary_weights,
        ternary_bytes,
        full_precision_bytes: done.iter().map(|step| step.full_precision_bytes).sum(),
        bits_per_weight: 8.0 * ternary_bytes as f64 / ternary_weights as f64,
        reduction,
        layers: done.into_iter().filter_map(|step| step.layer).collect(),
    }
}

/// Writes what stands beside the weights, and makes the folder a model.
fn finish(checkpoint: &Checkpoint, mut config: Value, report: &Report, writer: FolderWriter) -> Result<(), CalibError> {
    for name in COMPANIONS {
        writer.copy(checkpoint.folder(), name)?;
    }
    writer.file(REPORT_FILE, format!("{:#}\n", json!(report)).as_bytes())?;
    if let Some(reduction) = &report.reduction {
        config["num_local_experts"] = json!(reduction.experts_kept);
    }
    config["quantization_config"] = json!(TernaryQuantization {
        quant_method: TERNOSS.into(),
        version: FORMAT_VERSION,
        method: report.method.to_string(),
        format: report.ternary.format,
        group_size: report.ternary.granularity.group_size(),
        rotation: report.ternary.rotation,
        planes: report.planes,
        activation_bits: 8,
        bits_per_weight: report.bits_per_weight,
    });
    Ok(writer.finish(&config)?)
}

/// What the options come down to.
pub(crate) fn recipe(options: &QuantizeOptions) -> Result<Recipe, CalibError> {
    let QuantizeOptions { method, steps, planes, table_planes, keep_experts, .. } = *options;
    let most = if method == Method::Ternoss { MAX_PLANES } else { 1 };
    if !(1..=most).contains(&planes) {
        return Err(CalibError::Planes { planes, method, most });
    }
    if options.ternary.granularity == Granularity::Tensor && method != Method::Absmean {
        return Err(CalibError::OneScale { method });
    }
    let rotation = steps.rotation.then(Rotation::default);
    Ok(Recipe {
        method,
        steps,
        ternary: TernaryConfig { rotation, ..options.ternary },
        planes,
        table_planes,
        keep_experts,
    })
}

/// The model's `config.json` as it is, so that keys this project does not know survive.
fn read_config(checkpoint: &Checkpoint) -> Result<Value, CalibError> {
    let path = checkpoint.folder().join(CONFIG_FILE);
    let broken = || CalibError::Config { path: path.display().to_string() };
    let text = std::fs::read_to_string(&path).map_err(|_| broken())?;
    let config: Value = serde_json::from_str(&text).map_err(|_| broken())?;
    match config.is_object() {
        true => Ok(config),
        false => Err(broken()),
    }
}
