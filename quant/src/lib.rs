//! Ternary quantization as Burn building blocks.
//!
//! | module | what it holds |
//! |---|---|
//! | [`mod@absmean`] | weights to trits and scales: `a = mean|W|`, `t = clip(round(W/a), -1, 1)` |
//! | [`ternary_tensor`] | packed trits and scales as a Burn module |
//! | [`bit_linear`] | [`BitLinear`]: a linear layer whose weight is latent (trainable) or packed |
//! | [`linear`] | [`Linear`]: a linear layer that is dense or ternary |
//! | [`mxfp4`] | decoding of the 4-bit blocks gpt-oss is published in |
//!
//! Everything is generic over Burn's `Backend`; the packed forward passes ask for
//! [`TernaryBackend`](ternoss_backends::TernaryBackend), which has a plain-Burn fallback for any backend.
//!
//! ```
//! use burn::{nn::LinearConfig, tensor::{Distribution, Tensor}};
//! use ternoss_quant::{BitLinear, TernaryConfig};
//! type B = burn_flex::Flex;
//!
//! let device = Default::default();
//! let dense = LinearConfig::new(128, 32).init::<B>(&device);
//! let latent = BitLinear::from_linear(&dense, &TernaryConfig::default());
//! let packed = latent.clone().pack().unwrap();
//! let x = Tensor::<B, 2>::random([4, 128], Distribution::Default, &device);
//! let difference = (latent.forward(x.clone()) - packed.forward(x)).abs().max().into_scalar();
//! assert!(difference < 1e-4);
//! ```
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic))]

pub mod absmean;
pub mod bit_linear;
pub mod linear;
pub mod mxfp4;
pub mod ternary_tensor;

pub use absmean::{Granularity, TernaryParts, absmean};
pub use bit_linear::{BitLinear, BitLinearConfig, BitWeight, LatentWeight, TunedWeight};
pub use linear::Linear;
pub use ternary_tensor::{PackedTernary, TernaryConfig, TernaryTensor};
