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
    tokens::level_words,
    weight::Packed,
};
use crate::format::{CodeFormat, TernaryLayout};

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
/// From one token to the next one in shared memory: no two units of a plane read the same bank.
const STRIDE: u32 = STEP + 4;

/// What a cube for a few tokens has in shared memory, in words: so rows are read one after the other, and nothing waits until
/// all is on its way. (Units that read 16 bytes of 16 rows each were held up by how many rows a load can touch: 1.3 TB/s on
/// an H200.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Stage {
    /// Code words of a row.
    codes: u32,
    /// Words of a row's group scales, which may begin within one.
    scales: u32,
    /// Words of a token.
    levels: u32,
    /// Tokens at most.
    tokens: u32,
}

impl Stage {
    pub(super) fn of(layout: &TernaryLayout, tokens: usize) -> Self {
        let scales = if layout.group_size.is_some() { (layout.groups() + 3).div_ceil(4) } else { 0 };
        Self {
            codes: layout.words_per_row() as u32,
            scales: scales as u32,
            levels: level_words(layout) as u32,
            tokens: if tokens > 1 { FEW } else { 1 },
        }
    }

    /// Whether a cube of this device has so much.
    pub(super) fn fits<R: CubeRuntime>(self, client: &ComputeClient<R>) -> bool {
        let rows = FEW_ROWS * (spread(self.codes) + self.scales);
        let words = rows + self.tokens * spread(self.levels) + 4 * UNITS;
        4 * words as usize <= client.properties().hardware.max_shared_memory_size
    }
}

/// From one row of so many words to the next one: eight rows, four words each, are in different banks.
const fn spread(words: u32) -> u32 {
    words + (12 - words % 8) % 8
}

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
pub(super) fn few(x: &Operands, weight: &Packed, addends: &Addends, out: &mut Array<f32>, #[comptime] stage: Stage) {
    block_of_few(x, weight, addends, out, CUBE_POS_X, &mut staged(stage), stage);
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
    #[comptime] stage: Stage,
) {
    let mut staged = staged(stage);
    if CUBE_POS_X < first_blocks {
        block_of_few(x, first, to_first, first_out, CUBE_POS_X, &mut staged, stage);
    } else if CUBE_POS_X < first_blocks + second_blocks {
        block_of_few(x, second, to_second, second_out, CUBE_POS_X - first_blocks, &mut staged, stage);
    } else {
        let block = CUBE_POS_X - first_blocks - second_blocks;
        block_of_few(x, third, to_third, third_out, block, &mut staged, stage);
    }
}

/// See [`Stage`].
#[derive(CubeType)]
struct Staged {
    codes: SharedMemory<u32>,
    scales: SharedMemory<u32>,
    levels: SharedMemory<u32>,
    /// What the planes of a cube found.
    parts: SharedMemory<i32>,
}

#[cube]
fn staged(#[comptime] stage: Stage) -> Staged {
    Staged {
        codes: SharedMemory::<u32>::new(comptime!((FEW_ROWS * spread(stage.codes)) as usize)),
        scales: SharedMemory::<u32>::new(comptime!((FEW_ROWS * stage.scales).max(1) as usize)),
        levels: SharedMemory::<u32>::new(comptime!((stage.tokens * spread(stage.levels)) as usize)),
        parts: SharedMemory::<i32>::new(comptime!((4 * UNITS) as usize)),
    }
}

/// The planes of a cube share the depth.
#[cube]
fn block_of_few(
    x: &Operands,
    weight: &Packed,
    addends: &Addends,
    out: &mut Array<f32>,
    block: u32,
    staged: &mut Staged,
    #[comptime] stage: Stage,
) {
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
    #[unroll]
    for n in 0..comptime!((stage.tokens * stage.levels).div_ceil(UNITS)) {
        let place = n * UNITS + UNIT_POS;
        let (token, word) = (place / stage.levels, place % stage.levels);
        if token < width {
            let input = x.input_of(x.choice_at(first + token));
            staged.levels[(token * comptime!(spread(stage.levels)) + word) as usize] =
                x.levels[(input * stage.levels + word) as usize];
        }
    }
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
        let mut totals = Array::<i32>::new(4usize);
        #[unroll]
        for number in 0..4usize {
            totals[number] = 0;
        }
        stage_rows(weight, weight.row(matrix, weight_plane, 0), first_row, staged, stage);
        sync_cube();
        let mut at = plane * STEP;
        while at < stage.levels {
            let row = weight.row(matrix, weight_plane, first_row + line);
            add_staged(weight, staged, row, line, quarter, line < width, at, &mut totals, stage);
            at += comptime!(STEP * UNITS / PLANE);
        }
        #[unroll]
        for number in 0..4u32 {
            staged.parts[(number * UNITS + UNIT_POS) as usize] = totals[comptime!(number as usize)];
        }
        sync_cube();
        if is_own {
            let mut total = i32::new(0);
            #[unroll]
            for other in 0..comptime!(UNITS / PLANE) {
                total += staged.parts[(plane * UNITS + other * PLANE + UNIT_POS % PLANE) as usize];
            }
            y += f32::cast_from(total) * (row_scales[comptime!(weight_plane as usize)] * scale);
        }
        sync_cube();
    }
    if is_own {
        out[(choice * weight.rows + own_row) as usize] = y + added;
    }
}

/// Brings the codes and the group scales of a block of rows of a matrix's plane, whose row 0 is `matrix_row`. What comes after
/// its last row is the last one again.
#[cube]
fn stage_rows(weight: &Packed, matrix_row: u32, first_row: u32, staged: &mut Staged, #[comptime] stage: Stage) {
    #[unroll]
    for n in 0..comptime!((FEW_ROWS * stage.codes).div_ceil(UNITS)) {
        let place = n * UNITS + UNIT_POS;
        let (line, word) = (place / stage.codes, place % stage.codes);
        if line < FEW_ROWS {
            let row = matrix_row + min(first_row + line, weight.rows - 1);
            staged.codes[(line * comptime!(spread(stage.codes)) + word) as usize] = weight.word(row, word);
        }
    }
    if comptime!(stage.scales > 0) {
        #[unroll]
        for n in 0..comptime!((FEW_ROWS * stage.scales).div_ceil(UNITS)) {
            let place = n * UNITS + UNIT_POS;
            let (line, word) = (place / stage.scales, place % stage.scales);
            if line < FEW_ROWS {
                let row = matrix_row + min(first_row + line, weight.rows - 1);
                staged.scales[place as usize] = weight.group_scale_words(row, word);
            }
        }
    }
}

/// Adds the products of [`STEP`] words of the inputs, one group, to a plane's totals. `row` is the first of the two rows of this
/// unit, number `line` of the block; there may be no token `line`.
#[cube]
fn add_staged(
    weight: &Packed,
    staged: &Staged,
    row: u32,
    line: u32,
    quarter: u32,
    is_there: bool,
    at: u32,
    totals: &mut Array<i32>,
    #[comptime] stage: Stage,
) {
    let raw = comptime!(raw_words(weight.shape.format));
    let mut codes = Array::<u32>::new(comptime!((2 * raw) as usize));
    #[unroll]
    for side in 0..2u32 {
        let first = (line + 8 * side) * comptime!(spread(stage.codes));
        #[unroll]
        for part in 0..raw {
            let word = weight.word_of(at + 4 * part + quarter);
            codes[comptime!((side * raw + part) as usize)] = staged.codes[(first + word) as usize];
        }
    }
    let mut sums = zeros();
    #[unroll]
    for depth in 0..2u32 {
        let mut a = Array::<Vector<i8, Const<4>>>::new(4usize);
        let mut b = Array::<Vector<i8, Const<4>>>::new(2usize);
        #[unroll]
        for half in 0..2u32 {
            let part = comptime!(2 * depth + half);
            let token = min(line, comptime!(stage.tokens - 1));
            let word = staged.levels[(token * comptime!(spread(stage.levels)) + at + 4 * part + quarter) as usize];
            // Zeros make whatever they are multiplied with nothing.
            let word = select(is_there, word, u32::new(0));
            b[comptime!(half as usize)] = Vector::<i8, Const<4>>::reinterpret(word);
            #[unroll]
            for side in 0..2u32 {
                let word = codes_of(weight, &codes, comptime!(side * raw), part, at, quarter);
                a[comptime!((2 * half + side) as usize)] = Vector::<i8, Const<4>>::reinterpret(word);
            }
        }
        units().execute_inplace(&a, &b, &mut sums);
        units().execute_inplace(&minus_ones(), &b, &mut sums);
    }
    #[unroll]
    for side in 0..2u32 {
        let mut scale = i32::new(1);
        if comptime!(stage.scales > 0) {
            // Rows past the last one have its scales, and are not written.
            let byte = weight.group_scale_byte(row + 8 * side, at);
            let word = staged.scales[((line + 8 * side) * stage.scales + byte / 4) as usize];
            scale = i32::cast_from((word >> (byte % 4 * 8)) & 255);
        }
        let pair = sums[comptime!(side as usize)];
        #[unroll]
        for n in 0..2u32 {
            totals[comptime!((2 * side + n) as usize)] += scale * pair[comptime!(n as usize)];
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
