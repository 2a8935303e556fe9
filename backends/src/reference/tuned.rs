use burn::tensor::{Tensor, backend::Backend};

use crate::{
    format::{TernaryLayout, TernaryWeight},
    ops::TernaryBackend,
};

/// [`tuned_linear`](crate::tuned_linear) by the backend's own product of floats.
#[must_use]
pub fn tuned_linear<B: TernaryBackend>(
    x: Tensor<B, 2>,
    trits: &TernaryWeight<B>,
    scales: Tensor<B, 3>,
) -> Tensor<B, 2> {
    let x = B::round_activations(x, trits.layout.rotation);
    x.matmul(B::scaled_trits(trits, scales).transpose())
}

/// The trits of one matrix with other scales, `[planes, rows, groups]`: the sum over the planes, `[rows, in_features]`.
#[must_use]
pub fn scaled_trits<B: Backend>(trits: &TernaryWeight<B>, scales: Tensor<B, 3>) -> Tensor<B, 2> {
    let TernaryLayout { planes, rows, in_features, group_size, .. } = trits.layout;
    let ([_, _, groups], size) = (scales.dims(), group_size.unwrap_or(in_features));
    let planes = (0..planes).map(|plane| {
        let scales = scales.clone().slice_dim(0, plane..plane + 1).reshape([rows, groups]);
        trits.parts(0, plane).0 * spread(scales, in_features, size)
    });
    planes.reduce(|sum, plane| sum + plane).expect("a validated layout has planes")
}

/// The gradient by the scales of [`scaled_trits`], `[planes, rows, groups]`, from the one by the matrix,
/// `[rows, in_features]`: of each group, the sum of `of_matrix * trits`.
#[must_use]
pub fn scale_gradient<B: Backend>(of_matrix: Tensor<B, 2>, trits: &TernaryWeight<B>) -> Tensor<B, 3> {
    let TernaryLayout { planes, rows, in_features, group_size, .. } = trits.layout;
    let size = group_size.unwrap_or(in_features);
    let planes = (0..planes).map(|plane| {
        let products = of_matrix.clone() * trits.parts(0, plane).0;
        let groups = (0..in_features).step_by(size).map(|first| {
            let group = products.clone().slice([0..rows, first..(first + size).min(in_features)]);
            group.sum_dim(1)
        });
        Tensor::cat(groups.collect(), 1)
    });
    Tensor::stack(planes.collect(), 0)
}

/// Repeats each group's value over its `size` inputs: `[rows, groups]` to `[rows, in_features]`.
#[must_use]
pub fn spread<B: Backend>(values: Tensor<B, 2>, in_features: usize, size: usize) -> Tensor<B, 2> {
    let [rows, groups] = values.dims();
    values
        .unsqueeze_dim::<3>(2)
        .expand([rows, groups, size])
        .reshape([rows, groups * size])
        .slice([0..rows, 0..in_features])
}
