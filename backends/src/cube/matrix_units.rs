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
        let mut fetched = Fetched {
            input,
            is_there: line < width,
            quarter,
            levels: Array::<u32>::new(comptime!((4 * AHEAD) as usize)),
            codes: Array::<u32>::new(comptime!((2 * AHEAD * raw_words(weight.shape.format)) as usize)),
            scales: Array::<u32>::new(comptime!((2 * AHEAD) as usize)),
        };
        // All of it is fetched before the first product waits: a compiler would put it off within one block of operations.
        let mut at = plane * STEP;
        fetched.bring(x, weight, &rows, at);
        while at < x.level_words {
            fetched.add(x, weight, &rows, at, &mut totals);
            at += comptime!(AHEAD * STEP * UNITS / PLANE);
            if at < x.level_words {
                fetched.bring(x, weight, &rows, at);
            }
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

/// What a unit needs for [`AHEAD`] steps, as it is stored.
#[derive(CubeType)]
struct Fetched {
    /// Where its token's words are, if there is such a token.
    input: u32,
    is_there: bool,
    /// Which of four neighbours it is.
    quarter: u32,
    levels: Array<u32>,
    /// Of each step, those of both rows.
    codes: Array<u32>,
    scales: Array<u32>,
}

#[cube]
impl Fetched {
    fn bring(&mut self, x: &Operands, weight: &Packed, rows: &Array<u32>, at: u32) {
        let raw = comptime!(raw_words(weight.shape.format));
        #[unroll]
        for ahead in 0..AHEAD {
            let step = at + ahead * comptime!(STEP * UNITS / PLANE);
            let known = min(step, x.level_words - STEP);
            #[unroll]
            for side in 0..2u32 {
                let row = rows[comptime!(side as usize)];
                bring_words(weight, row, known, self.quarter, &mut self.codes, comptime!((2 * ahead + side) * raw));
                self.scales[comptime!((2 * ahead + side) as usize)] = weight.group_scale_word(row, known);
            }
            #[unroll]
            for part in 0..4u32 {
                // Zeros make whatever they are multiplied with nothing.
                let mut word = u32::new(0);
                if self.is_there && step < x.level_words {
                    word = x.levels[(self.input + known + 4 * part) as usize];
                }
                self.levels[comptime!((4 * ahead + part) as usize)] = word;
            }
        }
    }

    /// Adds the products to the totals of a plane.
    fn add(&self, x: &Operands, weight: &Packed, rows: &Array<u32>, at: u32, totals: &mut Array<i32>) {
        let raw = comptime!(raw_words(weight.shape.format));
        #[unroll]
        for ahead in 0..AHEAD {
            let known = min(at + ahead * comptime!(STEP * UNITS / PLANE), x.level_words - STEP);
            let mut sums = zeros();
            #[unroll]
            for depth in 0..2u32 {
                let mut a = Array::<Vector<i8, Const<4>>>::new(4usize);
                let mut b = Array::<Vector<i8, Const<4>>>::new(2usize);
                #[unroll]
                for half in 0..2u32 {
                    let part = comptime!(2 * depth + half);
                    let word = self.levels[comptime!((4 * ahead + part) as usize)];
                    b[comptime!(half as usize)] = Vector::<i8, Const<4>>::reinterpret(word);
                    #[unroll]
                    for side in 0..2u32 {
                        let from = comptime!((2 * ahead + side) * raw);
                        let word = codes_of(weight, &self.codes, from, part, known, self.quarter);
                        a[comptime!((2 * half + side) as usize)] = Vector::<i8, Const<4>>::reinterpret(word);
                    }
                }
                units().execute_inplace(&a, &b, &mut sums);
                units().execute_inplace(&minus_ones(), &b, &mut sums);
            }
            #[unroll]
            for side in 0..2u32 {
                let word = self.scales[comptime!((2 * ahead + side) as usize)];
                let scale = weight.group_scale_of(word, rows[comptime!(side as usize)], known);
                let pair = sums[comptime!(side as usize)];
                #[unroll]
                for n in 0..2u32 {
                    totals[comptime!((2 * side + n) as usize)] += scale * pair[comptime!(n as usize)];
                }
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

/// Words that hold a unit's quarter of a step: the codes of every fourth word of activations.
const fn raw_words(format: CodeFormat) -> u32 {
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
fn codes_of(
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
fn minus_ones() -> Array<Vector<i8, Const<4>>> {
    let mut ones = Array::<Vector<i8, Const<4>>>::new(4usize);
    #[unroll]
    for word in 0..4usize {
        ones[word] = Vector::<i8, Const<4>>::new(-1);
    }
    ones
}
