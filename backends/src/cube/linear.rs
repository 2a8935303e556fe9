//! Products of packed weights with int8 activations: one row and token at a time for a few tokens, in tiles for many, on
//! matrix units where the device has them.
#![allow(unsafe_code)]

use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{
    device::{Join, joined},
    few_stage::Stage,
    few_units, matrix_units,
    operands::{Addends, Matrices, Operands, Routes, TILE, Term},
    rounding::Before,
    tokens::{Tokens, quantize},
    weight::{Packed, digit, dot, level},
};
use crate::format::TernaryWeight;

/// Units that share a row.
const LANES: u32 = 32;
/// Rows of a cube.
const ROWS: u32 = 8;
/// Tokens from which on weights are worth being shared in tiles.
const TILED: usize = 12;
/// The same where matrix units share them among a few tokens already: the cubes of fewer tokens leave much of a GPU idle.
const TILED_UNITS: usize = 128;
/// Rows, and tokens, of a tile that one unit computes.
const PART: u32 = 4;
/// Words of activations that a tile takes at a time: a group of weights is never shorter.
const STEP: u32 = 16;

/// Whether so many tokens are worth tiles.
pub(super) const fn is_tiled(tokens: usize) -> bool {
    tokens >= TILED
}

/// Tokens of one matrix from which on tiles are worth it.
const fn least_tiled(has_units: bool) -> usize {
    if has_units { TILED_UNITS } else { TILED }
}

/// Tokens for products with these weights, which are packed alike. A single one is rounded by the products themselves: that takes as
/// long, and is a launch less. (Not with experts, whose matrices are so many cubes that a GPU is busy with rounding the same again: 25
/// microseconds on an H200, of 13 for both launches.)
pub(super) fn rounded<'a, R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    x: CubeTensor<R>,
    before: Before<R>,
    weights: impl IntoIterator<Item = &'a TernaryWeight<CubeBackend<R, F, I, BT>>> + Clone,
) -> Tokens<R> {
    let client = x.client.clone();
    let layout = weights.clone().into_iter().next().expect("weights for tokens").layout;
    let fresh = Tokens::unrounded(x.clone(), before.clone(), &layout);
    let takes = |weight| Stage::of(weight, 1, true, &client).is_some();
    if fresh.count == 1 && matrix_units::are_there(&client) && weights.into_iter().all(takes) {
        return fresh;
    }
    quantize(x, before, &layout)
}

/// The products of tokens, or of choices, with their matrices, plus what is added to them: `[choices, rows]`.
pub(super) fn products<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    x: &Tokens<R>,
    term: Term<R, F, I, BT>,
    matrices: Matrices<R>,
) -> CubeTensor<R> {
    let (matrix, routes) = match matrices {
        Matrices::One(matrix) => (matrix, None),
        Matrices::Routed(routes) => (0, Some(routes)),
    };
    let (choices, layout) = (x.choices(routes.as_ref()), term.weight.layout);
    let rows = layout.rows;
    assert!(matrix < layout.matrices, "matrix {matrix} of {layout:?}");
    let client = x.levels.client.clone();
    let has_units = matrix_units::are_there(&client);
    let together = if routes.as_ref().is_none_or(|routes| routes.plan.is_some()) { choices } else { 1 };
    let stage = Stage::of(term.weight, together, x.unrounded.is_some(), &client).filter(|_| has_units);
    assert!(x.unrounded.is_none() || stage.is_some(), "only few products round tokens themselves");
    let (weight, addends, out) = term.launch(x, choices);
    if choices == 0 {
        return out;
    }
    let product = out.clone().into_array_arg();
    let (is_few, tiles) = match &routes {
        None if choices < least_tiled(has_units) => (true, choices.div_ceil(few_units::FEW as usize)),
        None => (false, choices.div_ceil(TILE as usize)),
        Some(Routes { plan: None, .. }) => (true, choices),
        Some(Routes { plan: Some(plan), .. }) => (plan.tile < TILE, plan.count),
    };
    let operands = x.operands(matrix, routes.as_ref());
    let cubes = |rows_a_cube, tiles| CubeCount::Static((rows as u32).div_ceil(rows_a_cube), tiles as u32, 1);
    match (is_few, stage) {
        (true, Some(stage)) => {
            let (cubes, dim) = (cubes(few_units::FEW_ROWS, tiles), CubeDim::new_1d(matrix_units::UNITS));
            // SAFETY: see `matrix_units`.
            unsafe {
                let fresh = x.fresh();
                few_units::few::launch_unchecked::<R>(
                    &client, cubes, dim, operands, fresh, weight, addends, product, stage,
                );
            }
        }
        (true, None) => {
            let (cubes, dim) = (cubes(ROWS, choices), CubeDim::new_1d(LANES * ROWS));
            row_by_row::launch::<R>(&client, cubes, dim, operands, weight, addends, product);
        }
        (false, _) if has_units => {
            let (cubes, dim) = (cubes(matrix_units::ROWS, tiles), CubeDim::new_1d(matrix_units::UNITS));
            // SAFETY: see `matrix_units`.
            unsafe {
                matrix_units::many::launch_unchecked::<R>(&client, cubes, dim, operands, weight, addends, product);
            }
        }
        (false, _) => {
            let (cubes, dim) = (cubes(TILE, tiles), CubeDim::new_1d((TILE / PART) * (TILE / PART)));
            tiled::launch::<R>(&client, cubes, dim, operands, weight, addends, product);
        }
    }
    out
}

/// The products of the same tokens with three matrices, in one launch where the device can.
pub(super) fn three_products<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    x: &Tokens<R>,
    terms: [Term<R, F, I, BT>; 3],
) -> [CubeTensor<R>; 3] {
    let client = x.levels.client.clone();
    let has_units = matrix_units::are_there(&client);
    let stages = terms.each_ref().map(|term| Stage::of(term.weight, x.count, x.unrounded.is_some(), &client));
    let alike = stages[0].filter(|_| has_units && stages.iter().all(|stage| *stage == stages[0]));
    let Some(stage) = alike.filter(|_| x.count > 0 && x.count < least_tiled(has_units)) else {
        return terms.map(|term| products(x, term, Matrices::One(0)));
    };
    let blocks = terms.each_ref().map(|term| (term.weight.layout.rows as u32).div_ceil(few_units::FEW_ROWS));
    let [(a, to_a, first), (b, to_b, second), (c, to_c, third)] = terms.map(|term| term.launch(x, x.count));
    // SAFETY: see `matrix_units`.
    unsafe {
        few_units::few_of_three::launch_unchecked::<R>(
            &client,
            CubeCount::Static(blocks.iter().sum(), x.count.div_ceil(few_units::FEW as usize) as u32, 1),
            CubeDim::new_1d(matrix_units::UNITS),
            x.operands(0, None),
            x.fresh(),
            a,
            b,
            c,
            to_a,
            to_b,
            to_c,
            first.clone().into_array_arg(),
            second.clone().into_array_arg(),
            third.clone().into_array_arg(),
            blocks[0],
            blocks[1],
            stage,
        );
    }
    [first, second, third]
}

/// A cube computes [`ROWS`] rows of one choice, [`LANES`] units each of them.
#[cube(launch)]
fn row_by_row(x: &Operands, weight: &Packed, addends: &Addends, out: &mut Array<f32>) {
    let choice = CUBE_POS_Y;
    let input = x.input_of(choice);
    let lane = UNIT_POS % LANES;
    let row = CUBE_POS_X * ROWS + UNIT_POS / LANES;
    let mut totals = SharedMemory::<i32>::new(comptime!((LANES * ROWS) as usize));
    let matrix = x.matrix_of(choice);
    let known = matrix < weight.matrices && row < weight.rows;
    let mut y = f32::new(0.0);
    #[unroll]
    for plane in 0..weight.shape.planes {
        let mut total = i32::new(0);
        let packed_row = weight.row(matrix, plane, row);
        if known {
            let mut word = lane;
            while word < weight.words {
                total += word_total(&x.levels, input * x.level_words, weight, packed_row, word);
                word += LANES;
            }
        }
        let total = joined(total, &mut totals, LANES, Join::Sum);
        if known {
            y += f32::cast_from(total) * (weight.row_scale(matrix, plane, row) * x.scale(input));
        }
    }
    if lane == 0 && known {
        out[(choice * weight.rows + row) as usize] = y + addends.sum(matrix, choice, row, weight.rows);
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
fn tiled(x: &Operands, weight: &Packed, addends: &Addends, out: &mut Array<f32>) {
    let (matrix, start, end) = x.tile(CUBE_POS_Y);
    if matrix < 0 {
        terminate!();
    }
    let matrix = u32::cast_from(matrix);
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
        while at < x.level_words {
            #[unroll]
            for n in 0..comptime!(TILE * STEP / (units * units)) {
                let slot = UNIT_POS + n * units * units;
                let (line, place) = (slot / STEP, at + slot % STEP);
                let row = min(first_row + line, weight.rows - 1);
                codes[slot as usize] = weight.codes_at(weight.row(matrix, plane, row), place);
                let input = x.input_of(x.choice_at(min(start + line, end - 1)));
                inputs[slot as usize] = x.levels[(input * x.level_words + place) as usize];
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
            let row_scale = weight.row_scale(matrix, plane, row);
            #[unroll]
            for c in 0..PART {
                let part = comptime!((r * PART + c) as usize);
                let input = x.input_of(x.choice_at(min(start + own_choice + c, end - 1)));
                y[part] += f32::cast_from(total[part]) * (row_scale * x.scale(input));
            }
        }
    }
    #[unroll]
    for r in 0..PART {
        #[unroll]
        for c in 0..PART {
            let row = first_row + own_row + r;
            let place = start + own_choice + c;
            if row < weight.rows && place < end {
                let choice = x.choice_at(place);
                let added = addends.sum(matrix, choice, row, weight.rows);
                out[(choice * weight.rows + row) as usize] = y[comptime!((r * PART + c) as usize)] + added;
            }
        }
    }
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
