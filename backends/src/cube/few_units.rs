//! Products with a few tokens on [`matrix_units`](super::matrix_units), where the same holds: no access is checked, and all are
//! within the arrays.

use burn_cubecl::CubeRuntime;
use cubecl::{client::ComputeClient, prelude::*};

use super::{
    matrix_units::{PLANE, SHAPE, STEP, UNITS, codes_of, left, minus_ones, raw_words, right, units, zeros},
    operands::{Addends, Operands},
    tokens::level_words,
    weight::Packed,
};
use crate::format::TernaryLayout;

/// Rows of a cube for a few tokens.
pub(super) const FEW_ROWS: u32 = SHAPE[0];
/// Tokens of a cube for a few.
pub(super) const FEW: u32 = SHAPE[1];

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
    stage_tokens(x, first, width, staged, stage);
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

/// Brings the words of `width` tokens, whose choices stand from place `first` on.
///
/// As in [`stage_rows`], nothing depends on a condition, so that all is fetched together: what there is nothing for brings the last
/// word, or the last token, once more.
#[cube]
fn stage_tokens(x: &Operands, first: u32, width: u32, staged: &mut Staged, #[comptime] stage: Stage) {
    let words = comptime!(stage.tokens * stage.levels);
    let own = comptime!(words.div_ceil(UNITS));
    let mut fetched = Array::<u32>::new(comptime!(own as usize));
    #[unroll]
    for n in 0..own {
        let place = min(n * UNITS + UNIT_POS, comptime!(words - 1));
        let input = x.input_of(x.choice_at(first + min(place / stage.levels, width - 1)));
        fetched[comptime!(n as usize)] = x.levels[(input * stage.levels + place % stage.levels) as usize];
    }
    put_apart(&fetched, &mut staged.levels, words, stage.levels);
}

/// Brings the codes and the group scales of a block of rows of a matrix's plane, whose row 0 is `matrix_row`.
#[cube]
fn stage_rows(weight: &Packed, matrix_row: u32, first_row: u32, staged: &mut Staged, #[comptime] stage: Stage) {
    let words = comptime!(FEW_ROWS * stage.codes);
    let own = comptime!(words.div_ceil(UNITS));
    let scale_words = comptime!(FEW_ROWS * stage.scales);
    let own_scales = comptime!(scale_words.div_ceil(UNITS));
    let mut fetched = Array::<u32>::new(comptime!((own + own_scales) as usize));
    #[unroll]
    for n in 0..own {
        let place = min(n * UNITS + UNIT_POS, comptime!(words - 1));
        let row = matrix_row + min(first_row + place / stage.codes, weight.rows - 1);
        fetched[comptime!(n as usize)] = weight.word(row, place % stage.codes);
    }
    #[unroll]
    for n in 0..own_scales {
        let place = min(n * UNITS + UNIT_POS, comptime!(scale_words - 1));
        let row = matrix_row + min(first_row + place / stage.scales, weight.rows - 1);
        fetched[comptime!((own + n) as usize)] = weight.group_scale_word_of_row(row, place % stage.scales);
    }
    put_apart(&fetched, &mut staged.codes, words, stage.codes);
    #[unroll]
    for n in 0..own_scales {
        let place = min(n * UNITS + UNIT_POS, comptime!(scale_words - 1));
        staged.scales[place as usize] = fetched[comptime!((own + n) as usize)];
    }
}

/// Puts a unit's first words of rows of so many words where they are [spread].
#[cube]
fn put_apart(fetched: &Array<u32>, to: &mut SharedMemory<u32>, #[comptime] words: u32, #[comptime] width: u32) {
    #[unroll]
    for n in 0..comptime!(words.div_ceil(UNITS)) {
        let place = min(n * UNITS + UNIT_POS, comptime!(words - 1));
        to[(place / width * comptime!(spread(width)) + place % width) as usize] = fetched[comptime!(n as usize)];
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
    let mut words = Array::<u32>::new(comptime!(raw as usize));
    let mut codes = Array::<u32>::new(8usize);
    #[unroll]
    for side in 0..2u32 {
        let first = (line + 8 * side) * comptime!(spread(stage.codes));
        #[unroll]
        for part in 0..raw {
            let word = weight.word_of(at + 4 * part + quarter);
            words[comptime!(part as usize)] = staged.codes[(first + word) as usize];
        }
        #[unroll]
        for part in 0..4u32 {
            codes[comptime!((4 * side + part) as usize)] = codes_of(weight, &words, 0u32, part, at, quarter);
        }
    }
    let mut levels = Array::<u32>::new(4usize);
    #[unroll]
    for part in 0..4u32 {
        let token = min(line, comptime!(stage.tokens - 1));
        let word = staged.levels[(token * comptime!(spread(stage.levels)) + at + 4 * part + quarter) as usize];
        // Zeros make whatever they are multiplied with nothing.
        levels[comptime!(part as usize)] = select(is_there, word, u32::new(0));
    }
    let mut sums = zeros();
    #[unroll]
    for depth in 0..2u32 {
        let right = right(&levels, depth);
        units().execute_inplace(&left(&codes, 0u32, depth), &right, &mut sums);
        units().execute_inplace(&minus_ones(), &right, &mut sums);
    }
    #[unroll]
    for side in 0..2u32 {
        let mut scale = i32::new(1);
        if comptime!(stage.scales > 0) {
            // Rows past the last one have its scales, and are not written.
            let byte = weight.group_scale_byte_of_row(row + 8 * side, at);
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
