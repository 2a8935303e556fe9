use proptest::prelude::*;
use ternoss::backends::{
    CodeFormat,
    cpu::{linear, lookup, tokens::Tokens},
};

use crate::support::{Noise, Weights, all_kernels, any_layout, assert_same, layout};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn looking_sums_up_gives_the_bits_of_multiplying(layout in any_layout(), tokens in 0..4usize, seed: u64) {
        let weights = Weights::new(layout, seed);
        let rows = weights.rows(layout.matrices - 1);
        let x = Noise::new(seed ^ 1).floats(tokens * layout.in_features);
        for kernels in all_kernels() {
            let tokens = Tokens::quantize(kernels, &x, layout.in_features, layout.rotation);
            let mut expected = vec![f32::NAN; tokens.len() * layout.rows];
            linear::ternary_linear(kernels, &rows, &tokens, &mut expected).unwrap();
            let packed = lookup::LookupRows::new(&rows);
            prop_assert_eq!(packed.is_some(), layout.format == CodeFormat::T2);
            if let Some(packed) = packed {
                let mut out = vec![f32::NAN; expected.len()];
                lookup::ternary_linear(kernels, &packed, &lookup::Tables::new(&tokens), &mut out).unwrap();
                assert_same(&out, &expected, &kernels.isa().to_string());
            }
        }
    }
}

#[test]
fn more_rows_than_a_tile_are_looked_up_and_the_largest_sums_too() {
    for rows in [31, 33, 64, 70, 97] {
        let mut weights = Weights::new(layout(CodeFormat::T2, rows, 2880), 1);
        let ones: Vec<i8> = (0..2880).map(|i| if i % 64 < 32 { 1 } else { -1 }).collect();
        weights.codes[..180].fill(0);
        CodeFormat::T2.pack_row(&ones, &mut weights.codes[..180]);
        let x: Vec<f32> = ones.iter().map(|one| f32::from(*one)).collect();
        for kernels in all_kernels() {
            let tokens = Tokens::quantize(kernels, &x, 2880, None);
            let (mut expected, mut out) = (vec![0.0; rows], vec![f32::NAN; rows]);
            linear::ternary_linear(kernels, &weights.rows(0), &tokens, &mut expected).unwrap();
            let packed = lookup::LookupRows::new(&weights.rows(0)).unwrap();
            lookup::ternary_linear(kernels, &packed, &lookup::Tables::new(&tokens), &mut out).unwrap();
            assert_same(&out, &expected, &kernels.isa().to_string());
        }
    }
}
