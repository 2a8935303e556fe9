//! Dot products of some stored rows with some tokens, in the order that [`stored`](super::stored) fixes: one source for AVX2
//! and AVX-512.

/// Defines them in the file of an instruction set, with its features. That file has the sixteen `Lanes` and, for them,
/// `zero`, `load`, `load_stored`, `multiply_add` and `add`, and says in `dots_of` which tiles it takes.
macro_rules! stored_kernels {
    ($features:literal) => {
        const BF16: u8 = 0;
        const F16: u8 = 1;
        const F32: u8 = 2;

        #[target_feature(enable = $features)]
        pub(in crate::cpu) fn stored_dots(
            float: $crate::ops::StoredFloat,
            rows: &[&[u32]],
            tokens: &[&[f32]],
            out: &mut [f32],
        ) {
            use $crate::ops::StoredFloat;
            match float {
                StoredFloat::Bf16 => dots_of::<BF16>(float, rows, tokens, out),
                StoredFloat::F16 => dots_of::<F16>(float, rows, tokens, out),
                StoredFloat::F32 => dots_of::<F32>(float, rows, tokens, out),
            }
        }

        /// `R` stored rows times `T` tokens, `out[row * T + token]`.
        #[target_feature(enable = $features)]
        fn dot_tile<const R: usize, const T: usize, const FLOAT: u8>(
            float: $crate::ops::StoredFloat,
            rows: [&[u32]; R],
            tokens: [&[f32]; T],
            out: &mut [f32],
        ) {
            use $crate::cpu::stored::LANES;
            let step = if FLOAT == F32 { LANES } else { LANES / 2 };
            let whole = rows[0].len() / step;
            // What the unchecked loads below rely on.
            assert!(rows.iter().all(|row| row.len() == rows[0].len()), "rows of one matrix");
            assert!(tokens.iter().all(|token| token.len() >= rows[0].len().div_ceil(step) * LANES), "padded tokens");
            let mut sums = [[zero(); T]; R];
            for i in 0..whole {
                for r in 0..R {
                    // SAFETY: i < whole, so the row has the words of 16 elements from i * step on.
                    let weights = unsafe { load_stored::<FLOAT>(rows[r].as_ptr().add(i * step)) };
                    for t in 0..T {
                        // SAFETY: tokens have at least whole * 16 floats.
                        let x = unsafe { load(tokens[t].as_ptr().add(i * LANES)) };
                        sums[r][t] = multiply_add(weights, x, sums[r][t]);
                    }
                }
            }
            if whole * step < rows[0].len() {
                for r in 0..R {
                    let mut padded = [0.0; LANES];
                    float.decode(&rows[r][whole * step..], &mut padded);
                    // SAFETY: the array has 16 floats.
                    let weights = unsafe { load(padded.as_ptr()) };
                    for t in 0..T {
                        // SAFETY: tokens have floats for the last, padded step as well.
                        let x = unsafe { load(tokens[t].as_ptr().add(whole * LANES)) };
                        sums[r][t] = multiply_add(weights, x, sums[r][t]);
                    }
                }
            }
            for r in 0..R {
                for t in 0..T {
                    out[r * T + t] = add(sums[r][t]);
                }
            }
        }
    };
}
pub(super) use stored_kernels;
