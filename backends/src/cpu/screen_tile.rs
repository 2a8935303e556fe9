//! Products of a screen's codes with some tokens, in the layout of [`screen`](super::screen): one source for AVX2 and AVX-512.

/// Defines them in the file of an instruction set, with its features. That file has a `Vector`, its `WIDTH` in bytes, and for
/// them `load`, `left`, `right` (shifts by bits), `codes` (two bits of one vector and the third of another), and for a pair of
/// sums `zero`, `add` (a run's products), `end_of_runs` and `total`.
macro_rules! screen_kernels {
    ($features:literal) => {
        /// Bytes from the codes that are multiplied to those that are fetched meanwhile. Rows follow each other, one at a time:
        /// the processor's own prefetching follows a single stream best.
        const AHEAD: usize = 4096;

        /// Tokens that share the codes of a row.
        const TOKENS: usize = 4;

        /// `totals[token * rows + row]`.
        #[target_feature(enable = $features)]
        pub(in crate::cpu) fn screen_totals(
            rows: &$crate::cpu::bounds::ScreenRows<'_>,
            tokens: &[&[i8]],
            totals: &mut [i32],
        ) {
            let count = totals.len() / tokens.len().max(1);
            for (tokens, totals) in tokens.chunks(TOKENS).zip(totals.chunks_mut((TOKENS * count).max(1))) {
                for row in 0..count {
                    let mut write = |sums: &[i32]| (0..sums.len()).for_each(|t| totals[t * count + row] = sums[t]);
                    match *tokens {
                        [a, b, c, d] => write(&dots(rows, row, [a, b, c, d])),
                        [a, b, c] => write(&dots(rows, row, [a, b, c])),
                        [a, b] => write(&dots(rows, row, [a, b])),
                        [a] => write(&dots(rows, row, [a])),
                        _ => {}
                    }
                }
            }
        }

        /// One row times `T` tokens.
        #[inline]
        #[target_feature(enable = $features)]
        fn dots<const T: usize>(
            rows: &$crate::cpu::bounds::ScreenRows<'_>,
            row: usize,
            tokens: [&[i8]; T],
        ) -> [i32; T] {
            use $crate::cpu::{bounds::padded, screen::RUNS};
            let (pairs, thirds) = rows.row(row);
            let stride = padded(rows.run);
            // What the unchecked loads below rely on.
            assert!(tokens.iter().all(|token| token.len() == RUNS * stride), "tokens of padded runs");
            let mut sums = [zero(); T];
            for at in (0..rows.run).step_by(WIDTH) {
                let (even, odd, thirds) = (load(&pairs[0][at..]), load(&pairs[1][at..]), load(&thirds[at..]));
                for line in (0..3 * WIDTH).step_by(64) {
                    _mm_prefetch::<_MM_HINT_T0>(pairs[0].as_ptr().wrapping_add(AHEAD + 3 * at + line).cast());
                }
                let lows = [
                    even,
                    odd,
                    right::<2>(even),
                    right::<2>(odd),
                    right::<4>(even),
                    right::<4>(odd),
                    right::<6>(even),
                    right::<6>(odd),
                ];
                let highs = [
                    left::<2>(thirds),
                    left::<1>(thirds),
                    thirds,
                    right::<1>(thirds),
                    right::<2>(thirds),
                    right::<3>(thirds),
                    right::<4>(thirds),
                    right::<5>(thirds),
                ];
                for k in 0..RUNS {
                    let codes = codes(lows[k], highs[k]);
                    for t in 0..T {
                        // SAFETY: whole vectors of a padded run.
                        let levels =
                            unsafe { tokens[t].as_ptr().add(k * stride + at).cast::<Vector>().read_unaligned() };
                        add(&mut sums[t], k, codes, levels);
                    }
                }
                for t in 0..T {
                    end_of_runs(&mut sums[t]);
                }
            }
            let mut totals = [0; T];
            for t in 0..T {
                totals[t] = total(sums[t]);
            }
            totals
        }
    };
}
pub(super) use screen_kernels;
