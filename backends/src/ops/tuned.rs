use burn::tensor::Tensor;

use super::{TernaryBackend, restore, single, timed};
use crate::format::TernaryWeight;

/// [`ternary_linear`](super::ternary_linear) with the trits of the one matrix of `trits` and other scales: floats that are
/// tuned, not yet rounded as the format stores them, `[planes, rows, groups]`, one group where a row has one scale.
///
/// ```text
/// y[t, r] = sum over inputs i of  x[t, i] * sum over planes p of scales[p, r, group of i] * trits[p, r, i]      x as rounded
/// ```
///
/// Gradients go to `x`, for which the rounding counts as the identity, and to the scales.
///
/// # Panics
/// If shapes do not fit each other, or there are several matrices.
#[must_use]
pub fn tuned_linear<B: TernaryBackend>(
    x: Tensor<B, 2>,
    trits: &TernaryWeight<B>,
    scales: Tensor<B, 3>,
) -> Tensor<B, 2> {
    let layout = trits.layout;
    assert!(x.dims()[1] == layout.in_features && layout.matrices == 1, "x of {:?} times {layout:?}", x.dims());
    assert_eq!(scales.dims(), [layout.planes, layout.rows, layout.groups().max(1)], "scales of {layout:?}");
    let dtype = x.dtype();
    restore(timed(|| B::tuned_linear(single(x), trits, single(scales))), dtype)
}
