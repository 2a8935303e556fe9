//! What a quantization did, as `calibration_report.json`.

use serde::{Deserialize, Serialize};
use ternoss_quant::TernaryConfig;

use crate::{KeptExpert, Method, Reduction, Steps};

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
    /// Weights that became ternary.
    pub ternary_weights: usize,
    /// Bytes of their codes and scales.
    pub ternary_bytes: usize,
    /// Bytes of what is in full precision: norms, router, biases, sinks; embedding and output layer unless they are ternary.
    pub full_precision_bytes: usize,
    /// `8 * ternary_bytes / ternary_weights`
    pub bits_per_weight: f64,
    /// What was given up for size beside that, if anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reduction: Option<Reduction>,
    /// One entry a layer, in order.
    pub layers: Vec<LayerReport>,
}

impl Report {
    /// The mean of all matrices' relative errors.
    pub fn mean_relative_error(&self) -> f64 {
        let errors: Vec<f64> =
            self.layers.iter().flat_map(|layer| &layer.matrices).map(|matrix| matrix.relative_error).collect();
        errors.iter().sum::<f64>() / errors.len().max(1) as f64
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
}

/// What became of one matrix.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MatrixReport {
    /// Its path in the model, with the number that the expert has in the full-precision model.
    pub name: String,
    /// Squared error of its outputs over their square, on the calibration text; of its weights where there was none.
    pub relative_error: f64,
    /// Share of trits that are zero.
    pub zeros: f64,
    /// Calibration tokens it saw.
    pub tokens: usize,
}
