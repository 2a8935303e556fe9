//! The streaming pipeline: checkpoint in, ternary folder out.

use std::path::Path;

use burn::tensor::{Tensor, TensorData, backend::Backend};
use rayon::prelude::*;
use serde_json::json;
use ternoss_backends::{FormatError, TernaryLayout};
use ternoss_model::{
    Checkpoint, CheckpointError,
    checkpoint::{CONFIG_FILE, ExpertMatrix, FolderWriter, LinearName, OutputTensor, TernaryPath},
    config::{FORMAT_VERSION, Quantization, TERNOSS, TernaryQuantization},
};
use ternoss_quant::{PackedTernary, TernaryConfig};

use crate::{
    Method, Report,
    report::{LayerSums, REPORT_FILE},
};

/// What to do with a checkpoint.
#[derive(Clone, Copy, Debug, Default)]
pub struct QuantizeOptions {
    /// Quantization method.
    pub method: Method,
    /// Granularity of the scales and packing of the trits.
    pub ternary: TernaryConfig,
    /// Whether an existing output may be replaced.
    pub overwrite: bool,
}

/// A quantization that cannot be done.
#[derive(Debug, thiserror::Error)]
pub enum CalibError {
    /// Reading the model or writing the result failed.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The options do not describe a valid layout.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// There is nothing left to quantize.
    #[error("{folder} is ternary already")]
    AlreadyTernary {
        /// The model's folder.
        folder: String,
    },
    /// The model's own configuration is not an object.
    #[error("{path}: not a JSON object")]
    Config {
        /// `config.json` of the model.
        path: String,
    },
}

/// Files beside the weights that a ternary folder keeps.
const COMPANIONS: [&str; 7] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "LICENSE",
    "USAGE_POLICY",
];

/// Expert matrices in work at the same time: bounds memory whatever the number of threads.
const MATRICES_AT_ONCE: usize = 4;

/// Weights of a model that a quantization makes ternary.
pub fn ternary_weights(checkpoint: &Checkpoint) -> usize {
    let config = checkpoint.config();
    let size = |[in_features, out_features]: [usize; 2]| in_features * out_features;
    let attention: usize = LinearName::ALL.iter().map(|linear| size(linear.shape(config))).sum();
    let expert: usize = ExpertMatrix::ALL.iter().map(|matrix| size(matrix.shape(config))).sum();
    config.num_hidden_layers() * (attention + config.num_local_experts * expert)
}

/// Makes a checkpoint ternary and writes it to `output`, one weight file a layer; `progress` hears how many weights
/// became ternary since its last call.
///
/// Peak memory is one layer's packed weights and four expert matrices in f32 with their temporaries: 1.3 GB for
/// gpt-oss-20b. Every tensor is scanned for NaN and infinity. The output is whole or not there (see [`FolderWriter`]).
///
/// # Errors
/// [`CalibError`], naming the file, the tensor, and what was expected.
pub fn quantize<B: Backend>(
    checkpoint: &Checkpoint,
    output: &Path,
    options: &QuantizeOptions,
    device: &B::Device,
    progress: &(dyn Fn(usize) + Sync),
) -> Result<Report, CalibError> {
    if matches!(checkpoint.config().quantization, Quantization::Ternary(_)) {
        return Err(CalibError::AlreadyTernary { folder: checkpoint.folder().display().to_string() });
    }
    let layers = checkpoint.config().num_hidden_layers();
    let mut job = Job::<B> { checkpoint, options, device, progress, ternary_bytes: 0, copied_bytes: 0 };
    job.check_layout()?;
    let mut config = read_config(checkpoint)?;
    let mut writer = FolderWriter::create(output, layers + 1, options.overwrite)?;
    writer.shard(0, job.copied(None)?)?;
    let mut reports = Vec::with_capacity(layers);
    for layer in 0..layers {
        let mut sums = LayerSums::default();
        let packed = job.layer(layer, &mut sums)?;
        let mut tensors = job.copied(Some(layer))?;
        for (path, matrices) in &packed {
            tensors.extend(OutputTensor::ternary(path, matrices));
        }
        writer.shard(layer + 1, tensors)?;
        reports.push(sums.report());
    }
    let weights = ternary_weights(checkpoint);
    let report = Report {
        method: options.method,
        ternary: options.ternary,
        ternary_weights: weights,
        ternary_bytes: job.ternary_bytes,
        full_precision_bytes: job.copied_bytes,
        bits_per_weight: 8.0 * job.ternary_bytes as f64 / weights as f64,
        layers: reports,
    };
    for name in COMPANIONS {
        writer.copy(checkpoint.folder(), name)?;
    }
    writer.file(REPORT_FILE, format!("{:#}\n", json!(report)).as_bytes())?;
    config["quantization_config"] = json!(TernaryQuantization {
        quant_method: TERNOSS.into(),
        version: FORMAT_VERSION,
        method: options.method.to_string(),
        format: options.ternary.format,
        group_size: options.ternary.granularity.group_size(),
        rotation: options.ternary.rotation,
        planes: 1,
        activation_bits: 8,
        bits_per_weight: report.bits_per_weight,
    });
    writer.finish(&config)?;
    Ok(report)
}

/// The model's `config.json` as it is, so that keys this project does not know survive.
fn read_config(checkpoint: &Checkpoint) -> Result<serde_json::Value, CalibError> {
    let path = checkpoint.folder().join(CONFIG_FILE);
    let broken = || CalibError::Config { path: path.display().to_string() };
    let text = std::fs::read_to_string(&path).map_err(|_| broken())?;
    let config: serde_json::Value = serde_json::from_str(&text).map_err(|_| broken())?;
    match config.is_object() {
        true => Ok(config),
        false => Err(broken()),
    }
}

/// One quantization under way.
struct Job<'a, B: Backend> {
    checkpoint: &'a Checkpoint,
    options: &'a QuantizeOptions,
    device: &'a B::Device,
    progress: &'a (dyn Fn(usize) + Sync),
    ternary_bytes: usize,
    copied_bytes: usize,
}

impl<'a, B: Backend> Job<'a, B> {
    /// Refuses options that no matrix can have, before anything is written.
    fn check_layout(&self) -> Result<(), FormatError> {
        TernaryLayout {
            format: self.options.ternary.format,
            matrices: 1,
            planes: 1,
            rows: 1,
            in_features: self.checkpoint.config().hidden_size,
            group_size: self.options.ternary.granularity.group_size(),
            rotation: self.options.ternary.rotation,
        }
        .validate()
    }

    /// All ternary matrices of a layer.
    fn layer(&mut self, layer: usize, sums: &mut LayerSums) -> Result<Vec<(TernaryPath, PackedTernary)>, CalibError> {
        let mut all = Vec::new();
        for linear in LinearName::ALL {
            let path = linear.path(layer);
            let shape = linear.shape(self.checkpoint.config());
            let name = format!("{path}.weight");
            let weight = self.checkpoint.floats(&name, &[shape[1], shape[0]])?;
            let (matrix, matrix_sums) = self.ternarize(&name, weight, shape)?;
            sums.add(matrix_sums);
            all.push((TernaryPath::Linear(path), matrix));
        }
        for matrix in ExpertMatrix::ALL {
            let experts = self.experts(layer, matrix, sums)?;
            all.push((TernaryPath::Experts(matrix.path(layer)), experts));
        }
        self.ternary_bytes += all.iter().map(|(_, packed)| packed.layout.bytes()).sum::<usize>();
        Ok(all)
    }

    fn experts(&self, layer: usize, matrix: ExpertMatrix, sums: &mut LayerSums) -> Result<PackedTernary, CalibError> {
        let experts = self.checkpoint.config().num_local_experts;
        let shape = matrix.shape(self.checkpoint.config());
        let name = self.checkpoint.expert_tensors(layer, matrix).swap_remove(0);
        let mut matrices = Vec::with_capacity(experts);
        for first in (0..experts).step_by(MATRICES_AT_ONCE) {
            let batch: Result<Vec<_>, CalibError> = (first..(first + MATRICES_AT_ONCE).min(experts))
                .into_par_iter()
                .map(|expert| {
                    let weight = self.checkpoint.expert_rows(layer, matrix, expert)?;
                    self.ternarize(&name, weight, shape)
                })
                .collect();
            for (packed, matrix_sums) in batch? {
                sums.add(matrix_sums);
                matrices.push(packed);
            }
        }
        Ok(PackedTernary::stack(matrices)?)
    }

    /// One matrix, `[in, out]` its shape and `weight` its rows.
    fn ternarize(
        &self,
        name: &str,
        weight: Vec<f32>,
        [in_features, rows]: [usize; 2],
    ) -> Result<(PackedTernary, LayerSums), CalibError> {
        self.checkpoint.expect_finite(name, &weight)?;
        let weight = Tensor::<B, 2>::from_data(TensorData::new(weight, [rows, in_features]), self.device);
        let parts = self.options.method.ternarize(weight.clone(), self.options.ternary.granularity);
        let packed = PackedTernary::pack(
            std::slice::from_ref(&parts),
            self.options.ternary.format,
            self.options.ternary.rotation,
        )?;
        let error = (weight.clone() - parts.to_dense()).square();
        let sums = LayerSums {
            squared_error: sum(error),
            squared_weight: sum(weight.square()),
            zeros: (rows * in_features) as f64 - sum(parts.trits.abs()),
            weights: (rows * in_features) as f64,
        };
        (self.progress)(rows * in_features);
        Ok((packed, sums))
    }

    /// The tensors of a layer, or of no layer, that stay as they are.
    fn copied<'b>(&mut self, layer: Option<usize>) -> Result<Vec<(String, OutputTensor<'b>)>, CalibError>
    where
        'a: 'b,
    {
        let replaced: Vec<String> = layer.map_or(Vec::new(), |layer| {
            let linears = LinearName::ALL.iter().map(|linear| format!("{}.weight", linear.path(layer)));
            let experts = ExpertMatrix::ALL.iter().flat_map(|m| self.checkpoint.expert_tensors(layer, *m));
            linears.chain(experts).collect()
        });
        let checkpoint: &'b Checkpoint = self.checkpoint;
        let mut tensors = Vec::new();
        for (name, entry) in checkpoint.tensors() {
            if layer_of(name, checkpoint) != layer || replaced.iter().any(|other| other == name) {
                continue;
            }
            self.copied_bytes += entry.bytes();
            checkpoint.expect_finite_stored(name)?;
            tensors.push((name.to_string(), OutputTensor::copied(checkpoint, name)?));
        }
        Ok(tensors)
    }
}

/// The layer a tensor belongs to, if the model has it.
fn layer_of(name: &str, checkpoint: &Checkpoint) -> Option<usize> {
    let number = name.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()?;
    (number < checkpoint.config().num_hidden_layers()).then_some(number)
}

/// In double precision and a fixed order, so that the report does not depend on the thread count.
fn sum<B: Backend>(values: Tensor<B, 2>) -> f64 {
    values.sum_dim(1).into_data().iter::<f32>().map(f64::from).sum()
}
