//! Post-training ternarization of gpt-oss without fine-tuning.
//!
//! [`quantize`] streams a checkpoint through a [`Method`], one matrix in memory at a time, and writes a ternary model
//! folder with a [`Report`]. The steps of a method are functions from weights to weights; the pipeline knows files and
//! order, the steps know arithmetic.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic))]

mod method;
mod pipeline;
mod report;

pub use method::Method;
pub use pipeline::{CalibError, QuantizeOptions, quantize, ternary_weights};
pub use report::{LayerReport, Report};
