//! Products of 4-bit codes with int8 activations.
//!
//! `vpmaddubsw` multiplies 32 codes with 32 activations and adds neighbours to 16 bits, which hold 4 blocks:
//! 4 blocks * 2 halves * 2 neighbours * 15 * 127 = 30,480.

use std::arch::x86_64::*;

use super::super::{bounds::ScreenRows, screen::BLOCK_BYTES};
use crate::format::BLOCK;

/// Blocks between two visits to the 32-bit sums.
const CHUNK: usize = 4;

/// Rows that share the loads of one token's activations.
const ROWS: usize = 4;

const AHEAD: usize = 4;

/// Tokens that share the codes of one row.
const TOKENS: usize = 4;

/// `totals[token * rows + row]`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::cpu) fn screen_totals(rows: &ScreenRows<'_>, tokens: &[&[i8]], totals: &mut [i32]) {
    let count = totals.len() / tokens.len().max(1);
    if let [token] = *tokens {
        let whole = count / ROWS * ROWS;
        for row in (0..whole).step_by(ROWS) {
            let codes = [rows.row(row), rows.row(row + 1), rows.row(row + 2), rows.row(row + 3)];
            let sums = tile(rows.blocks, codes, [token]);
            (0..ROWS).for_each(|r| totals[row + r] = sums[r][0]);
        }
        for row in whole..count {
            totals[row] = tile(rows.blocks, [rows.row(row)], [token])[0][0];
        }
        return;
    }
    for (tokens, totals) in tokens.chunks(TOKENS).zip(totals.chunks_mut((TOKENS * count).max(1))) {
        for row in 0..count {
            let mut write = |sums: &[i32]| (0..sums.len()).for_each(|t| totals[t * count + row] = sums[t]);
            match *tokens {
                [a, b, c, d] => write(&tile(rows.blocks, [rows.row(row)], [a, b, c, d])[0]),
                [a, b, c] => write(&tile(rows.blocks, [rows.row(row)], [a, b, c])[0]),
                [a, b] => write(&tile(rows.blocks, [rows.row(row)], [a, b])[0]),
                [a] => write(&tile(rows.blocks, [rows.row(row)], [a])[0]),
                _ => {}
            }
        }
    }
}

/// `R` rows times `T` tokens.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn tile<const R: usize, const T: usize>(blocks: usize, codes: [&[u8]; R], tokens: [&[i8]; T]) -> [[i32; T]; R] {
    // What the unchecked loads below rely on.
    assert!(codes.iter().all(|codes| codes.len() == blocks * BLOCK_BYTES), "rows of whole blocks");
    assert!(tokens.iter().all(|token| token.len() == blocks * BLOCK), "tokens of whole blocks");
    let (zero, mask) = (_mm256_setzero_si256(), _mm256_set1_epi8(15));
    let mut sums = [[zero; T]; R];
    for chunk in (0..blocks).step_by(CHUNK) {
        let mut part = [[zero; T]; R];
        for block in chunk..(chunk + CHUNK).min(blocks) {
            for r in 0..R {
                // SAFETY: block < blocks, and a row has 32 bytes a block.
                let bytes = unsafe { _mm256_loadu_si256(codes[r].as_ptr().add(block * BLOCK_BYTES).cast()) };
                if R == ROWS && block % 2 == 0 {
                    let ahead = codes[r].as_ptr().wrapping_add(block * BLOCK_BYTES + AHEAD * blocks * BLOCK_BYTES);
                    _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                }
                let low = _mm256_and_si256(bytes, mask);
                let high = _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), mask);
                for t in 0..T {
                    // SAFETY: block < blocks, and a token has 64 bytes a block.
                    let x = unsafe { tokens[t].as_ptr().add(block * BLOCK).cast::<__m256i>() };
                    // SAFETY: as above, 32 bytes each.
                    let (first, second) = unsafe { (_mm256_loadu_si256(x), _mm256_loadu_si256(x.add(1))) };
                    let products =
                        _mm256_add_epi16(_mm256_maddubs_epi16(low, first), _mm256_maddubs_epi16(high, second));
                    part[r][t] = _mm256_add_epi16(part[r][t], products);
                }
            }
        }
        for r in 0..R {
            for t in 0..T {
                sums[r][t] = _mm256_add_epi32(sums[r][t], _mm256_madd_epi16(part[r][t], _mm256_set1_epi16(1)));
            }
        }
    }
    let mut totals = [[0; T]; R];
    for r in 0..R {
        for t in 0..T {
            totals[r][t] = add_lanes(sums[r][t]);
        }
    }
    totals
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_lanes(x: __m256i) -> i32 {
    let x = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
    let x = _mm_add_epi32(x, _mm_shuffle_epi32::<0b01_00_11_10>(x));
    _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32::<0b10_11_00_01>(x)))
}
