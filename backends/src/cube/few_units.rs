//! Products with a few tokens on [`matrix_units`](super::matrix_units), where the same holds: no access is checked, and all are
//! within the arrays.

use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement};
use cubecl::{client::ComputeClient, prelude::*};

use super::{
    matrix_units::{PLANE, SHAPE, STEP, UNITS, left, minus_ones, right, units, zeros},
    operands::{Addends, Operands},
    tokens::level_words,
    weight::{Packed, has_quads},
};
use crate::format::TernaryWeight;

/// Rows of a cube for a few tokens.
pub(super) const FEW_ROWS: u32 = SHAPE[0];
/// Tokens of a cube for a few.
pub(super) const FEW: u32 = SHAPE[1];
/// Words of activations that the planes of a cube take together.
const TOGETHER: u32 = STEP * UNITS / PLANE;
/// How often they do so without a loop.
const MOST_UNROLLED: u32 = 8;

/// What a cube for a few tokens has in shared memory, in words: so rows are read one after the other, 16 bytes at a time, and
/// nothing waits until all is on its way. What the units are kept busy with is bringing it, so it takes few instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Stage {
    /// Code words of a row.
    codes: u32,
    /// Group scales of a row.
    groups: u32,
    /// Words of a token.
    levels: u32,
    /// Tokens at most.
    tokens: u32,
    /// Whether rows are read 16 bytes at a time.
    in_quads: bool,
}

impl Stage {
    /// None where a cube of this device has no room for it.
    pub(super) fn of<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
        weight: &TernaryWeight<CubeBackend<R, F, I, BT>>,
        tokens: usize,
        client: &ComputeClient<R>,
    ) -> Option<Self> {
        let layout = &weight.layout;
        let stage = Self {
            codes: layout.words_per_row() as u32,
            groups: if layout.group_size.is_some() { layout.groups() as u32 } else { 0 },
            levels: level_words(layout) as u32,
            tokens: if tokens > 1 { FEW } else { 1 },
            in_quads: has_quads(weight),
        };
        let rows = FEW_ROWS * (code_stride(stage.codes) + stage.groups.max(1));
        let words = rows + stage.tokens * level_stride(stage.levels) + 4 * UNITS;
        (4 * words as usize <= client.properties().hardware.max_shared_memory_size).then_some(stage)
    }
}

/// From one row of so many words to the next one: the same four words of neighbouring rows are in different banks.
const fn code_stride(words: u32) -> u32 {
    words + (12 - words % 8) % 8
}

/// From one token of so many words to the next one: sixteen neighbouring words of both are in different banks.
const fn level_stride(words: u32) -> u32 {
    words + (48 - words % 32) % 32
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
    /// Of each group, those of all rows.
    scales: SharedMemory<i32>,
    levels: SharedMemory<u32>,
    /// What the planes of a cube found.
    parts: SharedMemory<i32>,
}

#[cube]
fn staged(#[comptime] stage: Stage) -> Staged {
    Staged {
        codes: SharedMemory::<u32>::new_aligned(comptime!((FEW_ROWS * code_stride(stage.codes)) as usize), 16usize),
        scales: SharedMemory::<i32>::new(comptime!((FEW_ROWS * stage.groups.max(1)) as usize)),
        levels: SharedMemory::<u32>::new_aligned(
            comptime!((stage.tokens * level_stride(stage.levels)) as usize),
            16usize,
        ),
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
    // Fetched before anything is waited for.
    let mut rows = Fetched::new(stage);
    rows.fetch(weight, weight.row(matrix, 0, 0), first_row, stage);
    let levels = fetch_tokens(x, first, width, stage);
    // Who adds up what the planes found: of a row and a choice each.
    let (own_row, own_choice) = (first_row + line + plane / 2 * 8, 2 * quarter + plane % 2);
    let is_own = plane < 4 && own_row < weight.rows && own_choice < width;
    let choice = x.choice_at(first + min(own_choice, width - 1));
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
        if comptime!(weight_plane == 0) {
            put_tokens(&levels, staged, width, stage);
        } else {
            rows.fetch(weight, weight.row(matrix, weight_plane, 0), first_row, stage);
        }
        rows.put(staged, stage);
        sync_cube();
        let token = min(line, width - 1);
        // Without a condition as long as there is a step for every plane.
        let whole = comptime!(stage.levels / TOGETHER);
        #[unroll(whole <= MOST_UNROLLED)]
        for n in 0..whole {
            let step = n * comptime!(TOGETHER / STEP) + plane;
            add_staged(weight, staged, line, token, quarter, step, &mut totals, stage);
        }
        if comptime!(!stage.levels.is_multiple_of(TOGETHER)) {
            let step = comptime!(whole * (TOGETHER / STEP)) + plane;
            if step < comptime!(stage.levels / STEP) {
                add_staged(weight, staged, line, token, quarter, step, &mut totals, stage);
            }
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

/// The words of `width` tokens, whose choices stand from place `first` on, as far as a unit brings them.
///
/// Nothing depends on a condition that units of a plane do not share, so that all is fetched together: what there is nothing for
/// brings the last words once more.
#[cube]
fn fetch_tokens(x: &Operands, first: u32, width: u32, #[comptime] stage: Stage) -> Array<Quad> {
    let (quads, sharers) = comptime!((stage.levels / 4, sharers(stage)));
    let mut fetched = Array::<Quad>::new(comptime!(own_quads(stage) as usize));
    let token = UNIT_POS / sharers;
    if token < width {
        let input = x.input_of(x.choice_at(first + token));
        #[unroll]
        for n in 0..comptime!(own_quads(stage)) {
            let place = min(n * sharers + UNIT_POS % sharers, comptime!(quads - 1));
            fetched[comptime!(n as usize)] = x.level_quad(input * quads + place);
        }
    }
    fetched
}

/// Puts them into shared memory.
#[cube]
fn put_tokens(fetched: &Array<Quad>, staged: &mut Staged, width: u32, #[comptime] stage: Stage) {
    let (quads, sharers) = comptime!((stage.levels / 4, sharers(stage)));
    let token = UNIT_POS / sharers;
    let mut levels = staged.levels.to_slice_mut().into_vectorized().with_vector_size::<Const<4>>();
    if token < width {
        #[unroll]
        for n in 0..comptime!(own_quads(stage)) {
            let place = min(n * sharers + UNIT_POS % sharers, comptime!(quads - 1));
            levels[(token * comptime!(level_stride(stage.levels) / 4) + place) as usize] =
                fetched[comptime!(n as usize)];
        }
    }
}

/// Units that bring a token: all of a cube, or a plane.
const fn sharers(stage: Stage) -> u32 {
    UNITS / stage.tokens
}

/// How often each of them brings four words.
const fn own_quads(stage: Stage) -> u32 {
    (stage.levels / 4).div_ceil(sharers(stage))
}

/// Four neighbouring words.
type Quad = Vector<u32, Const<4>>;

/// What a unit brings of a block of rows.
#[derive(CubeType)]
struct Fetched {
    quads: Array<Quad>,
    words: Array<u32>,
    scales: Array<i32>,
}

#[cube]
impl Fetched {
    fn new(#[comptime] stage: Stage) -> Self {
        let own = comptime!((FEW_ROWS * stage.codes).div_ceil(UNITS));
        let own_scales = comptime!((FEW_ROWS * stage.groups).div_ceil(UNITS).max(1));
        Fetched {
            quads: Array::new(comptime!(own.div_ceil(4) as usize)),
            words: Array::new(comptime!((if stage.in_quads { 1 } else { own }) as usize)),
            scales: Array::new(comptime!(own_scales as usize)),
        }
    }

    /// Brings the codes and the group scales of a matrix's plane, whose row 0 is `matrix_row`.
    fn fetch(&mut self, weight: &Packed, matrix_row: u32, first_row: u32, #[comptime] stage: Stage) {
        if comptime!(stage.in_quads) {
            let (width, all) = comptime!((stage.codes / 4, FEW_ROWS * stage.codes / 4));
            #[unroll]
            for n in 0..comptime!(all.div_ceil(UNITS)) {
                let place = min(n * UNITS + UNIT_POS, comptime!(all - 1));
                let row = matrix_row + min(first_row + place / width, weight.rows - 1);
                self.quads[comptime!(n as usize)] = weight.quad(row, place % width);
            }
        } else {
            let (width, all) = comptime!((stage.codes, FEW_ROWS * stage.codes));
            #[unroll]
            for n in 0..comptime!(all.div_ceil(UNITS)) {
                let place = min(n * UNITS + UNIT_POS, comptime!(all - 1));
                let row = matrix_row + min(first_row + place / width, weight.rows - 1);
                self.words[comptime!(n as usize)] = weight.word(row, place % width);
            }
        }
        let scales = comptime!(FEW_ROWS * stage.groups);
        #[unroll]
        for n in 0..comptime!(scales.div_ceil(UNITS)) {
            let place = min(n * UNITS + UNIT_POS, comptime!(scales - 1));
            let row = matrix_row + min(first_row + place % FEW_ROWS, weight.rows - 1);
            self.scales[comptime!(n as usize)] = weight.scale_of_group(row, place / FEW_ROWS);
        }
    }

    /// Puts them into shared memory.
    fn put(&self, staged: &mut Staged, #[comptime] stage: Stage) {
        if comptime!(stage.in_quads) {
            let (width, all) = comptime!((stage.codes / 4, FEW_ROWS * stage.codes / 4));
            let mut codes = staged.codes.to_slice_mut().into_vectorized().with_vector_size::<Const<4>>();
            #[unroll]
            for n in 0..comptime!(all.div_ceil(UNITS)) {
                let place = min(n * UNITS + UNIT_POS, comptime!(all - 1));
                let to = place / width * comptime!(code_stride(stage.codes) / 4) + place % width;
                codes[to as usize] = self.quads[comptime!(n as usize)];
            }
        } else {
            let (width, all) = comptime!((stage.codes, FEW_ROWS * stage.codes));
            #[unroll]
            for n in 0..comptime!(all.div_ceil(UNITS)) {
                let place = min(n * UNITS + UNIT_POS, comptime!(all - 1));
                let to = place / width * comptime!(code_stride(stage.codes)) + place % width;
                staged.codes[to as usize] = self.words[comptime!(n as usize)];
            }
        }
        let scales = comptime!(FEW_ROWS * stage.groups);
        #[unroll]
        for n in 0..comptime!(scales.div_ceil(UNITS)) {
            let place = min(n * UNITS + UNIT_POS, comptime!(scales - 1));
            staged.scales[place as usize] = self.scales[comptime!(n as usize)];
        }
    }
}

/// Adds the products of a step's [`STEP`] words of the inputs, of one group, to a plane's totals: of rows number `line` and eight further of
/// the block, and of a token. A unit takes four neighbouring words, whichever these are: both sides of a product have them in the
/// same order.
#[cube]
fn add_staged(
    weight: &Packed,
    staged: &Staged,
    line: u32,
    token: u32,
    quarter: u32,
    step: u32,
    totals: &mut Array<i32>,
    #[comptime] stage: Stage,
) {
    let mut codes = Array::<u32>::new(8usize);
    #[unroll]
    for side in 0..2u32 {
        let first = (line + 8 * side) * comptime!(code_stride(stage.codes));
        if comptime!(stage.in_quads) {
            let rows = staged.codes.to_slice().into_vectorized().with_vector_size::<Const<4>>();
            let quad = rows[(first / 4 + step) as usize];
            #[unroll]
            for n in 0..4u32 {
                codes[comptime!((4 * side + n) as usize)] =
                    (quad[comptime!(n as usize)] >> (2 * quarter)) & 0x0303_0303u32;
            }
        } else {
            #[unroll]
            for n in 0..4u32 {
                let place = step * STEP + 4 * quarter + n;
                let word = staged.codes[(first + weight.word_of(place)) as usize];
                codes[comptime!((4 * side + n) as usize)] = weight.codes_of(word, place);
            }
        }
    }
    let tokens = staged.levels.to_slice().into_vectorized().with_vector_size::<Const<4>>();
    let quad =
        tokens[(token * comptime!(level_stride(stage.levels) / 4) + step * comptime!(STEP / 4) + quarter) as usize];
    let mut levels = Array::<u32>::new(4usize);
    #[unroll]
    for n in 0..4usize {
        levels[n] = quad[n];
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
        if comptime!(stage.groups > 0) {
            let group = min(weight.group_of(step * STEP), comptime!(stage.groups - 1));
            scale = staged.scales[(group * FEW_ROWS + line + 8 * side) as usize];
        }
        let pair = sums[comptime!(side as usize)];
        #[unroll]
        for n in 0..2u32 {
            totals[comptime!((2 * side + n) as usize)] += scale * pair[comptime!(n as usize)];
        }
    }
}
