//! Dot products with rows in their checkpoint's float type, in the order that [`stored`](super::super::stored) fixes.

use std::arch::x86_64::*;

use super::super::stored_tile::stored_kernels;
use crate::ops::StoredFloat;

/// Sixteen floats.
type Lanes = [__m256; 2];

stored_kernels!("avx2,fma,f16c");

#[target_feature(enable = "avx2,fma,f16c")]
fn dots_of<const FLOAT: u8>(float: StoredFloat, rows: &[&[u32]], tokens: &[&[f32]], out: &mut [f32]) {
    if let (&[a, b, c, d], &[x]) = (rows, tokens) {
        return dot_tile::<4, 1, FLOAT>(float, [a, b, c, d], [x], out);
    }
    let width = tokens.len();
    for (rows, out) in rows.chunks(2).zip(out.chunks_mut(2 * width.max(1))) {
        match (rows, tokens) {
            (&[a, b], &[x, y, z]) => dot_tile::<2, 3, FLOAT>(float, [a, b], [x, y, z], out),
            (&[a, b], &[x, y]) => dot_tile::<2, 2, FLOAT>(float, [a, b], [x, y], out),
            _ => {
                for (i, out) in out.chunks_exact_mut(1).enumerate() {
                    dot_tile::<1, 1, FLOAT>(float, [rows[i / width]], [tokens[i % width]], out);
                }
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn zero() -> Lanes {
    [_mm256_setzero_ps(); 2]
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn multiply_add(weights: Lanes, x: Lanes, sums: Lanes) -> Lanes {
    [_mm256_fmadd_ps(weights[0], x[0], sums[0]), _mm256_fmadd_ps(weights[1], x[1], sums[1])]
}

/// 16 stored elements as floats.
///
/// # Safety
/// There must be 16 elements to read.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load_stored<const FLOAT: u8>(words: *const u32) -> Lanes {
    // SAFETY: two loads of 8 elements each: 4 words for the 2-byte types, 8 for f32.
    unsafe {
        match FLOAT {
            BF16 => [widen_bf16(_mm_loadu_si128(words.cast())), widen_bf16(_mm_loadu_si128(words.add(4).cast()))],
            F16 => {
                let (low, high) = (_mm_loadu_si128(words.cast()), _mm_loadu_si128(words.add(4).cast()));
                [_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)]
            }
            _ => [_mm256_loadu_ps(words.cast()), _mm256_loadu_ps(words.add(8).cast())],
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn widen_bf16(halves: __m128i) -> __m256 {
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)))
}

/// # Safety
/// There must be 16 floats to read.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load(x: *const f32) -> Lanes {
    // SAFETY: the caller's promise.
    unsafe { [_mm256_loadu_ps(x), _mm256_loadu_ps(x.add(8))] }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add(lanes: Lanes) -> f32 {
    let x = _mm256_add_ps(lanes[0], lanes[1]);
    let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
}
