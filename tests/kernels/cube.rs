//! The GPU kernels against the definitions and against Burn's operations: on Vulkan, or without the feature `wgpu` on CUDA.
//! Skipped, with a word, where there is no driver.

use burn::tensor::{
    DType, Int, Tensor, TensorData,
    backend::{AutodiffBackend, Backend},
};
use burn_autodiff::Autodiff;
use burn_flex::Flex;
use proptest::prelude::*;
use ternoss::backends::{
    BiasedWeight, CodeFormat, LayerCache, Rotation, StoredFloat, StoredMatrix, TernaryBackend, TernaryLayout, largest,
    linear_onto, norm_linears, rms_norm, route, stored_linear, stored_linear_at, stored_rows, ternary_linear,
    ternary_linears, ternary_rows,
};

#[cfg(not(feature = "wgpu"))]
use ternoss::backends::cube::{Cuda as Gpu, devices::cuda_devices as devices};
#[cfg(feature = "wgpu")]
use ternoss::backends::cube::{Wgpu as Gpu, devices::wgpu_devices as devices};

use crate::{
    cache,
    experts::{Batch, EXPERTS, Layer, ONE_LEVEL},
    support::{Noise, Weights, any_layout, assert_close, assert_same, layout, matrix, values},
};

/// How close Burn's own products of floats come. NVIDIA's matrix units take them rounded to 11 bits (TF32).
const BURNS_PRODUCTS: f32 = if cfg!(feature = "wgpu") { 1e-5 } else { 5e-4 };

/// Whether there is a device; says so where there is none, which is an error with `TERNOSS_GPU` in the environment.
fn device() -> bool {
    match devices() {
        Ok(_) => true,
        Err(error) => {
            assert!(std::env::var_os("TERNOSS_GPU").is_none(), "a GPU is required: {error}");
            eprintln!("skipped: {error}");
            false
        }
    }
}

fn naive(weights: &Weights, matrix: usize, x: &[f32]) -> Vec<f32> {
    x.chunks(weights.layout.in_features).flat_map(|x| weights.multiply(matrix, x)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn ternary_products_are_the_definition(layout in any_layout(), tokens in prop_oneof![1..=5usize, 12..=70usize], seed: u64) {
        if !device() {
            return Ok(());
        }
        let weights = Weights::new(layout, seed);
        let x = Noise::new(seed ^ 1).floats(tokens * layout.in_features);
        for number in 0..layout.matrices {
            let y = values(ternary_linear(matrix::<Gpu>(&x, [tokens, layout.in_features]), &weights.tensor(), number));
            assert_close(&y, &naive(&weights, number, &x), 1e-5, &format!("{layout:?}"));
        }
    }

    #[test]
    fn linears_that_share_an_input_give_what_flex_gives(layout in any_layout(), tokens in 1..20usize, seed: u64) {
        if !device() {
            return Ok(());
        }
        let weights = [Weights::new(layout, seed), Weights::new(layout, seed ^ 1)];
        let mut noise = Noise::new(seed);
        let (x, bias) = (noise.floats(tokens * layout.in_features), noise.floats(layout.rows));
        let [found, expected] = [shared::<Gpu>, shared::<Flex>].map(|run| run(&weights, &x, &bias));
        assert_close(&found, &expected, 1e-5, &format!("{layout:?}"));
        let [found, expected] = [onto::<Gpu>, onto::<Flex>].map(|run| run(&weights[0], &x, &bias));
        assert_close(&found, &expected, 1e-5, &format!("onto others, {layout:?}"));
        // The norm rounds in another order, which may move an activation by a level.
        let gamma = noise.floats(layout.in_features);
        let [found, expected] = [normed::<Gpu>, normed::<Flex>].map(|run| run(&weights, &x, &gamma));
        assert_close(&found, &expected, ONE_LEVEL, &format!("normed, {layout:?}"));
    }

    #[test]
    fn ternary_rows_are_those_of_flex(layout in any_layout(), seed: u64) {
        if !device() {
            return Ok(());
        }
        let weights = Weights::new(layout, seed);
        let chosen = [layout.rows as i64 - 1, 0, layout.rows as i64, -1];
        let found = values(ternary_rows(&weights.tensor::<Gpu>(), layout.matrices - 1, ids(&chosen)));
        let expected = values(ternary_rows(&weights.tensor::<Flex>(), layout.matrices - 1, ids(&chosen)));
        assert_close(&found, &expected, 1e-6, &format!("{layout:?}"));
    }

    #[test]
    fn norms_and_routes_are_those_of_flex(
        tokens in 1..9usize, width in 1..300usize, experts in prop_oneof![1..40usize, Just(128), Just(300)], k in 1..5usize, seed: u64,
    ) {
        if !device() {
            return Ok(());
        }
        let mut noise = Noise::new(seed);
        let (x, gamma) = (noise.floats(tokens * width), noise.floats(width));
        let (weight, bias) = (noise.floats(width * experts), noise.floats(experts));
        let [found, expected] = [norm::<Gpu>, norm::<Flex>].map(|run| run(&x, &gamma));
        assert_close(&found, &expected, 1e-5, "norm");
        let [found, expected] = [routes::<Gpu>, routes::<Flex>].map(|run| run(&x, &weight, &bias, k.min(experts)));
        prop_assert_eq!(found.0, expected.0);
        assert_close(&found.1, &expected.1, 1e-4, "weights");
    }

    #[test]
    fn attention_over_a_cache_is_that_of_flex(case in cache::any_case(), step in 1..=80usize, keep in 0..70usize) {
        if !device() {
            return Ok(());
        }
        let expected = case.run::<Flex>(case.sizes[2], case.cache(), false);
        assert_close(&case.run::<Gpu>(step, case.cache(), false), &expected, 1e-5, "in steps");
        // Entries that are taken back leave no trace, and a clone goes its own way.
        let tokens = case.sizes[2];
        let keep = keep.min(tokens - 1);
        let mut first = case.cache::<Gpu>().with_spare(tokens - keep);
        let all = case.step(0..tokens, &mut first, false);
        let mut clone = first.clone();
        first.truncate(keep);
        let again = case.step(keep..tokens, &mut first, false);
        clone.truncate(keep);
        let cloned = case.step(keep..tokens, &mut clone, false);
        let width = all.len() / tokens;
        assert_close(&again, &all[keep * width..], 1e-5, "again");
        assert_close(&cloned, &all[keep * width..], 1e-5, "the clone");
    }

    #[test]
    fn attention_of_sequences_side_by_side_is_that_of_each_alone(case in cache::any_case(), new in 1..=20usize) {
        if !device() || case.sizes[2] < 4 {
            return Ok(());
        }
        let new = new.min(case.sizes[2] / 4);
        case.side_by_side::<Gpu>(new, false, |found, expected| assert_close(found, expected, 1e-5, "side by side"));
    }
}

#[test]
fn a_router_of_many_inputs_or_experts_chooses_as_flex_does() {
    if !device() {
        return;
    }
    // The scores of so many experts are more than a cube's shared memory: Burn's operations choose.
    for (width, experts) in [(100_000, 4), (64, 60_000)] {
        let mut noise = Noise::new(8);
        let (weight, bias) = (noise.floats(width * experts), noise.floats(experts));
        // Scores near each other, so that no weight is nearly one.
        let x: Vec<f32> = noise.floats(2 * width).iter().map(|x| x * 0.003).collect();
        let [found, expected] = [routes::<Gpu>, routes::<Flex>].map(|run| run(&x, &weight, &bias, 2));
        assert_eq!(found.0, expected.0);
        assert_close(&found.1, &expected.1, BURNS_PRODUCTS.max(1e-4), "weights");
    }
}

#[test]
fn a_token_after_many_others_sees_them_all() {
    if !device() {
        return;
    }
    for (window, size) in [(None, 64), (Some(128), 64), (Some(300), 24)] {
        let case = cache::Case::new([4, 2, 620, size], window, 7);
        let expected = case.run::<Flex>(620, case.cache(), false);
        let width = expected.len() / 620;
        let mut cache = case.cache::<Gpu>();
        case.step(0..600, &mut cache, false);
        let mut late = cache.clone();
        for token in 600..605 {
            let found = case.step(token..token + 1, &mut cache, false);
            assert_close(&found, &expected[token * width..][..width], 1e-5, "one more token");
        }
        let found = case.step(600..604, &mut late, false);
        assert_close(&found, &expected[600 * width..604 * width], 1e-5, "four more");
        case.advance(&mut [&mut cache, &mut late], 3, false, &expected, |found, expected| {
            assert_close(found, expected, 1e-5, "side by side");
        });
    }
}

#[test]
fn sequences_leave_their_company_and_outgrow_it() {
    if !device() {
        return;
    }
    let close = |found: &[f32], expected: &[f32]| assert_close(found, expected, 1e-5, "side by side");
    for window in [None, Some(16)] {
        let case = cache::Case::new([4, 2, 700, 16], window, 9);
        let all = case.run::<Flex>(700, case.cache(), false);
        let advance = |caches: &mut [&mut LayerCache<Gpu>], new| case.advance(caches, new, false, &all, close);
        let mut caches = [1, 40, 250].map(|start| {
            let mut cache = case.cache::<Gpu>().with_spare(8);
            advance(&mut [&mut cache], start);
            cache
        });
        let [a, b, c] = &mut caches;
        advance(&mut [a, b, c], 2);
        advance(&mut [a, b, c], 3);
        // One and many tokens of a sequence that does not come first in its buffers.
        advance(&mut [c], 1);
        advance(&mut [b], 20);
        // A copy stays where it is while the others move on.
        let mut copy = b.clone();
        advance(&mut [c, b], 2);
        advance(&mut [a, b, c], 1);
        advance(&mut [&mut copy], 2);
        b.truncate(b.position() - 3);
        advance(&mut [c, b], 4);
        // Past what they have room for, one of them much further than the others.
        (0..3).for_each(|_| advance(&mut [a, b, c], 15));
        advance(&mut [b], 300);
        (0..20).for_each(|_| advance(&mut [a, b, c, &mut copy], 2));
    }
}

fn ids<B: Backend>(ids: &[i64]) -> Tensor<B, 1, Int> {
    Tensor::from_data(TensorData::new(ids.to_vec(), [ids.len()]), &Default::default())
}

fn vector<B: Backend>(values: &[f32]) -> Tensor<B, 1> {
    matrix::<B>(values, [1, values.len()]).reshape([values.len()])
}

fn shared<B: TernaryBackend>(weights: &[Weights; 2], x: &[f32], bias: &[f32]) -> Vec<f32> {
    let width = weights[0].layout.in_features;
    let linears =
        weights.each_ref().map(|weights| BiasedWeight { weight: weights.tensor::<B>(), bias: Some(vector(bias)) });
    ternary_linears(matrix::<B>(x, [x.len() / width, width]), &linears).into_iter().flat_map(values).collect()
}

fn normed<B: TernaryBackend>(weights: &[Weights; 2], x: &[f32], gamma: &[f32]) -> Vec<f32> {
    let width = gamma.len();
    let linears = weights.each_ref().map(|weights| BiasedWeight { weight: weights.tensor::<B>(), bias: None });
    let products = norm_linears(matrix::<B>(x, [x.len() / width, width]), vector(gamma), 1e-5, &linears);
    products.into_iter().flat_map(values).collect()
}

/// The tokens times a matrix with a bias, onto the product with it without one.
fn onto<B: TernaryBackend>(weights: &Weights, x: &[f32], bias: &[f32]) -> Vec<f32> {
    let x = matrix::<B>(x, [x.len() / weights.layout.in_features, weights.layout.in_features]);
    let residual = ternary_linear(x.clone(), &weights.tensor(), 0);
    values(linear_onto(residual, x, &BiasedWeight { weight: weights.tensor(), bias: Some(vector(bias)) }))
}

fn norm<B: TernaryBackend>(x: &[f32], gamma: &[f32]) -> Vec<f32> {
    values(rms_norm(matrix::<B>(x, [x.len() / gamma.len(), gamma.len()]), vector(gamma), 1e-5))
}

fn routes<B: TernaryBackend>(x: &[f32], weight: &[f32], bias: &[f32], k: usize) -> (Vec<i64>, Vec<f32>) {
    let (experts, width) = (bias.len(), weight.len() / bias.len());
    let x = matrix::<B>(x, [x.len() / width, width]);
    let (chosen, weights) = route(x, matrix(weight, [width, experts]), vector(bias), k);
    (chosen.into_data().iter::<i64>().collect(), values(weights))
}

#[test]
fn the_largest_numbers_are_found_in_order_and_nan_is_never_missed() {
    if !device() {
        return;
    }
    for (n, k) in [(1, 1), (5, 5), (2048, 3), (2049, 40), (70_000, 64)] {
        let mut noise = Noise::new(n as u64);
        // Few different numbers, so that many are equal.
        let x: Vec<f32> = (0..2 * n).map(|_| ((noise.next() % 1000) as f32 - 500.0) * 0.25).collect();
        let (places, numbers) = largest(matrix::<Gpu>(&x, [2, n]), k).unwrap();
        for (row, (places, numbers)) in x.chunks(n).zip(places.chunks(k).zip(numbers.chunks(k))) {
            let mut order: Vec<usize> = (0..n).collect();
            order.sort_by(|a, b| row[*b].total_cmp(&row[*a]).then(a.cmp(b)));
            let expected: Vec<u32> = order[..k].iter().map(|at| *at as u32).collect();
            assert_eq!(places, expected, "{k} of {n}");
            assert_same(numbers, &order[..k].iter().map(|at| row[*at]).collect::<Vec<_>>(), "numbers");
        }
    }
    let mut x = vec![f32::NEG_INFINITY; 5000];
    x[4321] = f32::NAN;
    x[7] = f32::INFINITY;
    let (places, numbers) = largest(matrix::<Gpu>(&x, [1, 5000]), 3).unwrap();
    assert_eq!(places, [4321, 7, 0]);
    assert_same(&numbers, &[f32::NAN, f32::INFINITY, f32::NEG_INFINITY], "numbers");
}

#[test]
fn experts_are_the_naive_loop_one_by_one_and_in_tiles() {
    if !device() {
        return;
    }
    for (format, planes, group_size) in
        [(CodeFormat::T2, 1, None), (CodeFormat::T2, 2, Some(64)), (CodeFormat::T5, 1, Some(128))]
    {
        let layer = Layer::new(format, planes, group_size);
        for tokens in [1, 2, 17, 100] {
            let batch = Batch::new(tokens, 3);
            assert_close(&batch.run(&layer.tensors::<Gpu>(), false), &layer.naive(&batch), ONE_LEVEL, "naive");
        }
    }
}

#[test]
fn a_layer_of_experts_is_that_of_flex() {
    if !device() {
        return;
    }
    let layer = Layer::new(CodeFormat::T2, 1, Some(64));
    for tokens in [1, 3, 100] {
        let batch = Batch::new(tokens, 3);
        let expected = batch.through(&layer.with_router::<Flex>());
        assert_close(&batch.through(&layer.with_router::<Gpu>()), &expected, ONE_LEVEL, &format!("{tokens} tokens"));
    }
}

#[test]
fn products_of_several_tiles_are_the_definition() {
    if !device() {
        return;
    }
    for (format, planes, group_size) in
        [(CodeFormat::T2, 1, Some(64)), (CodeFormat::T2, 2, None), (CodeFormat::T5, 1, Some(128))]
    {
        let layout = TernaryLayout { planes, group_size, ..layout(format, 150, 704) };
        let weights = Weights::new(layout, 6);
        for tokens in [1, 9, 70, 130] {
            let x = Noise::new(7).floats(tokens * 704);
            let y = values(ternary_linear(matrix::<Gpu>(&x, [tokens, 704]), &weights.tensor(), 0));
            assert_close(&y, &naive(&weights, 0, &x), 1e-5, &format!("{tokens} tokens, {layout:?}"));
        }
    }
}

#[test]
fn tokens_and_choices_that_are_no_numbers_spoil_only_their_own_rows() {
    if !device() {
        return;
    }
    let layer = Layer::new(CodeFormat::T2, 1, None);
    for tokens in [3, 100] {
        let mut batch = Batch::new(tokens, 2);
        let hidden = batch.x.len() / tokens;
        batch.x[0] = f32::NAN;
        batch.x[hidden] = f32::INFINITY;
        batch.chosen[2 * 2] = EXPERTS as i64;
        let y = batch.run(&layer.tensors::<Gpu>(), false);
        assert!(y[..3 * hidden].iter().all(|y| y.is_nan()), "{tokens}");
        assert!(y[3 * hidden..].iter().all(|y| y.is_finite()), "{tokens}");
    }
    assert!(
        routes::<Gpu>(&[1.0, 2.0], &[0.0; 8], &[1.0, 2.0, f32::NAN, 2.0], 2).1.iter().all(|weight| weight.is_nan())
    );
    assert_eq!(routes::<Gpu>(&[1.0, 2.0], &[0.0; 8], &[1.0, 2.0, 2.0, 2.0], 2), (vec![1, 2], vec![0.5, 0.5]));
}

/// Value and gradients of a product and of a stored one after it.
fn gradients<B: AutodiffBackend + TernaryBackend>(weights: &Weights, words: &[u32], x: &[f32]) -> [Vec<f32>; 3] {
    let TernaryLayout { rows, in_features, .. } = weights.layout;
    let mut weight = weights.tensor::<B>();
    weight.row_scales = weight.row_scales.require_grad();
    let x = matrix::<B>(x, [x.len() / in_features, in_features]).require_grad();
    let words = TensorData::new(words.to_vec(), [words.len() / rows, rows]);
    let words = Tensor::from_data(words, (&Default::default(), DType::U32));
    let stored = StoredMatrix::new(words, rows, StoredFloat::F32).unwrap();
    let y = stored_linear(ternary_linear(x.clone(), &weight, 1), &stored);
    let gradients = y.clone().square().sum().backward();
    [values(y), values(x.grad(&gradients).unwrap()), values(weight.row_scales.grad(&gradients).unwrap())]
}

#[test]
fn gradients_are_those_of_flex() {
    if !device() {
        return;
    }
    for group_size in [None, Some(64)] {
        let layout = TernaryLayout {
            matrices: 2,
            planes: 2,
            group_size,
            rotation: Some(Rotation { seed: 3 }),
            ..layout(CodeFormat::T2, 6, 160)
        };
        let weights = Weights::new(layout, 1);
        let words: Vec<u32> = Noise::new(2).floats(6 * 10).into_iter().map(f32::to_bits).collect();
        let x = Noise::new(3).floats(5 * 160);
        let found = gradients::<Autodiff<Gpu>>(&weights, &words, &x);
        let expected = gradients::<Autodiff<Flex>>(&weights, &words, &x);
        for (found, expected) in found.iter().zip(&expected) {
            assert_close(found, expected, BURNS_PRODUCTS.max(1e-4), "gradients");
        }
    }
}

#[test]
fn stored_matrices_are_those_of_flex() {
    if !device() {
        return;
    }
    fn run<B: TernaryBackend>(words: &[u32], float: StoredFloat, x: &[f32]) -> [Vec<f32>; 3] {
        let data = TensorData::new(words.to_vec(), [37, words.len() / 37]);
        let matrix =
            StoredMatrix::<B>::new(Tensor::from_data(data, (&Default::default(), DType::U32)), 90, float).unwrap();
        let x = crate::support::matrix::<B>(x, [x.len() / 90, 90]);
        let chosen = || ids::<B>(&[3, 36, 0, 37, -1]);
        [
            values(stored_linear(x.clone(), &matrix)),
            values(stored_linear_at(x, &matrix, chosen())),
            values(stored_rows(&matrix, chosen())),
        ]
    }
    for float in StoredFloat::ALL {
        let mut numbers = Noise::new(1).floats(37 * 90);
        numbers[3 * 90..3 * 90 + 4].copy_from_slice(&[1e-6, 65504.0, -3e-5, 0.0]);
        let mut words = vec![0; 37 * float.words_per_row(90).unwrap()];
        float.encode(&numbers, &mut words);
        for tokens in [1, 5, 40] {
            let x = Noise::new(2).floats(tokens * 90);
            let [found, expected] = [run::<Gpu>, run::<Flex>].map(|run| run(&words, float, &x));
            let is_burns = tokens > 5 && float != StoredFloat::Bf16;
            let tolerance = if is_burns { BURNS_PRODUCTS } else { 1e-5 };
            assert_close(&found[0], &expected[0], tolerance, "all rows");
            assert_close(&found[1], &expected[1], 1e-5, "some rows");
            assert_same(&found[2], &expected[2], "the rows themselves");
        }
    }
}
