//! x86-64 with AVX-512 (F, BW, VL) and its byte dot products (VNNI): a vector takes four blocks. The shared
//! arithmetic is compiled for its registers of 16 floats; the rest is AVX2's.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::shared::shared_arithmetic;
pub(super) use super::{
    avx2::{lookup_totals, t5_to_t2},
    avx512_product::add_product,
    avx512_screen::{last_totals, screen_totals},
    avx512_stored::stored_dots,
};

shared_arithmetic!("avx512f,avx512bw,avx512vl,avx2,fma,f16c");
super::vnni::vnni_kernels!("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c");

type Vector = __m512i;

/// Blocks in a vector.
const WIDTH: usize = 4;

const GEMV_ROWS: usize = 4;
const ROWS: usize = 4;
const TOKENS: usize = 4;

/// For each vector of 8 blocks: picks the scales of its blocks out of 8 of one row and 8 of another, as 16-bit numbers, four
/// times each, the first row's in the lower half of a 128-bit lane.
static PICK_SCALES: [[u8; 64]; 2] = {
    // A set top bit makes `vpshufb` write a zero.
    let mut picks = [[0x80; 64]; 2];
    let mut i = 0;
    while i < 64 {
        let (vector, block, row, word) = (i / 32, i % 32 / 8, i % 8 / 4, i % 32);
        picks[vector][2 * word] = (8 * row + 4 * vector + block) as u8;
        i += 1;
    }
    picks
};

#[inline]
#[target_feature(enable = "avx512f")]
fn zero() -> Vector {
    _mm512_setzero_si512()
}

/// # Safety
/// 64 bytes must lie there.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load(from: *const u8) -> Vector {
    // SAFETY: the caller's promise.
    unsafe { _mm512_loadu_si512(from.cast()) }
}

/// So many blocks, and zeros.
///
/// # Safety
/// The blocks must lie there, 16 bytes each.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load_some(from: *const u8, blocks: usize) -> Vector {
    // SAFETY: the caller's promise; what the mask leaves out is not read.
    unsafe { _mm512_maskz_loadu_epi32(((1u32 << (4 * blocks)) - 1) as u16, from.cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn prefetch(from: *const u8) {
    _mm_prefetch::<_MM_HINT_T1>(from.cast());
}

/// The codes at bits `2k` and up of each byte.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn quarter(codes: Vector, k: usize) -> Vector {
    let shifted = match k {
        0 => codes,
        1 => _mm512_srli_epi16::<2>(codes),
        2 => _mm512_srli_epi16::<4>(codes),
        _ => _mm512_srli_epi16::<6>(codes),
    };
    _mm512_and_si512(shifted, _mm512_set1_epi8(3))
}

#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn dot(sum: Vector, codes: Vector, activations: Vector) -> Vector {
    _mm512_dpbusd_epi32(sum, codes, activations)
}

/// Minus the sums of four blocks, each in one place of its lane.
///
/// # Safety
/// Four numbers must lie there.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn minus_sums(from: *const i16) -> Vector {
    // SAFETY: the caller's promise.
    let sums = unsafe { _mm_loadl_epi64(from.cast()) };
    let minus = _mm_sub_epi32(_mm_setzero_si128(), _mm_cvtepi16_epi32(sums));
    _mm512_maskz_broadcast_i32x4(0b1000_0100_0010_0001, minus)
}

/// Eight scales of each of two rows, in every lane.
///
/// # Safety
/// Eight bytes must lie at both places.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn spread_scales(first: *const u8, second: *const u8) -> Vector {
    // SAFETY: the caller's promise.
    let (first, second) = unsafe { (_mm_loadl_epi64(first.cast()), _mm_loadl_epi64(second.cast())) };
    _mm512_broadcast_i32x4(_mm_unpacklo_epi64(first, second))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn pick(spread: Vector, i: usize) -> Vector {
    let bytes = &PICK_SCALES[i % 2];
    // SAFETY: the array has 64 bytes.
    _mm512_shuffle_epi8(spread, unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) })
}

/// Adds the sums of blocks of two rows times their scales.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn add_scaled(sum: Vector, first: Vector, second: Vector, scales: Vector) -> Vector {
    _mm512_dpwssd_epi32(sum, _mm512_packs_epi32(first, second), scales)
}

/// Neighbours added; those of the first in the lower half of each lane.
#[inline]
#[target_feature(enable = "avx512f")]
fn side_by_side(first: Vector, second: Vector) -> Vector {
    _mm512_add_epi32(_mm512_unpacklo_epi64(first, second), _mm512_unpackhi_epi64(first, second))
}

/// The sum of the lower and that of the upper halves of all lanes.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx2")]
fn add_lanes(x: Vector) -> [i32; 2] {
    let x = _mm256_add_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64::<1>(x));
    let x = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
    let x = _mm_add_epi32(x, _mm_srli_epi64::<32>(x));
    [_mm_extract_epi32::<0>(x), _mm_extract_epi32::<2>(x)]
}
