//! x86-64 with AVX2 and AVX-VNNI, the byte dot products of processors without AVX-512: a vector takes two blocks. Everything
//! that is not a ternary product is AVX2's.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

pub(super) use super::avx2::{
    add_product, exponentials, last_totals, lookup_totals, quantize, rms_norm, round_token, screen_bounds, screen_row,
    screen_totals, sink_softmax, sink_softmax_gradient, stored_dots, swiglu, swiglu_gradient, t5_to_t2,
};

super::vnni::vnni_kernels!("avxvnni,avx2,fma,f16c");

type Vector = __m256i;

/// Blocks in a vector.
const WIDTH: usize = 2;

const GEMV_ROWS: usize = 8;
const ROWS: usize = 2;
const TOKENS: usize = 4;

/// For each vector of 8 blocks: picks the scales of its blocks out of 8 of one row and 8 of another, as 16-bit numbers, four
/// times each, the first row's in the lower half of a 128-bit lane.
static PICK_SCALES: [[u8; 32]; 4] = {
    // A set top bit makes `vpshufb` write a zero.
    let mut picks = [[0x80; 32]; 4];
    let mut i = 0;
    while i < 64 {
        let (vector, block, row, word) = (i / 16, i % 16 / 8, i % 8 / 4, i % 16);
        picks[vector][2 * word] = (8 * row + 2 * vector + block) as u8;
        i += 1;
    }
    picks
};

#[inline]
#[target_feature(enable = "avx2")]
fn zero() -> Vector {
    _mm256_setzero_si256()
}

/// # Safety
/// 32 bytes must lie there.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load(from: *const u8) -> Vector {
    // SAFETY: the caller's promise.
    unsafe { _mm256_loadu_si256(from.cast()) }
}

/// One block, and zeros.
///
/// # Safety
/// The block must lie there, 16 bytes.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load_some(from: *const u8, _one: usize) -> Vector {
    // SAFETY: the caller's promise.
    unsafe { _mm256_zextsi128_si256(_mm_loadu_si128(from.cast())) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn prefetch(from: *const u8) {
    _mm_prefetch::<_MM_HINT_T1>(from.cast());
}

/// The codes at bits `2k` and up of each byte.
#[inline]
#[target_feature(enable = "avx2")]
fn quarter(codes: Vector, k: usize) -> Vector {
    let shifted = match k {
        0 => codes,
        1 => _mm256_srli_epi16::<2>(codes),
        2 => _mm256_srli_epi16::<4>(codes),
        _ => _mm256_srli_epi16::<6>(codes),
    };
    _mm256_and_si256(shifted, _mm256_set1_epi8(3))
}

#[inline]
#[target_feature(enable = "avx2,avxvnni")]
fn dot(sum: Vector, codes: Vector, activations: Vector) -> Vector {
    _mm256_dpbusd_avx_epi32(sum, codes, activations)
}

/// Minus the sums of two blocks, each in one place of its lane.
///
/// # Safety
/// Two numbers must lie there.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn minus_sums(from: *const i16) -> Vector {
    // SAFETY: the caller's promise.
    let (first, second) = unsafe { (i32::from(*from), i32::from(*from.add(1))) };
    _mm256_setr_epi32(-first, 0, 0, 0, -second, 0, 0, 0)
}

/// Eight scales of each of two rows, in every lane.
///
/// # Safety
/// Eight bytes must lie at both places.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn spread_scales(first: *const u8, second: *const u8) -> Vector {
    // SAFETY: the caller's promise.
    let (first, second) = unsafe { (_mm_loadl_epi64(first.cast()), _mm_loadl_epi64(second.cast())) };
    _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(first, second))
}

#[inline]
#[target_feature(enable = "avx2")]
fn pick(spread: Vector, i: usize) -> Vector {
    let bytes = &PICK_SCALES[i % 4];
    // SAFETY: the array has 32 bytes.
    _mm256_shuffle_epi8(spread, unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) })
}

/// Adds the sums of blocks of two rows times their scales.
#[inline]
#[target_feature(enable = "avx2,avxvnni")]
fn add_scaled(sum: Vector, first: Vector, second: Vector, scales: Vector) -> Vector {
    _mm256_dpwssd_avx_epi32(sum, _mm256_packs_epi32(first, second), scales)
}

/// Neighbours added; those of the first in the lower half of each lane.
#[inline]
#[target_feature(enable = "avx2")]
fn side_by_side(first: Vector, second: Vector) -> Vector {
    _mm256_add_epi32(_mm256_unpacklo_epi64(first, second), _mm256_unpackhi_epi64(first, second))
}

/// The sum of the lower and that of the upper halves of all lanes.
#[inline]
#[target_feature(enable = "avx2")]
fn add_lanes(x: Vector) -> [i32; 2] {
    let x = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
    let x = _mm_add_epi32(x, _mm_srli_epi64::<32>(x));
    [_mm_extract_epi32::<0>(x), _mm_extract_epi32::<2>(x)]
}
