use burn::tensor::{DType, Tensor, TensorData};
use burn_flex::Flex;
use burn_ndarray::NdArray;
use proptest::prelude::*;
use ternoss::backends::{
    CodeFormat, FormatError, Rotation, TernaryBackend, TernaryLayout, TernaryWeight,
    cpu::{Isa, Kernels, linear, tokens::Tokens},
    format::MAX_IN_FEATURES,
    reference, ternary_linear,
};

use crate::support::{Noise, Weights, all_kernels, any_layout, assert_close, assert_same, layout, matrix, values};

fn run(kernels: Kernels, weights: &Weights, matrix: usize, x: &[f32]) -> Vec<f32> {
    let TernaryLayout { in_features, rows, rotation, .. } = weights.layout;
    let tokens = Tokens::quantize(kernels, x, in_features, rotation);
    let mut out = vec![f32::NAN; tokens.len() * rows];
    linear::ternary_linear(kernels, &weights.rows(matrix), &tokens, &mut out).unwrap();
    out
}

fn naive(weights: &Weights, matrix: usize, x: &[f32]) -> Vec<f32> {
    x.chunks(weights.layout.in_features).flat_map(|x| weights.multiply(matrix, x)).collect()
}

/// Tokens that test the edges of the rounding, picked by a number.
fn token(kind: usize, n: usize, noise: &mut Noise) -> Vec<f32> {
    let mut x = noise.floats(n);
    let at = noise.next() as usize % n;
    match kind {
        0 => x.fill(0.0),
        1 => x[at] = f32::NAN,
        2 => x[at] = f32::NEG_INFINITY,
        3 => x.iter_mut().for_each(|x| *x *= 1e-43),
        4 => x.iter_mut().for_each(|x| *x *= f32::MAX),
        5 => x.iter_mut().for_each(|x| *x = x.signum() * 1e-45),
        6 => x.iter_mut().for_each(|x| *x = (*x * 254.0).round() / 2.0), // ties, once the largest is 127
        _ => {}
    }
    if kind == 6 {
        x[at] = 127.0;
    }
    x
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_instruction_set_gives_the_bits_of_the_definition(
        layout in any_layout(),
        kinds in prop::collection::vec(0..12usize, 0..40),
        seed: u64,
    ) {
        let weights = Weights::new(layout, seed);
        let mut noise = Noise::new(seed ^ 1);
        let x: Vec<f32> = kinds.iter().flat_map(|kind| token(*kind, layout.in_features, &mut noise)).collect();
        for matrix in 0..layout.matrices {
            let expected = naive(&weights, matrix, &x);
            for kernels in all_kernels() {
                assert_same(&run(kernels, &weights, matrix, &x), &expected, &format!("{} {layout:?}", kernels.isa()));
                // One token, and a few, may have a kernel of their own.
                for few in [1, 3] {
                    for (x, expected) in x.chunks(few * layout.in_features).zip(expected.chunks(few * layout.rows)).take(2) {
                        let name = format!("{}, {few} tokens, {layout:?}", kernels.isa());
                        assert_same(&run(kernels, &weights, matrix, x), expected, &name);
                    }
                }
            }
        }
    }
}

fn backend_agrees<B: TernaryBackend>(name: &str) {
    let rotation = Some(Rotation { seed: 5 });
    for (format, planes, group_size, in_features, tokens, rotation) in [
        (CodeFormat::T2, 1, None, 2880, 3, None),
        (CodeFormat::T2, 3, Some(64), 320, 17, rotation),
        (CodeFormat::T2, 2, Some(192), 577, 1, rotation),
        (CodeFormat::T5, 1, None, 101, 2, None),
        (CodeFormat::T5, 2, Some(64), 2880, 9, rotation),
        (CodeFormat::T2, 1, Some(64), 96, 4, rotation),
        (CodeFormat::T2, 1, Some(4096), 4160, 2, None),
    ] {
        let layout = TernaryLayout { matrices: 2, planes, group_size, rotation, ..layout(format, 11, in_features) };
        let weights = Weights::new(layout, 7);
        let mut noise = Noise::new(8);
        let x: Vec<f32> = (0..tokens).flat_map(|kind| token(kind + 6, in_features, &mut noise)).collect();
        let what = format!("{name} {layout:?}");
        let tensor = weights.tensor::<B>();
        let y = values(ternary_linear(matrix::<B>(&x, [tokens, in_features]), &tensor, 1));
        assert_same(&y, &naive(&weights, 1, &x), &what);
        let plain = values(reference::ternary_linear(matrix::<B>(&x, [tokens, in_features]), &tensor, 1));
        assert_same(&plain, &y, &format!("plain Burn, {what}"));
    }
}

#[test]
fn flex_and_plain_burn_give_the_bits_of_the_definition() {
    backend_agrees::<Flex>("flex");
}

#[test]
fn ndarray_and_plain_burn_give_the_bits_of_the_definition() {
    backend_agrees::<NdArray>("ndarray");
}

#[test]
fn odd_tokens_agree_with_plain_burn() {
    let weights = Weights::new(TernaryLayout { group_size: Some(64), ..layout(CodeFormat::T2, 5, 200) }, 3);
    let mut noise = Noise::new(4);
    let x: Vec<f32> = (0..8).flat_map(|kind| token(kind, 200, &mut noise)).collect();
    let plain = reference::ternary_linear(matrix::<Flex>(&x, [8, 200]), &weights.tensor(), 0);
    assert_same(&values(plain), &naive(&weights, 0, &x), "plain Burn");
    let y = naive(&weights, 0, &x);
    assert!(y[..5].iter().all(|y| *y == 0.0), "a token of zeros gives zeros");
    assert!(y[5..15].iter().all(|y| y.is_nan()), "a token that is not finite gives NaN");
    assert!(y[15..20].iter().all(|y| y.is_finite()));
}

#[test]
fn the_widest_row_with_the_largest_values_is_exact() {
    for (format, group_size) in CodeFormat::ALL.into_iter().flat_map(|format| [(format, None), (format, Some(64))]) {
        let layout = TernaryLayout { group_size, ..layout(format, 2, MAX_IN_FEATURES) };
        let mut weights = Weights::new(layout, 1);
        weights.trits[..MAX_IN_FEATURES].fill(1);
        weights.trits[MAX_IN_FEATURES..].fill(-1);
        for (trits, words) in
            weights.trits.chunks(MAX_IN_FEATURES).zip(weights.codes.chunks_mut(layout.words_per_row()))
        {
            layout.format.pack_row(trits, words);
        }
        if let Some(scales) = &mut weights.group_scales {
            scales.fill(255);
        }
        for sign in [1.0, -1.0] {
            let x = vec![sign; 18 * MAX_IN_FEATURES];
            let expected = naive(&weights, 0, &x);
            assert!(expected[0].abs() > 1000.0 * weights.row_scales[0].abs());
            for kernels in all_kernels() {
                assert_same(&run(kernels, &weights, 0, &x[..MAX_IN_FEATURES]), &expected[..2], "one token");
                assert_same(&run(kernels, &weights, 0, &x[..2 * MAX_IN_FEATURES]), &expected[..4], "two tokens");
                assert_same(&run(kernels, &weights, 0, &x), &expected, "many tokens");
            }
        }
    }
}

#[test]
fn codes_that_no_packer_writes_mean_the_same_everywhere() {
    let mut noise = Noise::new(3);
    for group_size in [None, Some(64)] {
        let mut weights = Weights::new(TernaryLayout { group_size, ..layout(CodeFormat::T2, 40, 328) }, 2);
        weights.codes.fill_with(|| noise.next() as u32);
        let x = noise.floats(33 * 328);
        let expected = run(Kernels::new(Isa::Scalar).unwrap(), &weights, 0, &x);
        for (kernels, tokens) in all_kernels().flat_map(|kernels| [1, 17, 33].map(|tokens| (kernels, tokens))) {
            let y = run(kernels, &weights, 0, &x[..tokens * 328]);
            assert_same(&y, &expected[..tokens * 40], &format!("{}, {tokens} tokens", kernels.isa()));
        }
    }
}

#[test]
fn a_token_does_not_see_its_batch_nor_the_threads() {
    let weights =
        Weights::new(TernaryLayout { planes: 2, group_size: Some(64), ..layout(CodeFormat::T2, 700, 2880) }, 5);
    let x = Noise::new(6).floats(35 * 2880);
    for kernels in all_kernels() {
        let alone: Vec<f32> = x.chunks(2880).flat_map(|x| run(kernels, &weights, 0, x)).collect();
        for threads in [1, 2, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let together = pool.install(|| run(kernels, &weights, 0, &x));
            assert_same(&together, &alone, &format!("{} on {threads} threads", kernels.isa()));
        }
    }
}

#[test]
fn any_rank_and_any_view_of_x_will_do() {
    fn check<B: TernaryBackend>() {
        let weights = Weights::new(layout(CodeFormat::T2, 3, 70), 1);
        let x = Noise::new(2).floats(2 * 3 * 70);
        let expected = naive(&weights, 0, &x);
        let flat = matrix::<B>(&x, [6, 70]);
        let y = ternary_linear(flat.clone().reshape([2, 3, 70]), &weights.tensor(), 0);
        assert_eq!(y.dims(), [2, 3, 3]);
        assert_same(&values(y), &expected, "rank 3");
        let view = flat.clone().transpose().reshape([70, 6]).transpose();
        assert_same(&values(ternary_linear(view, &weights.tensor(), 0)), &expected, "transposed view");
        let part = ternary_linear(flat.slice_dim(0, 2..4), &weights.tensor(), 0);
        assert_same(&values(part), &expected[6..12], "slice");
        let none = ternary_linear(Tensor::<B, 2>::zeros([0, 70], &Default::default()), &weights.tensor(), 0);
        assert_eq!(none.dims(), [0, 3]);
    }
    check::<Flex>();
    check::<NdArray>();
}

#[test]
fn other_float_types_go_in_and_come_out() {
    let weights = Weights::new(layout(CodeFormat::T2, 3, 70), 1);
    let x = Noise::new(2).floats(70);
    let wide = matrix::<NdArray>(&x, [1, 70]).cast(DType::F64);
    let y = ternary_linear(wide, &weights.tensor(), 0);
    assert_eq!(y.dtype(), DType::F64);
    assert_same(&values(y.cast(DType::F32)), &naive(&weights, 0, &x), "f64");
}

#[test]
fn dense_weights_are_the_ones_that_are_multiplied() {
    let layout = TernaryLayout { matrices: 2, planes: 2, group_size: Some(64), ..layout(CodeFormat::T5, 4, 150) };
    let weights = Weights::new(layout, 9);
    let dense = values(weights.tensor::<Flex>().to_dense(1));
    let unit = |i: usize| (0..150).map(|j| if i == j { 127.0 } else { 0.0 }).collect::<Vec<_>>();
    for i in [0, 63, 64, 149] {
        let column: Vec<f32> = (0..4).map(|r| 127.0 * dense[r * 150 + i]).collect();
        assert_close(&weights.multiply(1, &unit(i)), &column, 1e-6, "column");
    }
}

#[test]
fn tensors_that_do_not_follow_the_layout_are_refused() {
    let weights = Weights::new(TernaryLayout { group_size: Some(64), ..layout(CodeFormat::T2, 3, 128) }, 1);
    let good = weights.tensor::<Flex>();
    let TernaryWeight { codes, row_scales, group_scales, layout } = good;
    let try_new = |codes, scales, groups, layout| TernaryWeight::<Flex>::new(codes, scales, groups, layout).err();
    let missing = try_new(codes.clone(), row_scales.clone(), None, layout);
    assert!(matches!(missing, Some(FormatError::GroupScales { found: "missing", groups: 2 })));
    let without = TernaryLayout { group_size: None, ..layout };
    let superfluous = try_new(codes.clone(), row_scales.clone(), group_scales.clone(), without);
    assert!(matches!(superfluous, Some(FormatError::GroupScales { found: "given", groups: 0 })));
    let taller = TernaryLayout { rows: 4, ..layout };
    let shape = try_new(codes.clone(), row_scales.clone(), group_scales.clone(), taller);
    assert!(matches!(shape, Some(FormatError::Shape { tensor: "codes", .. })));
    let signed = Tensor::from_data(TensorData::new(vec![0i32; 24], [1, 1, 3, 8]), (&Default::default(), DType::I32));
    let dtype = try_new(signed, row_scales, group_scales, layout);
    assert!(matches!(dtype, Some(FormatError::ElementType { tensor: "codes", .. })));
}

/// Other tests run on what is there, and would not miss what is not.
#[test]
#[cfg(target_arch = "aarch64")]
fn no_instruction_set_is_left_out_where_all_are_required() {
    if std::env::var_os("TERNOSS_ISA").is_some() {
        assert_eq!(Isa::available(), [Isa::Scalar, Isa::Neon, Isa::NeonDot, Isa::NeonI8mm]);
    }
}
