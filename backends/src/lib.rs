//! Packed ternary weights and the kernels that multiply with them, as an extension of Burn backends.
//!
//! - [`mod@format`] says what a packed row is: two codes for trits, scales by row and by group, and the layout of a tensor.
//! - [`ops`] holds the operations: [`ternary_linear`], [`ternary_experts`], [`ternary_rows`], [`stored_linear`],
//!   [`stored_rows`], [`screen_bounds`] and [`sink_attention`], and the trait [`TernaryBackend`] that a backend implements to run them.
//! - [`mod@reference`] computes each of them with Burn's own operations, on any backend. Every kernel is tested against it.
//! - [`cpu`] holds the kernels for processors, free of Burn: scalar, AVX2, AVX-VNNI, AVX-512 and NEON, chosen at run time.
//! - [`mapped`] maps model files into memory, so that weights are used where they lie on disk.
//!
//! A backend is registered by a feature: `flex` and `ndarray` share the CPU kernels; `autodiff` adds gradients to
//! whatever it wraps. Results do not depend on the number of threads, on the instruction set, or on what else is in a
//! batch: see the notes of each operation.
//!
//! ```
//! use burn::tensor::{Int, Tensor, TensorData};
//! use ternoss_backends::{CodeFormat, TernaryLayout, TernaryWeight, ternary_linear};
//! type B = burn_flex::Flex;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // One matrix of two rows of three weights, packed, with a scale a row.
//! let format = CodeFormat::T2;
//! let layout = TernaryLayout { format, matrices: 1, planes: 1, rows: 2, in_features: 3, group_size: None, rotation: None };
//! let words = layout.words_per_row();
//! let mut codes = vec![0; 2 * words];
//! for (trits, row) in [[1, 0, -1], [1, 1, 1]].iter().zip(codes.chunks_mut(words)) {
//!     format.pack_row(trits, row);
//! }
//! let device = Default::default();
//! let codes = Tensor::<B, 4, Int>::from_data(TensorData::new(codes, [1, 1, 2, words]), (&device, burn::tensor::DType::U32));
//! let scales = Tensor::from_data([[[0.5, 2.0]]], &device);
//! let weight = TernaryWeight::new(codes, scales, None, layout)?;
//! let y = ternary_linear(Tensor::<B, 2>::from_data([[127.0, 1.0, 2.0]], &device), &weight, 0);
//! assert_eq!(y.into_data().into_vec::<f32>()?, [62.5, 260.0]);
//! # Ok(()) }
//! ```
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic))]

#[cfg(target_endian = "big")]
compile_error!("packed weights are little-endian words and are used in place: big-endian targets are not supported");

#[cfg(feature = "autodiff")]
mod autodiff;
mod bandwidth;
pub mod cpu;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub mod cube;
#[cfg(feature = "flex")]
mod flex;
pub mod format;
#[cfg(any(feature = "flex", feature = "ndarray"))]
mod host;
pub mod mapped;
#[cfg(feature = "ndarray")]
mod ndarray;
pub mod ops;
pub mod reference;
#[cfg(any(feature = "flex", feature = "ndarray"))]
mod register;

pub use bandwidth::read_bandwidth;
pub use format::{BLOCK, CodeFormat, FormatError, Rotation, TernaryLayout, TernaryWeight};
pub use mapped::{MappedError, MappedFile};
pub use ops::{
    AttentionSpec, BiasedWeight, ClampedSwiGlu, ExpertLayer, KvFormat, LayerCache, ScoreView, Screen, StoredFloat,
    StoredMatrix, TernaryBackend, TernaryExperts, cached_attention, clamped_swiglu, closer_bounds, expert_layer,
    largest, linear_onto, norm_linears, rms_norm, round_activations, route, screen, screen_bounds, sink_attention,
    stored_linear, stored_linear_at, stored_rows, ternary_experts, ternary_linear, ternary_linears, ternary_rows,
    time_in_operations, tuned_linear,
};
#[cfg(any(feature = "flex", feature = "ndarray"))]
pub use register::switch_kernels_off;
