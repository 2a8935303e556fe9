use burn::tensor::{Int, Tensor, activation::softmax, backend::Backend};

/// [`rms_norm`](crate::rms_norm) with Burn's operations.
#[must_use]
pub fn rms_norm<B: Backend>(x: Tensor<B, 2>, gamma: Tensor<B, 1>, epsilon: f64) -> Tensor<B, 2> {
    let rms = ((x.clone() * x.clone()).mean_dim(1) + epsilon).sqrt();
    x / rms * gamma.unsqueeze()
}

/// [`route`](crate::route) with Burn's operations.
#[must_use]
pub fn route<B: Backend>(
    x: Tensor<B, 2>,
    weight: Tensor<B, 2>,
    bias: Tensor<B, 1>,
    k: usize,
) -> (Tensor<B, 2, Int>, Tensor<B, 2>) {
    let scores = x.matmul(weight) + bias.unsqueeze();
    let (values, chosen) = scores.sort_descending_with_indices(1);
    (chosen.slice_dim(1, 0..k), softmax(values.slice_dim(1, 0..k), 1))
}
