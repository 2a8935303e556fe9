//! t5 rows rewritten as t2: 16 neighbouring weights are the same digit of 16 neighbouring bytes.

use std::arch::x86_64::*;

use super::super::math::FRACTION;
use crate::format::T2_BLOCK_BYTES;

/// One t5 row of `in_features` weights rewritten as t2, padding included.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::cpu) fn t5_to_t2(t5: &[u32], in_features: usize, t2: &mut [u32]) {
    let (t5, t2) = (bytemuck::cast_slice::<_, u8>(t5), bytemuck::cast_slice_mut::<_, u8>(t2));
    let mut at = Place { digit: 0, byte: 0, weight: 0 };
    for block in t2.as_chunks_mut::<T2_BLOCK_BYTES>().0 {
        let mut codes = digits(t5, in_features, &mut at);
        codes = _mm256_or_si256(codes, _mm256_slli_epi16::<2>(digits(t5, in_features, &mut at)));
        codes = _mm256_or_si256(codes, _mm256_slli_epi16::<4>(digits(t5, in_features, &mut at)));
        codes = _mm256_or_si256(codes, _mm256_slli_epi16::<6>(digits(t5, in_features, &mut at)));
        let bytes = _mm_packus_epi16(_mm256_castsi256_si128(codes), _mm256_extracti128_si256::<1>(codes));
        *block = bytemuck::cast(bytes);
    }
}

/// The place of a weight in a row of t5 bytes.
#[derive(Clone, Copy)]
struct Place {
    digit: usize,
    byte: usize,
    weight: usize,
}

impl Place {
    fn advance(&mut self, weights: usize, bytes: usize) {
        self.weight += weights;
        self.byte += weights;
        while self.byte >= bytes {
            self.byte -= bytes;
            self.digit += 1;
        }
    }
}

/// The codes of 16 weights, and on to the next ones. Past the end of the row lie zeros, code 1.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn digits(t5: &[u8], in_features: usize, at: &mut Place) -> __m256i {
    let run = t5.get(at.byte..).and_then(|rest| rest.first_chunk::<16>());
    let codes = match (run, FRACTION.get(at.digit)) {
        _ if at.weight >= in_features => _mm256_set1_epi16(1),
        (Some(run), Some(fraction)) => {
            // SAFETY: the array has 16 bytes.
            let bytes = _mm256_cvtepu8_epi16(unsafe { _mm_loadu_si128(run.as_ptr().cast()) });
            let leading = _mm256_mullo_epi16(bytes, _mm256_set1_epi16(*fraction as i16));
            _mm256_mulhi_epu16(leading, _mm256_set1_epi16(3))
        }
        _ => one_by_one(t5, *at),
    };
    at.advance(16, t5.len());
    codes
}

/// The same where a digit ends within the 16 weights.
#[target_feature(enable = "avx2,fma,f16c")]
fn one_by_one(t5: &[u8], mut at: Place) -> __m256i {
    let mut codes = [1u16; 16];
    for code in &mut codes {
        if let Some(fraction) = FRACTION.get(at.digit) {
            let leading = u16::from(t5[at.byte]).wrapping_mul(*fraction);
            *code = u16::from(leading > 21_845) + u16::from(leading > 43_690);
        }
        at.advance(1, t5.len());
    }
    bytemuck::cast(codes)
}
