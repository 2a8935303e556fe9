//! Products with the numbers of a cache by vectors of 16 floats: see [`product`](super::product).
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use half::f16;

super::product::vector_products!("avx512f,avx512bw,avx512vl,avx2,fma,f16c");

type Vector = __m512;

const LANES: usize = 16;
/// Bytes between what is read and what is fetched meanwhile.
const AHEAD: usize = 16 * 1024;

const ROWS: usize = 8;

/// Panels that are multiplied together: a factor is loaded once for them.
const PANELS: usize = 2;

/// Numbers that load as floats.
trait Load: super::product::Number {
    /// # Safety
    /// There must be 16 of them, and AVX-512.
    unsafe fn load(from: *const Self) -> Vector;
}

impl Load for f32 {
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load(from: *const Self) -> Vector {
        // SAFETY: the caller's promise.
        unsafe { _mm512_loadu_ps(from) }
    }
}

impl Load for f16 {
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load(from: *const Self) -> Vector {
        // SAFETY: the caller's promise.
        _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(from.cast()) })
    }
}

impl Load for i8 {
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load(from: *const Self) -> Vector {
        // SAFETY: the caller's promise.
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(unsafe { _mm_loadu_si128(from.cast()) }))
    }
}

/// # Safety
/// There must be room for 16 floats.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store(to: *mut f32, x: Vector) {
    // SAFETY: the caller's promise.
    unsafe { _mm512_storeu_ps(to, x) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn splat(x: f32) -> Vector {
    _mm512_set1_ps(x)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn multiply_add(a: Vector, b: Vector, sum: Vector) -> Vector {
    _mm512_fmadd_ps(a, b, sum)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn prefetch(from: *const u8) {
    _mm_prefetch::<_MM_HINT_T1>(from.cast());
}
