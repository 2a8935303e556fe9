//! gpt-oss made ternary after training, and run fast on an ordinary CPU.
//!
//! This crate re-exports the parts under one roof; a Burn app can also depend on the parts alone:
//!
//! | module | crate | what it holds |
//! |---|---|---|
//! | [`backends`] | `ternoss-backends` | packed formats, and the kernels registered per Burn backend |
//! | [`quant`] | `ternoss-quant` | absmean, MXFP4, the `BitLinear` module |
//! | [`model`] | `ternoss-model` | GPT-OSS as Burn modules, checkpoints, tokenizer, generation |
//! | `calib` | `ternoss-calib` | quantization methods and the streaming pipeline |
//!
//! | feature | what it adds |
//! |---|---|
//! | `ndarray`, `flex` | the CPU kernels, registered for that Burn backend |
//! | `wgpu`, `cuda` | the same for GPUs |
//! | `autodiff` | gradients on whatever it wraps |
//! | `tokenizer` | text to tokens and back, and conversations |
//! | `calib` | the module `calib`; implies `autodiff` |
//! | `hub` | the module `hub`: downloads |
//! | `cli` (the default) | all that the `ternoss` program needs: `calib`, `flex`, `hub`, `ndarray`, `tokenizer`, and its own crates |
//!
//! Without any, everything works on any Burn backend by Burn's own operations, once it has an empty
//! [`TernaryBackend`](backends::TernaryBackend) implementation.
//!
//! ```
//! use ternoss::model::{Checkpoint, GptOss, LoadOptions};
//! type B = burn_flex::Flex;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let checkpoint = Checkpoint::open("examples/tiny-gpt-oss".as_ref())?;
//! let model = GptOss::<B>::load(&checkpoint, LoadOptions::default(), &Default::default())?;
//! let ternary = model.to_ternary(&Default::default())?;
//! let logits = ternary.forward(ternary.tokens(&[1, 2, 3])?, &mut ternary.new_cache());
//! assert_eq!(logits.dims(), [3, ternary.config().vocab_size]);
//! # Ok(()) }
//! ```
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic))]

#[cfg(feature = "cli")]
extern crate self as ternoss;

pub use ternoss_backends as backends;
#[cfg(feature = "calib")]
pub use ternoss_calib as calib;
pub use ternoss_model as model;
pub use ternoss_quant as quant;

#[cfg(feature = "hub")]
pub mod hub;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod program;

/// The backend the `ternoss` program computes on unless another is chosen.
#[cfg(feature = "flex")]
pub type Cpu = burn_flex::Flex;

/// The other one for processors.
#[cfg(feature = "ndarray")]
pub type NdArray = burn_ndarray::NdArray;
