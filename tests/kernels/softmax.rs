//! The softmax of attention, the gate of experts and the rounding of activations: kernels against Burn's operations, and their
//! gradients.

use burn::tensor::{DType, Tensor, TensorData, backend::Backend};
use burn_autodiff::Autodiff;
use burn_flex::Flex;
use burn_ndarray::NdArray;
use proptest::prelude::*;
use ternoss::backends::{
    AttentionSpec, ClampedSwiGlu, Rotation, ScoreView, TernaryBackend, clamped_swiglu,
    cpu::{Isa, Kernels, attention, experts, tokens},
    reference, round_activations,
};

use crate::support::{Noise, assert_close, assert_same, matrix, values};

fn tensor<B: Backend, const D: usize>(values: &[f32], shape: [usize; D]) -> Tensor<B, D> {
    Tensor::from_data(TensorData::new(values.to_vec(), shape), (&B::Device::default(), DType::F32))
}

/// Clamps in the midst of what the noise gives.
const SWIGLU: ClampedSwiGlu = ClampedSwiGlu { alpha: 1.702, limit: 0.6 };

type Softmax<B> = fn(Tensor<B, 3>, Tensor<B, 1>, ScoreView) -> Tensor<B, 3>;

fn view(window: Option<usize>, query: usize, key: usize) -> ScoreView {
    ScoreView { spec: AttentionSpec { scale: 0.3, window }, query, key }
}

/// Blocks of scores: heads, queries, keys, window, first query, first key.
fn blocks() -> impl Strategy<Value = ([usize; 3], Option<usize>, usize, usize, u64)> {
    let sizes = [1usize..4, 1usize..9, 1usize..40];
    (sizes, prop::option::of(1usize..20), 0usize..30, 0usize..12, any::<u64>())
}

fn softmax_is_the_reference<B: TernaryBackend>(
    sizes: [usize; 3],
    view: ScoreView,
    seed: u64,
) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let [heads, queries, keys] = sizes;
    let mut noise = Noise::new(seed);
    let scores: Vec<f32> = noise.floats(heads * queries * keys).iter().map(|x| x * 20.0).collect();
    let (sinks, gradient) = (noise.floats(heads), noise.floats(heads * queries * keys));
    let run = |softmax: Softmax<B>| softmax(tensor(&scores, sizes), tensor(&sinks, [heads]), view);
    let found = values(run(B::sink_softmax));
    assert_close(&found, &values(run(reference::sink_softmax)), 2e-6, "shares");

    // The gradients: by the kernel, by its formula, and by Burn's own differentiation of the reference.
    type A<B> = Autodiff<B>;
    let by = |softmax: Softmax<A<B>>| {
        let (scores, sinks) =
            (tensor::<A<B>, 3>(&scores, sizes).require_grad(), tensor(&sinks, [heads]).require_grad());
        let grads = (softmax(scores.clone(), sinks.clone(), view) * tensor(&gradient, sizes)).sum().backward();
        (values(scores.grad(&grads).unwrap()), values(sinks.grad(&grads).unwrap()))
    };
    let (scores_gradient, sinks_gradient) = by(<A<B> as TernaryBackend>::sink_softmax);
    let (expected, expected_sinks) = by(reference::sink_softmax);
    // A score's is `scale` times a difference of numbers up to 1, which may cancel: it is known to that many decimals.
    let largest = expected.iter().fold(view.spec.scale, |largest, x| largest.max(x.abs()));
    for (found, expected) in scores_gradient.iter().zip(&expected) {
        assert!((found - expected).abs() <= 2e-6 * largest, "gradient of the scores: {found} {expected}");
    }
    // A sink's share is what is missing to 1, so it is known to that many decimals only.
    for (found, expected) in sinks_gradient.iter().zip(&expected_sinks) {
        assert!((found - expected).abs() < 4e-6, "gradient of the sinks: {found} {expected}");
    }
    (found, scores_gradient, sinks_gradient)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn softmax_and_its_gradient_are_those_of_burn((sizes, window, query, key, seed) in blocks()) {
        let flex = softmax_is_the_reference::<Flex>(sizes, view(window, query, key), seed);
        let ndarray = softmax_is_the_reference::<NdArray>(sizes, view(window, query, key), seed);
        assert_same(&flex.0, &ndarray.0, "one kernel for both");
    }

    #[test]
    fn instruction_sets_give_the_same_bits((sizes, window, query, key, seed) in blocks(), width in 1usize..200) {
        let [heads, queries, keys] = sizes;
        let mut noise = Noise::new(seed);
        let (scores, sinks) = (noise.floats(heads * queries * keys), noise.floats(heads));
        let gradient = noise.floats(heads * queries * keys);
        let x = noise.floats(3 * width);
        let run = |isa: &Isa| {
            let kernels = Kernels::new(*isa).unwrap();
            let mut shares = scores.clone();
            attention::sink_softmax(kernels, &mut shares, &sinks, [queries, keys], view(window, query, key));
            let mut slopes = gradient.clone();
            let of_sinks = attention::sink_softmax_gradient(kernels, &shares, &mut slopes, [queries, keys], 0.3);
            let mut rounded = x.clone();
            tokens::round_tokens(kernels, &mut rounded, width, Some(Rotation::default()));
            let (gate_up, of_gate) = (&scores[..scores.len() / 2 * 2], &gradient[..scores.len() / 2]);
            let mut of_gate_up = vec![0.0; gate_up.len()];
            experts::swiglu_gradient(kernels, SWIGLU, gate_up, of_gate, &mut of_gate_up);
            [shares, slopes, of_sinks, rounded, of_gate_up].concat()
        };
        let expected = run(&Isa::Scalar);
        for isa in Isa::available() {
            assert_same(&run(isa), &expected, &isa.to_string());
        }
    }

    #[test]
    fn gates_and_their_gradients_are_those_of_burn(pairs in 1usize..40, seed in any::<u64>()) {
        let mut noise = Noise::new(seed);
        let (gate_up, gradient) = (noise.floats(6 * pairs), noise.floats(3 * pairs));
        let burn = matrix::<Autodiff<NdArray>>(&gate_up, [3, 2 * pairs]).require_grad();
        let y = reference::clamped_swiglu(burn.clone(), SWIGLU);
        let grads = (y.clone() * matrix(&gradient, [3, pairs])).sum().backward();
        let of_burn = values(burn.grad(&grads).unwrap());
        let plain = [matrix::<Flex>(&gate_up, [3, 2 * pairs]), matrix(&gradient, [3, pairs])];
        let [gate_up_tensor, gradient_tensor] = plain;
        let formula = reference::clamped_swiglu_gradient(gate_up_tensor, gradient_tensor, SWIGLU);
        assert_close(&values(formula), &of_burn, 1e-5, "the formula");

        let tracked = matrix::<Autodiff<Flex>>(&gate_up, [3, 2 * pairs]).require_grad();
        let found = clamped_swiglu(tracked.clone(), SWIGLU);
        assert_close(&values(found.clone()), &values(y), 1e-5, "gate");
        let grads = (found * matrix(&gradient, [3, pairs])).sum().backward();
        assert_close(&values(tracked.grad(&grads).unwrap()), &of_burn, 1e-5, "gradient");
    }

    #[test]
    fn activations_are_rounded_as_the_reference_rounds_them(
        width in 1usize..300, rotated in any::<bool>(), seed in any::<u64>(),
    ) {
        let x: Vec<f32> = Noise::new(seed).floats(4 * width).iter().map(|x| x * 1e3).collect();
        let rotation = rotated.then(Rotation::default);
        let expected = values(reference::round_activations(matrix::<Flex>(&x, [4, width]), rotation));
        assert_same(&values(round_activations(matrix::<Flex>(&x, [4, width]), rotation)), &expected, "flex");
        assert_same(&values(round_activations(matrix::<NdArray>(&x, [4, width]), rotation)), &expected, "ndarray");
        // The rounding counts as the identity, so the gradient is the one of the rotation alone.
        let gradient = Noise::new(seed ^ 1).floats(4 * width);
        let tracked = matrix::<Autodiff<Flex>>(&x, [4, width]).require_grad();
        let y = round_activations(tracked.clone(), rotation);
        let grads = (y * matrix(&gradient, [4, width])).sum().backward();
        let expected = match rotation {
            Some(rotation) => values(reference::rotate_back(matrix::<NdArray>(&gradient, [4, width]), rotation)),
            None => gradient,
        };
        assert_close(&values(tracked.grad(&grads).unwrap()), &expected, 1e-6, "gradient");
    }
}

#[test]
fn gradients_that_cancel_are_those_of_burn() {
    softmax_is_the_reference::<Flex>([2, 6, 6], view(None, 7, 0), 172_734_569_026_341_809);
}

#[test]
fn shares_and_the_sink_make_a_whole_and_unseen_keys_get_nothing() {
    let view = view(Some(3), 4, 2);
    let scores = tensor::<Flex, 3>(&Noise::new(1).floats(2 * 2 * 5), [2, 2, 5]);
    let shares = values(Flex::sink_softmax(scores, tensor(&[f32::NEG_INFINITY, 0.0], [2]), view));
    for (row, shares) in shares.chunks(5).enumerate() {
        // Queries 4 and 5 see three keys each, of which the block's keys 2 to 6 hold the last ones.
        let seen = view.seen(row % 2, 5);
        assert_eq!(seen, [0..3, 1..4][row % 2]);
        let total: f32 = shares.iter().sum();
        assert!(shares.iter().enumerate().all(|(key, share)| seen.contains(&key) == (*share > 0.0)), "{shares:?}");
        assert!(if row < 2 { (total - 1.0).abs() < 1e-6 } else { total < 0.95 }, "{total}");
    }
}

#[test]
fn what_is_no_number_stays_in_its_row() {
    let scores = [1.0, f32::NAN, 0.5, 1.0, 0.0, 2.0];
    let shares = values(Flex::sink_softmax(tensor(&scores, [1, 2, 3]), tensor(&[0.0], [1]), view(None, 2, 0)));
    assert!(shares[..3].iter().all(|share| share.is_nan()) && shares[3..].iter().all(|share| share.is_finite()));
    let rounded = values(round_activations(matrix::<Flex>(&[1.0, f32::INFINITY, 1.0, 2.0], [2, 2]), None));
    assert!(rounded[..2].iter().all(|x| x.is_nan()) && rounded[2..].iter().all(|x| x.is_finite()), "{rounded:?}");
    assert!(values(round_activations(matrix::<Flex>(&[], [0, 4]), None)).is_empty());
}
