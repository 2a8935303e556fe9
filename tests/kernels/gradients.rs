use burn::tensor::{DType, Int, Tensor, TensorData, backend::AutodiffBackend};
use burn_autodiff::Autodiff;
use burn_flex::Flex;
use burn_ndarray::NdArray;
use ternoss::backends::{
    AttentionSpec, ClampedSwiGlu, CodeFormat, Rotation, StoredFloat, StoredMatrix, TernaryBackend, TernaryExperts,
    TernaryLayout, TernaryWeight, reference, sink_attention, stored_linear, stored_rows, ternary_experts,
    ternary_linear, tuned_linear,
};

use crate::support::{Noise, Weights, assert_close, assert_same, layout, matrix, quantize, values};

const TOKENS: usize = 5;

fn weights() -> Weights {
    let layout = TernaryLayout { matrices: 2, planes: 2, group_size: Some(64), ..layout(CodeFormat::T2, 6, 150) };
    Weights::new(layout, 1)
}

/// The weights on `B`, row scales with gradients.
fn tracked<B: AutodiffBackend>(weights: &Weights) -> TernaryWeight<B> {
    let mut tensor = weights.tensor::<B>();
    tensor.row_scales = tensor.row_scales.require_grad();
    tensor
}

fn gradients_follow_their_definition<B: AutodiffBackend + TernaryBackend>() {
    let weights = weights();
    let TernaryLayout { rows, in_features, .. } = weights.layout;
    let x = Noise::new(2).floats(TOKENS * in_features);
    let out_grad = Noise::new(3).floats(TOKENS * rows);
    let tensor = tracked::<B>(&weights);
    let x_tensor = matrix::<B>(&x, [TOKENS, in_features]).require_grad();
    let y = ternary_linear(x_tensor.clone(), &tensor, 1);
    let expected: Vec<f32> = x.chunks(in_features).flat_map(|x| weights.multiply(1, x)).collect();
    assert_same(&values(y.clone()), &expected, "the value is the one without gradients");
    let grads = (y * matrix(&out_grad, [TOKENS, rows])).sum().backward();

    let dense = values(weights.tensor::<Flex>().to_dense(1));
    let x_grad = |t: usize, i: usize| (0..rows).map(|r| out_grad[t * rows + r] * dense[r * in_features + i]).sum();
    let expected: Vec<f32> = (0..TOKENS * in_features).map(|n| x_grad(n / in_features, n % in_features)).collect();
    assert_close(&values(x_tensor.grad(&grads).unwrap()), &expected, 1e-5, "dx");

    // The value is linear in the row scales, so a unit step is an exact difference.
    let scale_grad = values(tensor.row_scales.grad(&grads).unwrap());
    let loss = |weights: &Weights| -> f64 {
        let y = x.chunks(in_features).flat_map(|x| weights.multiply(1, x));
        y.zip(&out_grad).map(|(y, g)| f64::from(y) * f64::from(*g)).sum()
    };
    let difference = |n: usize| {
        let mut stepped = weights.clone();
        stepped.row_scales[n] += 1.0;
        (loss(&stepped) - loss(&weights)) as f32
    };
    let expected: Vec<f32> = (0..scale_grad.len()).map(difference).collect();
    assert_close(&scale_grad, &expected, 1e-4, "d row_scales");
    assert!(scale_grad[..scale_grad.len() / 2].iter().all(|g| *g == 0.0), "the other matrix has no gradient");
}

#[test]
fn ternary_linear_on_flex_has_the_straight_through_gradient() {
    gradients_follow_their_definition::<Autodiff<Flex>>();
}

#[test]
fn ternary_linear_on_ndarray_has_the_straight_through_gradient() {
    gradients_follow_their_definition::<Autodiff<NdArray>>();
}

#[test]
fn plain_burn_has_the_same_value_and_the_same_gradients() {
    type B = Autodiff<Flex>;
    let weights = weights();
    let TernaryLayout { rows, in_features, .. } = weights.layout;
    let x = Noise::new(2).floats(TOKENS * in_features);
    let out_grad = matrix::<B>(&Noise::new(3).floats(TOKENS * rows), [TOKENS, rows]);
    let results = [false, true].map(|plain| {
        let tensor = tracked::<B>(&weights);
        let x = matrix::<B>(&x, [TOKENS, in_features]).require_grad();
        let y = if plain {
            reference::ternary_linear(x.clone(), &tensor, 0)
        } else {
            ternary_linear(x.clone(), &tensor, 0)
        };
        let grads = (y.clone() * out_grad.clone()).sum().backward();
        [values(y), values(x.grad(&grads).unwrap()), values(tensor.row_scales.grad(&grads).unwrap())]
    });
    assert_same(&results[1][0], &results[0][0], "value");
    assert_close(&results[1][1], &results[0][1], 1e-5, "dx");
    assert_close(&results[1][2], &results[0][2], 1e-5, "d row_scales");
}

/// Value, gradient by `x`, and gradient by the scales, against a loop over everything.
fn scales_can_be_tuned<B: AutodiffBackend + TernaryBackend>() {
    for (format, planes, group_size, rotation) in [
        (CodeFormat::T2, 1, None, None),
        (CodeFormat::T2, 2, Some(64), Some(Rotation::default())),
        (CodeFormat::T5, 3, Some(128), Some(Rotation::default())),
    ] {
        let layout = TernaryLayout { planes, group_size, rotation, ..layout(format, 7, 150) };
        let (weights, groups) = (Weights::new(layout, 1), layout.groups().max(1));
        let x = Noise::new(2).floats(TOKENS * 150);
        let out_grad = Noise::new(3).floats(TOKENS * 7);
        let inputs = || matrix::<B>(&x, [TOKENS, 150]).require_grad();
        let gradients = |y: Tensor<B, 2>| (y * matrix(&out_grad, [TOKENS, 7])).sum().backward();

        let weight = weights.tensor::<B>();
        let scales = Tensor::stack::<3>((0..planes).map(|plane| weight.scales(0, plane)).collect(), 0).require_grad();
        let (tuned, plain) = (inputs(), inputs());
        let y = tuned_linear(tuned.clone(), &weight, scales.clone());
        let expected = ternary_linear(plain.clone(), &weight, 0);
        assert_close(&values(y.clone()), &values(expected.clone()), 1e-5, "value");
        let (of_tuned, of_plain) = (gradients(y), gradients(expected));
        assert_close(&values(tuned.grad(&of_tuned).unwrap()), &values(plain.grad(&of_plain).unwrap()), 1e-5, "dx");

        let rounded = values(reference::round_activations(matrix::<Flex>(&x, [TOKENS, 150]), rotation));
        let size = group_size.unwrap_or(150);
        let mut expected = vec![0.0; planes * 7 * groups];
        for plane in 0..planes {
            let trits = values(weights.tensor::<Flex>().parts(0, plane).0);
            for (at, trit) in trits.iter().enumerate() {
                let (row, input) = (at / 150, at % 150);
                let of_matrix: f32 = (0..TOKENS).map(|t| out_grad[t * 7 + row] * rounded[t * 150 + input]).sum();
                expected[(plane * 7 + row) * groups + input / size] += of_matrix * trit;
            }
        }
        let found = scales.grad(&of_tuned).unwrap();
        assert_eq!(found.dims(), [planes, 7, groups]);
        assert_close(&values(found), &expected, 1e-5, "d scales");
    }
}

#[test]
fn scales_can_be_tuned_on_flex() {
    scales_can_be_tuned::<Autodiff<Flex>>();
}

#[test]
fn scales_can_be_tuned_on_ndarray() {
    scales_can_be_tuned::<Autodiff<NdArray>>();
}

#[test]
fn plain_burn_gives_the_same_matrix_and_the_same_gradient_of_scales() {
    for (format, group_size) in [(CodeFormat::T2, Some(64)), (CodeFormat::T5, None)] {
        let layout = TernaryLayout { planes: 2, group_size, ..layout(format, 7, 150) };
        let trits = Weights::new(layout, 1).tensor::<Flex>();
        let gradient = matrix::<Flex>(&Noise::new(2).floats(7 * 150), [7, 150]);
        let expected = reference::scale_gradient(gradient.clone(), &trits);
        let scales = expected.clone();
        assert_close(&values(Flex::scale_gradient(gradient, &trits)), &values(expected), 1e-5, "d scales");
        let expected = values(reference::scaled_trits(&trits, scales.clone()));
        assert_close(&values(Flex::scaled_trits(&trits, scales)), &expected, 1e-6, "matrix");
    }
}

#[test]
fn rounding_activations_keeps_their_gradient() {
    let x = Noise::new(1).floats(3 * 40);
    let tensor = matrix::<Autodiff<Flex>>(&x, [3, 40]).require_grad();
    let y = reference::fake_quantize(tensor.clone());
    let rounded = x.chunks(40).flat_map(|x| {
        let (levels, scale) = quantize(x);
        levels.into_iter().map(move |level| f32::from(level) * scale)
    });
    assert_close(&values(y.clone()), &rounded.collect::<Vec<_>>(), 1e-6, "value");
    let grads = y.sum().backward();
    assert_same(&values(tensor.grad(&grads).unwrap()), &[1.0; 120], "gradient");
}

#[test]
fn nothing_is_tracked_without_need() {
    let weights = weights();
    let x = matrix::<Autodiff<Flex>>(&Noise::new(2).floats(150), [1, 150]);
    let y = ternary_linear(x, &weights.tensor(), 0);
    assert!(!y.is_require_grad());
    let frozen = ternary_linear(matrix::<Autodiff<Flex>>(&[1.0; 150], [1, 150]).require_grad(), &weights.tensor(), 0);
    frozen.sum().backward();
}

#[test]
fn stored_linear_passes_its_gradient_to_x() {
    type B = Autodiff<NdArray>;
    let (rows, columns) = (9, 30);
    let float = StoredFloat::Bf16;
    let mut words = vec![0; rows * columns / 2];
    float.encode(&Noise::new(1).floats(rows * columns), &mut words);
    let mut dense = vec![0.0; rows * columns];
    float.decode(&words, &mut dense);
    let words = TensorData::new(words, [rows, columns / 2]);
    let stored = StoredMatrix::<B>::new(Tensor::from_data(words, (&Default::default(), DType::U32)), columns, float);
    let stored = stored.unwrap();
    let x = matrix::<B>(&Noise::new(2).floats(2 * columns), [2, columns]).require_grad();
    let out_grad = matrix::<B>(&Noise::new(3).floats(2 * rows), [2, rows]);
    let grads = (stored_linear(x.clone(), &stored) * out_grad.clone()).sum().backward();
    let expected = values(out_grad.matmul(matrix(&dense, [rows, columns])));
    assert_close(&values(x.grad(&grads).unwrap()), &expected, 1e-5, "dx");
    let ids = Tensor::from_data(TensorData::new(vec![8i64], [1]), &Default::default());
    assert_same(&values(stored_rows(&stored, ids)), &dense[8 * columns..], "rows");
}

#[test]
fn gradients_reach_through_the_experts() {
    type B = Autodiff<Flex>;
    let (experts, hidden, inner) = (3, 64, 70);
    let of = |rows, width| TernaryLayout { matrices: experts, ..layout(CodeFormat::T2, rows, width) };
    let mut moe = TernaryExperts::<B>::new(
        tracked(&Weights::new(of(2 * inner, hidden), 1)),
        matrix(&Noise::new(2).floats(experts * 2 * inner), [experts, 2 * inner]),
        tracked(&Weights::new(of(hidden, inner), 3)),
        matrix(&Noise::new(4).floats(experts * hidden), [experts, hidden]),
        ClampedSwiGlu { alpha: 1.702, limit: 7.0 },
    )
    .unwrap();
    moe.down_bias = moe.down_bias.require_grad();
    let x = matrix::<B>(&Noise::new(5).floats(2 * hidden), [2, hidden]).require_grad();
    let weights = matrix::<B>(&[0.25, 0.75, 0.5, 0.5], [2, 2]).require_grad();
    let chosen: Tensor<B, 2, Int> =
        Tensor::from_data(TensorData::new(vec![0i64, 2, 2, 0], [2, 2]), &Default::default());
    let y = ternary_experts(x.clone(), chosen, weights.clone(), &moe);
    let grads = y.sum().backward();
    let norm = |grad: Vec<f32>| grad.iter().map(|g| g * g).sum::<f32>();
    assert!(norm(values(x.grad(&grads).unwrap())) > 0.0);
    assert!(norm(values(weights.grad(&grads).unwrap())) > 0.0);
    let scales = values(moe.gate_up.row_scales.grad(&grads).unwrap());
    let of_expert = |e: usize| norm(scales[e * 2 * inner..(e + 1) * 2 * inner].to_vec());
    assert!(of_expert(0) > 0.0 && of_expert(2) > 0.0);
    assert_eq!(of_expert(1), 0.0, "nobody chose expert 1");
    let bias = values(moe.down_bias.grad(&grads).unwrap());
    assert_close(&bias[..hidden], &[0.75; 64], 1e-6, "d bias of expert 0: 0.25 + 0.5");
}

#[test]
fn attention_has_the_gradient_of_finite_differences() {
    type B = Autodiff<NdArray>;
    let spec = AttentionSpec { scale: 0.5, window: Some(3) };
    let (q, kv) = (Noise::new(1).floats(4 * 3 * 4), Noise::new(2).floats(2 * 5 * 4));
    let (sinks, out_grad) = (Noise::new(3).floats(4), Noise::new(4).floats(3 * 16));
    let cube = |values: &[f32], shape: [usize; 3]| -> Tensor<B, 3> {
        Tensor::from_data(TensorData::new(values.to_vec(), shape), &Default::default())
    };
    let loss = |sinks: &[f32], q: &[f32]| {
        let q = cube(q, [4, 3, 4]).require_grad();
        let k = cube(&kv, [2, 5, 4]);
        let sinks = Tensor::<B, 1>::from_data(TensorData::new(sinks.to_vec(), [4]), &Default::default()).require_grad();
        let y = sink_attention(q.clone(), k.clone(), k, sinks.clone(), spec);
        ((y * matrix(&out_grad, [3, 16])).sum(), q, sinks)
    };
    let (value, q_tensor, sinks_tensor) = loss(&sinks, &q);
    let grads = value.backward();
    let step = 1e-2;
    let nudge = |values: &[f32], n: usize, by: f32| {
        let mut values = values.to_vec();
        values[n] += by;
        values
    };
    let scalar = |sinks: &[f32], q: &[f32]| loss(sinks, q).0.into_scalar();
    let by_sink =
        (0..4).map(|n| (scalar(&nudge(&sinks, n, step), &q) - scalar(&nudge(&sinks, n, -step), &q)) / (2.0 * step));
    assert_close(&values(sinks_tensor.grad(&grads).unwrap()), &by_sink.collect::<Vec<_>>(), 5e-3, "d sinks");
    let by_q =
        (0..48).map(|n| (scalar(&sinks, &nudge(&q, n, step)) - scalar(&sinks, &nudge(&q, n, -step))) / (2.0 * step));
    assert_close(&values(q_tensor.grad(&grads).unwrap()), &by_q.collect::<Vec<_>>(), 5e-3, "dq");
}
