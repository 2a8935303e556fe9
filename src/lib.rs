//! gpt-oss made ternary after training, and run fast on an ordinary CPU.
//!
//! This crate re-exports the parts under one roof; a Burn app can also depend on the parts alone:
//!
//! | module | crate | what it holds |
//! |---|---|---|
//! | [`backends`] | `ternoss-backends` | packed formats, and the kernels registered per Burn backend |
//! | [`quant`] | `ternoss-quant` | absmean, MXFP4, the `BitLinear` module |
//! | [`model`] | `ternoss-model` | GPT-OSS as Burn modules, checkpoints, tokenizer, generation |
//! | [`calib`] | `ternoss-calib` | quantization methods and the streaming pipeline |
//!
//! Features: `flex` and `ndarray` register the CPU kernels for a Burn backend, `wgpu` and `cuda` those for GPUs, `autodiff` adds
//! gradients, `tokenizer` and `hub` add text and downloads, and `cli` (the default) is all that the `ternoss` program needs.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic))]

pub use ternoss_backends as backends;
pub use ternoss_calib as calib;
pub use ternoss_model as model;
pub use ternoss_quant as quant;

#[cfg(feature = "hub")]
pub mod hub;

/// The backend the `ternoss` program computes on unless another is chosen.
#[cfg(feature = "flex")]
pub type Cpu = burn_flex::Flex;

/// The other one for processors.
#[cfg(feature = "ndarray")]
pub type NdArray = burn_ndarray::NdArray;
