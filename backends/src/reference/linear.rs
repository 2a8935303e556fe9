use burn::tensor::{DType, Tensor, TensorData, backend::Backend};

use crate::{
    format::{BLOCK, Rotation, TernaryWeight},
    ops::{BiasedWeight, TernaryBackend},
};

/// Largest int8 activation.
const QMAX: f32 = 127.0;

/// [`ternary_linear`](crate::ternary_linear) with Burn's operations, the integers exact on every backend whose `F32`
/// products of small integers are: a sum of `65,536 * 127` stays below 2^24, so no partial sum is ever rounded.
///
/// Where gradients are on, the value is the same and the gradient is that of the dense product with the rounded
/// activations, the rounding itself counting as the identity.
#[must_use]
pub fn ternary_linear<B: Backend>(x: Tensor<B, 2>, weight: &TernaryWeight<B>, matrix: usize) -> Tensor<B, 2> {
    let x = match weight.layout.rotation {
        Some(rotation) => rotate(x, rotation),
        None => x,
    };
    let (levels, scale) = quantize(x.clone().detach());
    let mut value: Option<Tensor<B, 2>> = None;
    for plane in 0..weight.layout.planes {
        let total = plane_totals(&levels, weight, matrix, plane);
        let row_scale = weight.row_scale_column(matrix, plane).detach().transpose();
        let y = total * (row_scale * scale.clone());
        value = Some(match value {
            Some(sum) => sum + y,
            None => y,
        });
    }
    let value = value.expect("a validated layout has planes");
    if !B::ad_enabled(&x.device()) {
        return value;
    }
    // Zero in value, but with the gradient of the dense product.
    let dense = fake_quantize(x).matmul(weight.to_dense(matrix).transpose());
    let through = dense.clone() - dense.detach();
    value + through
}

/// [`ternary_linears`](crate::ternary_linears), one product after the other.
#[must_use]
pub fn ternary_linears<B: TernaryBackend>(x: Tensor<B, 2>, linears: &[BiasedWeight<B>]) -> Vec<Tensor<B, 2>> {
    let product = |linear: &BiasedWeight<B>| {
        let y = B::ternary_linear(x.clone(), &linear.weight, 0);
        match &linear.bias {
            Some(bias) => y + bias.clone().unsqueeze(),
            None => y,
        }
    };
    linears.iter().map(product).collect()
}

/// [`norm_linears`](crate::norm_linears): the norm, then the products.
#[must_use]
pub fn norm_linears<B: TernaryBackend>(
    x: Tensor<B, 2>,
    gamma: Tensor<B, 1>,
    epsilon: f64,
    linears: &[BiasedWeight<B>],
) -> Vec<Tensor<B, 2>> {
    B::ternary_linears(B::rms_norm(x, gamma, epsilon), linears)
}

/// The activations as int8 would hold them, back in floats: `q * s`. The gradient passes through unchanged.
#[must_use]
pub fn fake_quantize<B: Backend>(x: Tensor<B, 2>) -> Tensor<B, 2> {
    let (levels, scale) = quantize(x.clone().detach());
    let rounded = levels * scale;
    x.clone() + (rounded - x.detach())
}

/// [`round_activations`](crate::round_activations) with Burn's operations.
#[must_use]
pub fn round_activations<B: Backend>(x: Tensor<B, 2>, rotation: Option<Rotation>) -> Tensor<B, 2> {
    fake_quantize(match rotation {
        Some(rotation) => rotate(x, rotation),
        None => x,
    })
}

/// Each token of `x [tokens, in_features]` rotated, with the bits of [`Rotation::rotate`].
#[must_use]
pub fn rotate<B: Backend>(x: Tensor<B, 2>, rotation: Rotation) -> Tensor<B, 2> {
    let [tokens, in_features] = x.dims();
    let factors = factors(in_features, rotation, &x.device());
    butterflies(x * factors, tokens, Rotation::width(in_features))
}

/// The other way round: what [`rotate`] made of a token, and the gradient of a rotated input.
#[must_use]
pub fn rotate_back<B: Backend>(y: Tensor<B, 2>, rotation: Rotation) -> Tensor<B, 2> {
    let [tokens, in_features] = y.dims();
    let device = y.device();
    // The transform is symmetric.
    butterflies(y, tokens, Rotation::width(in_features)) * factors(in_features, rotation, &device)
}

fn factors<B: Backend>(in_features: usize, rotation: Rotation, device: &B::Device) -> Tensor<B, 2> {
    let width = Rotation::width(in_features);
    let factors: Vec<f32> = (0..in_features).map(|input| rotation.factor(input, width)).collect();
    Tensor::from_data(TensorData::new(factors, [1, in_features]), (device, DType::F32))
}

/// The unnormalized Walsh-Hadamard transform of each run of `width` numbers.
fn butterflies<B: Backend>(x: Tensor<B, 2>, tokens: usize, width: usize) -> Tensor<B, 2> {
    let in_features = x.dims()[1];
    let mut half = 1;
    let mut x = x;
    while half < width {
        let pairs = x.reshape([tokens * in_features / (2 * half), 2, half]);
        let (a, b) = (pairs.clone().slice_dim(1, 0..1), pairs.slice_dim(1, 1..2));
        x = Tensor::cat(vec![a.clone() + b.clone(), a - b], 1).reshape([tokens, in_features]);
        half *= 2;
    }
    x
}

/// `|x|`, by which a transposed tensor stays right on every backend: NdArray's own `abs` returns the elements of a shared,
/// non-contiguous tensor in another order (tracel-ai/burn#5552, in all of 0.21).
#[must_use]
pub fn magnitude<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    x.clone().max_pair(-x)
}

/// Absmax int8 a token: levels `[tokens, n]` (whole numbers) and scales `[tokens, 1]`, NaN for a token that is not finite.
fn quantize<B: Backend>(x: Tensor<B, 2>) -> (Tensor<B, 2>, Tensor<B, 2>) {
    // x - x is NaN exactly where x is not finite, and so is the sum of a row that has such an element.
    let poison = (x.clone() - x.clone()).sum_dim(1);
    let finite = x.clone().mask_fill(x.clone().is_finite().bool_not(), 0.0);
    let scale = magnitude(finite.clone()).max_dim(1) / QMAX;
    let divisor = scale.clone().mask_fill(scale.clone().equal_elem(0.0), 1.0);
    let levels = (finite / divisor).round().clamp(-QMAX, QMAX);
    // A scale that underflows to zero stands for a row of zeros.
    let zero = scale.clone().equal_elem(0.0).expand(levels.dims());
    (levels.mask_fill(zero, 0.0), scale + poison)
}

/// `[tokens, rows]`: the exact totals of one plane, rounded once to `f32`.
fn plane_totals<B: Backend>(
    levels: &Tensor<B, 2>,
    weight: &TernaryWeight<B>,
    matrix: usize,
    plane: usize,
) -> Tensor<B, 2> {
    let [_, width] = levels.dims();
    let trits = weight.trits(matrix, plane);
    let Some(group_size) = weight.layout.group_size else {
        return levels.clone().matmul(trits.transpose());
    };
    // A block of 64 times scales up to 255 stays below 2^24 as well; the blocks are summed as integers.
    let block = group_size.min(BLOCK);
    let mut total = None;
    for start in (0..width).step_by(block) {
        let end = (start + block).min(width);
        let dot = levels.clone().slice([0..levels.dims()[0], start..end]);
        let dot = dot.matmul(trits.clone().slice([0..weight.layout.rows, start..end]).transpose()).int();
        total = Some(match total {
            Some(sum) => sum + dot,
            None => dot,
        });
    }
    match total {
        Some(total) => total.float().cast(DType::F32),
        None => Tensor::from_data(TensorData::zeros::<f32, _>([0, 0]), &levels.device()),
    }
}
