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
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic))]

#[cfg(target_endian = "big")]
compile_error!("packed weights are little-endian words and are used in place: big-endian targets are not supported");

#[cfg(feature = "autodiff")]
mod autodiff;
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

pub use format::{BLOCK, CodeFormat, FormatError, Rotation, TernaryLayout, TernaryWeight};
pub use mapped::{MappedError, MappedFile};
pub use ops::{
    AttentionSpec, BiasedWeight, ClampedSwiGlu, KvFormat, LayerCache, ScoreView, Screen, StoredFloat, StoredMatrix,
    TernaryBackend, TernaryExperts, cached_attention, largest, norm_linears, rms_norm, round_activations, route,
    screen, screen_bounds, sink_attention, stored_linear, stored_linear_at, stored_rows, ternary_experts,
    ternary_linear, ternary_linears, ternary_rows, time_in_operations,
};
#[cfg(any(feature = "flex", feature = "ndarray"))]
pub use register::switch_kernels_off;
