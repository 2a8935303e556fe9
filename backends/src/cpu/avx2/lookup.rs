//! Ternary products by byte shuffles: see [`lookup`](super::super::lookup).

use std::arch::x86_64::*;

use super::super::lookup::{LOOKUP_ROWS, Table};
use crate::format::T2_BLOCK_BYTES;

/// `totals[row]` of one or two tiles of 32 rows.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::cpu) fn lookup_totals(
    codes: &[[u8; LOOKUP_ROWS]],
    scales: Option<&[[u8; LOOKUP_ROWS]]>,
    tables: &[Table],
    totals: &mut [i32],
) {
    if totals.len() == 2 * LOOKUP_ROWS {
        tiles::<2>(codes, scales, tables, totals);
    } else {
        tiles::<1>(codes, scales, tables, totals);
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn tiles<const G: usize>(
    codes: &[[u8; LOOKUP_ROWS]],
    scales: Option<&[[u8; LOOKUP_ROWS]]>,
    tables: &[Table],
    totals: &mut [i32],
) {
    let zero = _mm256_setzero_si256();
    let bytes = tables.len() / 2;
    let blocks = bytes / T2_BLOCK_BYTES;
    let codes: [&[[u8; LOOKUP_ROWS]]; G] = std::array::from_fn(|g| &codes[g * bytes..(g + 1) * bytes]);
    // Rows of even and odd numbers, the lower and the upper half of each lane.
    let mut sums = [[[zero; 2]; 2]; G];
    for block in 0..blocks {
        let words = block_sums(block, codes, &tables[2 * T2_BLOCK_BYTES * block..][..2 * T2_BLOCK_BYTES]);
        for g in 0..G {
            let scales = scales.map_or(_mm256_set1_epi8(1), |scales| load(&scales[g * blocks + block]));
            let scales = [_mm256_and_si256(scales, _mm256_set1_epi16(0xff)), _mm256_srli_epi16::<8>(scales)];
            for odd in 0..2 {
                let (words, scales) = (words[g][odd], scales[odd]);
                let low = _mm256_madd_epi16(_mm256_unpacklo_epi16(words, zero), _mm256_unpacklo_epi16(scales, zero));
                let high = _mm256_madd_epi16(_mm256_unpackhi_epi16(words, zero), _mm256_unpackhi_epi16(scales, zero));
                sums[g][odd][0] = _mm256_add_epi32(sums[g][odd][0], low);
                sums[g][odd][1] = _mm256_add_epi32(sums[g][odd][1], high);
            }
        }
    }
    for (g, totals) in totals.chunks_exact_mut(LOOKUP_ROWS).enumerate() {
        for (n, sums) in sums[g].as_flattened().iter().enumerate() {
            let (odd, upper) = (n / 2, n % 2);
            let eight: [i32; 8] = bytemuck::cast(*sums);
            for (i, total) in eight.into_iter().enumerate() {
                totals[2 * (8 * (i / 4) + 4 * upper + i % 4) + odd] = total;
            }
        }
    }
}

/// The sums of one block (at most 64 * 127) of the rows with even and with odd numbers, in 16 bits.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn block_sums<const G: usize>(block: usize, codes: [&[[u8; LOOKUP_ROWS]]; G], tables: &[Table]) -> [[__m256i; 2]; G] {
    let zero = _mm256_setzero_si256();
    let mut words = [[zero; 2]; G];
    // A byte holds 16 lower parts (16 * 15 = 240), and 8 upper ones (8 * -16 = -128).
    for (eight, tables) in tables.as_chunks::<16>().0.iter().enumerate() {
        let mut low = [zero; G];
        for (four, tables) in tables.as_chunks::<8>().0.iter().enumerate() {
            let mut high = [zero; G];
            for (j, [first, second]) in tables.as_chunks::<2>().0.iter().enumerate() {
                let (first_low, second_low) = (broadcast(&first.low), broadcast(&second.low));
                let (first_high, second_high) = (broadcast(&first.high), broadcast(&second.high));
                for g in 0..G {
                    let codes = load(&codes[g][T2_BLOCK_BYTES * block + 8 * eight + 4 * four + j]);
                    let mask = _mm256_set1_epi8(15);
                    let (a, b) = (_mm256_and_si256(codes, mask), _mm256_and_si256(_mm256_srli_epi16::<4>(codes), mask));
                    low[g] = _mm256_add_epi8(low[g], _mm256_shuffle_epi8(first_low, a));
                    low[g] = _mm256_add_epi8(low[g], _mm256_shuffle_epi8(second_low, b));
                    high[g] = _mm256_add_epi8(high[g], _mm256_shuffle_epi8(first_high, a));
                    high[g] = _mm256_add_epi8(high[g], _mm256_shuffle_epi8(second_high, b));
                }
            }
            for g in 0..G {
                // 16 times the signed bytes.
                let even = _mm256_srai_epi16::<4>(_mm256_slli_epi16::<8>(high[g]));
                let odd = _mm256_slli_epi16::<4>(_mm256_srai_epi16::<8>(high[g]));
                words[g] = [_mm256_add_epi16(words[g][0], even), _mm256_add_epi16(words[g][1], odd)];
            }
        }
        for g in 0..G {
            let even = _mm256_and_si256(low[g], _mm256_set1_epi16(0xff));
            let odd = _mm256_srli_epi16::<8>(low[g]);
            words[g] = [_mm256_add_epi16(words[g][0], even), _mm256_add_epi16(words[g][1], odd)];
        }
    }
    words
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: the array has 32 bytes.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

/// The same 16 bytes in both lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn broadcast(bytes: &[u8; 16]) -> __m256i {
    // SAFETY: the array has 16 bytes.
    _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) })
}
