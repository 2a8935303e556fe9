//! t5 rows rewritten as t2: 16 neighbouring weights are the same digit of 16 neighbouring bytes.

use std::arch::x86_64::*;

use super::super::math::FRACTION;
use crate::format::{BLOCK, T2_BLOCK_BYTES};

/// Weights that are read together.
const RUN: usize = 16;

/// One t5 row of `in_features` weights rewritten as t2, padding included.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::cpu) fn t5_to_t2(t5: &[u32], in_features: usize, t2: &mut [u32]) {
    let (t5, t2) = (bytemuck::cast_slice::<_, u8>(t5), bytemuck::cast_slice_mut::<_, u8>(t2));
    let (mut digit, mut byte) = (0, 0);
    for (n, block) in t2.as_chunks_mut::<T2_BLOCK_BYTES>().0.iter_mut().enumerate() {
        let runs = t5.get(byte..).and_then(|rest| rest.first_chunk::<BLOCK>());
        let quarters = match (runs, FRACTION.get(digit)) {
            (Some(runs), Some(fraction)) => quarters(runs, [_mm256_set1_epi16(*fraction as i16); 4]),
            _ => pieced_together(t5, byte, digit, in_features - n * BLOCK),
        };
        let lower = _mm256_or_si256(quarters[0], _mm256_slli_epi16::<2>(quarters[1]));
        let upper = _mm256_or_si256(quarters[2], _mm256_slli_epi16::<2>(quarters[3]));
        let codes = _mm256_or_si256(lower, _mm256_slli_epi16::<4>(upper));
        let codes = _mm_packus_epi16(_mm256_castsi256_si128(codes), _mm256_extracti128_si256::<1>(codes));
        *block = bytemuck::cast(codes);
        byte += BLOCK;
        while byte >= t5.len() {
            byte -= t5.len();
            digit += 1;
        }
    }
}

/// The digits of 64 bytes that the fractions say, as 16-bit numbers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn quarters(bytes: &[u8; BLOCK], fractions: [__m256i; 4]) -> [__m256i; 4] {
    let mut quarters = fractions;
    for (quarter, run) in quarters.iter_mut().zip(bytes.as_chunks::<RUN>().0) {
        // SAFETY: the array has 16 bytes.
        let bytes = _mm256_cvtepu8_epi16(unsafe { _mm_loadu_si128(run.as_ptr().cast()) });
        let leading = _mm256_mullo_epi16(bytes, *quarter);
        *quarter = _mm256_mulhi_epu16(leading, _mm256_set1_epi16(3));
    }
    quarters
}

/// The codes of at most `left` weights from a byte and digit on, where a digit or the row ends in between; then 1.
#[target_feature(enable = "avx2,fma,f16c")]
fn pieced_together(t5: &[u8], mut byte: usize, mut digit: usize, left: usize) -> [__m256i; 4] {
    // Half of 2^16 leads to code 1.
    let (mut bytes, mut fractions) = ([1; BLOCK], [1u16 << 15; BLOCK]);
    let (mut at, end) = (0, left.min(BLOCK));
    while at < end {
        while byte >= t5.len() {
            byte -= t5.len();
            digit += 1;
        }
        let run = (end - at).min(t5.len() - byte);
        bytes[at..at + run].copy_from_slice(&t5[byte..byte + run]);
        fractions[at..at + run].fill(FRACTION[digit]);
        (at, byte) = (at + run, byte + run);
    }
    quarters(&bytes, bytemuck::cast(fractions))
}
