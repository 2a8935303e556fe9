//! What a quantization did, as `calibration_report.json`.

use std::{collections::BTreeMap, path::Path};

use serde::{Deserialize, Serialize};
use ternoss_model::{
    Checkpoint,
    checkpoint::Part,
    perplexity::{Agreement, Comparison},
};
use ternoss_quant::{Granularity, TernaryConfig};

use crate::{
    Calibration, KeptExpert, Method, Reduction, Steps,
    size::{layer_weights, parameters},
    step::Done,
    ternarize::Recipe,
};

/// Name of the report in the ternary folder.
pub(crate) const REPORT_FILE: &str = "calibration_report.json";

/// Kinds of matrices, as their names have them before `_proj`, in the order data flows.
pub(crate) const KINDS: [&str; 6] = ["q", "k", "v", "o", "gate_up", "down"];

/// Bytes by what they are spent on; parts without any are left out.
pub type PartBytes = BTreeMap<Part, usize>;

/// Sizes and errors of a finished quantization. Sizes are those of the tensors that were written; a weight file's own
/// header, some kilobytes, is not counted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Quantization method.
    pub method: Method,
    /// Its steps.
    pub steps: Steps,
    /// Granularity of the scales, packing of the trits, rotation.
    pub ternary: TernaryConfig,
    /// Trits a weight is the sum of.
    pub planes: usize,
    /// Tokens of text that were calibrated on.
    pub calibration_tokens: usize,
    /// Tells apart runs with other settings, another text or another model.
    pub run: String,
    /// What distillation did, where it ran.
    pub distillation: Option<Distilled>,
    /// Weights of attention and experts that became ternary.
    pub ternary_weights: usize,
    /// Weights of the whole model, those that stay in full precision included; those of dropped experts are not.
    pub parameters: usize,
    /// Bytes of these weights: their codes, padding of rows to whole words included, and all their scales. Ternary tables are
    /// not among them: see [`Reduction::table_bytes`].
    pub ternary_bytes: usize,
    /// Bytes of what is in full precision: norms, router, biases, sinks; embedding and output layer unless they are ternary.
    pub full_precision_bytes: usize,
    /// All bytes by what they are spent on: `ternary_bytes`, `full_precision_bytes` and the bytes of ternary tables, taken
    /// apart.
    pub parts: PartBytes,
    /// `8 * ternary_bytes / ternary_weights`
    pub bits_per_weight: f64,
    /// `8 * bytes / parameters`, with all bytes.
    pub bits_per_parameter: f64,
    /// How the text spread over the experts; `None` without calibration.
    pub expert_loads: Option<ExpertLoads>,
    /// How the ternary model does on a text that nothing was fitted to; `None` where that was not measured.
    pub held_out: Option<HeldOut>,
    /// What was given up for size beside that, if anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reduction: Option<Reduction>,
    /// One entry a layer, in order.
    pub layers: Vec<LayerReport>,
}

/// How the calibration text spread over the experts of all layers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExpertLoads {
    /// Experts of all layers.
    pub experts: usize,
    /// An expert with fewer tokens than this saw too few ([`Calibration::expert_tokens_wanted`]).
    pub tokens_wanted: usize,
    /// Share of the experts that saw too few, from 0 to 1.
    pub too_few: f64,
    /// Share of the experts that saw none at all.
    pub none: f64,
}

/// Both models on a text that no step was fitted to.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct HeldOut {
    /// Tokens of that text.
    pub tokens: usize,
    /// Perplexity of the full-precision model: the exponential of its mean cross-entropy.
    pub teacher_perplexity: f64,
    /// Perplexity of the ternary model.
    pub perplexity: f64,
    /// Mean over tokens of `KL(p || q)` in nats, `p` the full-precision model's prediction and `q` the ternary one's.
    pub kl_divergence: f64,
    /// Share of the tokens, from 0 to 1, for which both models find the same next token likeliest.
    pub top_1: f64,
}

impl Report {
    /// The report in a ternary folder, if there is one.
    pub fn read(folder: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(folder.join(REPORT_FILE)).ok()?).ok()
    }

    pub(crate) fn new(
        checkpoint: &Checkpoint,
        recipe: &Recipe,
        target_size: Option<u64>,
        calibration: Option<&Calibration>,
        mut done: Vec<Done>,
    ) -> Self {
        let ternary_weights = checkpoint.config().num_hidden_layers() * layer_weights(checkpoint, recipe.keep_experts);
        let parameters = parameters(checkpoint, recipe.keep_experts);
        let ternary_bytes: usize = done.iter().map(|step| step.ternary_bytes).sum();
        let full_precision_bytes: usize = done.iter().map(|step| step.full_precision_bytes).sum();
        let parts = done.iter().flat_map(|step| &step.parts).fold(PartBytes::new(), |mut parts, (part, bytes)| {
            *parts.entry(*part).or_default() += bytes;
            parts
        });
        let tokens = calibration.map_or(0, Calibration::tokens);
        let reduction = Reduction::of(checkpoint, recipe, target_size, tokens, &mut done);
        let layers: Vec<LayerReport> = done.into_iter().filter_map(|step| step.layer).collect();
        let mut report = Self {
            method: recipe.method,
            steps: recipe.steps,
            ternary: recipe.ternary,
            planes: recipe.planes,
            calibration_tokens: if recipe.steps.look_at_text() { tokens } else { 0 },
            run: String::new(),
            distillation: None,
            ternary_weights,
            parameters,
            ternary_bytes,
            full_precision_bytes,
            parts,
            bits_per_weight: 8.0 * ternary_bytes as f64 / ternary_weights as f64,
            bits_per_parameter: 0.0,
            expert_loads: ExpertLoads::of(&layers, Calibration::expert_tokens_wanted(checkpoint.config())),
            held_out: None,
            reduction,
            layers,
        };
        report.bits_per_parameter = 8.0 * report.bytes() as f64 / parameters as f64;
        report
    }

    /// Takes over the bytes that were written in the end.
    pub(crate) fn set_parts(&mut self, parts: PartBytes) {
        self.full_precision_bytes = parts.values().sum::<usize>() - self.ternary_bytes - self.table_bytes();
        self.bits_per_parameter = 8.0 * self.bytes() as f64 / self.parameters as f64;
        self.parts = parts;
    }

    /// Bytes of all weights.
    pub fn bytes(&self) -> usize {
        self.ternary_bytes + self.full_precision_bytes + self.table_bytes()
    }

    /// Bytes of ternary tables.
    fn table_bytes(&self) -> usize {
        self.reduction.as_ref().map_or(0, |reduction| reduction.table_bytes)
    }

    /// The mean of all matrices' relative errors.
    pub fn mean_relative_error(&self) -> f64 {
        let errors = self.layers.iter().flat_map(|layer| &layer.matrices).map(|matrix| matrix.relative_error);
        mean(errors).unwrap_or(0.0)
    }

    /// What was made, in words: `ternoss, 1 plane, t2, a scale for 64 inputs, inputs rotated`.
    pub(crate) fn recipe(&self) -> String {
        let planes = if self.planes == 1 { "plane" } else { "planes" };
        let scales = match self.ternary.granularity {
            Granularity::Tensor => "a scale for a matrix".into(),
            Granularity::Row => "a scale for a row".into(),
            Granularity::Group(size) => format!("a scale for {size} inputs"),
        };
        let rotated = if self.ternary.rotation.is_some() { ", inputs rotated" } else { "" };
        format!("{}, {} {planes}, {}, {scales}{rotated}", self.method, self.planes, self.ternary.format)
    }

    /// What the relative errors are errors of.
    pub(crate) fn error_of(&self) -> &'static str {
        if self.calibration_tokens > 0 { "outputs" } else { "weights" }
    }
}

impl ExpertLoads {
    /// `None` if no layer counted tokens.
    pub(crate) fn of(layers: &[LayerReport], tokens_wanted: usize) -> Option<Self> {
        let loads = || layers.iter().flat_map(|layer| &layer.expert_tokens);
        let experts = loads().count();
        let share = |below: usize| loads().filter(|tokens| **tokens < below).count() as f64 / experts as f64;
        (experts > 0).then(|| Self { experts, tokens_wanted, too_few: share(tokens_wanted), none: share(1) })
    }
}

/// What distillation did.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Distilled {
    /// Steps taken.
    pub steps: usize,
    /// Whether the result was kept: only where it lowers the divergence on text that was held out.
    pub kept: bool,
    /// The models before it.
    pub before: HeldOut,
}

impl HeldOut {
    pub(crate) fn new(sum: &Comparison, tokens: usize) -> Self {
        let [perplexity, teacher_perplexity] = sum.perplexities();
        let Agreement { kl_divergence, top_1 } = sum.agreement();
        Self { tokens, teacher_perplexity, perplexity, kl_divergence, top_1 }
    }
}

/// What became of one layer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LayerReport {
    /// Its matrices in the order in which they were made ternary.
    pub matrices: Vec<MatrixReport>,
    /// Calibration tokens that the full-precision router sent to each expert, among those that stay; empty without
    /// calibration.
    pub expert_tokens: Vec<usize>,
    /// The experts that stayed, in order, where some were dropped.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kept: Vec<KeptExpert>,
    /// What block reconstruction did, where it ran.
    pub reconstruction: Option<Reconstruction>,
}

/// What block reconstruction did to a layer. Errors are squared, of the layer's output on text that was held out, over the
/// square of what the full-precision layer adds to its input.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reconstruction {
    /// Error before it.
    pub before: f64,
    /// Error after it.
    pub after: f64,
    /// Whether the result was kept: only where the error fell.
    pub kept: bool,
}

impl LayerReport {
    /// The mean relative error of its matrices of a kind: one matrix of the attention, or one of each expert.
    pub(crate) fn relative_error(&self, kind: &str) -> Option<f64> {
        let is_kind = |part: &str| part.strip_suffix("_proj") == Some(kind);
        let of_kind = self.matrices.iter().filter(|matrix| matrix.name.split('.').any(is_kind));
        mean(of_kind.map(|matrix| matrix.relative_error))
    }
}

/// What became of one matrix.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MatrixReport {
    /// Its path in the model, with the number that the expert has in the full-precision model.
    pub name: String,
    /// Squared error of its outputs over their square, on the calibration text, about the means where a bias makes up for those; of
    /// its weights where there was no text.
    pub relative_error: f64,
    /// Trits a weight of it is the sum of.
    pub planes: usize,
    /// Share of trits that are zero.
    pub zeros: f64,
    /// Calibration tokens it saw.
    pub tokens: usize,
}

/// Bytes of tensors, given by name, by what they are spent on.
pub(crate) fn bytes_by_part<'a>(tensors: impl Iterator<Item = (&'a str, usize)>) -> PartBytes {
    let mut parts = PartBytes::new();
    for (name, bytes) in tensors {
        *parts.entry(Part::of(name)).or_default() += bytes;
    }
    parts
}

pub(crate) fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (count, sum) = values.fold((0usize, 0.0), |(count, sum), value| (count + 1, sum + value));
    (count > 0).then(|| sum / count as f64)
}
