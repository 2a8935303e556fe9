//! 64-bit Arm with the dot product instructions: `sdot` multiplies 16 codes (trit + 1) with 16 activations and adds four
//! neighbours to 32 bits. Everything that is not a ternary product is NEON's.
#![allow(unsafe_code)]

use std::arch::{aarch64::*, asm};

use super::{
    linear::T2Rows,
    neon::{surplus, take_apart},
    tokens::{QUAD_BLOCKS, Quad, Token},
};
use crate::format::T2_BLOCK_BYTES;

pub(super) use super::neon::{
    add_product, exponentials, last_totals, lookup_totals, quantize, rms_norm, round_token, screen_bounds, screen_row,
    screen_totals, sink_softmax, sink_softmax_gradient, stored_dots, swiglu, swiglu_gradient, t5_to_t2,
};

/// Rows and tokens that pass each other.
const ROWS: usize = 2;
const TOKENS: usize = 4;

#[target_feature(enable = "neon,dotprod")]
pub(super) fn t2_totals(rows: &T2Rows<'_>, tokens: &[Token<'_>], totals: &mut [i32]) {
    if tokens.is_empty() {
        return;
    }
    for (n, totals) in totals.chunks_mut(ROWS * tokens.len()).enumerate() {
        for (m, some) in tokens.chunks(TOKENS).enumerate() {
            let totals = Totals { totals, width: tokens.len(), first: m * TOKENS };
            match (some.len(), totals.totals.len() / tokens.len(), rows.scales) {
                (TOKENS, ROWS, None) => tile::<ROWS, TOKENS, false>(rows, n * ROWS, some, totals),
                (TOKENS, ROWS, Some(_)) => tile::<ROWS, TOKENS, true>(rows, n * ROWS, some, totals),
                (_, count, None) => one_by_one::<false>(rows, n * ROWS, count, some, totals),
                (_, count, Some(_)) => one_by_one::<true>(rows, n * ROWS, count, some, totals),
            }
        }
    }
}

/// Where the totals of a tile go.
struct Totals<'a> {
    /// `[rows of the tile, width]`.
    totals: &'a mut [i32],
    width: usize,
    /// First token of the tile.
    first: usize,
}

#[target_feature(enable = "neon,dotprod")]
fn one_by_one<const SCALED: bool>(rows: &T2Rows<'_>, row: usize, count: usize, tokens: &[Token<'_>], to: Totals<'_>) {
    let Totals { totals, width, first } = to;
    for (t, token) in tokens.iter().enumerate() {
        let token = std::slice::from_ref(token);
        if count == ROWS {
            tile::<ROWS, 1, SCALED>(rows, row, token, Totals { totals, width, first: first + t });
        } else {
            tile::<1, 1, SCALED>(rows, row, token, Totals { totals, width, first: first + t });
        }
    }
}

/// `R` rows times `T` tokens: codes are taken apart once, activations loaded once.
#[target_feature(enable = "neon,dotprod")]
fn tile<const R: usize, const T: usize, const SCALED: bool>(
    rows: &T2Rows<'_>,
    row: usize,
    tokens: &[Token<'_>],
    to: Totals<'_>,
) {
    let zero = vdupq_n_s32(0);
    let codes: [&[u8]; R] = std::array::from_fn(|r| bytemuck::cast_slice(rows.row(row + r)));
    let scales: [&[u8]; R] = std::array::from_fn(|r| rows.row_scales(row + r).unwrap_or(&[]));
    let mut sums = [[zero; T]; R];
    for b in 0..rows.blocks {
        let mut dots = if SCALED { [[zero; T]; R] } else { sums };
        let mut quarters = [[vdupq_n_s8(0); 4]; R];
        for r in 0..R {
            quarters[r] = take_apart(&codes[r][T2_BLOCK_BYTES * b..]);
        }
        for t in 0..T {
            let activations = load_block(&tokens[t].quads[b / QUAD_BLOCKS], b % QUAD_BLOCKS);
            for r in 0..R {
                for k in 0..4 {
                    dots[r][t] = dot(dots[r][t], quarters[r][k], activations[k]);
                }
            }
        }
        for r in 0..R {
            for t in 0..T {
                sums[r][t] =
                    if SCALED { vmlaq_n_s32(sums[r][t], dots[r][t], i32::from(scales[r][b])) } else { dots[r][t] };
            }
        }
    }
    for r in 0..R {
        for t in 0..T {
            let surplus = surplus::<SCALED>(scales[r], tokens[t].block_sums);
            to.totals[r * to.width + to.first + t] = vaddvq_s32(sums[r][t]).wrapping_sub(surplus);
        }
    }
}

/// The activations of a block, in the order of its codes.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn load_block(quad: &Quad, place: usize) -> [int8x16_t; 4] {
    [0, 64, 128, 192].map(|k| {
        let activations = &quad.0[k + 16 * place..][..16];
        // SAFETY: the slice has 16 bytes.
        unsafe { vld1q_s8(activations.as_ptr()) }
    })
}

/// `vdotq_s32`, which Rust 1.95 does not have yet.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn dot(mut sum: int32x4_t, codes: int8x16_t, activations: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction works on registers alone, and the processor has it.
    unsafe {
        asm!(
            "sdot {sum:v}.4s, {codes:v}.16b, {activations:v}.16b",
            sum = inout(vreg) sum,
            codes = in(vreg) codes,
            activations = in(vreg) activations,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}
