//! Products on matrix units, which multiply int8 with int8: NVIDIA's from Ampere on, by CUDA.
//!
//! Codes are multiplied as they are, 0, 1 and 2, and a product of the same inputs with -1 makes trits of them: on an H200 the
//! operations around the products take the time, not the products. The sums are the whole numbers that the other kernels find.
//!
//! No access is checked on the device, which would take a good part of the time. All of them are within the arrays: a matrix
//! is one of the weight's (`few` asks; tiles are made of experts that exist), rows end at the weight's last one, words at those
//! of a row, of which there is a multiple of [`STEP`] whatever the width, choices at the last one, and an array holds what the
//! layout says (`Rows::holding`).

use burn_cubecl::CubeRuntime;
use cubecl::{
    client::ComputeClient,
    ir::{ElemType, IntKind},
    prelude::*,
};

use super::{
    device::multiplies,
    operands::{Addends, Operands, TILE},
    weight::Packed,
};
use crate::format::CodeFormat;

/// Rows, columns and depth of one product of the units, by a plane of 32.
const SHAPE: [u32; 3] = [16, 8, 32];
/// Units of a plane.
const PLANE: u32 = 32;
/// Planes of a cube: four times as many rows and twice as many choices as one has.
const PLANES: [u32; 2] = [4, 2];
/// Units of a cube.
pub(super) const UNITS: u32 = PLANE * PLANES[0] * PLANES[1];
/// Products of rows, and of choices, of a plane.
const PARTS: [u32; 2] = [2, TILE / (PLANES[1] * SHAPE[1])];
/// Rows of a cube.
pub(super) const ROWS: u32 = PLANES[0] * PARTS[0] * SHAPE[0];
/// Words of activations of a step: a group of weights is never shorter.
const STEP: u32 = 16;
/// Rows of a cube for a few tokens.
pub(super) const FEW_ROWS: u32 = SHAPE[0];
/// Tokens of a cube for a few.
pub(super) const FEW: u32 = SHAPE[1];
/// Steps that are fetched before the first of them is used.
const AHEAD: u32 = 3;
/// From one token to the next one in shared memory: no two units of a plane read the same bank.
const STRIDE: u32 = STEP + 4;

/// Whether this device has them.
pub(super) fn are_there<R: CubeRuntime>(client: &ComputeClient<R>) -> bool {
    multiplies(client, SHAPE, [ElemType::Int(IntKind::I8), ElemType::Int(IntKind::I32)])
}

/// A cube computes [`ROWS`] rows of [`TILE`] choices that share a matrix.
#[cube(launch_unchecked)]
pub(super) fn many(x: &Operands, weight: &Packed, addends: &Addends, out: &mut Array<f32>) {
    let (matrix, start, end) = x.tile(CUBE_POS_Y);
    if matrix < 0 {
        terminate!();
    }
    let matrix = u32::cast_from(matrix);
    let mut inputs = SharedMemory::<u32>::new(comptime!((2 * TILE * STRIDE) as usize));
    let plane = UNIT_POS / PLANE;
    // How the units' numbers lie in a plane: four neighbours share a row of either matrix.
    let (line, quarter) = (UNIT_POS % PLANE / 4, UNIT_POS % 4);
    let first_row = CUBE_POS_X * ROWS + plane % comptime!(PLANES[0]) * comptime!(PARTS[0] * SHAPE[0]) + line;
    let first_choice = plane / comptime!(PLANES[0]) * comptime!(PARTS[1] * SHAPE[1]);
    // Which words of the inputs this unit brings.
    let brought = comptime!(TILE * STEP / UNITS);
    let own_word = UNIT_POS % STEP;
    let mut sources = Array::<u32>::new(comptime!(brought as usize));
    #[unroll]
    for n in 0..brought {
        let place = min(start + UNIT_POS / STEP + n * comptime!(UNITS / STEP), end - 1);
        sources[comptime!(n as usize)] = x.input_of(x.choice_at(place)) * x.level_words + own_word;
    }
    let numbers = comptime!((4 * PARTS[0] * PARTS[1]) as usize);
    let mut y = Array::<f32>::new(numbers);
    #[unroll]
    for number in 0..numbers {
        y[number] = 0.0;
    }
    #[unroll]
    for weight_plane in 0..weight.shape.planes {
        let mut rows = Array::<u32>::new(comptime!((2 * PARTS[0]) as usize));
        #[unroll]
        for r in 0..comptime!(2 * PARTS[0]) {
            let row = min(first_row + 8 * r, weight.rows - 1);
            rows[comptime!(r as usize)] = weight.row(matrix, weight_plane, row);
        }
        let mut totals = Array::<i32>::new(numbers);
        #[unroll]
        for number in 0..numbers {
            totals[number] = 0;
        }
        let mut at = u32::new(0);
        let mut side = u32::new(0);
        while at < x.level_words {
            #[unroll]
            for n in 0..brought {
                let slot = (UNIT_POS / STEP + n * comptime!(UNITS / STEP)) * STRIDE + own_word;
                inputs[(side + slot) as usize] = x.levels[(sources[comptime!(n as usize)] + at) as usize];
            }
            // The other side may still be read: it is written next time, when all have passed here once more.
            sync_cube();
            add_step(weight, &inputs, &rows, side + (first_choice + line) * STRIDE + quarter, at, quarter, &mut totals);
            side = comptime!(TILE * STRIDE) - side;
            at += STEP;
        }
        sync_cube();
        #[unroll]
        for r in 0..comptime!(2 * PARTS[0]) {
            let row_scale = weight.row_scale(matrix, weight_plane, min(first_row + 8 * r, weight.rows - 1));
            #[unroll]
            for c in 0..comptime!(2 * PARTS[1]) {
                let number = comptime!(number_of(r, c));
                let place = min(start + first_choice + c / 2 * 8 + 2 * quarter + c % 2, end - 1);
                let scale = x.scale(x.input_of(x.choice_at(place)));
                y[number] += f32::cast_from(totals[number]) * (row_scale * scale);
            }
        }
    }
    #[unroll]
    for r in 0..comptime!(2 * PARTS[0]) {
        let row = first_row + 8 * r;
        #[unroll]
        for c in 0..comptime!(2 * PARTS[1]) {
            let place = start + first_choice + c / 2 * 8 + 2 * quarter + c % 2;
            if row < weight.rows && place < end {
                let choice = x.choice_at(place);
                let added = addends.sum(matrix, choice, row, weight.rows);
                out[(choice * weight.rows + row) as usize] = y[comptime!(number_of(r, c))] + added;
            }
        }
    }
}

/// A cube computes [`FEW_ROWS`] rows of one choice, or of up to [`FEW`] tokens, or choices, that share the matrix.
#[cube(launch_unchecked)]
pub(super) fn few(x: &Operands, weight: &Packed, addends: &Addends, out: &mut Array<f32>) {
    block_of_few(x, weight, addends, out, CUBE_POS_X);
}

/// [`few`] of three matrices, one after the other.
#[cube(launch_unchecked)]
pub(super) fn few_of_three(
    x: &Operands,
    first: &Packed,
    second: &Packed,
    third: &Packed,
    to_first: &Addends,
    to_second: &Addends,
    to_third: &Addends,
    first_out: &mut Array<f32>,
    second_out: &mut Array<f32>,
    third_out: &mut Array<f32>,
    first_blocks: u32,
    second_blocks: u32,
) {
    if CUBE_POS_X < first_blocks {
        block_of_few(x, first, to_first, first_out, CUBE_POS_X);
    } else if CUBE_POS_X < first_blocks + second_blocks {
        block_of_few(x, second, to_second, second_out, CUBE_POS_X - first_blocks);
    } else {
        block_of_few(x, third, to_third, third_out, CUBE_POS_X - first_blocks - second_blocks);
    }
}

/// The planes of a cube share the depth, [`AHEAD`] steps of which they fetch at once.
#[cube]
fn block_of_few(x: &Operands, weight: &Packed, addends: &Addends, out: &mut Array<f32>, block: u32) {
    let (line, quarter, plane) = (UNIT_POS % PLANE / 4, UNIT_POS % 4, UNIT_POS / PLANE);
    let first_row = block * FEW_ROWS;
    // Where the first choice stands in the order, how many there are, and their matrix.
    let mut first = CUBE_POS_Y;
    let mut width = u32::new(1);
    let mut matrix = weight.matrices;
    if comptime!(x.planned) {
        let (tile_matrix, start, end) = x.tile(CUBE_POS_Y);
        // None becomes larger than all.
        matrix = u32::cast_from(tile_matrix);
        first = start;
        width = end - start;
    }
    if comptime!(!x.planned) {
        if comptime!(!x.routed) {
            first = CUBE_POS_Y * FEW;
            width = min(x.choices - first, FEW);
        }
        matrix = x.matrix_of(first);
    }
    if matrix >= weight.matrices {
        terminate!();
    }
    let input = x.input_of(x.choice_at(first + min(line, width - 1))) * x.level_words + quarter;
    let mut parts = SharedMemory::<i32>::new(comptime!((4 * UNITS) as usize));
    // Who adds up what the planes found: of a row and a choice each.
    let (own_row, own_choice) = (first_row + line + plane / 2 * 8, 2 * quarter + plane % 2);
    let is_own = plane < 4 && own_row < weight.rows && own_choice < width;
    let choice = x.choice_at(first + min(own_choice, width - 1));
    // Fetched before it is waited for.
    let (mut added, mut scale) = (f32::new(0.0), f32::new(0.0));
    let mut row_scales = Array::<f32>::new(comptime!(weight.shape.planes as usize));
    if is_own {
        added = addends.sum(matrix, choice, own_row, weight.rows);
        scale = x.scale(x.input_of(choice));
        #[unroll]
        for weight_plane in 0..weight.shape.planes {
            row_scales[comptime!(weight_plane as usize)] = weight.row_scale(matrix, weight_plane, own_row);
        }
    }
    let mut y = f32::new(0.0);
    #[unroll]
    for weight_plane in 0..weight.shape.planes {
        let mut rows = Array::<u32>::new(2usize);
        let mut totals = Array::<i32>::new(4usize);
        #[unroll]
        for side in 0..2u32 {
            let row = min(first_row + line + 8 * side, weight.rows - 1);
            rows[comptime!(side as usize)] = weight.row(matrix, weight_plane, row);
        }
        #[unroll]
        for number in 0..4usize {
            totals[number] = 0;
        }
        let mut at = plane * STEP;
        while at < x.level_words {
            add_few(x, weight, &rows, input, line < width, at, quarter, &mut totals);
            at += comptime!(AHEAD * STEP * UNITS / PLANE);
        }
        #[unroll]
        for number in 0..4u32 {
            parts[(number * UNITS + UNIT_POS) as usize] = totals[comptime!(number as usize)];
        }
        sync_cube();
        if is_own {
            let mut total = i32::new(0);
            #[unroll]
            for other in 0..comptime!(UNITS / PLANE) {
                total += parts[(plane * UNITS + other * PLANE + UNIT_POS % PLANE) as usize];
            }
            y += f32::cast_from(total) * (row_scales[comptime!(weight_plane as usize)] * scale);
        }
        sync_cube();
    }
    if is_own {
        out[(choice * weight.rows + own_row) as usize] = y + added;
    }
}

/// Adds the products of [`AHEAD`] steps of a plane to its totals.
#[cube]
fn add_few(
    x: &Operands,
    weight: &Packed,
    rows: &Array<u32>,
    input: u32,
    is_there: bool,
    at: u32,
    quarter: u32,
    totals: &mut Array<i32>,
) {
    let mut words = Array::<u32>::new(comptime!((4 * AHEAD) as usize));
    let mut codes = Array::<u32>::new(comptime!((8 * AHEAD) as usize));
    let mut group_scales = Array::<i32>::new(comptime!((2 * AHEAD) as usize));
    #[unroll]
    for ahead in 0..AHEAD {
        let step = at + ahead * comptime!(STEP * UNITS / PLANE);
        let known = min(step, x.level_words - STEP);
        #[unroll]
        for part in 0..4u32 {
            // Zeros make whatever they are multiplied with nothing.
            let mut word = u32::new(0);
            if is_there && step < x.level_words {
                word = x.levels[(input + known + 4 * part) as usize];
            }
            words[comptime!((4 * ahead + part) as usize)] = word;
        }
        #[unroll]
        for side in 0..2u32 {
            let row = rows[comptime!(side as usize)];
            group_scales[comptime!((2 * ahead + side) as usize)] = weight.group_scale(row, known);
            bring_codes(weight, row, known, quarter, &mut codes, comptime!(8 * ahead + 4 * side));
        }
    }
    #[unroll]
    for ahead in 0..AHEAD {
        let mut sums = zeros();
        #[unroll]
        for depth in 0..2u32 {
            let mut a = Array::<Vector<i8, Const<4>>>::new(4usize);
            let mut b = Array::<Vector<i8, Const<4>>>::new(2usize);
            #[unroll]
            for half in 0..2u32 {
                let word = words[comptime!((4 * ahead + 2 * depth + half) as usize)];
                b[comptime!(half as usize)] = Vector::<i8, Const<4>>::reinterpret(word);
                #[unroll]
                for side in 0..2u32 {
                    let word = codes[comptime!((8 * ahead + 4 * side + 2 * depth + half) as usize)];
                    a[comptime!((2 * half + side) as usize)] = Vector::<i8, Const<4>>::reinterpret(word);
                }
            }
            units().execute_inplace(&a, &b, &mut sums);
            units().execute_inplace(&minus_ones(), &b, &mut sums);
        }
        #[unroll]
        for side in 0..2u32 {
            let scale = group_scales[comptime!((2 * ahead + side) as usize)];
            let pair = sums[comptime!(side as usize)];
            #[unroll]
            for n in 0..2u32 {
                totals[comptime!((2 * side + n) as usize)] += scale * pair[comptime!(n as usize)];
            }
        }
    }
}

/// Where a unit keeps its number of row `r` and choice `c`, of twice as many each as it has products.
const fn number_of(r: u32, c: u32) -> usize {
    (4 * (r / 2 * PARTS[1] + c / 2) + r % 2 * 2 + c % 2) as usize
}

/// Adds the products of [`STEP`] words of inputs, one group, to the totals of a plane.
#[cube]
fn add_step(
    weight: &Packed,
    inputs: &SharedMemory<u32>,
    rows: &Array<u32>,
    input: u32,
    at: u32,
    quarter: u32,
    totals: &mut Array<i32>,
) {
    // Two products deep; of each, both halves of its rows and of its depth.
    let mut codes = Array::<u32>::new(comptime!((8 * PARTS[0]) as usize));
    let mut group_scales = Array::<i32>::new(comptime!((2 * PARTS[0]) as usize));
    #[unroll]
    for r in 0..comptime!(2 * PARTS[0]) {
        let row = rows[comptime!(r as usize)];
        group_scales[comptime!(r as usize)] = weight.group_scale(row, at);
        bring_codes(weight, row, at, quarter, &mut codes, comptime!(4 * r));
    }
    #[unroll]
    for c in 0..comptime!(PARTS[1]) {
        let mut words = Array::<Vector<i8, Const<4>>>::new(4usize);
        #[unroll]
        for part in 0..4u32 {
            let word = inputs[(input + c * comptime!(SHAPE[1] * STRIDE) + 4 * part) as usize];
            words[comptime!(part as usize)] = Vector::<i8, Const<4>>::reinterpret(word);
        }
        // What is to be taken away is the same for all rows.
        let mut taken = zeros();
        #[unroll]
        for depth in 0..2u32 {
            let mut b = Array::<Vector<i8, Const<4>>>::new(2usize);
            #[unroll]
            for half in 0..2u32 {
                b[comptime!(half as usize)] = words[comptime!((2 * depth + half) as usize)];
            }
            units().execute_inplace(&minus_ones(), &b, &mut taken);
        }
        #[unroll]
        for r in 0..comptime!(PARTS[0]) {
            let mut sums = Array::<Vector<i32, Const<2>>>::new(2usize);
            #[unroll]
            for half in 0..2usize {
                sums[half] = taken[half];
            }
            #[unroll]
            for depth in 0..2u32 {
                let mut a = Array::<Vector<i8, Const<4>>>::new(4usize);
                let mut b = Array::<Vector<i8, Const<4>>>::new(2usize);
                #[unroll]
                for half in 0..2u32 {
                    b[comptime!(half as usize)] = words[comptime!((2 * depth + half) as usize)];
                    #[unroll]
                    for side in 0..2u32 {
                        let word = codes[comptime!((4 * (2 * r + side) + 2 * depth + half) as usize)];
                        a[comptime!((2 * half + side) as usize)] = Vector::<i8, Const<4>>::reinterpret(word);
                    }
                }
                units().execute_inplace(&a, &b, &mut sums);
            }
            #[unroll]
            for side in 0..2u32 {
                let scale = group_scales[comptime!((2 * r + side) as usize)];
                let pair = sums[comptime!(side as usize)];
                #[unroll]
                for n in 0..2u32 {
                    let number = comptime!(number_of(2 * r + side, 2 * c + n));
                    totals[number] += scale * pair[comptime!(n as usize)];
                }
            }
        }
    }
}

#[cube]
fn units() -> cmma::MmaDefinition<i8, i8, i32> {
    cmma::MmaDefinition::<i8, i8, i32>::new(
        comptime!(SHAPE[0] as usize),
        comptime!(SHAPE[1] as usize),
        comptime!(SHAPE[2] as usize),
    )
}

/// Sums of a product: a pair of neighbouring choices for each half of its rows.
#[cube]
fn zeros() -> Array<Vector<i32, Const<2>>> {
    let mut sums = Array::<Vector<i32, Const<2>>>::new(2usize);
    #[unroll]
    for half in 0..2usize {
        sums[half] = Vector::<i32, Const<2>>::new(0);
    }
    sums
}

/// The codes of a unit's quarter of a step: of every fourth word of activations. They go to four places from `to` on.
#[cube]
fn bring_codes(weight: &Packed, row: u32, at: u32, quarter: u32, codes: &mut Array<u32>, #[comptime] to: u32) {
    match comptime!(weight.shape.format) {
        CodeFormat::T2 => {
            let word = weight.word(row, at / 4 + quarter);
            #[unroll]
            for digit in 0..4u32 {
                codes[comptime!((to + digit) as usize)] = (word >> (2 * digit)) & 0x0303_0303u32;
            }
        }
        CodeFormat::T5 =>
        {
            #[unroll]
            for part in 0..4u32 {
                codes[comptime!((to + part) as usize)] = weight.codes_at(row, at + 4 * part + quarter);
            }
        }
    }
}

/// A matrix of -1.
#[cube]
fn minus_ones() -> Array<Vector<i8, Const<4>>> {
    let mut ones = Array::<Vector<i8, Const<4>>>::new(4usize);
    #[unroll]
    for word in 0..4usize {
        ones[word] = Vector::<i8, Const<4>>::new(-1);
    }
    ones
}
