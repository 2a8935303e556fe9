//! Post-training ternarization of gpt-oss without fine-tuning.
//!
//! [`quantize`] streams a checkpoint through a [`Method`], one layer in memory at a time, and writes a ternary model
//! folder with a [`Report`]. A method is a list of [`Steps`], in the order of the files here:
//!
//! | file | step |
//! |---|---|
//! | `calibration` | the text |
//! | `moments` | statistics of every linear's inputs, the target for the student's inputs |
//! | `levels` | thresholds and scales of a group of weights (stage 1) |
//! | `compensate` | ternary GPTQ |
//! | `refine` | scales in closed form, greedy changes of single trits (stage 2) |
//! | `ternarize` | all of them on one matrix |
//! | `visits` | which tokens go to which expert |
//! | `prune` | which experts stay, where only some may |
//! | `tables` | embedding and output layer made ternary |
//! | `layer` | one layer: attention, then experts, the full-precision model beside the ternary one |
//! | `step` | one weight file: a layer, with or without a text |
//! | `size` | how large the folder becomes, and what to give up so that it fits |
//! | `pipeline` | all of them, and the folder |
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic))]

mod calibration;
mod compensate;
mod error;
mod layer;
mod levels;
mod linalg;
mod method;
mod moments;
mod pipeline;
mod prune;
mod refine;
mod report;
mod size;
mod solution;
mod step;
mod tables;
mod ternarize;
mod visits;

pub use calibration::Calibration;
pub use error::CalibError;
pub use levels::MAX_PLANES;
pub use method::{Method, Steps};
pub use pipeline::{QuantizeOptions, quantize, ternary_weights};
pub use prune::KeptExpert;
pub use report::{LayerReport, MatrixReport, Report};
pub use size::Reduction;
