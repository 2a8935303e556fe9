//! Dot products with rows in their checkpoint's float type, in the order that [`stored`](super::super::stored) fixes.

use std::arch::x86_64::*;

use super::super::stored::LANES;
use crate::ops::StoredFloat;

const BF16: u8 = 0;
const F16: u8 = 1;
const F32: u8 = 2;

#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::cpu) fn stored_dots(float: StoredFloat, rows: &[&[u32]], tokens: &[&[f32]], out: &mut [f32]) {
    match float {
        StoredFloat::Bf16 => dots_of::<BF16>(float, rows, tokens, out),
        StoredFloat::F16 => dots_of::<F16>(float, rows, tokens, out),
        StoredFloat::F32 => dots_of::<F32>(float, rows, tokens, out),
    }
}

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

/// `R` stored rows times `T` tokens, `out[row * T + token]`.
#[target_feature(enable = "avx2,fma,f16c")]
fn dot_tile<const R: usize, const T: usize, const FLOAT: u8>(
    float: StoredFloat,
    rows: [&[u32]; R],
    tokens: [&[f32]; T],
    out: &mut [f32],
) {
    let step = if FLOAT == F32 { LANES } else { LANES / 2 };
    let whole = rows[0].len() / step;
    // What the unchecked loads below rely on.
    assert!(rows.iter().all(|row| row.len() == rows[0].len()), "rows of one matrix");
    assert!(tokens.iter().all(|token| token.len() >= rows[0].len().div_ceil(step) * LANES), "padded tokens");
    let mut sums = [[[_mm256_setzero_ps(); 2]; T]; R];
    for i in 0..whole {
        for r in 0..R {
            // SAFETY: i < whole, so the row has the words of 16 elements from i * step on.
            let weights = unsafe { load_stored::<FLOAT>(rows[r].as_ptr().add(i * step)) };
            for t in 0..T {
                // SAFETY: tokens have at least whole * 16 floats.
                let x = unsafe { load_lanes(tokens[t].as_ptr().add(i * LANES)) };
                sums[r][t] = multiply_add(weights, x, sums[r][t]);
            }
        }
    }
    if whole * step < rows[0].len() {
        for r in 0..R {
            let mut padded = [0.0; LANES];
            float.decode(&rows[r][whole * step..], &mut padded);
            // SAFETY: the array has 16 floats.
            let weights = unsafe { load_lanes(padded.as_ptr()) };
            for t in 0..T {
                // SAFETY: tokens have floats for the last, padded step as well.
                let x = unsafe { load_lanes(tokens[t].as_ptr().add(whole * LANES)) };
                sums[r][t] = multiply_add(weights, x, sums[r][t]);
            }
        }
    }
    for r in 0..R {
        for t in 0..T {
            out[r * T + t] = add_lanes(sums[r][t]);
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn multiply_add(weights: [__m256; 2], x: [__m256; 2], sums: [__m256; 2]) -> [__m256; 2] {
    [_mm256_fmadd_ps(weights[0], x[0], sums[0]), _mm256_fmadd_ps(weights[1], x[1], sums[1])]
}

/// 16 stored elements as floats.
///
/// # Safety
/// There must be 16 elements to read.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load_stored<const FLOAT: u8>(words: *const u32) -> [__m256; 2] {
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
unsafe fn load_lanes(x: *const f32) -> [__m256; 2] {
    // SAFETY: the caller's promise.
    unsafe { [_mm256_loadu_ps(x), _mm256_loadu_ps(x.add(8))] }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_lanes(lanes: [__m256; 2]) -> f32 {
    let x = _mm256_add_ps(lanes[0], lanes[1]);
    let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
}
