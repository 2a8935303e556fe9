use burn::tensor::{DType, Tensor, backend::Backend};

use super::{TernaryBackend, restore, single, timed};
use crate::format::{FormatError, TernaryWeight, check_dtype, check_shape};

/// gpt-oss's gate: `gate = min(gate, limit)`, `up = clamp(up, -limit, limit)`,
/// `out = (up + 1) * gate * sigmoid(alpha * gate)` (gpt-oss model card, section 2.3; `swiglu` in openai/gpt-oss).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClampedSwiGlu {
    /// Steepness of the gate: 1.702 in gpt-oss.
    pub alpha: f32,
    /// Where both halves are clamped: `swiglu_limit` in config.json, 7 in gpt-oss.
    pub limit: f32,
}

/// The gate between an expert's two matrices, as [`ClampedSwiGlu`] says: `gate_up [n, 2 * intermediate]`, gate and up
/// alternating, to `[n, intermediate]`.
///
/// # Panics
/// If the width is odd.
#[must_use]
pub fn clamped_swiglu<B: TernaryBackend>(gate_up: Tensor<B, 2>, activation: ClampedSwiGlu) -> Tensor<B, 2> {
    assert!(gate_up.dims()[1].is_multiple_of(2), "gate and up of {:?}", gate_up.dims());
    let dtype = gate_up.dtype();
    restore(timed(|| B::clamped_swiglu(single(gate_up), activation)), dtype)
}

/// The experts of one layer: two ternary matrices each, with biases, and the gate between them.
#[derive(Debug, Clone)]
pub struct TernaryExperts<B: Backend> {
    /// A matrix an expert, `2 * intermediate` rows of `hidden` inputs: row `2i` is gate `i`, row `2i + 1` is up `i`.
    pub gate_up: TernaryWeight<B>,
    /// `[experts, 2 * intermediate]`, in the same order.
    pub gate_up_bias: Tensor<B, 2>,
    /// A matrix an expert, `hidden` rows of `intermediate` inputs.
    pub down: TernaryWeight<B>,
    /// `[experts, hidden]`.
    pub down_bias: Tensor<B, 2>,
    /// What happens between the two.
    pub activation: ClampedSwiGlu,
}

impl<B: Backend> TernaryExperts<B> {
    /// Puts the parts together.
    ///
    /// # Errors
    /// [`FormatError::Shape`] or [`FormatError::ElementType`] where a part does not fit the others.
    pub fn new(
        gate_up: TernaryWeight<B>,
        gate_up_bias: Tensor<B, 2>,
        down: TernaryWeight<B>,
        down_bias: Tensor<B, 2>,
        activation: ClampedSwiGlu,
    ) -> Result<Self, FormatError> {
        let (upper, lower) = (gate_up.layout, down.layout);
        check_shape("gate_up rows", &[upper.rows], &[2 * lower.in_features])?;
        check_shape("down [experts, rows]", &[lower.matrices, lower.rows], &[upper.matrices, upper.in_features])?;
        check_shape("gate_up_bias", &gate_up_bias.dims(), &[upper.matrices, upper.rows])?;
        check_shape("down_bias", &down_bias.dims(), &[lower.matrices, lower.rows])?;
        check_dtype("gate_up_bias", gate_up_bias.dtype(), DType::F32)?;
        check_dtype("down_bias", down_bias.dtype(), DType::F32)?;
        Ok(Self { gate_up, gate_up_bias, down, down_bias, activation })
    }

    /// How many experts there are.
    #[must_use]
    pub fn experts(&self) -> usize {
        self.gate_up.layout.matrices
    }

    /// Width of the residual stream that goes in and comes out.
    #[must_use]
    pub fn hidden(&self) -> usize {
        self.gate_up.layout.in_features
    }

    /// Width between the two matrices.
    #[must_use]
    pub fn intermediate(&self) -> usize {
        self.down.layout.in_features
    }
}

/// The second half of a layer: a norm, a router and its experts.
#[derive(Debug, Clone)]
pub struct ExpertLayer<B: Backend> {
    /// The norm's factors, `[hidden]`: see [`rms_norm`](crate::rms_norm).
    pub gamma: Tensor<B, 1>,
    /// The norm's epsilon.
    pub epsilon: f64,
    /// `[hidden, experts]`: see [`route`](crate::route).
    pub router: Tensor<B, 2>,
    /// `[experts]`
    pub router_bias: Tensor<B, 1>,
    /// How many experts a token goes to.
    pub experts_per_token: usize,
    /// What they are.
    pub experts: TernaryExperts<B>,
}

/// The residual stream `x [tokens, hidden]` after the second half of a layer: `x` plus [`ternary_experts`], which see the
/// [norm](crate::rms_norm) of `x` and are chosen by [`route`] from it.
///
/// [`ternary_experts`]: crate::ternary_experts
/// [`route`]: crate::route
///
/// # Panics
/// If shapes do not fit each other.
#[must_use]
pub fn expert_layer<B: TernaryBackend>(x: Tensor<B, 2>, layer: &ExpertLayer<B>) -> Tensor<B, 2> {
    let hidden = layer.experts.hidden();
    assert_eq!([x.dims()[1], layer.gamma.dims()[0]], [hidden; 2], "width of x and of the norm");
    let experts = layer.experts.experts();
    assert_eq!(layer.router.dims(), [hidden, experts], "shape of the router");
    assert_eq!(layer.router_bias.dims(), [experts], "one bias an expert");
    assert!(layer.experts_per_token <= experts, "{} of {experts} experts", layer.experts_per_token);
    let dtype = x.dtype();
    restore(timed(|| B::expert_layer(single(x), layer)), dtype)
}

/// [`expert_layer`] by the operations that it consists of.
pub(crate) fn layer_by_parts<B: TernaryBackend>(x: Tensor<B, 2>, layer: &ExpertLayer<B>) -> Tensor<B, 2> {
    let normed = B::rms_norm(x.clone(), layer.gamma.clone(), layer.epsilon);
    let (router, bias) = (layer.router.clone(), layer.router_bias.clone());
    let (chosen, weights) = B::route(normed.clone(), router, bias, layer.experts_per_token);
    x + B::ternary_experts(normed, chosen, weights, &layer.experts)
}
