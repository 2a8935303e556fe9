//! Ternary dot products.
//!
//! A 256-bit load takes the codes of two blocks. `vpmaddubsw` multiplies 32 unsigned codes (trit + 1) with 32 activations
//! and adds neighbours to 16 bits; the surplus of +1 a weight is taken off once a row, with the sums of the activations.
//! Where blocks have scales, they take the place of the ones in the step from 16 to 32 bits (`vpmaddwd`).

use std::arch::x86_64::*;

use super::super::{
    linear::T2Rows,
    tokens::{Pair, Token},
};

/// Pairs of blocks between two visits to the 32-bit sums, as many as 16 bits can take:
/// 8 pairs * 4 (the weight of the upper codes) * 2 (codes a byte pair) * 2 * 2 (code) * 127 = 32,512.
const CHUNK: usize = 8;

/// Blocks in a chunk, and block scales in a register.
const CHUNK_BLOCKS: usize = 2 * CHUNK;

/// Rows that share the loads of one token's activations.
const GEMV_ROWS: usize = 4;

/// For each pair of a chunk: picks its two block scales out of 16, one into each half, as 16-bit numbers.
static PICK_SCALES: [[u8; 32]; CHUNK] = pick_scales();

const fn pick_scales() -> [[u8; 32]; CHUNK] {
    // A set top bit makes `vpshufb` write a zero.
    let mut picks = [[0x80; 32]; CHUNK];
    let mut i = 0;
    while i < CHUNK * 16 {
        let (pair, lane) = (i / 16, i % 16);
        picks[pair][2 * lane] = (2 * pair + lane / 8) as u8;
        i += 1;
    }
    picks
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::cpu) fn t2_totals(rows: &T2Rows<'_>, tokens: &[Token<'_>], totals: &mut [i32]) {
    // What the unchecked loads below rely on.
    for token in tokens {
        assert!(token.pairs.len() >= rows.blocks.div_ceil(2), "activations of a token");
        assert!(token.block_sums.len() >= rows.blocks.next_multiple_of(CHUNK_BLOCKS), "sums of a token");
    }
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
    let mut quads = totals.chunks_exact_mut(GEMV_ROWS);
    let mut row = 0;
    for quad in quads.by_ref() {
        row_tile::<GEMV_ROWS, SCALED>(rows, row, token, quad);
        row += GEMV_ROWS;
    }
    for total in quads.into_remainder().chunks_exact_mut(1) {
        row_tile::<1, SCALED>(rows, row, token, total);
        row += 1;
    }
}

/// `R` rows times one token, `totals[row]`.
#[target_feature(enable = "avx2,fma,f16c")]
fn row_tile<const R: usize, const SCALED: bool>(
    rows: &T2Rows<'_>,
    first: usize,
    token: &Token<'_>,
    totals: &mut [i32],
) {
    let zero = _mm256_setzero_si256();
    let mut codes = [[].as_slice(); R];
    for (r, codes) in codes.iter_mut().enumerate() {
        *codes = rows.row(first + r);
    }
    let (mut sums, mut surplus) = ([zero; R], [zero; R]);
    for chunk in 0..rows.blocks.div_ceil(CHUNK_BLOCKS) {
        let mut part = RowPart { low: [zero; R], high: [zero; R], scales: [zero; R] };
        let block_sums = load_sums(token, chunk);
        for r in 0..R {
            let scales = load_scales::<SCALED>(rows, first + r, chunk);
            part.scales[r] = _mm256_broadcastsi128_si256(scales);
            let products = _mm256_madd_epi16(block_sums, _mm256_cvtepu8_epi16(scales));
            surplus[r] = _mm256_add_epi32(surplus[r], products);
        }
        let pairs = chunk * CHUNK..(chunk * CHUNK + CHUNK).min(rows.blocks / 2);
        for p in pairs.clone() {
            let mut words = [zero; R];
            for r in 0..R {
                // SAFETY: p < blocks / 2, and a row has 4 words a block.
                words[r] = unsafe { load_pair(codes[r], p) };
            }
            // SAFETY: a token has at least blocks / 2 pairs, asserted on entry.
            part.add::<SCALED>(words, unsafe { token.pairs.get_unchecked(p) }, p % CHUNK);
        }
        if pairs.end < chunk * CHUNK + CHUNK && 2 * pairs.end < rows.blocks {
            let mut words = [zero; R];
            for r in 0..R {
                words[r] = load_last(codes[r]);
            }
            part.add::<SCALED>(words, &token.pairs[pairs.end], pairs.end % CHUNK);
        }
        for r in 0..R {
            let (one, four) = (_mm256_set1_epi16(1), _mm256_set1_epi16(4));
            let low = if SCALED { part.low[r] } else { _mm256_madd_epi16(part.low[r], four) };
            let high = if SCALED { zero } else { _mm256_madd_epi16(part.high[r], one) };
            sums[r] = _mm256_add_epi32(sums[r], _mm256_add_epi32(low, high));
        }
    }
    for r in 0..R {
        totals[r] = add_lanes(_mm256_sub_epi32(_mm256_srai_epi32::<2>(sums[r]), surplus[r]));
    }
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
    fn add<const SCALED: bool>(&mut self, codes: [__m256i; R], pair: &Pair, i: usize) {
        let (at_0, at_2) = (_mm256_set1_epi8(0b0011), _mm256_set1_epi8(0b1100));
        for r in 0..R {
            let upper = _mm256_srli_epi16::<4>(codes[r]);
            let m0 = _mm256_maddubs_epi16(_mm256_and_si256(codes[r], at_0), quarter(pair, 0));
            let m1 = _mm256_maddubs_epi16(_mm256_and_si256(codes[r], at_2), quarter(pair, 1));
            let m2 = _mm256_maddubs_epi16(_mm256_and_si256(upper, at_0), quarter(pair, 2));
            let m3 = _mm256_maddubs_epi16(_mm256_and_si256(upper, at_2), quarter(pair, 3));
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
    for (row, totals) in totals.chunks_exact_mut(tokens.len()).enumerate() {
        match tokens.len() {
            1 => row_tile::<1, SCALED>(rows, row, &tokens[0], totals),
            2 => token_tile::<2, SCALED>(rows, row, tokens, totals),
            3 => token_tile::<3, SCALED>(rows, row, tokens, totals),
            4 => token_tile::<4, SCALED>(rows, row, tokens, totals),
            5 => token_tile::<5, SCALED>(rows, row, tokens, totals),
            6 => token_tile::<6, SCALED>(rows, row, tokens, totals),
            7 => token_tile::<7, SCALED>(rows, row, tokens, totals),
            _ => token_tile::<8, SCALED>(rows, row, tokens, totals),
        }
    }
}

/// One row times `T` tokens, `totals[token]`: the codes are taken apart once.
#[target_feature(enable = "avx2,fma,f16c")]
fn token_tile<const T: usize, const SCALED: bool>(
    rows: &T2Rows<'_>,
    row: usize,
    tokens: &[Token<'_>],
    totals: &mut [i32],
) {
    let zero = _mm256_setzero_si256();
    let codes = rows.row(row);
    let mut pairs = [[].as_slice(); T];
    for (pairs, token) in pairs.iter_mut().zip(tokens) {
        *pairs = token.pairs;
    }
    let (mut sums, mut surplus) = ([zero; T], [zero; T]);
    for chunk in 0..rows.blocks.div_ceil(CHUNK_BLOCKS) {
        let scales = load_scales::<SCALED>(rows, row, chunk);
        let spread = _mm256_broadcastsi128_si256(scales);
        let mut part = [zero; T];
        let range = chunk * CHUNK..(chunk * CHUNK + CHUNK).min(rows.blocks / 2);
        for p in range.clone() {
            // SAFETY: p < blocks / 2, and a row has 4 words a block.
            let quarters = take_apart(unsafe { load_pair(codes, p) });
            for t in 0..T {
                // SAFETY: a token has at least blocks / 2 pairs, asserted on entry.
                let pair = unsafe { pairs[t].get_unchecked(p) };
                part[t] = add_pair::<SCALED>(part[t], quarters, pair, spread, p % CHUNK);
            }
        }
        if range.end < chunk * CHUNK + CHUNK && 2 * range.end < rows.blocks {
            let quarters = take_apart(load_last(codes));
            for t in 0..T {
                part[t] = add_pair::<SCALED>(part[t], quarters, &pairs[t][range.end], spread, range.end % CHUNK);
            }
        }
        let scales = _mm256_cvtepu8_epi16(scales);
        for t in 0..T {
            let part = if SCALED { part[t] } else { _mm256_madd_epi16(part[t], _mm256_set1_epi16(1)) };
            sums[t] = _mm256_add_epi32(sums[t], part);
            let products = _mm256_madd_epi16(load_sums(&tokens[t], chunk), scales);
            surplus[t] = _mm256_add_epi32(surplus[t], products);
        }
    }
    for t in 0..T {
        totals[t] = add_lanes(_mm256_sub_epi32(sums[t], surplus[t]));
    }
}

/// The four weights of each byte.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn take_apart(codes: __m256i) -> [__m256i; 4] {
    let mask = _mm256_set1_epi8(3);
    [
        _mm256_and_si256(codes, mask),
        _mm256_and_si256(_mm256_srli_epi16::<2>(codes), mask),
        _mm256_and_si256(_mm256_srli_epi16::<4>(codes), mask),
        _mm256_and_si256(_mm256_srli_epi16::<6>(codes), mask),
    ]
}

/// Adds a pair of blocks to 32-bit sums, times their scales, or to 16-bit sums.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_pair<const SCALED: bool>(sum: __m256i, codes: [__m256i; 4], pair: &Pair, spread: __m256i, i: usize) -> __m256i {
    let m0 = _mm256_maddubs_epi16(codes[0], quarter(pair, 0));
    let m1 = _mm256_maddubs_epi16(codes[1], quarter(pair, 1));
    let m2 = _mm256_maddubs_epi16(codes[2], quarter(pair, 2));
    let m3 = _mm256_maddubs_epi16(codes[3], quarter(pair, 3));
    let all = _mm256_add_epi16(_mm256_add_epi16(m0, m1), _mm256_add_epi16(m2, m3));
    if SCALED {
        let scale = _mm256_shuffle_epi8(spread, pick(i));
        _mm256_add_epi32(sum, _mm256_madd_epi16(all, scale))
    } else {
        _mm256_add_epi16(sum, all)
    }
}

/// The codes of a pair of blocks.
///
/// # Safety
/// The row must have at least `8 * pair + 8` words.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load_pair(row: &[u32], pair: usize) -> __m256i {
    debug_assert!(row.len() >= 8 * pair + 8);
    // SAFETY: the caller's promise.
    unsafe { _mm256_loadu_si256(row.as_ptr().add(8 * pair).cast()) }
}

/// The codes of the last of an odd number of blocks, and zeros.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load_last(row: &[u32]) -> __m256i {
    let block = &row[row.len() - 4..];
    // SAFETY: the slice has 4 words, 16 bytes.
    unsafe { _mm256_zextsi128_si256(_mm_loadu_si128(block.as_ptr().cast())) }
}

/// 32 of a pair's activations.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn quarter(pair: &Pair, k: usize) -> __m256i {
    let quarter = &pair.0[32 * k..32 * k + 32];
    // SAFETY: the slice has 32 bytes, and a `Pair` starts at a multiple of 64.
    unsafe { _mm256_load_si256(quarter.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn pick(i: usize) -> __m256i {
    let bytes = &PICK_SCALES[i % CHUNK];
    // SAFETY: the array has 32 bytes.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

/// The scales of 16 blocks, ones if there are none.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load_scales<const SCALED: bool>(rows: &T2Rows<'_>, row: usize, chunk: usize) -> __m128i {
    match rows.row_scales(row) {
        Some(scales) if SCALED => {
            let scales = &scales[CHUNK_BLOCKS * chunk..CHUNK_BLOCKS * chunk + CHUNK_BLOCKS];
            // SAFETY: the slice has 16 bytes.
            unsafe { _mm_loadu_si128(scales.as_ptr().cast()) }
        }
        _ => _mm_set1_epi8(1),
    }
}

/// The sums of a token's activations in 16 blocks.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load_sums(token: &Token<'_>, chunk: usize) -> __m256i {
    let sums = &token.block_sums[CHUNK_BLOCKS * chunk..CHUNK_BLOCKS * chunk + CHUNK_BLOCKS];
    // SAFETY: the slice has 16 numbers of 2 bytes.
    unsafe { _mm256_loadu_si256(sums.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_lanes(x: __m256i) -> i32 {
    let x = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
    let x = _mm_add_epi32(x, _mm_shuffle_epi32::<0b01_00_11_10>(x));
    _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32::<0b10_11_00_01>(x)))
}
