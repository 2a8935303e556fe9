//! What a quantization did, as `calibration_report.json`.

use std::path::Path;

use serde::{Deserialize, Serialize};
use ternoss_model::perplexity::{Agreement, Comparison};
use ternoss_quant::TernaryConfig;

use crate::{Method, Steps};

/// Name of the report in the ternary folder.
pub(crate) const REPORT_FILE: &str = "calibration_report.json";

/// Sizes and errors of a finished quantization.
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
    /// Both models on text that was not calibrated on, where there was some.
    pub held_out: Option<HeldOut>,
    /// What distillation did, where it ran.
    pub distillation: Option<Distilled>,
    /// Weights that became ternary.
    pub ternary_weights: usize,
    /// Bytes of their codes and scales.
    pub ternary_bytes: usize,
    /// Bytes of everything else: embedding, output layer, norms, router, biases, sinks.
    pub full_precision_bytes: usize,
    /// `8 * ternary_bytes / ternary_weights`
    pub bits_per_weight: f64,
    /// One entry a layer, in order.
    pub layers: Vec<LayerReport>,
}

impl Report {
    /// The report in a ternary folder, if there is one.
    pub fn read(folder: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(folder.join(REPORT_FILE)).ok()?).ok()
    }

    /// The mean of all matrices' relative errors.
    pub fn mean_relative_error(&self) -> f64 {
        let errors: Vec<f64> =
            self.layers.iter().flat_map(|layer| &layer.matrices).map(|matrix| matrix.relative_error).collect();
        errors.iter().sum::<f64>() / errors.len().max(1) as f64
    }
}

/// What the ternary model and the full-precision one predict on text that was not calibrated on.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct HeldOut {
    /// Tokens of that text.
    pub tokens: usize,
    /// Perplexity of the full-precision model.
    pub teacher_perplexity: f64,
    /// Perplexity of the ternary model.
    pub perplexity: f64,
    /// Mean Kullback-Leibler divergence of its predictions from the full-precision model's, in nats.
    pub kl_divergence: f64,
    /// Share of positions at which both find the same token likeliest.
    pub top_1: f64,
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
    /// Calibration tokens that the full-precision router sent to each expert; empty without calibration.
    pub expert_tokens: Vec<usize>,
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

/// What became of one matrix.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MatrixReport {
    /// Its path in the model, with the number of the expert.
    pub name: String,
    /// Squared error of its outputs over their square, on the calibration text; of its weights where there was none.
    pub relative_error: f64,
    /// Share of trits that are zero.
    pub zeros: f64,
    /// Calibration tokens it saw.
    pub tokens: usize,
}
