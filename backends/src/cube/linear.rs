//! Products of packed weights with int8 activations: one row and token at a time for a few tokens, in tiles for many.

use burn::tensor::DType;
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{
    buffer::room,
    device::{Join, joined},
    tokens::Tokens,
    weight::{Packed, digit, dot, level, packed},
};
use crate::format::TernaryWeight;

/// Units that share a row.
const LANES: u32 = 32;
/// Rows of a cube.
const ROWS: u32 = 8;
/// Tokens from which on weights are worth being shared in tiles.
const TILED: usize = 12;
/// Rows and tokens of a tile.
pub(super) const TILE: u32 = 64;
/// Rows, and tokens, of a tile that one unit computes.
const PART: u32 = 4;
/// Words of activations that a tile takes at a time: a group of weights is never shorter.
const STEP: u32 = 16;

/// Which matrix each token is multiplied with.
#[derive(Clone)]
pub(super) enum Matrices<R: CubeRuntime> {
    /// The same for all.
    One(usize),
    /// Every token goes through several: see [`Routes`].
    Routed(Routes<R>),
}

/// Tokens and their matrices. A choice is a token and one of its matrices.
#[derive(Clone)]
pub(super) struct Routes<R: CubeRuntime> {
    /// `[choices]`: matrices.
    pub(super) chosen: CubeTensor<R>,
    /// Choices an input takes part in: as many as a token has, or 1 where every choice has an input of its own.
    pub(super) per_input: usize,
    /// Choices in the order of their matrices.
    pub(super) plan: Option<Plan<R>>,
}

/// Tiles of choices that share a matrix.
#[derive(Clone)]
pub(super) struct Plan<R: CubeRuntime> {
    /// `[choices]`
    pub(super) order: CubeTensor<R>,
    /// `[tiles, 3]`: matrix, first of its choices in `order`, and past the last one.
    pub(super) tiles: CubeTensor<R>,
    pub(super) count: usize,
}

/// Whether so many tokens are worth tiles.
pub(super) const fn is_tiled(tokens: usize) -> bool {
    tokens >= TILED
}

/// The products of tokens, or of choices, with their matrices, plus a bias `[matrices, rows]`: `[choices, rows]`.
pub(super) fn products<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    x: &Tokens<R>,
    weight: &TernaryWeight<CubeBackend<R, F, I, BT>>,
    bias: Option<CubeTensor<R>>,
    matrices: Matrices<R>,
) -> CubeTensor<R> {
    let (choices, routed) = match &matrices {
        Matrices::One(_) => (x.count, false),
        Matrices::Routed(routes) => (routes.chosen.meta.num_elements(), true),
    };
    let rows = weight.layout.rows;
    let out = room(&x.levels, [choices, rows], DType::F32);
    if choices == 0 {
        return out;
    }
    let client = out.client.clone();
    let biased = bias.is_some();
    let bias = bias.unwrap_or_else(|| x.scales.clone());
    let (levels, scales) = (x.levels.clone().into_array_arg(), x.scales.clone().into_array_arg());
    let (matrix, chosen, per_input, plan) = match matrices {
        Matrices::One(matrix) => (matrix, x.levels.clone(), 1, None),
        Matrices::Routed(routes) => (0, routes.chosen, routes.per_input, routes.plan),
    };
    let step = |n: usize, by: u32| (n as u32).div_ceil(by);
    if routed && plan.is_none() || !routed && !is_tiled(choices) {
        row_by_row::launch::<R>(
            &client,
            CubeCount::Static(step(rows, ROWS), choices as u32, 1),
            CubeDim::new_1d(LANES * ROWS),
            levels,
            scales,
            packed(weight),
            bias.into_array_arg(),
            chosen.into_array_arg(),
            out.clone().into_array_arg(),
            x.words as u32,
            matrix as u32,
            weight.layout.matrices as u32,
            per_input as u32,
            routed,
            biased,
        );
        return out;
    }
    let tiles = plan.as_ref().map_or(step(choices, TILE), |plan| plan.count as u32);
    let (order, tile_list) = match plan {
        Some(plan) => (plan.order, plan.tiles),
        None => (x.levels.clone(), x.levels.clone()),
    };
    tiled::launch::<R>(
        &client,
        CubeCount::Static(step(rows, TILE), tiles, 1),
        CubeDim::new_1d((TILE / PART) * (TILE / PART)),
        levels,
        scales,
        packed(weight),
        bias.into_array_arg(),
        order.into_array_arg(),
        tile_list.into_array_arg(),
        out.clone().into_array_arg(),
        x.words as u32,
        matrix as u32,
        choices as u32,
        per_input as u32,
        routed,
        biased,
    );
    out
}

/// A cube computes [`ROWS`] rows of one choice, [`LANES`] units each of them.
#[cube(launch)]
fn row_by_row(
    levels: &Array<u32>,
    scales: &Array<f32>,
    weight: &Packed,
    bias: &Array<f32>,
    chosen: &Array<i32>,
    out: &mut Array<f32>,
    level_words: u32,
    matrix: u32,
    matrices: u32,
    per_input: u32,
    #[comptime] routed: bool,
    #[comptime] biased: bool,
) {
    let choice = CUBE_POS_Y;
    let input = choice / per_input;
    let lane = UNIT_POS % LANES;
    let row = CUBE_POS_X * ROWS + UNIT_POS / LANES;
    let mut totals = SharedMemory::<i32>::new(comptime!((LANES * ROWS) as usize));
    let mut matrix = matrix;
    if comptime!(routed) {
        matrix = u32::cast_from(chosen[choice as usize]);
    }
    let known = matrix < matrices && row < weight.rows;
    let mut y = f32::new(0.0);
    #[unroll]
    for plane in 0..weight.shape.planes {
        let mut total = i32::new(0);
        let packed_row = weight.row(matrix, plane, row);
        if known {
            let mut word = lane;
            while word < weight.words {
                total += word_total(levels, input * level_words, weight, packed_row, word);
                word += LANES;
            }
        }
        let total = joined(total, &mut totals, LANES, Join::Sum);
        if known {
            y += f32::cast_from(total) * (weight.row_scale(packed_row) * scales[input as usize]);
        }
    }
    if lane == 0 && known {
        if comptime!(biased) {
            y += bias[(matrix * weight.rows + row) as usize];
        }
        out[(choice * weight.rows + row) as usize] = y;
    }
}

/// What the codes of one word add to a row's total.
#[cube]
fn word_total(levels: &Array<u32>, at: u32, weight: &Packed, row: u32, word: u32) -> i32 {
    let codes = weight.word(row, word);
    let mut total = i32::new(0);
    #[unroll]
    for k in 0..comptime!(weight.shape.digits()) {
        let place = weight.place(word, k);
        let part = dot(digit(codes, k, weight.shape.format), levels[(at + place) as usize]);
        total += part * weight.group_scale(row, place);
    }
    total
}

/// A cube computes [`TILE`] rows of as many choices that share a matrix.
#[cube(launch)]
fn tiled(
    levels: &Array<u32>,
    scales: &Array<f32>,
    weight: &Packed,
    bias: &Array<f32>,
    order: &Array<u32>,
    tiles: &Array<i32>,
    out: &mut Array<f32>,
    level_words: u32,
    matrix: u32,
    choices: u32,
    per_input: u32,
    #[comptime] routed: bool,
    #[comptime] biased: bool,
) {
    let mut matrix = matrix;
    let (mut start, mut end) = (CUBE_POS_Y * TILE, choices);
    if comptime!(routed) {
        let tile = (3 * CUBE_POS_Y) as usize;
        if tiles[tile] < 0 {
            terminate!();
        }
        matrix = u32::cast_from(tiles[tile]);
        start = u32::cast_from(tiles[tile + 1]);
        end = u32::cast_from(tiles[tile + 2]);
    }
    let size = comptime!((TILE * STEP) as usize);
    let mut codes = SharedMemory::<u32>::new(size);
    let mut inputs = SharedMemory::<u32>::new(size);
    let units = comptime!(TILE / PART);
    let first_row = CUBE_POS_X * TILE;
    let (own_row, own_choice) = (UNIT_POS % units * PART, UNIT_POS / units * PART);
    let parts = comptime!((PART * PART) as usize);
    let mut y = Array::<f32>::new(parts);
    #[unroll]
    for part in 0..parts {
        y[part] = 0.0;
    }
    #[unroll]
    for plane in 0..weight.shape.planes {
        let mut total = Array::<i32>::new(parts);
        #[unroll]
        for part in 0..parts {
            total[part] = 0;
        }
        let mut at = u32::new(0);
        while at < level_words {
            #[unroll]
            for n in 0..comptime!(TILE * STEP / (units * units)) {
                let slot = UNIT_POS + n * units * units;
                let (line, place) = (slot / STEP, at + slot % STEP);
                let row = min(first_row + line, weight.rows - 1);
                codes[slot as usize] = weight.codes_at(weight.row(matrix, plane, row), place);
                let choice = min(start + line, end - 1);
                let input = input_of(order, choice, per_input, routed);
                inputs[slot as usize] = levels[(input * level_words + place) as usize];
            }
            sync_cube();
            let mut sums = Array::<f32>::new(parts);
            #[unroll]
            for part in 0..parts {
                sums[part] = 0.0;
            }
            for place in 0..STEP {
                add_part(&codes, &inputs, own_row * STEP + place, own_choice * STEP + place, &mut sums);
            }
            #[unroll]
            for r in 0..PART {
                let row = min(first_row + own_row + r, weight.rows - 1);
                let scale = weight.group_scale(weight.row(matrix, plane, row), at);
                #[unroll]
                for c in 0..PART {
                    let part = comptime!((r * PART + c) as usize);
                    total[part] += scale * i32::cast_from(sums[part]);
                }
            }
            sync_cube();
            at += STEP;
        }
        #[unroll]
        for r in 0..PART {
            let row = min(first_row + own_row + r, weight.rows - 1);
            let row_scale = weight.row_scale(weight.row(matrix, plane, row));
            #[unroll]
            for c in 0..PART {
                let part = comptime!((r * PART + c) as usize);
                let choice = min(start + own_choice + c, end - 1);
                let input = input_of(order, choice, per_input, routed);
                y[part] += f32::cast_from(total[part]) * (row_scale * scales[input as usize]);
            }
        }
    }
    #[unroll]
    for r in 0..PART {
        #[unroll]
        for c in 0..PART {
            let row = first_row + own_row + r;
            let choice = start + own_choice + c;
            if row < weight.rows && choice < end {
                let mut y = y[comptime!((r * PART + c) as usize)];
                if comptime!(biased) {
                    y += bias[(matrix * weight.rows + row) as usize];
                }
                let mut choice = choice;
                if comptime!(routed) {
                    choice = order[choice as usize];
                }
                out[(choice * weight.rows + row) as usize] = y;
            }
        }
    }
}

/// The input of a choice, by its place in the order.
#[cube]
fn input_of(order: &Array<u32>, choice: u32, per_input: u32, #[comptime] routed: bool) -> u32 {
    if comptime!(routed) { order[choice as usize] / per_input } else { choice }
}

/// Adds the products of four weights of [`PART`] rows with [`PART`] inputs, exact in floats: they are whole numbers.
#[cube]
fn add_part(codes: &SharedMemory<u32>, inputs: &SharedMemory<u32>, row: u32, input: u32, sums: &mut Array<f32>) {
    let mut trits = Array::<f32>::new(comptime!((4 * PART) as usize));
    #[unroll]
    for r in 0..PART {
        let codes = codes[(row + r * STEP) as usize];
        #[unroll]
        for byte in 0..4u32 {
            trits[comptime!((4 * r + byte) as usize)] = f32::cast_from((codes >> (8 * byte)) & 3) - 1.0;
        }
    }
    #[unroll]
    for c in 0..PART {
        let levels = inputs[(input + c * STEP) as usize];
        #[unroll]
        for byte in 0..4u32 {
            let level = f32::cast_from(level(levels, byte));
            #[unroll]
            for r in 0..PART {
                sums[comptime!((r * PART + c) as usize)] += trits[comptime!((4 * r + byte) as usize)] * level;
            }
        }
    }
}
