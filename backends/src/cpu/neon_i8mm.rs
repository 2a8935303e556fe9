//! 64-bit Arm with the matrix product instructions for bytes (FEAT_I8MM): `smmla` multiplies 8 codes (trit + 1) of two rows
//! with 8 activations of two tokens each, twice the products of an `sdot`. One token alone, and rows that are left over, are
//! [`neon_dot`](super::neon_dot)'s, and everything that is not a ternary product is NEON's.
#![allow(unsafe_code)]

use std::arch::{aarch64::*, asm};

use super::{
    linear::{T2Rows, TOKEN_TILE},
    neon::{surplus, take_apart},
    neon_dot::{self, load_block},
    tokens::{QUAD, QUAD_BLOCKS, Quad, Token},
};
use crate::format::T2_BLOCK_BYTES;

pub(super) use super::neon::{
    add_product, exponentials, last_totals, lookup_totals, quantize, rms_norm, round_token, screen_bounds, screen_row,
    screen_totals, sink_softmax, sink_softmax_gradient, stored_dots, swiglu, swiglu_gradient, t5_to_t2,
};

/// Rows that pass the tokens together.
const ROWS: usize = 4;

/// The activations of `P` pairs of tokens with a block: those of each quarter of its codes, 8 of both tokens and then the
/// other 8.
type Block<const P: usize> = [[[int8x16_t; P]; 2]; 4];

#[target_feature(enable = "neon,dotprod,i8mm")]
pub(super) fn t2_totals(rows: &T2Rows<'_>, tokens: &[Token<'_>], totals: &mut [i32]) {
    assert!(tokens.len() <= TOKEN_TILE, "tokens of a tile");
    match (tokens.len().div_ceil(2), rows.scales) {
        _ if tokens.len() < 2 => neon_dot::t2_totals(rows, tokens, totals),
        (1, None) => pairs::<1, false>(rows, tokens, totals),
        (1, Some(_)) => pairs::<1, true>(rows, tokens, totals),
        (2, None) => pairs::<2, false>(rows, tokens, totals),
        (2, Some(_)) => pairs::<2, true>(rows, tokens, totals),
        (3, None) => pairs::<3, false>(rows, tokens, totals),
        (3, Some(_)) => pairs::<3, true>(rows, tokens, totals),
        (_, None) => pairs::<4, false>(rows, tokens, totals),
        (_, Some(_)) => pairs::<4, true>(rows, tokens, totals),
    }
}

#[target_feature(enable = "neon,dotprod,i8mm")]
fn pairs<const P: usize, const SCALED: bool>(rows: &T2Rows<'_>, tokens: &[Token<'_>], totals: &mut [i32]) {
    let mut blocks = Vec::with_capacity(rows.blocks);
    for b in 0..rows.blocks {
        blocks.push(interleave::<P>(tokens, b));
    }
    let (whole, rest) = totals.split_at_mut(totals.len() / tokens.len() / ROWS * ROWS * tokens.len());
    let left_over = whole.len() / tokens.len();
    for (n, totals) in whole.chunks_exact_mut(ROWS * tokens.len()).enumerate() {
        tile::<P, SCALED>(rows, n * ROWS, &blocks, tokens, totals);
    }
    if !rest.is_empty() {
        neon_dot::t2_totals(&rows.after(left_over), tokens, rest);
    }
}

/// Block `b` of all tokens; where their number is odd, the last pair ends with zeros.
#[target_feature(enable = "neon")]
fn interleave<const P: usize>(tokens: &[Token<'_>], b: usize) -> Block<P> {
    const NOTHING: &Quad = &Quad([0; QUAD]);
    let mut block = [[[vdupq_n_s8(0); P]; 2]; 4];
    for p in 0..P {
        let second = tokens.get(2 * p + 1).map_or(NOTHING, |token| &token.quads[b / QUAD_BLOCKS]);
        let first = load_block(&tokens[2 * p].quads[b / QUAD_BLOCKS], b % QUAD_BLOCKS);
        let second = load_block(second, b % QUAD_BLOCKS);
        for k in 0..4 {
            [block[k][0][p], block[k][1][p]] = halves(first[k], second[k]);
        }
    }
    block
}

/// `ROWS` rows times all tokens: `totals [ROWS, tokens]`.
#[target_feature(enable = "neon,i8mm")]
fn tile<const P: usize, const SCALED: bool>(
    rows: &T2Rows<'_>,
    row: usize,
    blocks: &[Block<P>],
    tokens: &[Token<'_>],
    totals: &mut [i32],
) {
    let codes: [&[u8]; ROWS] = std::array::from_fn(|r| bytemuck::cast_slice(rows.row(row + r)));
    let scales: [&[u8]; ROWS] = std::array::from_fn(|r| rows.row_scales(row + r).unwrap_or(&[]));
    // Of two rows and two tokens each.
    let mut sums = [[vdupq_n_s32(0); P]; ROWS / 2];
    for (b, block) in blocks.iter().enumerate() {
        let mut dots = if SCALED { [[vdupq_n_s32(0); P]; ROWS / 2] } else { sums };
        for two in 0..ROWS / 2 {
            let first = take_apart(&codes[2 * two][T2_BLOCK_BYTES * b..]);
            let second = take_apart(&codes[2 * two + 1][T2_BLOCK_BYTES * b..]);
            for k in 0..4 {
                for (codes, activations) in halves(first[k], second[k]).into_iter().zip(&block[k]) {
                    for p in 0..P {
                        dots[two][p] = multiply(dots[two][p], codes, activations[p]);
                    }
                }
            }
        }
        if !SCALED {
            sums = dots;
            continue;
        }
        for two in 0..ROWS / 2 {
            let (first, second) = (i32::from(scales[2 * two][b]), i32::from(scales[2 * two + 1][b]));
            let scale = vcombine_s32(vdup_n_s32(first), vdup_n_s32(second));
            for p in 0..P {
                sums[two][p] = vmlaq_s32(sums[two][p], dots[two][p], scale);
            }
        }
    }
    for (r, totals) in totals.chunks_exact_mut(tokens.len()).enumerate() {
        for (t, (total, token)) in totals.iter_mut().zip(tokens).enumerate() {
            let four = lanes(sums[r / 2][t / 2]);
            *total = four[r % 2 * 2 + t % 2].wrapping_sub(surplus::<SCALED>(scales[r], token.block_sums));
        }
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn lanes(x: int32x4_t) -> [i32; 4] {
    let mut lanes = [0; 4];
    // SAFETY: the array has room for four.
    unsafe { vst1q_s32(lanes.as_mut_ptr(), x) };
    lanes
}

/// The first 8 bytes of both, and the last 8 of both.
#[inline]
#[target_feature(enable = "neon")]
fn halves(a: int8x16_t, b: int8x16_t) -> [int8x16_t; 2] {
    let (a, b) = (vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b));
    [vreinterpretq_s8_s64(vzip1q_s64(a, b)), vreinterpretq_s8_s64(vzip2q_s64(a, b))]
}

/// `vmmlaq_s32`, which Rust 1.95 does not have yet: `sum [rows, tokens]` of two each.
#[inline]
#[target_feature(enable = "neon,i8mm")]
fn multiply(mut sum: int32x4_t, codes: int8x16_t, activations: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction works on registers alone, and the processor has it.
    unsafe {
        asm!(
            "smmla {sum:v}.4s, {codes:v}.16b, {activations:v}.16b",
            sum = inout(vreg) sum,
            codes = in(vreg) codes,
            activations = in(vreg) activations,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}
