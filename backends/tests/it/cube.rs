//! The GPU kernels against the definitions and against Burn's operations. Skipped, with a word, where no Vulkan driver is.

use std::panic;

use burn::tensor::Tensor;
use proptest::prelude::*;
use ternoss_backends::{cube::Wgpu, ternary_linear};

use crate::support::{Noise, Weights, any_layout, assert_close, matrix, values};

/// Whether there is a device, asked once: without one the runtime panics.
fn device() -> bool {
    static DEVICE: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *DEVICE.get_or_init(|| {
        let found = panic::catch_unwind(|| Tensor::<Wgpu, 1>::zeros([1], &Default::default()).into_data());
        if found.is_err() {
            eprintln!("no device for wgpu: skipped");
        }
        found.is_ok()
    })
}

fn naive(weights: &Weights, matrix: usize, x: &[f32]) -> Vec<f32> {
    x.chunks(weights.layout.in_features).flat_map(|x| weights.multiply(matrix, x)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn ternary_products_are_the_definition(layout in any_layout(), tokens in prop_oneof![1..=5usize, 12..=70usize], seed: u64) {
        if !device() {
            return Ok(());
        }
        let weights = Weights::new(layout, seed);
        let x = Noise::new(seed ^ 1).floats(tokens * layout.in_features);
        for number in 0..layout.matrices {
            let y = values(ternary_linear(matrix::<Wgpu>(&x, [tokens, layout.in_features]), &weights.tensor(), number));
            assert_close(&y, &naive(&weights, number, &x), 1e-5, &format!("{layout:?}"));
        }
    }
}
