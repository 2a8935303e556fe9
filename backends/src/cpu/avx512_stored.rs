//! Dot products of stored rows with two or three tokens by AVX-512: the sixteen lanes of [`stored`](super::stored) are one
//! register.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{avx2, stored::LANES};
use crate::ops::StoredFloat;

const BF16: u8 = 0;
const F16: u8 = 1;
const F32: u8 = 2;

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
pub(super) fn stored_dots(float: StoredFloat, rows: &[&[u32]], tokens: &[&[f32]], out: &mut [f32]) {
    match float {
        StoredFloat::Bf16 => dots_of::<BF16>(float, rows, tokens, out),
        StoredFloat::F16 => dots_of::<F16>(float, rows, tokens, out),
        StoredFloat::F32 => dots_of::<F32>(float, rows, tokens, out),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
fn dots_of<const FLOAT: u8>(float: StoredFloat, rows: &[&[u32]], tokens: &[&[f32]], out: &mut [f32]) {
    match (rows, tokens) {
        (&[a, b, c, d], &[x, y, z]) => dot_tile::<4, 3, FLOAT>(float, [a, b, c, d], [x, y, z], out),
        (&[a, b, c, d], &[x, y]) => dot_tile::<4, 2, FLOAT>(float, [a, b, c, d], [x, y], out),
        _ => avx2::stored_dots(float, rows, tokens, out),
    }
}

/// `R` stored rows times `T` tokens, `out[row * T + token]`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
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
    let mut sums = [[_mm512_setzero_ps(); T]; R];
    for i in 0..whole {
        let mut weights = [_mm512_setzero_ps(); R];
        for r in 0..R {
            // SAFETY: i < whole, so the row has the words of 16 elements from i * step on.
            weights[r] = unsafe { load_stored::<FLOAT>(rows[r].as_ptr().add(i * step)) };
        }
        for t in 0..T {
            // SAFETY: tokens have at least whole * 16 floats.
            let x = unsafe { _mm512_loadu_ps(tokens[t].as_ptr().add(i * LANES)) };
            for r in 0..R {
                sums[r][t] = _mm512_fmadd_ps(weights[r], x, sums[r][t]);
            }
        }
    }
    if whole * step < rows[0].len() {
        for r in 0..R {
            let mut padded = [0.0; LANES];
            float.decode(&rows[r][whole * step..], &mut padded);
            // SAFETY: the array has 16 floats.
            let weights = unsafe { _mm512_loadu_ps(padded.as_ptr()) };
            for t in 0..T {
                // SAFETY: tokens have floats for the last, padded step as well.
                let x = unsafe { _mm512_loadu_ps(tokens[t].as_ptr().add(whole * LANES)) };
                sums[r][t] = _mm512_fmadd_ps(weights, x, sums[r][t]);
            }
        }
    }
    for r in 0..R {
        for t in 0..T {
            out[r * T + t] = add_lanes(sums[r][t]);
        }
    }
}

/// 16 stored elements as floats.
///
/// # Safety
/// There must be 16 elements to read.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
unsafe fn load_stored<const FLOAT: u8>(words: *const u32) -> __m512 {
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
fn add_lanes(lanes: __m512) -> f32 {
    let upper = _mm512_castps512_ps256(_mm512_shuffle_f32x4::<0b1110>(lanes, lanes));
    let x = _mm256_add_ps(_mm512_castps512_ps256(lanes), upper);
    let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
}
