//! Each operation with Burn's own tensor operations: what a backend without kernels runs, and what kernels are tested
//! against. Differentiable wherever the operation is.
//!
//! ```
//! use burn::tensor::Tensor;
//! use ternoss_backends::{reference, rms_norm};
//! type B = burn_flex::Flex;
//!
//! let device = Default::default();
//! let x = Tensor::<B, 2>::from_floats([[3.0, -4.0]], &device);
//! let gamma = Tensor::<B, 1>::ones([2], &device);
//! let difference = rms_norm(x.clone(), gamma.clone(), 0.0) - reference::rms_norm(x, gamma, 0.0);
//! assert!(difference.abs().max().into_scalar() < 1e-6);
//! ```

mod attention;
mod experts;
mod linear;
mod routing;
mod rows;
mod screen;
mod stored;
mod tuned;

pub(crate) use attention::attention_by;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub(crate) use attention::each_alone;
pub use attention::{cached_attention, rotate_heads, sink_attention, sink_softmax, sink_softmax_gradient};
pub use experts::{clamped_swiglu, clamped_swiglu_gradient, ternary_experts};
pub use linear::{
    fake_quantize, magnitude, norm_linears, rotate, rotate_back, round_activations, ternary_linear, ternary_linears,
};
pub use routing::{rms_norm, route};
pub use rows::ternary_rows;
pub use screen::{closer_bounds, screen_bounds};
pub use stored::{stored_linear, stored_linear_at, stored_linear_transposed, stored_rows};
pub use tuned::{scale_gradient, scaled_trits, spread, tuned_linear};
