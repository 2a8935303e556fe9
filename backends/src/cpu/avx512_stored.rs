//! Dot products of stored rows with two or three tokens by AVX-512: the sixteen lanes of [`stored`](super::stored) are one
//! register.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{avx2, stored_tile::stored_kernels};
use crate::ops::StoredFloat;

/// Sixteen floats.
type Lanes = __m512;

stored_kernels!("avx512f,avx512bw,avx512vl,avx2,fma,f16c");

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
fn dots_of<const FLOAT: u8>(float: StoredFloat, rows: &[&[u32]], tokens: &[&[f32]], out: &mut [f32]) {
    match (rows, tokens) {
        (&[a, b, c, d], &[x, y, z]) => dot_tile::<4, 3, FLOAT>(float, [a, b, c, d], [x, y, z], out),
        (&[a, b, c, d], &[x, y]) => dot_tile::<4, 2, FLOAT>(float, [a, b, c, d], [x, y], out),
        _ => avx2::stored_dots(float, rows, tokens, out),
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
fn zero() -> Lanes {
    _mm512_setzero_ps()
}

/// # Safety
/// There must be 16 floats to read.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
unsafe fn load(x: *const f32) -> Lanes {
    // SAFETY: the caller's promise.
    unsafe { _mm512_loadu_ps(x) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
fn multiply_add(weights: Lanes, x: Lanes, sums: Lanes) -> Lanes {
    _mm512_fmadd_ps(weights, x, sums)
}

/// 16 stored elements as floats.
///
/// # Safety
/// There must be 16 elements to read.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
unsafe fn load_stored<const FLOAT: u8>(words: *const u32) -> Lanes {
    // SAFETY: 32 bytes of the 2-byte types, 64 of f32.
    unsafe {
        match FLOAT {
            BF16 => {
                let halves = _mm512_cvtepu16_epi32(_mm256_loadu_si256(words.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(halves))
            }
            F16 => _mm512_cvtph_ps(_mm256_loadu_si256(words.cast())),
            _ => _mm512_loadu_ps(words.cast()),
        }
    }
}

/// The upper half added to the lower half until one is left.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
fn add(lanes: Lanes) -> f32 {
    let upper = _mm512_castps512_ps256(_mm512_shuffle_f32x4::<0b1110>(lanes, lanes));
    let x = _mm256_add_ps(_mm512_castps512_ps256(lanes), upper);
    let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
}
