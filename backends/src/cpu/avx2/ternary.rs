//! Ternary dot products.
//!
//! A 256-bit load takes the codes of two blocks. `vpmaddubsw` multiplies 32 unsigned codes (trit + 1) with 32 activations
//! and adds neighbours to 16 bits; the surplus of +1 a weight is taken off once a row, with the sums of the activations.
//! Where blocks have scales, they take the place of the ones in the step from 16 to 32 bits (`vpmaddwd`).

use std::arch::x86_64::*;

use super::super::{
    linear::T2Rows,
    tokens::{QUAD, QUAD_BLOCKS, SUM_LANES, Token},
};

/// Quads of blocks between two visits to the 32-bit sums, as many as 16 bits can take:
/// 4 quads * 2 loads * 4 (the weight of the upper codes) * 2 (codes a byte pair) * 2 * 2 (code) * 127 = 32,512.
const CHUNK: usize = 4;

/// Rows that share the loads of one token's activations.
const GEMV_ROWS: usize = 4;

/// Tokens that share a row's codes, once they are taken apart.
const TOKENS: usize = 4;

/// How far ahead codes are fetched: rows lie one after the other, but are read side by side, which the processor's own
/// prefetcher does not recognize.
const AHEAD: usize = 5 * 1024;

/// For each load of a chunk: picks its two block scales out of 16, one into each half, as 16-bit numbers.
static PICK_SCALES: [[u8; 32]; 2 * CHUNK] = pick_scales();

const fn pick_scales() -> [[u8; 32]; 2 * CHUNK] {
    // A set top bit makes `vpshufb` write a zero.
    let mut picks = [[0x80; 32]; 2 * CHUNK];
    let mut i = 0;
    while i < 2 * CHUNK * 16 {
        let (pair, lane) = (i / 16, i % 16);
        picks[pair][2 * lane] = (2 * pair + lane / 8) as u8;
        i += 1;
    }
    picks
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::cpu) fn t2_totals(rows: &T2Rows<'_>, tokens: &[Token<'_>], totals: &mut [i32]) {
    let count = totals.len() / tokens.len().max(1);
    // What the unchecked loads below rely on.
    rows.check(count, tokens);
    match (tokens, rows.scales) {
        ([], _) => {}
        ([token], None) => one_token::<false>(rows, token, totals),
        ([token], Some(_)) => one_token::<true>(rows, token, totals),
        (tokens, None) => some_tokens::<false>(rows, tokens, totals),
        (tokens, Some(_)) => some_tokens::<true>(rows, tokens, totals),
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn one_token<const SCALED: bool>(rows: &T2Rows<'_>, token: &Token<'_>, totals: &mut [i32]) {
    let surplus = if SCALED { 0 } else { sum(token) };
    let mut quads = totals.chunks_exact_mut(GEMV_ROWS);
    let mut row = 0;
    for quad in quads.by_ref() {
        // SAFETY: `t2_totals` has checked the lengths for all rows.
        let products = unsafe { row_tile::<GEMV_ROWS, SCALED>(rows, row, token) };
        quad.iter_mut().zip(products).for_each(|(total, product)| *total = product - surplus);
        row += GEMV_ROWS;
    }
    for total in quads.into_remainder() {
        // SAFETY: as above.
        *total = unsafe { row_tile::<1, SCALED>(rows, row, token)[0] } - surplus;
        row += 1;
    }
}

/// What codes of 1 everywhere would sum to.
fn sum(token: &Token<'_>) -> i32 {
    token.block_sums.iter().map(|sum| i32::from(*sum)).sum()
}

/// `R` rows times one token; without scales the codes' products, surplus included.
///
/// # Safety
/// The rows must have their words and, if `SCALED`, their padded scales; the token its activations and padded sums.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn row_tile<const R: usize, const SCALED: bool>(rows: &T2Rows<'_>, first: usize, token: &Token<'_>) -> [i32; R] {
    let zero = _mm256_setzero_si256();
    let (bytes, stride) = (16 * rows.blocks, rows.scale_stride);
    let codes = rows.codes.as_ptr().cast::<u8>().wrapping_add(first * bytes);
    let scales = rows.scales.unwrap_or(&[]).as_ptr().wrapping_add(first * stride);
    let activations = token.quads.as_ptr().cast::<i8>();
    let whole = rows.blocks / QUAD_BLOCKS;
    let mut sums = [zero; R];
    for start in (0..rows.blocks.div_ceil(QUAD_BLOCKS)).step_by(CHUNK) {
        let mut part = RowPart { low: [zero; R], high: [zero; R], scales: [zero; R] };
        if SCALED {
            // SAFETY: scales and sums are padded to whole chunks.
            unsafe {
                let block_sums = _mm256_loadu_si256(token.block_sums.as_ptr().add(QUAD_BLOCKS * start).cast());
                for r in 0..R {
                    let scales = _mm_loadu_si128(scales.add(r * stride + QUAD_BLOCKS * start).cast());
                    part.scales[r] = _mm256_broadcastsi128_si256(scales);
                    let surplus = _mm256_madd_epi16(block_sums, _mm256_cvtepu8_epi16(scales));
                    sums[r] = _mm256_sub_epi32(sums[r], _mm256_slli_epi32::<2>(surplus));
                }
            }
        }
        let end = (start + CHUNK).min(whole);
        for q in start..end {
            for half in 0..2 {
                for line in 0..R / 2 {
                    let at = R * (64 * q + 32 * half) + 64 * line;
                    _mm_prefetch::<_MM_HINT_T0>(codes.wrapping_add(at + AHEAD).cast());
                }
                let mut words = [zero; R];
                for r in 0..R {
                    // SAFETY: a row has `whole` quads.
                    words[r] = unsafe { _mm256_loadu_si256(codes.add(r * bytes + 64 * q + 32 * half).cast()) };
                }
                // SAFETY: the token has as many.
                let activations = unsafe { quarters(activations.add(QUAD * q + 32 * half)) };
                part.add::<SCALED>(words, activations, 2 * (q - start) + half);
            }
        }
        if end < start + CHUNK {
            for half in 0..(rows.blocks % QUAD_BLOCKS).div_ceil(2) {
                let mut words = [zero; R];
                for r in 0..R {
                    // SAFETY: so many blocks of a row are left.
                    words[r] = unsafe { load_rest(codes.add(r * bytes + 64 * end + 32 * half), rows.blocks, half) };
                }
                // SAFETY: the activations are padded to whole quads.
                let activations = unsafe { quarters(activations.add(QUAD * end + 32 * half)) };
                part.add::<SCALED>(words, activations, 2 * (end - start) + half);
            }
        }
        for r in 0..R {
            let (one, four) = (_mm256_set1_epi16(1), _mm256_set1_epi16(4));
            let low = if SCALED { part.low[r] } else { _mm256_madd_epi16(part.low[r], four) };
            let high = if SCALED { zero } else { _mm256_madd_epi16(part.high[r], one) };
            sums[r] = _mm256_add_epi32(sums[r], _mm256_add_epi32(low, high));
        }
    }
    for sum in &mut sums {
        *sum = _mm256_srai_epi32::<2>(*sum);
    }
    add_lanes(sums)
}

/// The sums of a chunk of `R` rows. With scales, `low` holds four times the 32-bit sums; without, 16-bit sums of the codes at
/// bits 0 and 4 in `low`, and four times those at bits 2 and 6 in `high`: that saves shifting them down.
struct RowPart<const R: usize> {
    low: [__m256i; R],
    high: [__m256i; R],
    scales: [__m256i; R],
}

impl<const R: usize> RowPart<R> {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn add<const SCALED: bool>(&mut self, codes: [__m256i; R], activations: [__m256i; 4], i: usize) {
        let (at_0, at_2) = (_mm256_set1_epi8(0b0011), _mm256_set1_epi8(0b1100));
        for r in 0..R {
            let upper = _mm256_srli_epi16::<4>(codes[r]);
            let m0 = _mm256_maddubs_epi16(_mm256_and_si256(codes[r], at_0), activations[0]);
            let m1 = _mm256_maddubs_epi16(_mm256_and_si256(codes[r], at_2), activations[1]);
            let m2 = _mm256_maddubs_epi16(_mm256_and_si256(upper, at_0), activations[2]);
            let m3 = _mm256_maddubs_epi16(_mm256_and_si256(upper, at_2), activations[3]);
            let (low, high) = (_mm256_add_epi16(m0, m2), _mm256_add_epi16(m1, m3));
            if SCALED {
                let both = _mm256_add_epi16(high, _mm256_slli_epi16::<2>(low));
                let scale = _mm256_shuffle_epi8(self.scales[r], pick(i));
                self.low[r] = _mm256_add_epi32(self.low[r], _mm256_madd_epi16(both, scale));
            } else {
                self.low[r] = _mm256_add_epi16(self.low[r], low);
                self.high[r] = _mm256_add_epi16(self.high[r], high);
            }
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn some_tokens<const SCALED: bool>(rows: &T2Rows<'_>, tokens: &[Token<'_>], totals: &mut [i32]) {
    // SAFETY: `t2_totals` has checked the lengths for all rows and tokens.
    let tile = |row: usize, tokens: &[Token<'_>], totals: &mut [i32]| unsafe {
        match tokens.len() {
            1 => token_tile::<1, SCALED>(rows, row, tokens, totals),
            2 => token_tile::<2, SCALED>(rows, row, tokens, totals),
            3 => token_tile::<3, SCALED>(rows, row, tokens, totals),
            _ => token_tile::<TOKENS, SCALED>(rows, row, tokens, totals),
        }
    };
    for (row, totals) in totals.chunks_exact_mut(tokens.len()).enumerate() {
        for (tokens, totals) in tokens.chunks(TOKENS).zip(totals.chunks_mut(TOKENS)) {
            tile(row, tokens, totals);
        }
    }
    if !SCALED {
        for (t, token) in tokens.iter().enumerate() {
            let surplus = sum(token);
            totals.iter_mut().skip(t).step_by(tokens.len()).for_each(|total| *total -= surplus);
        }
    }
}

/// One row times `T` tokens, `totals[token]`: the codes are taken apart once. Without scales the surplus is included.
///
/// # Safety
/// As for [`row_tile`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn token_tile<const T: usize, const SCALED: bool>(
    rows: &T2Rows<'_>,
    row: usize,
    tokens: &[Token<'_>],
    totals: &mut [i32],
) {
    let zero = _mm256_setzero_si256();
    let (bytes, padded) = (16 * rows.blocks, rows.padded());
    let codes = rows.codes.as_ptr().cast::<u8>().wrapping_add(row * bytes);
    let scales = rows.scales.unwrap_or(&[]).as_ptr().wrapping_add(row * rows.scale_stride);
    let activations: [*const i8; T] = std::array::from_fn(|t| tokens[t].quads.as_ptr().cast());
    let whole = rows.blocks / QUAD_BLOCKS;
    let mut sums = [zero; T];
    for start in (0..rows.blocks.div_ceil(QUAD_BLOCKS)).step_by(CHUNK) {
        let mut spread = zero;
        if SCALED {
            // SAFETY: scales are padded to whole chunks.
            spread = unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(scales.add(QUAD_BLOCKS * start).cast())) };
        }
        let mut part = [zero; T];
        let end = (start + CHUNK).min(whole);
        for q in start..end {
            for half in 0..2 {
                // SAFETY: a row has `whole` quads, a token as many.
                unsafe {
                    let words = _mm256_loadu_si256(codes.add(64 * q + 32 * half).cast());
                    let at = QUAD * q + 32 * half;
                    add_words::<T, SCALED>(&mut part, words, activations, at, spread, 2 * (q - start) + half);
                }
            }
        }
        if end < start + CHUNK {
            for half in 0..(rows.blocks % QUAD_BLOCKS).div_ceil(2) {
                // SAFETY: so many blocks of a row are left, and the activations are padded to whole quads.
                unsafe {
                    let words = load_rest(codes.add(64 * end + 32 * half), rows.blocks, half);
                    let at = QUAD * end + 32 * half;
                    add_words::<T, SCALED>(&mut part, words, activations, at, spread, 2 * (end - start) + half);
                }
            }
        }
        for t in 0..T {
            let part = if SCALED { part[t] } else { _mm256_madd_epi16(part[t], _mm256_set1_epi16(1)) };
            sums[t] = _mm256_add_epi32(sums[t], part);
        }
    }
    for t in 0..T {
        let surplus = if SCALED {
            // SAFETY: scales and sums are padded alike.
            unsafe { scaled_surplus(scales, &tokens[t].block_sums[..padded]) }
        } else {
            zero
        };
        sums[t] = _mm256_sub_epi32(sums[t], surplus);
    }
    totals.copy_from_slice(&add_lanes(sums));
}

/// What codes of 1 everywhere would sum to.
///
/// # Safety
/// There must be as many scales as sums, a multiple of 16.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn scaled_surplus(scales: *const u8, block_sums: &[i16]) -> __m256i {
    let mut surplus = _mm256_setzero_si256();
    for at in (0..block_sums.len()).step_by(SUM_LANES) {
        // SAFETY: 16 sums lie there, and by the caller's promise as many scales.
        unsafe {
            let scales = _mm256_cvtepu8_epi16(_mm_loadu_si128(scales.add(at).cast()));
            let sums = _mm256_loadu_si256(block_sums.as_ptr().add(at).cast());
            surplus = _mm256_add_epi32(surplus, _mm256_madd_epi16(scales, sums));
        }
    }
    surplus
}

/// Adds two blocks to 32-bit sums, times their scales, or to 16-bit sums.
///
/// # Safety
/// The activations of two blocks of a quad must lie `at` bytes after each of `from`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn add_words<const T: usize, const SCALED: bool>(
    sums: &mut [__m256i; T],
    words: __m256i,
    from: [*const i8; T],
    at: usize,
    spread: __m256i,
    i: usize,
) {
    let shifted = [words, _mm256_srli_epi16::<2>(words), _mm256_srli_epi16::<4>(words), _mm256_srli_epi16::<6>(words)];
    let mut all = if SCALED { [_mm256_setzero_si256(); T] } else { *sums };
    for (k, shifted) in shifted.into_iter().enumerate() {
        let codes = _mm256_and_si256(shifted, _mm256_set1_epi8(3));
        for t in 0..T {
            // SAFETY: the caller's promise; quads start at multiples of 64.
            let activations = unsafe { _mm256_load_si256(from[t].add(at + 64 * k).cast()) };
            all[t] = _mm256_add_epi16(all[t], _mm256_maddubs_epi16(codes, activations));
        }
    }
    let scale = _mm256_shuffle_epi8(spread, pick(i));
    for t in 0..T {
        sums[t] = if SCALED { _mm256_add_epi32(sums[t], _mm256_madd_epi16(all[t], scale)) } else { all[t] };
    }
}

/// The activations of two blocks in the order of their codes.
///
/// # Safety
/// The two blocks of a quad must lie there.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn quarters(from: *const i8) -> [__m256i; 4] {
    let mut quarters = [_mm256_setzero_si256(); 4];
    for (k, quarter) in quarters.iter_mut().enumerate() {
        // SAFETY: the caller's promise; quads start at multiples of 64.
        *quarter = unsafe { _mm256_load_si256(from.add(64 * k).cast()) };
    }
    quarters
}

/// Half of the last quad of a row of so many blocks, no multiple of 4: two blocks, or one and zeros.
///
/// # Safety
/// What the row has of it must lie there, at least one block.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load_rest(from: *const u8, blocks: usize, half: usize) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        if blocks % QUAD_BLOCKS >= 2 * half + 2 {
            _mm256_loadu_si256(from.cast())
        } else {
            _mm256_zextsi128_si256(_mm_loadu_si128(from.cast()))
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn pick(i: usize) -> __m256i {
    let bytes = &PICK_SCALES[i % (2 * CHUNK)];
    // SAFETY: the array has 32 bytes.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

/// The sum of each vector's lanes, four vectors at a time.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_lanes<const N: usize>(x: [__m256i; N]) -> [i32; N] {
    let mut totals = [0; N];
    for at in (0..N).step_by(4) {
        let some = (N - at).min(4);
        let mut four = [_mm256_setzero_si256(); 4];
        four[..some].copy_from_slice(&x[at..at + some]);
        let [a, b, c, d] = four;
        let low = _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
        let high = _mm256_add_epi32(_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
        let all = _mm256_add_epi32(_mm256_unpacklo_epi64(low, high), _mm256_unpackhi_epi64(low, high));
        let all = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256::<1>(all));
        let four: [i32; 4] = bytemuck::cast(all);
        totals[at..at + some].copy_from_slice(&four[..some]);
    }
    totals
}
