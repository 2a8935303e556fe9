//! Products of 4-bit codes with int8 activations by AVX-512 VNNI: a vector takes two blocks, and sums go to 32 bits at once.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{bounds::ScreenRows, screen::BLOCK_BYTES};
use crate::format::BLOCK;

/// Bytes from the codes that are multiplied to those that are fetched meanwhile. Rows follow each other, one at a time: the
/// processor's own prefetching follows a single stream best.
const AHEAD: usize = 4096;

/// The activations of two blocks: their first halves, which the low nibbles belong to, and their second halves.
struct Halves {
    firsts: __m512i,
    seconds: __m512i,
}

/// `totals[token * rows + row]`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn screen_totals(rows: &ScreenRows<'_>, tokens: &[&[i8]], totals: &mut [i32]) {
    let count = totals.len() / tokens.len().max(1);
    let mut pairs = Vec::with_capacity(rows.blocks.div_ceil(2));
    for (token, totals) in tokens.iter().zip(totals.chunks_exact_mut(count.max(1))) {
        assert!(token.len() == rows.blocks * BLOCK, "tokens of whole blocks");
        pairs.clear();
        for two in token.chunks(2 * BLOCK) {
            pairs.push(halves(two));
        }
        for (row, total) in totals.iter_mut().enumerate() {
            *total = dot(rows.row(row), &pairs);
        }
    }
}

/// Of one or two blocks.
#[target_feature(enable = "avx512f")]
fn halves(blocks: &[i8]) -> Halves {
    let mut two = [0i8; 2 * BLOCK];
    two[..blocks.len()].copy_from_slice(blocks);
    // SAFETY: the array has 128 bytes.
    let (a, b) = unsafe { (_mm512_loadu_si512(two.as_ptr().cast()), _mm512_loadu_si512(two[BLOCK..].as_ptr().cast())) };
    Halves { firsts: _mm512_shuffle_i64x2::<0b01_00_01_00>(a, b), seconds: _mm512_shuffle_i64x2::<0b11_10_11_10>(a, b) }
}

/// One row times one token.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn dot(codes: &[u8], pairs: &[Halves]) -> i32 {
    let zero = _mm512_setzero_si512();
    // Two of each, for a sum waits for the one before it.
    let mut sums = [[zero; 2]; 2];
    let (whole, rest) = codes.as_chunks::<{ 2 * BLOCK_BYTES }>();
    for (i, (codes, pair)) in whole.iter().zip(pairs).enumerate() {
        _mm_prefetch::<_MM_HINT_T0>(codes.as_ptr().wrapping_add(AHEAD).cast());
        // SAFETY: the array has 64 bytes.
        add(&mut sums[i % 2], unsafe { _mm512_loadu_si512(codes.as_ptr().cast()) }, pair);
    }
    if let (false, Some(pair)) = (rest.is_empty(), pairs.get(whole.len())) {
        let mut last = [0u8; 2 * BLOCK_BYTES];
        last[..rest.len()].copy_from_slice(rest);
        // SAFETY: the array has 64 bytes.
        add(&mut sums[0], unsafe { _mm512_loadu_si512(last.as_ptr().cast()) }, pair);
    }
    let [[a, b], [c, d]] = sums;
    _mm512_reduce_add_epi32(_mm512_add_epi32(_mm512_add_epi32(a, b), _mm512_add_epi32(c, d)))
}

/// Adds the products of two blocks of codes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn add([low, high]: &mut [__m512i; 2], codes: __m512i, pair: &Halves) {
    let mask = _mm512_set1_epi8(15);
    *low = _mm512_dpbusd_epi32(*low, _mm512_and_si512(codes, mask), pair.firsts);
    *high = _mm512_dpbusd_epi32(*high, _mm512_and_si512(_mm512_srli_epi16::<4>(codes), mask), pair.seconds);
}
