//! Absmax 8-bit quantization of activations, one scale a token.

use burn::tensor::{Tensor, backend::Backend};
use ternoss_backends::reference::magnitude;

/// The largest magnitude of an activation's 8-bit code.
pub const MAX_CODE: f32 = 127.0;

/// Rounds every token (the last dimension of `x`, any shape) to 8 bits and back, with a straight-through gradient.
///
/// `s = max|x| / 127`, `q = clamp(round(x / s), -127, 127)` with ties to even, result `q * s`; a token of zeros stays
/// zero. The gradient of the result with respect to `x` is the identity (BitNet b1.58, arXiv 2402.17764, section 2).
pub fn fake_quantize<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    let frozen = x.clone().detach();
    let scale = magnitude(frozen.clone()).max_dim(D - 1) / MAX_CODE;
    let divisor = scale.clone().mask_fill(scale.clone().equal_elem(0.0), 1.0);
    let code = (frozen.clone() / divisor).round().clamp(-MAX_CODE, MAX_CODE);
    straight_through(x, frozen, code * scale)
}

/// `value` in the forward pass, the identity in the backward pass.
///
/// `latent - frozen` is exactly zero for finite numbers, so `value` passes unchanged to the last bit.
pub(crate) fn straight_through<B: Backend, const D: usize>(
    latent: Tensor<B, D>,
    frozen: Tensor<B, D>,
    value: Tensor<B, D>,
) -> Tensor<B, D> {
    value + (latent - frozen)
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::{backend::Autodiff, tensor::TensorData};
    type B = burn_flex::Flex;

    #[test]
    fn rounds_half_to_even_and_keeps_zero_tokens() {
        let x = Tensor::<B, 2>::from_data([[127.0f32, 0.5, 1.5, -2.5], [0.0, 0.0, 0.0, 0.0]], &Default::default());
        fake_quantize(x)
            .into_data()
            .assert_eq(&TensorData::from([[127.0f32, 0.0, 2.0, -2.0], [0.0, 0.0, 0.0, 0.0]]), true);
    }

    #[test]
    fn gradient_is_the_identity() {
        let device = Default::default();
        let x = Tensor::<Autodiff<B>, 2>::from_data([[0.3f32, -1.0, 0.77]], &device).require_grad();
        let weight = Tensor::from_data([[2.0f32, 3.0, 5.0]], &device);
        let grads = (fake_quantize(x.clone()) * weight).sum().backward();
        x.grad(&grads).unwrap().into_data().assert_eq(&TensorData::from([[2.0f32, 3.0, 5.0]]), true);
    }
}
