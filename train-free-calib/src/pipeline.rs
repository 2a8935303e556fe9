//! The streaming pipeline: checkpoint in, ternary folder out.

use std::path::Path;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::json;
use ternoss_backends::{FormatError, Rotation, TernaryBackend, TernaryLayout};
use ternoss_model::{
    Checkpoint, CheckpointError,
    checkpoint::{CONFIG_FILE, ExpertMatrix, FolderWriter, LinearName, OutputTensor, TernaryPath},
    config::{FORMAT_VERSION, Quantization, TERNOSS, TernaryQuantization},
};
use ternoss_quant::{PackedTernary, TernaryConfig};

use crate::{
    Calibration, Method, Report, Steps,
    layer::{Activations, ChangedBias, LayerCalibration, TernaryLayer},
    levels::MAX_PLANES,
    report::{LayerReport, MatrixReport, REPORT_FILE},
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
    /// Trits a weight is the sum of: 1 to 3, 1 for absmean.
    pub planes: usize,
    /// Whether an existing output may be replaced.
    pub overwrite: bool,
}

impl QuantizeOptions {
    /// A method with all its steps, one plane.
    pub fn new(method: Method) -> Self {
        Self { method, steps: method.steps(), ternary: TernaryConfig::default(), planes: 1, overwrite: false }
    }
}

/// The rotation of every model this crate rotates.
const ROTATION: Rotation = Rotation { seed: 0 };

/// A quantization that cannot be done.
#[derive(Debug, thiserror::Error)]
pub enum CalibError {
    /// Reading the model or writing the result failed.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The options do not describe a valid layout.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The method needs a text and none was given.
    #[error("method {method} needs a calibration text")]
    NoText {
        /// The method.
        method: Method,
    },
    /// The calibration text does not fill a window.
    #[error("the calibration text has {tokens} tokens, at least one window of {context} is needed")]
    ShortText {
        /// Tokens of the text.
        tokens: usize,
        /// Tokens a window.
        context: usize,
    },
    /// The calibration text holds a token that the model does not have.
    #[error("token {token} of the calibration text is outside the vocabulary of {vocab_size}")]
    Token {
        /// The token.
        token: u32,
        /// Tokens the model has.
        vocab_size: usize,
    },
    /// A number of planes that the method cannot do.
    #[error("{planes} planes: {method} makes 1 to {most}")]
    Planes {
        /// The number asked for.
        planes: usize,
        /// The method.
        method: Method,
        /// The most it can make.
        most: usize,
    },
    /// The output would take the place of the input.
    #[error("{folder} is the model's own folder, or holds it")]
    OutputIsInput {
        /// The folder.
        folder: String,
    },
    /// What an interrupted run left to go on from is damaged.
    #[error("{name} in the unfinished output is damaged: remove the folder to start anew")]
    Activations {
        /// The file.
        name: String,
    },
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
/// became ternary since its last call. Methods that look at a text need `calibration`.
///
/// Peak memory without a text is one layer's packed weights and four expert matrices in f32 with their temporaries:
/// 0.8 GB for gpt-oss-20b. With a text it is a layer's packed weights, some matrices in f32, and the activations of
/// the text twice. Every tensor is scanned for NaN and infinity. The output is whole or not there (see [`FolderWriter`]).
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
    let folder = || checkpoint.folder().display().to_string();
    if matches!(checkpoint.config().quantization, Quantization::Ternary(_)) {
        return Err(CalibError::AlreadyTernary { folder: folder() });
    }
    if let (Ok(model), Ok(target)) = (checkpoint.folder().canonicalize(), output.canonicalize())
        && model.starts_with(target)
    {
        return Err(CalibError::OutputIsInput { folder: output.display().to_string() });
    }
    let recipe = recipe(options)?;
    let layers = checkpoint.config().num_hidden_layers();
    let weights = ternary_weights(checkpoint);
    let job = Job::<B> { checkpoint, recipe, device, progress };
    job.check_layout()?;
    let calibration = calibration.filter(|_| recipe.steps.look_at_text());
    let mut activations = match calibration {
        Some(calibration) => Some(Activations::<B>::embed(checkpoint, calibration, device)?),
        None if recipe.steps.look_at_text() => return Err(CalibError::NoText { method: options.method }),
        None => None,
    };
    let mut config = read_config(checkpoint)?;
    let settings = json!({
        "method": recipe.method,
        "steps": recipe.steps,
        "scales and packing": recipe.ternary,
        "planes": recipe.planes,
        "calibration text": calibration.map(Calibration::fingerprint),
        "model": checkpoint.stamp(),
    });
    let (mut writer, notes) = FolderWriter::resume(output, layers + 1, options.overwrite, &settings)?;
    let mut done: Vec<Done> = notes.into_iter().map_while(|note| serde_json::from_value(note).ok()).collect();
    if let (Some(activations), 2..) = (&mut activations, done.len()) {
        let name = activations_file(done.len() - 1);
        if !activations.set_bytes(&writer.read(&name)?) {
            return Err(CalibError::Activations { name });
        }
    }
    progress(weights / layers * done.len().saturating_sub(1));
    for step in done.len()..=layers {
        let finished = job.step(step, activations.as_mut(), &mut writer)?;
        writer.commit(step, &json!(finished))?;
        writer.remove(&activations_file(step.saturating_sub(1)));
        done.push(finished);
    }
    writer.remove(&activations_file(layers));
    let ternary_bytes = done.iter().map(|step| step.ternary_bytes).sum();
    let report = Report {
        method: options.method,
        steps: recipe.steps,
        ternary: recipe.ternary,
        planes: recipe.planes,
        calibration_tokens: activations.as_ref().map_or(0, Activations::tokens),
        ternary_weights: weights,
        ternary_bytes,
        full_precision_bytes: done.iter().map(|step| step.full_precision_bytes).sum(),
        bits_per_weight: 8.0 * ternary_bytes as f64 / weights as f64,
        layers: done.into_iter().filter_map(|step| step.layer).collect(),
    };
    for name in COMPANIONS {
        writer.copy(checkpoint.folder(), name)?;
    }
    writer.file(REPORT_FILE, format!("{:#}\n", json!(report)).as_bytes())?;
    config["quantization_config"] = json!(TernaryQuantization {
        quant_method: TERNOSS.into(),
        version: FORMAT_VERSION,
        method: options.method.to_string(),
        format: recipe.ternary.format,
        group_size: recipe.ternary.granularity.group_size(),
        rotation: recipe.ternary.rotation,
        planes: recipe.planes,
        activation_bits: 8,
        bits_per_weight: report.bits_per_weight,
    });
    writer.finish(&config)?;
    Ok(report)
}

/// What the options come down to.
fn recipe(options: &QuantizeOptions) -> Result<Recipe, CalibError> {
    let QuantizeOptions { method, steps, planes, .. } = *options;
    let most = if method == Method::Absmean { 1 } else { MAX_PLANES };
    if !(1..=most).contains(&planes) {
        return Err(CalibError::Planes { planes, method, most });
    }
    let rotation = steps.rotation.then_some(ROTATION);
    Ok(Recipe { method, steps, ternary: TernaryConfig { rotation, ..options.ternary }, planes })
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
struct Job<'a, B: TernaryBackend> {
    checkpoint: &'a Checkpoint,
    recipe: Recipe,
    device: &'a B::Device,
    progress: &'a (dyn Fn(usize) + Sync),
}

/// One weight file that is done.
#[derive(Serialize, Deserialize)]
struct Done {
    ternary_bytes: usize,
    full_precision_bytes: usize,
    /// What became of the layer in it; the first file has none.
    layer: Option<LayerReport>,
}

/// The activations after so many layers.
fn activations_file(layers: usize) -> String {
    format!("activations-{layers:05}.bin")
}

impl<'a, B: TernaryBackend> Job<'a, B> {
    /// Refuses options that no matrix can have, before anything is written.
    fn check_layout(&self) -> Result<(), FormatError> {
        TernaryLayout {
            format: self.recipe.ternary.format,
            matrices: 1,
            planes: self.recipe.planes,
            rows: 1,
            in_features: self.checkpoint.config().hidden_size,
            group_size: self.recipe.ternary.granularity.group_size(),
            rotation: self.recipe.ternary.rotation,
        }
        .validate()
    }

    /// Weight file `step`: what belongs to no layer, then the layers.
    fn step(
        &self,
        step: usize,
        activations: Option<&mut Activations<B>>,
        writer: &mut FolderWriter,
    ) -> Result<Done, CalibError> {
        let number = step.checked_sub(1);
        self.check_finite(number)?;
        let layer = match (number, activations) {
            (None, _) => TernaryLayer::default(),
            (Some(number), None) => self.layer(number)?,
            (Some(number), Some(activations)) => {
                let layer = LayerCalibration::new(self.checkpoint, number, &self.recipe, self.device, self.progress)?;
                let layer = layer.run(activations)?;
                writer.file(&activations_file(step), &activations.to_bytes())?;
                layer
            }
        };
        let mut tensors = self.copied(number, &layer.biases)?;
        for (name, shape, values) in &layer.biases {
            tensors.push((name.clone(), OutputTensor::floats(shape.clone(), values)));
        }
        let full_precision_bytes = tensors.iter().map(|(_, tensor)| tensor.bytes()).sum();
        for (path, matrices) in &layer.matrices {
            tensors.extend(OutputTensor::ternary(path, matrices));
        }
        writer.shard(step, tensors)?;
        let ternary_bytes = layer.matrices.iter().map(|(_, packed)| packed.layout.bytes()).sum();
        Ok(Done { ternary_bytes, full_precision_bytes, layer: number.map(|_| layer.report) })
    }

    /// All ternary matrices of a layer, without looking at a text.
    fn layer(&self, layer: usize) -> Result<TernaryLayer, CalibError> {
        let mut result = TernaryLayer::default();
        for linear in LinearName::ALL {
            let path = linear.path(layer);
            let shape = linear.shape(self.checkpoint.config());
            let name = format!("{path}.weight");
            let weight = self.checkpoint.floats(&name, &[shape[1], shape[0]])?;
            let (matrix, report) = self.ternarize(&name, path.clone(), weight, shape)?;
            result.report.matrices.push(report);
            result.matrices.push((TernaryPath::Linear(path), matrix));
        }
        for matrix in ExpertMatrix::ALL {
            let experts = self.experts(layer, matrix, &mut result.report)?;
            result.matrices.push((TernaryPath::Experts(matrix.path(layer)), experts));
        }
        Ok(result)
    }

    fn experts(
        &self,
        layer: usize,
        matrix: ExpertMatrix,
        report: &mut LayerReport,
    ) -> Result<PackedTernary, CalibError> {
        let experts = self.checkpoint.config().num_local_experts;
        let shape = matrix.shape(self.checkpoint.config());
        let name = self.checkpoint.expert_tensors(layer, matrix).swap_remove(0);
        let mut matrices = Vec::with_capacity(experts);
        for first in (0..experts).step_by(MATRICES_AT_ONCE) {
            let batch: Result<Vec<_>, CalibError> = (first..(first + MATRICES_AT_ONCE).min(experts))
                .into_par_iter()
                .map(|expert| {
                    let weight = self.checkpoint.expert_rows(layer, matrix, expert)?;
                    self.ternarize(&name, format!("{}.{expert}", matrix.path(layer)), weight, shape)
                })
                .collect();
            for (packed, matrix_report) in batch? {
                report.matrices.push(matrix_report);
                matrices.push(packed);
            }
        }
        Ok(PackedTernary::stack(matrices)?)
    }

    /// One matrix, `[in, out]` its shape and `weight` its rows.
    fn ternarize(
        &self,
        tensor: &str,
        name: String,
        weight: Vec<f32>,
        shape: [usize; 2],
    ) -> Result<(PackedTernary, MatrixReport), CalibError> {
        self.checkpoint.expect_finite(tensor, &weight)?;
        let made = self.recipe.ternarize::<B>(weight, shape, None, self.device)?;
        (self.progress)(shape[0] * shape[1]);
        let report = made.report(name, 0);
        Ok((made.packed, report))
    }

    /// The tensors of a layer, or of no layer, that stay as they are; `biases` do not.
    fn copied<'b>(
        &self,
        layer: Option<usize>,
        biases: &[ChangedBias],
    ) -> Result<Vec<(String, OutputTensor<'b>)>, CalibError>
    where
        'a: 'b,
    {
        let checkpoint: &'b Checkpoint = self.checkpoint;
        let mut tensors = Vec::new();
        for name in self.full_precision(layer) {
            if !biases.iter().any(|(changed, ..)| changed == name) {
                tensors.push((name.to_string(), OutputTensor::copied(checkpoint, name)?));
            }
        }
        Ok(tensors)
    }

    /// Refuses NaN and infinity in what does not become ternary; the rest is checked when it does.
    fn check_finite(&self, layer: Option<usize>) -> Result<(), CheckpointError> {
        self.full_precision(layer).iter().try_for_each(|name| self.checkpoint.expect_finite_stored(name))
    }

    /// Names of the tensors of a layer, or of no layer, that do not become ternary.
    fn full_precision(&self, layer: Option<usize>) -> Vec<&'a str> {
        let ternary: Vec<String> = layer.map_or(Vec::new(), |layer| {
            let linears = LinearName::ALL.iter().map(|linear| format!("{}.weight", linear.path(layer)));
            let experts = ExpertMatrix::ALL.iter().flat_map(|m| self.checkpoint.expert_tensors(layer, *m));
            linears.chain(experts).collect()
        });
        let of_layer =
            |name: &&str| layer_of(name, self.checkpoint) == layer && !ternary.iter().any(|other| other == name);
        self.checkpoint.tensors().map(|(name, _)| name).filter(of_layer).collect()
    }
}

/// The layer a tensor belongs to, if the model has it.
fn layer_of(name: &str, checkpoint: &Checkpoint) -> Option<usize> {
    let number = name.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()?;
    (number < checkpoint.config().num_hidden_layers()).then_some(number)
}
