//! Products of 4-bit codes with int8 activations by AVX-512 VNNI: a vector takes two blocks, and sums go to 32 bits at once.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{bounds::ScreenRows, screen::BLOCK_BYTES};
use crate::format::BLOCK;

/// Rows that share the loads of one token's activations.
const ROWS: usize = 4;

/// Rows from one that is multiplied to the one that is fetched meanwhile.
const AHEAD: usize = 4;

/// `totals[token * rows + row]`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn screen_totals(rows: &ScreenRows<'_>, tokens: &[&[i8]], totals: &mut [i32]) {
    let count = totals.len() / tokens.len().max(1);
    for (token, totals) in tokens.iter().zip(totals.chunks_exact_mut(count.max(1))) {
        let mut quads = totals.chunks_exact_mut(ROWS);
        let mut row = 0;
        for quad in quads.by_ref() {
            let codes = [rows.row(row), rows.row(row + 1), rows.row(row + 2), rows.row(row + 3)];
            quad.copy_from_slice(&dots(rows.blocks, codes, token));
            row += ROWS;
        }
        for total in quads.into_remainder() {
            [*total] = dots(rows.blocks, [rows.row(row)], token);
            row += 1;
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn dots<const R: usize>(blocks: usize, codes: [&[u8]; R], token: &[i8]) -> [i32; R] {
    // What the unchecked loads below rely on.
    assert!(codes.iter().all(|codes| codes.len() == blocks * BLOCK_BYTES), "rows of whole blocks");
    assert!(token.len() == blocks * BLOCK, "tokens of whole blocks");
    let (zero, mask) = (_mm512_setzero_si512(), _mm512_set1_epi8(15));
    let (mut low, mut high) = ([zero; R], [zero; R]);
    for block in (0..blocks).step_by(2) {
        // The second of the two may be missing.
        let (both, bytes) = (block + 1 < blocks, block * BLOCK_BYTES);
        // SAFETY: block < blocks, and a token has 64 bytes a block.
        let first = unsafe { _mm512_loadu_si512(token.as_ptr().add(block * BLOCK).cast()) };
        let second = match both {
            // SAFETY: as above, block + 1 < blocks.
            true => unsafe { _mm512_loadu_si512(token.as_ptr().add((block + 1) * BLOCK).cast()) },
            false => zero,
        };
        // The first halves of both blocks, and the second halves: what low and high nibbles belong to.
        let (firsts, seconds) = (
            _mm512_shuffle_i64x2::<0b01_00_01_00>(first, second),
            _mm512_shuffle_i64x2::<0b11_10_11_10>(first, second),
        );
        for r in 0..R {
            let from = codes[r].as_ptr().wrapping_add(bytes);
            _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(AHEAD * blocks * BLOCK_BYTES).cast());
            let pair = match both {
                // SAFETY: a row has 32 bytes a block, and both blocks are there.
                true => unsafe { _mm512_loadu_si512(from.cast()) },
                // SAFETY: one block of 32 bytes is there.
                false => unsafe { _mm512_zextsi256_si512(_mm256_loadu_si256(from.cast())) },
            };
            low[r] = _mm512_dpbusd_epi32(low[r], _mm512_and_si512(pair, mask), firsts);
            let upper = _mm512_and_si512(_mm512_srli_epi16::<4>(pair), mask);
            high[r] = _mm512_dpbusd_epi32(high[r], upper, seconds);
        }
    }
    let mut sums = [0; R];
    for r in 0..R {
        sums[r] = _mm512_reduce_add_epi32(_mm512_add_epi32(low[r], high[r]));
    }
    sums
}
