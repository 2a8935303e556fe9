//! Products on matrix units, which multiply int8 with int8: NVIDIA's from Ampere on, by CUDA.
//!
//! Codes are multiplied as they are, 0, 1 and 2, and a product of the same inputs with -1 makes trits of them. The sums are the whole numbers that the other kernels find.
//!
//! No access is checked on the device, which would take a good part of the time. All of them are within the arrays: a matrix
//! is one of the weight's (`few_units` asks; tiles are made of experts that exist), rows end at the weight's last one, words at those
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
pub(super) const SHAPE: [u32; 3] = [16, 8, 32];
/// Units of a plane.
pub(super) const PLANE: u32 = 32;
/// Planes of a cube: four times as many rows and twice as many choices as one has.
const PLANES: [u32; 2] = [4, 2];
/// Units of a cube.
pub(super) const UNITS: u32 = PLANE * PLANES[0] * PLANES[1];
/// Products of rows, and of choices, of a plane.
const PARTS: [u32; 2] = [2, TILE / (PLANES[1] * SHAPE[1])];
/// Rows of a cube.
pub(super) const ROWS: u32 = PLANES[0] * PARTS[0] * SHAPE[0];
/// Words of activations of a step: a group of weights is never shorter.
pub(super) const STEP: u32 = 16;
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
        let raw = comptime!(raw_words(weight.shape.format));
        let mut levels = Array::<u32>::new(comptime!(brought as usize));
        let mut codes = Array::<u32>::new(comptime!((2 * PARTS[0] * raw) as usize));
        let mut scales = Array::<u32>::new(comptime!((2 * PARTS[0]) as usize));
        let mut next_codes = Array::<u32>::new(comptime!((2 * PARTS[0] * raw) as usize));
        let mut next_scales = Array::<u32>::new(comptime!((2 * PARTS[0]) as usize));
        bring_inputs(x, &sources, 0u32.runtime(), &mut levels, brought);
        bring_rows(weight, &rows, 0u32.runtime(), quarter, &mut codes, &mut scales);
        let mut at = u32::new(0);
        let mut side = u32::new(0);
        while at < x.level_words {
            #[unroll]
            for n in 0..brought {
                let slot = (UNIT_POS / STEP + n * comptime!(UNITS / STEP)) * STRIDE + own_word;
                inputs[(side + slot) as usize] = levels[comptime!(n as usize)];
            }
            // The other side may still be read: it is written next time, when all have passed here once more.
            sync_cube();
            // Fetched while this step is computed. Under a condition, or a compiler puts off what it fetches until it is needed.
            let next = at + STEP;
            if next < x.level_words {
                bring_inputs(x, &sources, next, &mut levels, brought);
                bring_rows(weight, &rows, next, quarter, &mut next_codes, &mut next_scales);
            }
            let input = side + (first_choice + line) * STRIDE + quarter;
            add_step(weight, &inputs, &rows, &codes, &scales, input, at, quarter, &mut totals);
            #[unroll]
            for word in 0..comptime!((2 * PARTS[0] * raw) as usize) {
                codes[word] = next_codes[word];
            }
            #[unroll]
            for word in 0..comptime!((2 * PARTS[0]) as usize) {
                scales[word] = next_scales[word];
            }
            side = comptime!(TILE * STRIDE) - side;
            at = next;
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

/// Where a unit keeps its number of row `r` and choice `c`, of twice as many each as it has products.
const fn number_of(r: u32, c: u32) -> usize {
    (4 * (r / 2 * PARTS[1] + c / 2) + r % 2 * 2 + c % 2) as usize
}

/// Brings a step's words of the choices that this unit puts into shared memory.
#[cube]
fn bring_inputs(x: &Operands, sources: &Array<u32>, at: u32, levels: &mut Array<u32>, #[comptime] brought: u32) {
    #[unroll]
    for n in 0..brought {
        levels[comptime!(n as usize)] = x.levels[(sources[comptime!(n as usize)] + at) as usize];
    }
}

/// Brings a step's words of a plane's rows, and those of their scales.
#[cube]
fn bring_rows(
    weight: &Packed,
    rows: &Array<u32>,
    at: u32,
    quarter: u32,
    codes: &mut Array<u32>,
    scales: &mut Array<u32>,
) {
    #[unroll]
    for r in 0..comptime!(2 * PARTS[0]) {
        let row = rows[comptime!(r as usize)];
        bring_words(weight, row, at, quarter, codes, comptime!(r * raw_words(weight.shape.format)));
        scales[comptime!(r as usize)] = weight.group_scale_word(row, at);
    }
}

/// Adds the products of [`STEP`] words of inputs, one group, to the totals of a plane.
#[cube]
fn add_step(
    weight: &Packed,
    inputs: &SharedMemory<u32>,
    rows: &Array<u32>,
    fetched: &Array<u32>,
    scales: &Array<u32>,
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
        group_scales[comptime!(r as usize)] = weight.group_scale_of(scales[comptime!(r as usize)], row, at);
        let from = comptime!(r * raw_words(weight.shape.format));
        #[unroll]
        for part in 0..4u32 {
            codes[comptime!((4 * r + part) as usize)] = codes_of(weight, fetched, from, part, at, quarter);
        }
    }
    #[unroll]
    for c in 0..comptime!(PARTS[1]) {
        let mut words = Array::<u32>::new(4usize);
        #[unroll]
        for part in 0..4u32 {
            let word = inputs[(input + c * comptime!(SHAPE[1] * STRIDE) + 4 * part) as usize];
            words[comptime!(part as usize)] = word;
        }
        // What is to be taken away is the same for all rows.
        let mut taken = zeros();
        #[unroll]
        for depth in 0..2u32 {
            units().execute_inplace(&minus_ones(), &right(&words, depth), &mut taken);
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
                units().execute_inplace(&left(&codes, comptime!(8 * r), depth), &right(&words, depth), &mut sums);
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
pub(super) fn units() -> cmma::MmaDefinition<i8, i8, i32> {
    cmma::MmaDefinition::<i8, i8, i32>::new(
        comptime!(SHAPE[0] as usize),
        comptime!(SHAPE[1] as usize),
        comptime!(SHAPE[2] as usize),
    )
}

/// Sums of a product: a pair of neighbouring choices for each half of its rows.
#[cube]
pub(super) fn zeros() -> Array<Vector<i32, Const<2>>> {
    let mut sums = Array::<Vector<i32, Const<2>>>::new(2usize);
    #[unroll]
    for half in 0..2usize {
        sums[half] = Vector::<i32, Const<2>>::new(0);
    }
    sums
}

/// Words that hold a unit's quarter of a step: the codes of every fourth word of activations.
pub(super) const fn raw_words(format: CodeFormat) -> u32 {
    match format {
        CodeFormat::T2 => 1,
        CodeFormat::T5 => 4,
    }
}

/// Fetches them, to the places from `to` on.
#[cube]
fn bring_words(weight: &Packed, row: u32, at: u32, quarter: u32, words: &mut Array<u32>, #[comptime] to: u32) {
    #[unroll]
    for part in 0..comptime!(raw_words(weight.shape.format)) {
        words[comptime!((to + part) as usize)] = weight.word_at(row, at + 4 * part + quarter);
    }
}

/// Part `part` of the codes in such words, which begin at `from`.
#[cube]
pub(super) fn codes_of(
    weight: &Packed,
    words: &Array<u32>,
    #[comptime] from: u32,
    #[comptime] part: u32,
    at: u32,
    quarter: u32,
) -> u32 {
    match comptime!(weight.shape.format) {
        CodeFormat::T2 => (words[comptime!(from as usize)] >> comptime!(2 * part)) & 0x0303_0303u32,
        CodeFormat::T5 => weight.codes_of(words[comptime!((from + part) as usize)], at + 4 * part + quarter),
    }
}

/// A matrix of -1.
#[cube]
pub(super) fn minus_ones() -> Array<Vector<i8, Const<4>>> {
    let mut ones = Array::<Vector<i8, Const<4>>>::new(4usize);
    #[unroll]
    for word in 0..4usize {
        ones[word] = Vector::<i8, Const<4>>::new(-1);
    }
    ones
}

/// The left side of product `depth` of a step, of two: of both of a unit's rows, the codes of four words each, from `from` on.
#[cube]
pub(super) fn left(codes: &Array<u32>, #[comptime] from: u32, #[comptime] depth: u32) -> Array<Vector<i8, Const<4>>> {
    let mut a = Array::<Vector<i8, Const<4>>>::new(4usize);
    #[unroll]
    for half in 0..2u32 {
        #[unroll]
        for side in 0..2u32 {
            let word = codes[comptime!((from + 4 * side + 2 * depth + half) as usize)];
            a[comptime!((2 * half + side) as usize)] = Vector::<i8, Const<4>>::reinterpret(word);
        }
    }
    a
}

/// Its right side: two of four words of activations.
#[cube]
pub(super) fn right(levels: &Array<u32>, #[comptime] depth: u32) -> Array<Vector<i8, Const<4>>> {
    let mut b = Array::<Vector<i8, Const<4>>>::new(2usize);
    #[unroll]
    for half in 0..2u32 {
        let word = levels[comptime!((2 * depth + half) as usize)];
        b[comptime!(half as usize)] = Vector::<i8, Const<4>>::reinterpret(word);
    }
    b
}
