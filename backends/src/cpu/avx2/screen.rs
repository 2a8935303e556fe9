//! Products of a screen's codes with int8 activations.
//!
//! `vpmaddubsw` multiplies 32 codes with 32 activations and adds neighbours to 16 bits, which hold all runs' together:
//! 8 runs * 2 neighbours * 7 * 127 = 14,224.

use std::arch::x86_64::*;

use super::super::{
    bounds::{self, LastBits, ScreenRows, padded},
    screen::RUNS,
};

type Vector = __m256i;

/// Bytes of a vector.
const WIDTH: usize = 32;

/// Bytes from the codes that are multiplied to those that are fetched meanwhile.
const AHEAD: usize = 4096;

/// Tokens that share the codes of one row.
const TOKENS: usize = 4;

/// `totals[token * rows + row]`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::cpu) fn screen_totals(rows: &ScreenRows<'_>, tokens: &[&[i8]], totals: &mut [i32]) {
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

#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::cpu) fn last_totals(last: &LastBits<'_>, rows: &[u32], levels: &[i8], totals: &mut [i32]) {
    bounds::last_totals(last, rows, levels, totals);
}

/// One row times `T` tokens.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dots<const T: usize>(rows: &ScreenRows<'_>, row: usize, tokens: [&[i8]; T]) -> [i32; T] {
    let (pairs, thirds) = rows.row(row);
    let stride = padded(rows.run);
    // What the unchecked loads below rely on.
    assert!(tokens.iter().all(|token| token.len() == RUNS * stride), "tokens of padded runs");
    let mut sums = [_mm256_setzero_si256(); T];
    let (two, third) = (_mm256_set1_epi8(3), _mm256_set1_epi8(4));
    for at in (0..rows.run).step_by(WIDTH) {
        let (even, odd, thirds) = (load(&pairs[0][at..]), load(&pairs[1][at..]), load(&thirds[at..]));
        for part in [0, 2 * WIDTH] {
            _mm_prefetch::<_MM_HINT_T0>(pairs[0].as_ptr().wrapping_add(AHEAD + 3 * at + part).cast());
        }
        let mut parts = [_mm256_setzero_si256(); T];
        let lows = [
            even,
            odd,
            _mm256_srli_epi16::<2>(even),
            _mm256_srli_epi16::<2>(odd),
            _mm256_srli_epi16::<4>(even),
            _mm256_srli_epi16::<4>(odd),
            _mm256_srli_epi16::<6>(even),
            _mm256_srli_epi16::<6>(odd),
        ];
        let highs = [
            _mm256_slli_epi16::<2>(thirds),
            _mm256_slli_epi16::<1>(thirds),
            thirds,
            _mm256_srli_epi16::<1>(thirds),
            _mm256_srli_epi16::<2>(thirds),
            _mm256_srli_epi16::<3>(thirds),
            _mm256_srli_epi16::<4>(thirds),
            _mm256_srli_epi16::<5>(thirds),
        ];
        for k in 0..RUNS {
            let codes = _mm256_or_si256(_mm256_and_si256(lows[k], two), _mm256_and_si256(highs[k], third));
            for t in 0..T {
                // SAFETY: whole vectors of a padded run.
                let levels = unsafe { _mm256_loadu_si256(tokens[t].as_ptr().add(k * stride + at).cast()) };
                parts[t] = _mm256_add_epi16(parts[t], _mm256_maddubs_epi16(codes, levels));
            }
        }
        for t in 0..T {
            sums[t] = _mm256_add_epi32(sums[t], _mm256_madd_epi16(parts[t], _mm256_set1_epi16(1)));
        }
    }
    let mut totals = [0; T];
    for t in 0..T {
        totals[t] = add_lanes(sums[t]);
    }
    totals
}

/// A vector, or what is left of a run and zeros.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load(bytes: &[u8]) -> Vector {
    let mut last = [0; WIDTH];
    let from = match bytes.first_chunk::<WIDTH>() {
        Some(whole) => whole,
        None => {
            last[..bytes.len()].copy_from_slice(bytes);
            &last
        }
    };
    // SAFETY: an array of 32 bytes.
    unsafe { _mm256_loadu_si256(from.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_lanes(x: Vector) -> i32 {
    let x = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
    let x = _mm_add_epi32(x, _mm_shuffle_epi32::<0b01_00_11_10>(x));
    _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32::<0b10_11_00_01>(x)))
}
