//! What a quantization did, as `calibration_report.json`.

use serde::{Deserialize, Serialize};
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
    /// Calibration tokens that the full-precision router sent to each expert; empty without calibration.
    pub expert_tokens: Vec<usize>,
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
