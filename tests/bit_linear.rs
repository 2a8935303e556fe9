//! BitLinear against its definition: naive loops, both modes, gradients.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use burn::{
    backend::Autodiff,
    module::{Module, Param},
    nn::{self, LinearConfig},
    tensor::{Tensor, TensorData, backend::Backend},
};
use proptest::prelude::*;
use ternoss::{
    backends::{CodeFormat, Rotation, TernaryBackend, reference::rotate, round_activations},
    quant::{self, BitLinear, BitWeight, Granularity, Linear, TernaryConfig, absmean},
};

type Flex = burn_flex::Flex;
type NdArray = burn_ndarray::NdArray;

const ROTATION: Option<Rotation> = Some(Rotation { seed: 9 });

const GRANULARITIES: [Granularity; 4] =
    [Granularity::Tensor, Granularity::Row, Granularity::Group(64), Granularity::Group(192)];

fn host<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

fn random<B: Backend>(shape: [usize; 2], seed: u64) -> Tensor<B, 2> {
    // Not the backend's own generator, so that every backend sees the same numbers.
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    // A sum of uniforms: close to the bell of trained weights.
    let values: Vec<f32> = (0..shape[0] * shape[1]).map(|_| next() + next() + next()).collect();
    Tensor::from_data(TensorData::new(values, shape), &Default::default())
}

/// The absmean of the weights that share a scale with weight `(row, column)`, straight from the definition.
fn scale_at(weight: &[f32], [rows, columns]: [usize; 2], granularity: Granularity, at: (usize, usize)) -> f64 {
    let mean = |values: &mut dyn Iterator<Item = f32>| {
        let (mut sum, mut count) = (0.0, 0);
        for value in values {
            sum += f64::from(value.abs());
            count += 1;
        }
        sum / f64::from(count)
    };
    let (row, column) = at;
    match granularity {
        Granularity::Tensor => mean(&mut weight[..rows * columns].iter().copied()),
        Granularity::Row => mean(&mut weight[row * columns..(row + 1) * columns].iter().copied()),
        Granularity::Group(size) => {
            let first = column / size * size;
            let last = (first + size).min(columns);
            mean(&mut weight[row * columns + first..row * columns + last].iter().copied())
        }
    }
}

#[test]
fn codes_are_minus_one_zero_or_one_and_follow_the_formula() {
    for shape in [[3, 64], [5, 130], [1, 1], [2, 2880], [7, 63]] {
        for granularity in GRANULARITIES {
            let weight = random::<Flex>(shape, 7);
            let trits = host(absmean(weight.clone(), granularity).trits);
            let weight = host(weight);
            for (at, trit) in trits.iter().enumerate() {
                assert!([-1.0, 0.0, 1.0].contains(trit));
                let scale = scale_at(&weight, shape, granularity, (at / shape[1], at % shape[1]));
                let ratio = f64::from(weight[at]) / scale;
                // Within float32's resolution of a tie either side is right.
                if (ratio.abs() - 0.5).abs() > 1e-5 {
                    assert_eq!(f64::from(*trit), ratio.round_ties_even().clamp(-1.0, 1.0), "{shape:?} {granularity:?}");
                }
            }
        }
    }
}

#[test]
fn ties_round_to_even() {
    // Mean magnitude 2, so 1 and -1 lie exactly between two trits.
    let weight = Tensor::<Flex, 2>::from_data([[1.0f32, -1.0, 3.0, -3.0]], &Default::default());
    let parts = absmean(weight, Granularity::Row);
    assert_eq!(host(parts.trits), [0.0, 0.0, 1.0, -1.0]);
    assert_eq!(host(parts.row_scales), [2.0]);
}

#[test]
fn zeros_stay_zeros() {
    for granularity in GRANULARITIES {
        let parts = absmean(Tensor::<Flex, 2>::zeros([2, 130], &Default::default()), granularity);
        assert!(host(parts.to_dense()).iter().all(|value| *value == 0.0));
    }
}

/// Bell-shaped weights keep their mean near zero, a standard deviation in proportion, and about 31 % zeros (a Gaussian
/// has P(|w| < mean|w| / 2) = 0.31). A scale that is wrong by a fifth breaks the bounds.
#[test]
fn the_weight_distribution_is_preserved() {
    let shape = [16, 2880];
    let deviation = |values: &[f32]| {
        let mean = values.iter().sum::<f32>() / values.len() as f32;
        (values.iter().map(|value| (value - mean).powi(2)).sum::<f32>() / values.len() as f32).sqrt()
    };
    for granularity in GRANULARITIES {
        let weight = random::<Flex>(shape, 3);
        let parts = absmean(weight.clone(), granularity);
        let (weight, ternary, trits) = (host(weight), host(parts.to_dense()), host(parts.trits));
        for row in 0..shape[0] {
            let row = row * shape[1]..(row + 1) * shape[1];
            let before = deviation(&weight[row.clone()]);
            let after = deviation(&ternary[row.clone()]);
            let mean = ternary[row.clone()].iter().sum::<f32>() / shape[1] as f32;
            let zeros = trits[row].iter().filter(|trit| **trit == 0.0).count() as f32 / shape[1] as f32;
            assert!(mean.abs() < 0.05 * before, "mean {mean} of deviation {before}");
            assert!((0.62..0.74).contains(&(after / before)), "deviation {after} of {before}, {granularity:?}");
            assert!((0.26..0.36).contains(&zeros), "zeros {zeros}");
        }
    }
}

/// Activations and weights quantized and multiplied element by element, in double precision; with each output how far it may be off
/// because float32's resolution decides to which side an activation is rounded.
///
/// The weights are quantized on the backend in question, so that it decides their ties: what it must find has tests of its own.
fn naive<B: Backend>(
    x: &[f32],
    weight: Tensor<B, 2>,
    bias: &[f32],
    TernaryConfig { granularity, rotation, .. }: TernaryConfig,
) -> Vec<(f64, f64)> {
    let inputs = weight.dims()[1];
    let weight = rotation.map_or(weight.clone(), |rotation| rotate(weight, rotation));
    let ternary = host(absmean(weight, granularity).to_dense());
    let mut y = Vec::new();
    for token in x.chunks(inputs) {
        let mut token = token.to_vec();
        if let Some(rotation) = rotation {
            rotation.rotate(&mut token);
        }
        let scale = token.iter().fold(0f32, |max, value| max.max(value.abs())) / 127.0;
        for (row, bias) in ternary.chunks(inputs).zip(bias) {
            let (mut dot, mut ties) = (f64::from(*bias), 0.0);
            for (value, weight) in token.iter().map(|value| value / scale).zip(row) {
                let step = f64::from(scale) * f64::from(*weight);
                dot += f64::from(value.round_ties_even().clamp(-127.0, 127.0)) * step;
                if (value.abs().fract() - 0.5).abs() < 1e-4 {
                    ties += step.abs();
                }
            }
            y.push((dot, ties));
        }
    }
    y
}

fn equals_the_naive_loop<B: TernaryBackend>() {
    for [tokens, inputs, outputs] in [[1, 64, 8], [3, 130, 5], [5, 2880, 4], [2, 1, 1]] {
        for granularity in GRANULARITIES {
            for (format, rotation) in [(CodeFormat::T2, None), (CodeFormat::T5, None), (CodeFormat::T2, ROTATION)] {
                let config = TernaryConfig { granularity, format, rotation };
                let (weight, bias) = (random::<B>([outputs, inputs], 17), random::<B>([1, outputs], 19));
                let layer = nn::Linear {
                    weight: Param::from_tensor(weight.clone().transpose()),
                    bias: Some(Param::from_tensor(bias.clone().squeeze_dim(0))),
                };
                let x = random::<B>([tokens, inputs], 11);
                let latent = BitLinear::<B>::from_linear(&layer, &config);
                let packed = latent.clone().pack().unwrap();
                assert!(matches!(packed.weight, BitWeight::Packed(_)));
                let expected = naive(&host(x.clone()), weight, &host(bias), config);
                let size = expected.iter().fold(0f64, |max, (value, _)| max.max(value.abs()));
                for y in [host(latent.forward(x.clone())), host(packed.forward(x))] {
                    for (found, (expected, ties)) in y.iter().zip(&expected) {
                        let error = (f64::from(*found) - expected).abs();
                        assert!(error <= 1e-5 * size + ties, "{found}, expected {expected} ({config:?})");
                    }
                }
            }
        }
    }
}

#[test]
fn both_modes_equal_the_naive_loop_on_flex() {
    equals_the_naive_loop::<Flex>();
}

#[test]
fn both_modes_equal_the_naive_loop_on_ndarray() {
    equals_the_naive_loop::<NdArray>();
}

#[test]
fn both_modes_equal_the_naive_loop_under_autodiff() {
    equals_the_naive_loop::<Autodiff<Flex>>();
}

#[test]
fn latent_and_packed_have_equal_codes() {
    for granularity in GRANULARITIES {
        let config = TernaryConfig { granularity, format: CodeFormat::T2, rotation: None };
        let dense = LinearConfig::new(200, 6).init::<Flex>(&Default::default());
        let latent = BitLinear::from_linear(&dense, &config);
        let BitWeight::Latent(weight) = &latent.weight else { panic!("latent") };
        let expected = host(weight.fake_quantize());
        let packed = latent.pack().unwrap();
        let BitWeight::Packed(weight) = &packed.weight else { panic!("packed") };
        assert_eq!(host(weight.weight().to_dense(0)), expected, "{granularity:?}");
    }
}

/// The straight-through definition: gradients of the layer are those of the dense product with both factors quantized.
#[test]
fn latent_gradients_pass_straight_through() {
    type B = Autodiff<Flex>;
    let device = Default::default();
    let x = random::<B>([3, 128], 5).require_grad();
    let dense = LinearConfig::new(128, 4).init::<B>(&device);
    let layer = BitLinear::from_linear(&dense, &TernaryConfig::default());
    let target = random::<B>([3, 4], 6);
    let y = layer.forward(x.clone());
    let grads = (y.clone() - target.clone()).square().sum().backward();
    let upstream = (y.inner() - target.inner()) * 2.0;

    let BitWeight::Latent(latent) = &layer.weight else { panic!("latent") };
    let x_quantized = round_activations(x.clone().inner(), None);
    let ternary = absmean(latent.weight.val().inner(), Granularity::Group(64)).to_dense();
    let close = |what: &str, found: Tensor<Flex, 2>, expected: Tensor<Flex, 2>| {
        let error = (found - expected).abs().max().into_scalar();
        assert!(error < 1e-4, "{what}: {error}");
    };
    close("weight", latent.weight.val().grad(&grads).unwrap(), upstream.clone().transpose().matmul(x_quantized));
    close("input", x.grad(&grads).unwrap(), upstream.clone().matmul(ternary));
    let bias = layer.bias.as_ref().unwrap().val().grad(&grads).unwrap();
    close("bias", bias.unsqueeze(), upstream.sum_dim(0));
}

/// Where the function is smooth, in the row scales of a packed weight, gradients equal finite differences.
#[test]
fn packed_scales_have_the_gradient_of_finite_differences() {
    type B = Autodiff<Flex>;
    let device = Default::default();
    let dense = LinearConfig::new(128, 4).init::<B>(&device);
    let layer = BitLinear::from_linear(&dense, &TernaryConfig::default()).pack().unwrap();
    let x = random::<B>([3, 128], 5);
    let loss = |layer: &BitLinear<B>| layer.forward(x.clone()).square().sum();
    let grads = loss(&layer).backward();
    let BitWeight::Packed(packed) = &layer.weight else { panic!("packed") };
    let gradient = host(packed.row_scales.val().grad(&grads).unwrap());
    let scales = host(packed.row_scales.val());
    for row in 0..4 {
        let shifted = |factor: f32| {
            let mut layer = layer.clone();
            let BitWeight::Packed(packed) = &mut layer.weight else { panic!("packed") };
            let mut scales = scales.clone();
            scales[row] *= factor;
            packed.row_scales = Param::from_data(TensorData::new(scales, [1, 1, 4]), &device);
            f64::from(loss(&layer).into_scalar())
        };
        let difference = (shifted(1.01) - shifted(0.99)) / (0.02 * f64::from(scales[row]));
        let error = (f64::from(gradient[row]) - difference).abs() / difference.abs();
        assert!(error < 1e-3, "row {row}: {}, finite difference {difference}", gradient[row]);
    }
}

#[test]
fn training_a_latent_layer_lowers_the_loss() {
    type B = Autodiff<Flex>;
    use burn::optim::{GradientsParams, Optimizer, SgdConfig};
    let mut layer = quant::BitLinearConfig::new(64, 8).init::<B>(&Default::default());
    let (x, target) = (random::<B>([32, 64], 1), random::<B>([32, 8], 2));
    let mut optimizer = SgdConfig::new().init();
    let mut losses = Vec::new();
    for _ in 0..100 {
        let loss = (layer.forward(x.clone()) - target.clone()).square().mean();
        losses.push(loss.clone().into_scalar());
        let gradients = GradientsParams::from_grads(loss.backward(), &layer);
        layer = optimizer.step(0.05, layer, gradients);
    }
    assert!(losses[99] < 0.8 * losses[0], "from {} to {}", losses[0], losses[99]);
}

#[test]
fn a_linear_becomes_ternary_in_one_call() {
    let dense = Linear::Dense(LinearConfig::new(64, 8).init::<Flex>(&Default::default()));
    let ternary = dense.to_ternary(&TernaryConfig::default()).unwrap();
    assert!(matches!(ternary, Linear::Ternary(_)));
    assert_eq!(ternary.shape(), dense.shape());
    let bad = TernaryConfig { granularity: Granularity::Group(63), ..TernaryConfig::default() };
    assert!(dense.to_ternary(&bad).unwrap_err().to_string().contains("multiples of 64"));
}

#[test]
fn packed_weights_survive_the_module_traversals() {
    let layer = quant::BitLinearConfig::new(64, 8).init::<Autodiff<Flex>>(&Default::default()).pack().unwrap();
    let x = random::<Autodiff<Flex>>([2, 64], 9);
    let expected = host(layer.forward(x.clone()));
    use burn::module::AutodiffModule;
    assert_eq!(host(layer.valid().forward(x.inner())), expected);
    let device = Default::default();
    assert_eq!(host(layer.clone().fork(&device).valid().forward(random([2, 64], 9))), expected);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn activations_keep_within_half_a_step(values in prop::collection::vec(-1e6f32..1e6, 1..300)) {
        let inputs = values.len();
        let x = Tensor::<Flex, 2>::from_data(TensorData::new(values.clone(), [1, inputs]), &Default::default());
        let step = values.iter().fold(0f32, |max, value| max.max(value.abs())) / 127.0;
        for (found, value) in host(round_activations(x, None)).iter().zip(&values) {
            prop_assert!((found - value).abs() <= step * 0.501);
        }
    }

    #[test]
    fn backends_agree_on_weights(rows in 1usize..5, columns in 1usize..200, seed in any::<u64>()) {
        for granularity in GRANULARITIES {
            let flex = absmean(random::<Flex>([rows, columns], seed), granularity);
            let ndarray = absmean(random::<NdArray>([rows, columns], seed), granularity);
            let differing = |flex: &[f32], ndarray: &[f32], by: f32| {
                flex.iter().zip(ndarray).filter(|(a, b)| (*a - *b).abs() > by).count()
            };
            let dense = (host(flex.to_dense()), host(ndarray.to_dense()));
            let largest = dense.0.iter().fold(0f32, |max, value| max.max(value.abs()));
            // Sums in another order may move a weight that lies on a tie, and a group's scale by one step.
            prop_assert!(differing(&host(flex.trits), &host(ndarray.trits), 0.0) <= 1);
            prop_assert!(differing(&dense.0, &dense.1, largest / 250.0) <= 1);
        }
    }
}
