//! What a quantization did, as `calibration_report.json`.

use serde::{Deserialize, Serialize};
use ternoss_quant::TernaryConfig;

use crate::Method;

/// Name of the report in the ternary folder.
pub(crate) const REPORT_FILE: &str = "calibration_report.json";

/// Sizes and errors of a finished quantization.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Quantization method.
    pub method: Method,
    /// Granularity of the scales and packing of the trits.
    pub ternary: TernaryConfig,
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

/// What became of one layer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LayerReport {
    /// Sum of squared weight errors over the sum of squared weights, all ternary matrices of the layer together.
    pub relative_squared_error: f64,
    /// Share of trits that are zero.
    pub zeros: f64,
}

/// Running sums from which a [`LayerReport`] is made.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct LayerSums {
    pub(crate) squared_error: f64,
    pub(crate) squared_weight: f64,
    pub(crate) zeros: f64,
    pub(crate) weights: f64,
}

impl LayerSums {
    pub(crate) fn add(&mut self, other: Self) {
        self.squared_error += other.squared_error;
        self.squared_weight += other.squared_weight;
        self.zeros += other.zeros;
        self.weights += other.weights;
    }

    pub(crate) fn report(self) -> LayerReport {
        LayerReport {
            relative_squared_error: self.squared_error / self.squared_weight.max(f64::MIN_POSITIVE),
            zeros: self.zeros / self.weights.max(1.0),
        }
    }
}
