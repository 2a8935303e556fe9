//! 64-bit Arm with the NEON that every such processor has (no dot product instructions; those are used in [`neon_dot`](super::neon_dot)).
//!
//! `smlal` multiplies codes (trit + 1) with activations into 16-bit sums, which are widened every 16 blocks, or every block
//! where blocks have scales; the surplus of +1 a weight is taken off once a row, with the sums of the activations.
#![allow(unsafe_code)]

use std::arch::aarch64::*;

use super::{
    bounds::{self, LastBits, ScreenRows},
    linear::T2Rows,
    lookup::{LOOKUP_ROWS, Table},
    math,
    product::{self, Panels, Rows, Sums},
    scalar,
    shared::shared_arithmetic,
    stored::{KERNEL_TOKENS, LANES},
    tokens::{QUAD_BLOCKS, Quad, Token},
};
use crate::{format::T2_BLOCK_BYTES, ops::StoredFloat};

shared_arithmetic!("neon");

#[target_feature(enable = "neon")]
pub(super) fn add_product(a: Rows<'_>, b: Panels<'_>, inner: usize, sums: Sums<'_>) {
    product::add_product(a, b, inner, sums);
}

/// Blocks whose products 16 bits can hold: 16 blocks * 4 quarters * 2 halves * 2 (code) * 127 = 32,512.
const CHUNK_BLOCKS: usize = 16;

#[target_feature(enable = "neon")]
pub(super) fn t2_totals(rows: &T2Rows<'_>, tokens: &[Token<'_>], totals: &mut [i32]) {
    if tokens.is_empty() {
        return;
    }
    for (row, totals) in totals.chunks_exact_mut(tokens.len()).enumerate() {
        for (tokens, totals) in tokens.chunks(4).zip(totals.chunks_mut(4)) {
            match (tokens.len(), rows.scales) {
                (4, None) => totals.copy_from_slice(&tokens_tile::<4, false>(rows, row, tokens)),
                (4, Some(_)) => totals.copy_from_slice(&tokens_tile::<4, true>(rows, row, tokens)),
                (_, None) => one_by_one::<false>(rows, row, tokens, totals),
                (_, Some(_)) => one_by_one::<true>(rows, row, tokens, totals),
            }
        }
    }
}

#[target_feature(enable = "neon")]
fn one_by_one<const SCALED: bool>(rows: &T2Rows<'_>, row: usize, tokens: &[Token<'_>], totals: &mut [i32]) {
    for (token, total) in tokens.iter().zip(totals) {
        *total = tokens_tile::<1, SCALED>(rows, row, std::slice::from_ref(token))[0];
    }
}

/// One row times `T` tokens: its codes are taken apart once.
#[target_feature(enable = "neon")]
fn tokens_tile<const T: usize, const SCALED: bool>(rows: &T2Rows<'_>, row: usize, tokens: &[Token<'_>]) -> [i32; T] {
    let codes = bytemuck::cast_slice::<u32, u8>(rows.row(row));
    let scales = rows.row_scales(row).unwrap_or(&[]);
    let mut sums = [vdupq_n_s32(0); T];
    for (chunk, codes) in codes.chunks(CHUNK_BLOCKS * T2_BLOCK_BYTES).enumerate() {
        let mut words = [vdupq_n_s16(0); T];
        for (i, block) in codes.chunks_exact(T2_BLOCK_BYTES).enumerate() {
            let b = chunk * CHUNK_BLOCKS + i;
            let quarters = take_apart(block);
            for t in 0..T {
                let start = if SCALED { vdupq_n_s16(0) } else { words[t] };
                words[t] = add_block(start, quarters, &tokens[t].quads[b / QUAD_BLOCKS], b % QUAD_BLOCKS);
                if SCALED {
                    sums[t] = vmlaq_n_s32(sums[t], vpaddlq_s16(words[t]), i32::from(scales[b]));
                }
            }
        }
        if !SCALED {
            for t in 0..T {
                sums[t] = vpadalq_s16(sums[t], words[t]);
            }
        }
    }
    std::array::from_fn(|t| vaddvq_s32(sums[t]).wrapping_sub(surplus::<SCALED>(scales, tokens[t].block_sums)))
}

/// What codes of 1 everywhere would sum to. Both slices are padded with zeros.
#[inline]
pub(super) fn surplus<const SCALED: bool>(scales: &[u8], block_sums: &[i16]) -> i32 {
    if SCALED {
        let products = scales.iter().zip(block_sums).map(|(scale, sum)| i32::from(*scale) * i32::from(*sum));
        products.fold(0, i32::wrapping_add)
    } else {
        block_sums.iter().map(|sum| i32::from(*sum)).sum()
    }
}

/// The codes of a block as four vectors of 16 weights.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn take_apart(block: &[u8]) -> [int8x16_t; 4] {
    let block = &block[..T2_BLOCK_BYTES];
    // SAFETY: the slice has 16 bytes.
    let codes = unsafe { vld1q_u8(block.as_ptr()) };
    let mask = vdupq_n_u8(3);
    [
        vreinterpretq_s8_u8(vandq_u8(codes, mask)),
        vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8::<2>(codes), mask)),
        vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8::<4>(codes), mask)),
        vreinterpretq_s8_u8(vshrq_n_u8::<6>(codes)),
    ]
}

#[inline]
#[target_feature(enable = "neon")]
fn add_block(mut sum: int16x8_t, quarters: [int8x16_t; 4], quad: &Quad, place: usize) -> int16x8_t {
    for (k, codes) in quarters.into_iter().enumerate() {
        let activations = &quad.0[64 * k + 16 * place..][..16];
        // SAFETY: the slice has 16 bytes.
        let activations = unsafe { vld1q_s8(activations.as_ptr()) };
        sum = vmlal_s8(sum, vget_low_s8(codes), vget_low_s8(activations));
        sum = vmlal_high_s8(sum, codes, activations);
    }
    sum
}

#[target_feature(enable = "neon")]
pub(super) fn lookup_totals(
    codes: &[[u8; LOOKUP_ROWS]],
    scales: Option<&[[u8; LOOKUP_ROWS]]>,
    tables: &[Table],
    totals: &mut [i32],
) {
    scalar::lookup_totals(codes, scales, tables, totals);
}

#[target_feature(enable = "neon")]
pub(super) fn t5_to_t2(t5: &[u32], in_features: usize, t2: &mut [u32]) {
    math::t5_to_t2(t5, in_features, t2);
}

#[target_feature(enable = "neon")]
pub(super) fn stored_dots(float: StoredFloat, rows: &[&[u32]], tokens: &[&[f32]], out: &mut [f32]) {
    debug_assert!(tokens.len() <= KERNEL_TOKENS);
    for (row, out) in rows.iter().zip(out.chunks_exact_mut(tokens.len().max(1))) {
        match *tokens {
            [x, y, z] => out.copy_from_slice(&dot_tile(float, row, [x, y, z])),
            [x, y] => out.copy_from_slice(&dot_tile(float, row, [x, y])),
            [x] => out.copy_from_slice(&dot_tile(float, row, [x])),
            _ => {}
        }
    }
}

/// One stored row times `T` tokens.
#[target_feature(enable = "neon")]
fn dot_tile<const T: usize>(float: StoredFloat, row: &[u32], tokens: [&[f32]; T]) -> [f32; T] {
    let mut sums = [[vdupq_n_f32(0.0); 4]; T];
    for (i, words) in row.chunks(LANES * float.bytes() / 4).enumerate() {
        let weights = load_stored(float, words);
        for t in 0..T {
            let x = load_lanes(&tokens[t][i * LANES..i * LANES + LANES]);
            for lane in 0..4 {
                sums[t][lane] = vfmaq_f32(sums[t][lane], weights[lane], x[lane]);
            }
        }
    }
    sums.map(|lanes| add_float_lanes(lanes))
}

/// Up to 16 stored elements as floats, the rest zeros.
#[inline]
#[target_feature(enable = "neon")]
fn load_stored(float: StoredFloat, words: &[u32]) -> [float32x4_t; 4] {
    if matches!(float, StoredFloat::Bf16) && words.len() == LANES / 2 {
        return [0, 2, 4, 6].map(|at| {
            let pair = &words[at..at + 2];
            // SAFETY: the slice has 2 words, 4 elements of 2 bytes.
            let halves = unsafe { vld1_u16(pair.as_ptr().cast()) };
            vreinterpretq_f32_u32(vshlq_n_u32::<16>(vmovl_u16(halves)))
        });
    }
    let mut floats = [0.0; LANES];
    float.decode(words, &mut floats);
    load_lanes(&floats)
}

#[inline]
#[target_feature(enable = "neon")]
fn load_lanes(x: &[f32]) -> [float32x4_t; 4] {
    [0, 4, 8, 12].map(|at| {
        let four = &x[at..at + 4];
        // SAFETY: the slice has 4 floats.
        unsafe { vld1q_f32(four.as_ptr()) }
    })
}

#[inline]
#[target_feature(enable = "neon")]
fn add_float_lanes(lanes: [float32x4_t; 4]) -> f32 {
    let x = vaddq_f32(vaddq_f32(lanes[0], lanes[2]), vaddq_f32(lanes[1], lanes[3]));
    let x = vadd_f32(vget_low_f32(x), vget_high_f32(x));
    vget_lane_f32::<0>(x) + vget_lane_f32::<1>(x)
}

#[target_feature(enable = "neon")]
pub(super) fn screen_totals(rows: &ScreenRows<'_>, tokens: &[&[i8]], totals: &mut [i32]) {
    bounds::screen_totals(rows, tokens, totals);
}

#[target_feature(enable = "neon")]
pub(super) fn last_totals(last: &LastBits<'_>, rows: &[u32], levels: &[i8], totals: &mut [i32]) {
    bounds::last_totals(last, rows, levels, totals);
}
