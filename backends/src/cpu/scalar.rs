//! Plain Rust: what any processor can run, and what the others are compared with.

use half::f16;

use super::{
    bounds::{self, ScreenRows, TokenTerms},
    linear::T2Rows,
    lookup::{LOOKUP_ROWS, Table},
    math::{self, Matrix},
    screen::{self, Dither},
    stored::LANES,
    tokens::{QUAD_BLOCKS, Quad, Token},
};
use crate::{
    format::{Rotation, T2_BLOCK_BYTES},
    ops::{ClampedSwiGlu, StoredFloat},
};

pub(super) fn t2_totals(rows: &T2Rows<'_>, tokens: &[Token<'_>], totals: &mut [i32]) {
    for (row, totals) in totals.chunks_exact_mut(tokens.len().max(1)).enumerate() {
        let scales = rows.row_scales(row);
        for (token, total) in tokens.iter().zip(totals) {
            *total = 0;
            for (b, words) in rows.row(row).chunks_exact(4).enumerate() {
                let scale = scales.map_or(1, |scales| i32::from(scales[b]));
                let dot = block_dot(words, token, b) - i32::from(token.block_sums[b]);
                *total = total.wrapping_add(scale * dot);
            }
        }
    }
}

/// Codes (not trits) of a block times activations.
fn block_dot(words: &[u32], token: &Token<'_>, block: usize) -> i32 {
    let quad = &token.quads[block / QUAD_BLOCKS].0;
    let mut dot = 0;
    for k in 0..4 {
        let activations = &quad[64 * k + 16 * (block % QUAD_BLOCKS)..][..16];
        for (j, q) in activations.iter().enumerate() {
            let code = (words[j / 4] >> (8 * (j % 4) + 2 * k)) & 3;
            dot += code as i32 * i32::from(*q);
        }
    }
    dot
}

/// `totals[row]` of some tiles of 32 rows, of which `codes` has all bytes and `scales` all blocks.
pub(super) fn lookup_totals(
    codes: &[[u8; LOOKUP_ROWS]],
    scales: Option<&[[u8; LOOKUP_ROWS]]>,
    tables: &[Table],
    totals: &mut [i32],
) {
    totals.fill(0);
    let bytes = tables.len() / 2;
    for (n, codes) in codes.iter().enumerate() {
        let (tile, at) = (n / bytes, n % bytes);
        let block = (tile * bytes + at) / T2_BLOCK_BYTES;
        let totals = &mut totals[tile * LOOKUP_ROWS..(tile + 1) * LOOKUP_ROWS];
        for (lane, (code, total)) in codes.iter().zip(totals).enumerate() {
            let scale = scales.map_or(1, |scales| i32::from(scales[block][lane]));
            let entry = |table: &Table, code: u8| {
                16 * i32::from(table.high[code as usize] as i8) + i32::from(table.low[code as usize])
            };
            let sum = entry(&tables[2 * at], code & 15) + entry(&tables[2 * at + 1], code >> 4);
            *total = total.wrapping_add(scale * sum);
        }
    }
}

pub(super) fn t5_to_t2(t5: &[u32], in_features: usize, t2: &mut [u32]) {
    math::t5_to_t2(t5, in_features, t2);
}

pub(super) fn quantize(x: &mut [f32], rotation: Option<Rotation>, quads: &mut [Quad], block_sums: &mut [i16]) -> f32 {
    math::quantize(x, rotation, quads, block_sums)
}

pub(super) fn swiglu(activation: ClampedSwiGlu, gate_up: &[f32], out: &mut [f32]) {
    math::swiglu(activation, gate_up, out);
}

pub(super) fn round_token(x: &mut [f32], rotation: Option<Rotation>) {
    math::round_token(x, rotation);
}

pub(super) fn add_product(a: Matrix<'_>, b: Matrix<'_>, out: &mut [f32], stride: usize, inner: usize) {
    math::add_product(a, b, out, stride, inner);
}

pub(super) fn rms_norm(x: &[f32], gamma: &[f32], epsilon: f32, out: &mut [f32]) {
    math::rms_norm(x, gamma, epsilon, out);
}

pub(super) fn widen_halves(halves: &[f16], out: &mut [f32]) {
    math::widen_halves(halves, out);
}

pub(super) fn widen_bytes(bytes: &[i8], out: &mut [f32]) {
    math::widen_bytes(bytes, out);
}

pub(super) fn sink_softmax(scores: &mut [f32], scale: f32, sink: f32) {
    math::sink_softmax(scores, scale, sink);
}

pub(super) fn sink_softmax_gradient(shares: &[f32], gradient: &mut [f32], scale: f32) -> f32 {
    math::sink_softmax_gradient(shares, gradient, scale)
}

pub(super) fn stored_dots(float: StoredFloat, rows: &[&[u32]], tokens: &[&[f32]], out: &mut [f32]) {
    for (row, out) in rows.iter().zip(out.chunks_exact_mut(tokens.len().max(1))) {
        for (token, out) in tokens.iter().zip(out) {
            *out = stored_dot(float, row, token);
        }
    }
}

fn stored_dot(float: StoredFloat, row: &[u32], token: &[f32]) -> f32 {
    let step = LANES * float.bytes() / 4;
    let mut lanes = [0.0f32; LANES];
    for (words, x) in row.chunks(step).zip(token.chunks_exact(LANES)) {
        let mut weights = [0.0; LANES];
        float.decode(words, &mut weights);
        for ((lane, weight), x) in lanes.iter_mut().zip(weights).zip(x) {
            *lane = weight.mul_add(*x, *lane);
        }
    }
    // Halves onto each other, as the vector kernels add their registers.
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

pub(super) fn screen_row(
    float: StoredFloat,
    words: &[u32],
    dither: &Dither,
    x: &mut [f32],
    codes: &mut [u8],
) -> [f32; 2] {
    screen::screen_row(float, words, dither, x, codes)
}

pub(super) fn screen_bounds(token: TokenTerms, totals: &[i32], steps: &[f32], lengths: &[f32], out: &mut [f32]) {
    bounds::screen_bounds(token, totals, steps, lengths, out);
}

pub(super) fn screen_totals(rows: &ScreenRows<'_>, tokens: &[&[i8]], totals: &mut [i32]) {
    bounds::screen_totals(rows, tokens, totals);
}
