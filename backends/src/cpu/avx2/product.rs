//! Products with the numbers of a cache by vectors of 8 floats: see [`product`](super::super::product).
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use half::f16;

super::super::product::vector_products!("avx2,fma,f16c");

type Vector = __m256;

const LANES: usize = 8;
/// Bytes between what is read and what is fetched meanwhile.
const AHEAD: usize = 16 * 1024;

const ROWS: usize = 4;

/// Panels that are multiplied together: a factor is loaded once for them.
const PANELS: usize = 1;

/// Numbers that load as floats.
trait Load: super::super::product::Number {
    /// # Safety
    /// There must be 8 of them, and AVX2 with F16C.
    unsafe fn load(from: *const Self) -> Vector;
}

impl Load for f32 {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load(from: *const Self) -> Vector {
        // SAFETY: the caller's promise.
        unsafe { _mm256_loadu_ps(from) }
    }
}

impl Load for f16 {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load(from: *const Self) -> Vector {
        // SAFETY: the caller's promise.
        _mm256_cvtph_ps(unsafe { _mm_loadu_si128(from.cast()) })
    }
}

impl Load for i8 {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load(from: *const Self) -> Vector {
        // SAFETY: the caller's promise.
        _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(unsafe { _mm_loadl_epi64(from.cast()) }))
    }
}

/// # Safety
/// There must be room for 8 floats.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn store(to: *mut f32, x: Vector) {
    // SAFETY: the caller's promise.
    unsafe { _mm256_storeu_ps(to, x) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn splat(x: f32) -> Vector {
    _mm256_set1_ps(x)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn multiply_add(a: Vector, b: Vector, sum: Vector) -> Vector {
    _mm256_fmadd_ps(a, b, sum)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn prefetch(from: *const u8) {
    _mm_prefetch::<_MM_HINT_T0>(from.cast());
}
