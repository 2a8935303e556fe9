//! Ternary dot products with `vpdpbusd`, which multiplies unsigned with signed bytes and adds four neighbours to 32 bits: one
//! source for the two encodings and widths that processors have ([`avx512`](super::avx512), [`avxvnni`](super::avxvnni)).
//!
//! Codes (trit + 1) are the unsigned bytes. Without scales all of a row goes into one sum, and the surplus of +1 a weight is
//! taken off at the end. With scales the sum of each block starts at minus its surplus, two rows' blocks are packed to 16
//! bits (4 * 4 * 2 * 127 = 4,064 at most, and up to 64 * 127 = 8,128 of surplus), and `vpdpwssd` multiplies them with their scales and adds them up.

/// The functions of a vector type. Its file defines `Vector`, `WIDTH` (blocks in one), the operations on it, and how much its
/// registers take: `GEMV_ROWS` rows with one token, `ROWS` rows with `TOKENS` tokens.
macro_rules! vnni_kernels {
    ($features:literal) => {
        use crate::cpu::{
            linear::T2Rows,
            tokens::{QUAD, QUAD_BLOCKS, Token},
        };

        /// How far ahead codes are fetched: rows lie one after the other, but are read side by side, which the processor's own
        /// prefetcher does not recognize.
        const AHEAD: usize = 12 * 1024;

        #[target_feature(enable = $features)]
        pub(in crate::cpu) fn t2_totals(rows: &T2Rows<'_>, tokens: &[Token<'_>], totals: &mut [i32]) {
            let count = totals.len() / tokens.len().max(1);
            // What the unchecked loads of `tile` rely on.
            rows.check(count, tokens);
            match rows.scales {
                None => all_rows::<false>(rows, count, tokens, totals),
                Some(_) => all_rows::<true>(rows, count, tokens, totals),
            }
        }

        #[target_feature(enable = $features)]
        fn all_rows<const SCALED: bool>(rows: &T2Rows<'_>, count: usize, tokens: &[Token<'_>], totals: &mut [i32]) {
            let mut row = 0;
            while tokens.len() == 1 && row + GEMV_ROWS <= count {
                some_tokens::<GEMV_ROWS, 1, SCALED>(rows, row, count, tokens, tokens, 0, totals);
                row += GEMV_ROWS;
            }
            while row + ROWS <= count {
                some_rows::<ROWS, SCALED>(rows, row, count, tokens, totals);
                row += ROWS;
            }
            while row < count {
                some_rows::<2, SCALED>(rows, row, count, tokens, totals);
                row += 2;
            }
        }

        #[target_feature(enable = $features)]
        fn some_rows<const R: usize, const SCALED: bool>(
            rows: &T2Rows<'_>,
            row: usize,
            count: usize,
            tokens: &[Token<'_>],
            totals: &mut [i32],
        ) {
            for (n, some) in tokens.chunks(TOKENS).enumerate() {
                let first = n * TOKENS;
                match some.len() {
                    1 => some_tokens::<R, 1, SCALED>(rows, row, count, tokens, some, first, totals),
                    2 => some_tokens::<R, 2, SCALED>(rows, row, count, tokens, some, first, totals),
                    3 => some_tokens::<R, 3, SCALED>(rows, row, count, tokens, some, first, totals),
                    _ => some_tokens::<R, TOKENS, SCALED>(rows, row, count, tokens, some, first, totals),
                }
            }
        }

        /// `R` rows from `row` on times `some`, those of `tokens` from `first` on. Past the end the last row is taken again.
        #[target_feature(enable = $features)]
        fn some_tokens<const R: usize, const T: usize, const SCALED: bool>(
            rows: &T2Rows<'_>,
            row: usize,
            count: usize,
            tokens: &[Token<'_>],
            some: &[Token<'_>],
            first: usize,
            totals: &mut [i32],
        ) {
            let at: [usize; R] = std::array::from_fn(|r| (row + r).min(count - 1));
            let some: [&Token<'_>; T] = std::array::from_fn(|t| &some[t]);
            // SAFETY: `t2_totals` has checked the lengths for `count` rows and all tokens.
            let products = unsafe { tile::<R, T, SCALED>(rows, at, some) };
            for t in 0..T {
                let surplus = if SCALED { 0 } else { some[t].block_sums.iter().map(|sum| i32::from(*sum)).sum() };
                for r in 0..R {
                    totals[at[r] * tokens.len() + first + t] = products[r][t] - surplus;
                }
            }
        }

        /// `R` rows (an even number) times `T` tokens; without scales the codes' products, surplus included.
        ///
        /// # Safety
        /// Every row must have its `4 * blocks` words and, if `SCALED`, its padded scales; every token its activations and
        /// padded sums.
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn tile<const R: usize, const T: usize, const SCALED: bool>(
            rows: &T2Rows<'_>,
            at: [usize; R],
            tokens: [&Token<'_>; T],
        ) -> [[i32; T]; R] {
            const BYTES: usize = 16 * WIDTH;
            let (whole, rest) = (rows.blocks / WIDTH, rows.blocks % WIDTH);
            let scales = rows.scales.unwrap_or(&[]);
            let mut codes = [rows.codes.as_ptr().cast::<u8>(); R];
            let mut scale = [scales.as_ptr(); R];
            for r in 0..R {
                codes[r] = codes[r].wrapping_add(at[r] * rows.blocks * 16);
                scale[r] = scale[r].wrapping_add(at[r] * rows.scale_stride);
            }
            let activations: [*const i8; T] = std::array::from_fn(|t| tokens[t].quads.as_ptr().cast());
            let block_sums: [*const i16; T] = std::array::from_fn(|t| tokens[t].block_sums.as_ptr());
            // With scales, the sums of a pair of rows stand in that of the first one.
            let mut sums = [[zero(); T]; R];
            let mut spread = [zero(); R];
            for g in 0..whole + usize::from(rest > 0) {
                let mut words = [zero(); R];
                for r in 0..R {
                    // SAFETY: group `g` of a row is whole, or has `rest` blocks.
                    words[r] = unsafe {
                        let codes = codes[r].add(BYTES * g);
                        if g < whole { load(codes) } else { load_some(codes, rest) }
                    };
                }
                let mut dots = sums;
                for t in 0..T {
                    if SCALED {
                        // SAFETY: the sums are padded to whole groups.
                        let start = unsafe { minus_sums(block_sums[t].add(WIDTH * g)) };
                        for r in 0..R {
                            dots[r][t] = start;
                        }
                    }
                }
                for k in 0..4 {
                    for line in R * BYTES * k / 256..R * BYTES * (k + 1) / 256 {
                        prefetch(codes[0].wrapping_add(R * BYTES * g + 64 * line + AHEAD));
                    }
                    let mut quarters = words;
                    for words in &mut quarters {
                        *words = quarter(*words, k);
                    }
                    for t in 0..T {
                        let at = QUAD * (WIDTH * g / QUAD_BLOCKS) + 16 * (WIDTH * g % QUAD_BLOCKS) + 64 * k;
                        // SAFETY: the activations are padded to whole quads, which hold whole groups.
                        let activations = unsafe { load(activations[t].add(at).cast()) };
                        for r in 0..R {
                            dots[r][t] = dot(dots[r][t], quarters[r], activations);
                        }
                    }
                }
                if !SCALED {
                    sums = dots;
                    continue;
                }
                for r in (0..R).step_by(2) {
                    let (eight, i) = (g / (8 / WIDTH), g % (8 / WIDTH));
                    if i == 0 {
                        // SAFETY: the scales are padded to a multiple of 16.
                        spread[r] = unsafe { spread_scales(scale[r].add(8 * eight), scale[r + 1].add(8 * eight)) };
                    }
                    let scales = pick(spread[r], i);
                    for t in 0..T {
                        sums[r][t] = add_scaled(sums[r][t], dots[r][t], dots[r + 1][t], scales);
                    }
                }
            }
            let mut totals = [[0; T]; R];
            for r in (0..R).step_by(2) {
                for t in 0..T {
                    let both = if SCALED { sums[r][t] } else { side_by_side(sums[r][t], sums[r + 1][t]) };
                    [totals[r][t], totals[r + 1][t]] = add_lanes(both);
                }
            }
            totals
        }
    };
}

pub(super) use vnni_kernels;
