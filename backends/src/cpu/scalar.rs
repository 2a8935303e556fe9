//! Plain Rust: what any processor can run, and what the others are compared with.

use super::{
    bounds::{self, LastBits, ScreenRows},
    linear::T2Rows,
    lookup::{LOOKUP_ROWS, Table},
    math,
    product::{self, Panels, Rows, Sums},
    shared::shared_arithmetic,
    stored::LANES,
    t5::{Straight, T5Rows},
    tokens::{QUAD_BLOCKS, Token},
};
use crate::{
    format::{BLOCK, T2_BLOCK_BYTES},
    ops::StoredFloat,
};

shared_arithmetic!();

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

pub(super) fn t5_totals(rows: &T5Rows<'_>, token: &Straight<'_>, totals: &mut [i32]) {
    for (row, total) in totals.iter_mut().enumerate() {
        let scales = rows.scales.map(|scales| &scales[row * rows.scale_stride..]);
        let scale = |block: usize| scales.map_or(1, |scales| i32::from(scales[block]));
        let surplus = |(block, sum): (usize, &i16)| scale(block).wrapping_mul(i32::from(*sum));
        *total = token.block_sums.iter().enumerate().map(surplus).fold(0, i32::wrapping_sub);
        let bytes = bytemuck::cast_slice::<_, u8>(&rows.codes[row * rows.words..(row + 1) * rows.words]);
        for (k, power) in [81, 27, 9, 3, 1].into_iter().enumerate() {
            for (j, byte) in bytes.iter().enumerate() {
                let input = k * bytes.len() + j;
                let product = i32::from(byte / power % 3) * i32::from(token.activations()[input]);
                // Past the last input the activations are zeros, and there may be no scale.
                if product != 0 {
                    *total = total.wrapping_add(scale(input / BLOCK) * product);
                }
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

pub(super) fn add_product(a: Rows<'_>, b: Panels<'_>, inner: usize, sums: Sums<'_>) {
    product::add_product(a, b, inner, sums);
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

pub(super) fn screen_totals(rows: &ScreenRows<'_>, tokens: &[&[i8]], totals: &mut [i32]) {
    bounds::screen_totals(rows, tokens, totals);
}

pub(super) fn last_totals(last: &LastBits<'_>, rows: &[u32], levels: &[i8], totals: &mut [i32]) {
    bounds::last_totals(last, rows, levels, totals);
}
