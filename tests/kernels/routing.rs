//! Norms, routing, linears that share an input, and threads that stay awake.

use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::tensor::Tensor;
use burn_flex::Flex;
use burn_ndarray::NdArray;
use proptest::prelude::*;
use ternoss::backends::{
    BiasedWeight, CodeFormat, TernaryBackend,
    cpu::{self, routing},
    norm_linears, reference, rms_norm, route, ternary_linear, ternary_linears,
};

use crate::support::{Noise, Weights, all_kernels, any_layout, assert_close, assert_same, layout, matrix, values};

fn vector<B: TernaryBackend>(values: &[f32]) -> Tensor<B, 1> {
    matrix::<B>(values, [1, values.len()]).reshape([values.len()])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn norms_are_those_of_burn(tokens in 1..5usize, width in 1..300usize, seed: u64) {
        let mut noise = Noise::new(seed);
        let (x, gamma) = (noise.floats(tokens * width), noise.floats(width));
        let expected = values(reference::rms_norm(matrix::<NdArray>(&x, [tokens, width]), vector(&gamma), 1e-5));
        let found = values(rms_norm(matrix::<Flex>(&x, [tokens, width]), vector(&gamma), 1e-5));
        assert_close(&found, &expected, 1e-5, "norm");
        for kernels in all_kernels() {
            let mut out = vec![0.0; x.len()];
            routing::rms_norm(kernels, &x, &gamma, 1e-5, &mut out).unwrap();
            assert_same(&out, &found, "instruction sets");
        }
        let last = values(rms_norm(matrix::<Flex>(&x[x.len() - width..], [1, width]), vector(&gamma), 1e-5));
        assert_same(&last, &found[x.len() - width..], "alone");
    }

    #[test]
    fn tokens_go_where_burn_sends_them(
        tokens in 1..9usize, width in 1..200usize, experts in 1..40usize, k in 1..5usize, seed: u64,
    ) {
        let k = k.min(experts);
        let mut noise = Noise::new(seed);
        let (x, weight, bias) = (noise.floats(tokens * width), noise.floats(width * experts), noise.floats(experts));
        let run = |x: &[f32]| {
            let (x, weight) = (matrix::<Flex>(x, [x.len() / width, width]), matrix(&weight, [width, experts]));
            let (chosen, weights) = route(x, weight, vector(&bias), k);
            (chosen.into_data().iter::<i64>().collect::<Vec<_>>(), values(weights))
        };
        let (chosen, weights) = run(&x);
        let plain = reference::route(
            matrix::<NdArray>(&x, [tokens, width]), matrix(&weight, [width, experts]), vector(&bias), k,
        );
        prop_assert_eq!(&chosen, &plain.0.into_data().iter::<i64>().collect::<Vec<_>>());
        assert_close(&weights, &values(plain.1), 1e-4, "weights");
        let alone = run(&x[..width]);
        prop_assert_eq!(&alone.0, &chosen[..k]);
        assert_same(&alone.1, &weights[..k], "alone");
        for kernels in all_kernels() {
            let found = routing::route(kernels, &x, &weight, &bias, k).unwrap();
            prop_assert_eq!(&found.0, &chosen);
            assert_same(&found.1, &weights, "instruction sets");
        }
    }

    #[test]
    fn linears_that_share_an_input_give_what_each_gives(first in any_layout(), rows in 1..40usize, seed: u64) {
        let layouts = [first, ternoss::backends::TernaryLayout { rows, planes: 1, ..first }];
        let weights = layouts.map(|layout| Weights::new(layout, seed));
        let mut noise = Noise::new(seed);
        let x = noise.floats(3 * first.in_features);
        let bias = noise.floats(rows);
        let linears = |biased: bool| weights.each_ref().map(|weights| BiasedWeight {
            weight: weights.tensor::<Flex>(),
            bias: (biased && weights.layout.rows == rows).then(|| vector(&bias)),
        });
        let x = matrix::<Flex>(&x, [3, first.in_features]);
        for (y, linear) in ternary_linears(x.clone(), &linears(true)).into_iter().zip(linears(true)) {
            let product = ternary_linear(x.clone(), &linear.weight, 0);
            let expected = match linear.bias {
                Some(bias) => product + bias.unsqueeze(),
                None => product,
            };
            assert_same(&values(y), &values(expected), "together");
        }
        // The norm of the same tokens in one pass with their rounding.
        let gamma = vector(&noise.floats(first.in_features));
        let expected = ternary_linears(rms_norm(x.clone(), gamma.clone(), 1e-5), &linears(true));
        for (y, expected) in norm_linears(x, gamma, 1e-5, &linears(true)).into_iter().zip(expected) {
            assert_same(&values(y), &values(expected), "norm and linears");
        }
    }
}

#[test]
fn of_equal_experts_the_first_is_chosen_and_no_number_is_not_hidden() {
    let weight = matrix::<Flex>(&[0.0; 8], [2, 4]);
    let choose = |bias: &[f32]| {
        let (chosen, weights) = route(matrix(&[1.0, 2.0], [1, 2]), weight.clone(), vector(bias), 2);
        (chosen.into_data().iter::<i64>().collect::<Vec<_>>(), values(weights))
    };
    assert_eq!(choose(&[1.0, 2.0, 2.0, 2.0]), (vec![1, 2], vec![0.5, 0.5]));
    assert!(choose(&[1.0, 2.0, f32::NAN, 2.0]).1.iter().all(|weight| weight.is_nan()));
}

/// A product large enough for several threads.
fn large() -> impl Fn() -> Vec<f32> {
    let weights = Weights::new(layout(CodeFormat::T2, 3000, 576), 1);
    let x = Noise::new(2).floats(576);
    move || values(ternary_linear(matrix::<Flex>(&x, [1, 576]), &weights.tensor(), 0))
}

#[test]
fn a_session_changes_no_bit_whatever_the_threads() {
    let product = large();
    let expected = product();
    for threads in [1, 2, 5] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let found = pool.install(|| Flex::session(|| Flex::session(|| (0..50).map(|_| product()).collect::<Vec<_>>())));
        found.iter().for_each(|found| assert_same(found, &expected, &format!("{threads} threads")));
    }
}

#[test]
fn sessions_beside_each_other_do_not_meet() {
    let product = large();
    let expected = product();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| cpu::session(|| (0..20).for_each(|_| assert_same(&product(), &expected, "beside others"))));
        }
    });
}

#[test]
fn a_panic_ends_a_session_and_not_the_next_one() {
    let product = large();
    let failed = catch_unwind(AssertUnwindSafe(|| cpu::session(|| panic!("{}", product().len()))));
    assert!(failed.is_err());
    assert_same(&cpu::session(&product), &product(), "the next one");
}
