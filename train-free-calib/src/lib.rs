//! Post-training ternarization of gpt-oss without fine-tuning.
//!
//! [`quantize`] streams a checkpoint through a [`Method`], one layer in memory at a time, and writes a ternary model
//! folder with a [`Report`]. A method is a list of [`Steps`], in the order of the files here:
//!
//! | file | step |
//! |---|---|
//! | `calibration` | the text |
//! | `traces` | text that the model writes itself |
//! | `moments` | statistics of every linear's inputs, the target for the student's inputs |
//! | `levels` | thresholds and scales of a group of weights (stage 1) |
//! | `compensate` | ternary GPTQ |
//! | `refine` | scales in closed form, greedy changes of single trits (stage 2) |
//! | `ternarize` | all of them on one matrix |
//! | `activations` | both models' residual streams |
//! | `rows` | what is kept for every token, in memory or on disk |
//! | `snapshot` | files that a killed run goes on from |
//! | `visits` | which tokens go to which expert |
//! | `prune` | which experts stay, where only some may |
//! | `tables` | embedding and output layer made ternary |
//! | `layer`, `experts` | one layer: attention, then experts, the full-precision model beside the ternary one |
//! | `step` | one weight file: a layer, with or without a text |
//! | `size` | how large the folder becomes, and what to give up so that it fits |
//! | `reconstruct`, `adam`, `tuned`, `hard` | a layer tuned by gradients on its own output, and packed again |
//! | `distill`, `distilled` | the whole model tuned on the full-precision model's predictions |
//! | `pipeline` | all of them |
//! | `folder` | what stands beside the weights |
//! | `finite` | the check after each layer |
//! | `report`, `summary`, `picture` | what was done: as JSON, as text, as an SVG ([`canvas`]) |
//!
//! ```
//! use ternoss_calib::{Method, QuantizeOptions, quantize};
//! use ternoss_model::Checkpoint;
//! type B = burn_flex::Flex;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let output = std::env::temp_dir().join(format!("ternoss-quantized-{}", std::process::id()));
//! let checkpoint = Checkpoint::open("../examples/tiny-gpt-oss".as_ref())?;
//! let options = QuantizeOptions::new(Method::Absmean);
//! let report = quantize::<B>(&checkpoint, &output, &options, None, &Default::default(), &|_| ())?;
//! assert!(report.bits_per_weight < 2.5);
//! # std::fs::remove_dir_all(output)?;
//! # Ok(()) }
//! ```
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic))]

mod activations;
mod adam;
mod budget;
mod calibration;
pub mod canvas;
mod compensate;
mod distill;
mod distilled;
mod error;
mod experts;
mod finite;
mod folder;
mod hard;
mod layer;
mod levels;
mod linalg;
mod method;
mod moments;
mod picture;
mod pipeline;
mod prune;
mod reconstruct;
mod refine;
mod regression;
mod report;
mod rows;
mod size;
mod snapshot;
mod solution;
mod step;
mod summary;
mod tables;
mod ternarize;
mod traces;
mod tuned;
mod visits;

pub use calibration::{Calibration, Shortage};
pub use distill::WINDOWS_PER_STEP;
pub use error::CalibError;
pub use finite::Side;
pub use levels::MAX_PLANES;
pub use method::{Method, Steps};
pub use pipeline::{ACTIVATION_MEMORY, DISTILLATION_RATE, Progress, QuantizeOptions, check, quantize, ternary_weights};
pub use prune::KeptExpert;
pub use report::{Distilled, ExpertLoads, HeldOut, LayerReport, MatrixReport, PartBytes, Reconstruction, Report};
pub use size::Reduction;
pub use traces::{TraceOptions, Traces};
