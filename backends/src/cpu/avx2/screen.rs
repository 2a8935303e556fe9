//! Products of a screen's codes with int8 activations.
//!
//! `vpmaddubsw` multiplies 32 codes with 32 activations and adds neighbours to 16 bits, which hold all runs' together:
//! 8 runs * 2 neighbours * 7 * 127 = 14,224.

use std::arch::x86_64::*;

use super::super::{
    bounds::{self, LastBits},
    screen_tile::screen_kernels,
};

type Vector = __m256i;

/// Bytes of a vector.
const WIDTH: usize = 32;

screen_kernels!("avx2,fma,f16c");

#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::cpu) fn last_totals(last: &LastBits<'_>, rows: &[u32], levels: &[i8], totals: &mut [i32]) {
    bounds::last_totals(last, rows, levels, totals);
}

/// In 32 bits, and in 16 those of the runs at hand.
#[inline]
#[target_feature(enable = "avx2")]
fn zero() -> [Vector; 2] {
    [_mm256_setzero_si256(); 2]
}

#[inline]
#[target_feature(enable = "avx2")]
fn left<const BITS: i32>(x: Vector) -> Vector {
    _mm256_slli_epi16::<BITS>(x)
}

#[inline]
#[target_feature(enable = "avx2")]
fn right<const BITS: i32>(x: Vector) -> Vector {
    _mm256_srli_epi16::<BITS>(x)
}

#[inline]
#[target_feature(enable = "avx2")]
fn codes(low: Vector, high: Vector) -> Vector {
    _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi8(3)), _mm256_and_si256(high, _mm256_set1_epi8(4)))
}

#[inline]
#[target_feature(enable = "avx2")]
fn add([_, part]: &mut [Vector; 2], _: usize, codes: Vector, levels: Vector) {
    *part = _mm256_add_epi16(*part, _mm256_maddubs_epi16(codes, levels));
}

#[inline]
#[target_feature(enable = "avx2")]
fn end_of_runs([sum, part]: &mut [Vector; 2]) {
    *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(*part, _mm256_set1_epi16(1)));
    *part = _mm256_setzero_si256();
}

#[inline]
#[target_feature(enable = "avx2")]
fn total([x, _]: [Vector; 2]) -> i32 {
    let x = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
    let x = _mm_add_epi32(x, _mm_shuffle_epi32::<0b01_00_11_10>(x));
    _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32::<0b10_11_00_01>(x)))
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
