//! Products with a few tokens on [`matrix_units`](super::matrix_units), where the same holds: no access is checked, and all are
//! within the arrays.

use cubecl::prelude::*;

use super::{
    few_stage::{Fetched, Stage, Staged, code_stride, fetch_tokens, level_stride, put_tokens, round_token, staged},
    matrix_units::{PLANE, SHAPE, STEP, UNITS, left, minus_ones, right, units, zeros},
    operands::{Addends, Operands},
    rounding::Unrounded,
    weight::Packed,
};

/// Rows of a cube for a few tokens.
pub(super) const FEW_ROWS: u32 = SHAPE[0];
/// Tokens of a cube for a few.
pub(super) const FEW: u32 = SHAPE[1];
/// Words of activations that the planes of a cube take together.
const TOGETHER: u32 = STEP * UNITS / PLANE;
/// How often they do so without a loop.
const MOST_UNROLLED: u32 = 8;

/// A cube computes [`FEW_ROWS`] rows of one choice, or of up to [`FEW`] tokens, or choices, that share the matrix.
#[cube(launch_unchecked)]
pub(super) fn few(
    x: &Operands,
    tokens: &Unrounded,
    weight: &Packed,
    addends: &Addends,
    out: &mut Array<f32>,
    #[comptime] stage: Stage,
) {
    block_of_few(x, tokens, 0.0, weight, addends, out, CUBE_POS_X, &mut staged(stage), stage, stage.rounds);
}

/// [`few`] of three matrices, one after the other.
#[cube(launch_unchecked)]
pub(super) fn few_of_three(
    x: &Operands,
    tokens: &Unrounded,
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
    // Here, and not in three places.
    let mut scale = f32::new(0.0);
    if comptime!(stage.rounds) {
        scale = round_token(tokens, CUBE_POS_Y, &mut staged);
    }
    if CUBE_POS_X < first_blocks {
        block_of_few(x, tokens, scale, first, to_first, first_out, CUBE_POS_X, &mut staged, stage, false);
    } else if CUBE_POS_X < first_blocks + second_blocks {
        let block = CUBE_POS_X - first_blocks;
        block_of_few(x, tokens, scale, second, to_second, second_out, block, &mut staged, stage, false);
    } else {
        let block = CUBE_POS_X - first_blocks - second_blocks;
        block_of_few(x, tokens, scale, third, to_third, third_out, block, &mut staged, stage, false);
    }
}

/// The planes of a cube share the depth. The cube rounds its token if that `is_due`; else it is there already, with this scale, or
/// comes rounded.
#[cube]
fn block_of_few(
    x: &Operands,
    tokens: &Unrounded,
    scale: f32,
    weight: &Packed,
    addends: &Addends,
    out: &mut Array<f32>,
    block: u32,
    staged: &mut Staged,
    #[comptime] stage: Stage,
    #[comptime] is_due: bool,
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
    let mut token_scale = scale;
    if comptime!(is_due) {
        token_scale = round_token(tokens, x.input_of(first), staged);
    } else if comptime!(!stage.rounds) {
        let levels = fetch_tokens(x, first, width, stage);
        put_tokens(&levels, staged, width, stage);
    }
    // Who adds up what the planes found: of a row and a choice each.
    let (own_row, own_choice) = (first_row + line + plane / 2 * 8, 2 * quarter + plane % 2);
    let is_own = plane < 4 && own_row < weight.rows && own_choice < width;
    let choice = x.choice_at(first + min(own_choice, width - 1));
    let mut added = f32::new(0.0);
    let mut row_scales = Array::<f32>::new(comptime!(weight.shape.planes as usize));
    if is_own {
        added = addends.sum(matrix, choice, own_row, weight.rows);
        if comptime!(!stage.rounds) {
            token_scale = x.scale(x.input_of(choice));
        }
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
        if comptime!(weight_plane > 0) {
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
            y += f32::cast_from(total) * (row_scales[comptime!(weight_plane as usize)] * token_scale);
        }
        sync_cube();
    }
    if is_own {
        out[(choice * weight.rows + own_row) as usize] = y + added;
    }
}

/// Adds the products of a step's [`STEP`] words of the inputs, of one group, to a plane's totals: of row number `line` of the block,
/// of the eighth after it, and of a token. A unit takes four neighbouring words, and so do both sides of a product: what order they
/// have does not matter.
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
