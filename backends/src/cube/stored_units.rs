//! Products of stored bf16 rows with several tokens on matrix units: NVIDIA's from Ampere on, by CUDA.
//!
//! A number of a token is the sum of three of bf16, all 24 bits of it, so nothing is rounded before the products are added up.
#![allow(unsafe_code)]

use burn::tensor::DType;
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement, tensor::CubeTensor};
use cubecl::{
    client::ComputeClient,
    ir::{ElemType, FloatKind},
    prelude::*,
};
use half::bf16;

use super::{
    buffer::{begins_even, integer_rows, room},
    device::{is_finite, is_nan, multiplies},
    operands::{Quad, quads},
};
use crate::ops::{StoredFloat, StoredMatrix};

/// Rows, columns and depth of one product of the units, by a plane of 32.
const SHAPE: [u32; 3] = [16, 8, 16];
/// Units of a plane.
const PLANE: u32 = 32;
/// Planes of a cube.
const PLANES: u32 = 8;
/// Products of a plane below each other, each of other rows.
const TILES: u32 = 2;
/// Products of a plane side by side at most, each of other tokens.
const MOST_SIDES: usize = 4;
/// Words of a row that two products take, one after the other: a unit reads four of them at once.
const STEP: u32 = SHAPE[2];
/// Numbers of bf16 that one of f32 is the sum of.
const PARTS: u32 = 3;
/// Units of a cube that takes numbers apart.
const UNITS: u32 = 256;

/// Whether this device multiplies rows of this matrix on such units.
pub(super) fn take<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    client: &ComputeClient<R>,
    matrix: &StoredMatrix<CubeBackend<R, F, I, BT>>,
) -> bool {
    let words = integer_rows(matrix.words.clone());
    let has_quads =
        (matrix.columns() / 2).is_multiple_of(4) && words.pitch.is_multiple_of(4) && begins_even(&words.array);
    matrix.float() == StoredFloat::Bf16
        && has_quads
        && multiplies(client, SHAPE, [ElemType::Float(FloatKind::BF16), ElemType::Float(FloatKind::F32)])
}

/// [`stored_linear`](crate::stored_linear) of a matrix that the units [take]: `[tokens, rows]`.
pub(super) fn linear<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    x: CubeTensor<R>,
    matrix: &StoredMatrix<CubeBackend<R, F, I, BT>>,
) -> CubeTensor<R> {
    assert_eq!(x.meta.shape()[1], matrix.columns(), "width of x and columns of the stored matrix");
    let (tokens, rows, row_words) = (x.meta.shape()[0], matrix.rows(), matrix.columns() / 2);
    let out = room(&x, [tokens, rows], DType::F32);
    if tokens * row_words * rows == 0 {
        return out;
    }
    let (all_sides, steps) = (tokens.div_ceil(SHAPE[1] as usize), row_words.div_ceil(STEP as usize));
    let pairs = all_sides * steps * (SHAPE[1] * STEP) as usize;
    let (client, parts) = (x.client.clone(), room(&x, [PARTS as usize, pairs], DType::U32));
    take_apart::launch::<R>(
        &client,
        CubeCount::Static((pairs as u32).div_ceil(UNITS), 1, 1),
        CubeDim::new_1d(UNITS),
        x.into_array_arg(),
        parts.clone().into_array_arg(),
        tokens as u32,
        row_words as u32,
        steps as u32,
        pairs as u32,
    );
    let words = integer_rows(matrix.words.clone()).holding(rows, row_words);
    let sides = all_sides.min(MOST_SIDES);
    // SAFETY: rows are those of the matrix, which has been checked for its size, sides those of `parts`, and what is past the last
    // word of a row is not looked at.
    unsafe {
        products::launch_unchecked::<R>(
            &client,
            CubeCount::Static((rows as u32).div_ceil(PLANES * TILES * SHAPE[0]), all_sides.div_ceil(sides) as u32, 1),
            CubeDim::new_1d(PLANES * PLANE),
            parts.into_array_arg(),
            words.array.into_array_arg(),
            out.clone().into_array_arg(),
            tokens as u32,
            rows as u32,
            row_words as u32,
            words.pitch as u32,
            steps as u32,
            all_sides as u32,
            sides as u32,
        );
    }
    out
}

/// Pairs of numbers as pairs of the bf16 that they are the sums of: first the leading bits of all, then the next ones. They lie as
/// the units of a plane take them: [`STEP`] words of each of eight tokens, then the next words of these, zeros where there are none.
#[cube(launch)]
fn take_apart(x: &Array<f32>, parts: &mut Array<u32>, tokens: u32, row_words: u32, steps: u32, pairs: u32) {
    let pair = CUBE_POS_X * UNITS + UNIT_POS;
    if pair >= pairs {
        terminate!();
    }
    let eight = comptime!(SHAPE[1]);
    let (block, token) = (pair / comptime!(SHAPE[1] * STEP), pair / STEP % eight);
    let (token, word) = (block / steps * eight + token, block % steps * STEP + pair % STEP);
    let is_there = token < tokens && word < row_words;
    let mut words = Array::<u32>::new(comptime!(PARTS as usize));
    #[unroll]
    for part in 0..PARTS {
        words[comptime!(part as usize)] = 0;
    }
    #[unroll]
    for n in 0..2u32 {
        let mut number = f32::new(0.0);
        if is_there {
            number = x[(2 * (token * row_words + word) + n) as usize];
        }
        let mut rest = number;
        #[unroll]
        for part in 0..PARTS {
            // What is no number is its first part alone.
            let bits = select(is_nan(rest), 0x7fc0_0000u32.runtime(), u32::reinterpret(rest) & 0xffff_0000u32);
            words[comptime!(part as usize)] |= (bits >> 16) << (16 * n);
            rest = select(is_finite(number), rest - f32::reinterpret(bits), f32::new(0.0));
        }
    }
    #[unroll]
    for part in 0..PARTS {
        parts[(part * pairs + pair) as usize] = words[comptime!(part as usize)];
    }
}

/// A plane computes 32 rows of `sides` times eight tokens.
#[cube(launch_unchecked)]
fn products(
    parts: &Array<u32>,
    words: &Array<u32>,
    out: &mut Array<f32>,
    tokens: u32,
    rows: u32,
    row_words: u32,
    pitch: u32,
    steps: u32,
    all_sides: u32,
    #[comptime] sides: u32,
) {
    // How the units' numbers lie in a plane: four neighbours share a row of either matrix.
    let (lane, line, quarter) = (UNIT_POS % PLANE, UNIT_POS % PLANE / 4, UNIT_POS % 4);
    let first_row = (CUBE_POS_X * PLANES + UNIT_POS / PLANE) * comptime!(TILES * SHAPE[0]) + line;
    let first_side = CUBE_POS_Y * sides;
    let parts = quads(parts);
    let mut sources = Array::<u32>::new(comptime!((2 * TILES) as usize));
    #[unroll]
    for n in 0..2 * TILES {
        sources[comptime!(n as usize)] = min(first_row + 8 * n, rows - 1) * (pitch / 4) + quarter;
    }
    let numbers = comptime!((4 * TILES * sides) as usize);
    let mut sums = Array::<f32>::new(numbers);
    #[unroll]
    for number in 0..numbers {
        sums[number] = 0.0;
    }
    let mut weights = Array::<Quad>::new(comptime!((2 * TILES) as usize));
    let mut next_weights = Array::<Quad>::new(comptime!((2 * TILES) as usize));
    bring(words, &sources, quarter, 0u32.runtime(), row_words, &mut weights);
    for step in 0..steps {
        // Fetched while these are multiplied. Under a condition, or a compiler puts off what it fetches until it is needed.
        if step + 1 < steps {
            bring(words, &sources, quarter, step + 1, row_words, &mut next_weights);
        }
        #[unroll]
        for side in 0..sides {
            let block = min(first_side + side, all_sides - 1) * steps + step;
            let mut inputs = Array::<Quad>::new(comptime!(PARTS as usize));
            #[unroll]
            for part in 0..PARTS {
                inputs[comptime!(part as usize)] = parts[((part * all_sides * steps + block) * PLANE + lane) as usize];
            }
            #[unroll]
            for tile in 0..TILES {
                #[unroll]
                for depth in 0..2u32 {
                    add(&weights, &inputs, &mut sums, tile, depth, comptime!(4 * (tile * sides + side)));
                }
            }
        }
        #[unroll]
        for n in 0..comptime!((2 * TILES) as usize) {
            weights[n] = next_weights[n];
        }
    }
    #[unroll]
    for tile in 0..TILES {
        #[unroll]
        for side in 0..sides {
            #[unroll]
            for n in 0..4u32 {
                let row = first_row + 8 * (2 * tile + n / 2);
                let token = (first_side + side) * comptime!(SHAPE[1]) + 2 * quarter + n % 2;
                if row < rows && token < tokens {
                    out[(token * rows + row) as usize] = sums[comptime!((4 * (tile * sides + side) + n) as usize)];
                }
            }
        }
    }
}

/// Brings four of a unit's words of each of its rows, of step `step`. What is past the end of a row is zero.
#[cube]
fn bring(words: &Array<u32>, sources: &Array<u32>, quarter: u32, step: u32, row_words: u32, weights: &mut Array<Quad>) {
    let words = quads(words);
    let is_there = 4 * (step * comptime!(STEP / 4) + quarter) < row_words;
    #[unroll]
    for n in 0..2 * TILES {
        let mut found = Quad::new(0);
        if is_there {
            found = words[(sources[comptime!(n as usize)] + step * comptime!(STEP / 4)) as usize];
        }
        weights[comptime!(n as usize)] = found;
    }
}

/// Adds product `depth` of a step's two, of 16 rows with eight tokens, to the sums from `to` on.
#[cube]
fn add(
    weights: &Array<Quad>,
    inputs: &Array<Quad>,
    sums: &mut Array<f32>,
    #[comptime] tile: u32,
    #[comptime] depth: u32,
    #[comptime] to: u32,
) {
    let mut a = Array::<Vector<bf16, Const<2>>>::new(4usize);
    #[unroll]
    for n in 0..4u32 {
        let row = weights[comptime!((2 * tile + n % 2) as usize)];
        a[comptime!(n as usize)] = Vector::<bf16, Const<2>>::reinterpret(row[comptime!((2 * depth + n / 2) as usize)]);
    }
    // The units do not round what they add up, so they add up a few numbers only.
    let mut step = Array::<Vector<f32, Const<2>>>::new(2usize);
    #[unroll]
    for half in 0..2usize {
        step[half] = Vector::<f32, Const<2>>::new(0.0);
    }
    #[unroll]
    for part in 0..PARTS {
        let input = inputs[comptime!(part as usize)];
        let mut b = Array::<Vector<bf16, Const<2>>>::new(2usize);
        #[unroll]
        for half in 0..2u32 {
            b[comptime!(half as usize)] =
                Vector::<bf16, Const<2>>::reinterpret(input[comptime!((2 * depth + half) as usize)]);
        }
        units().execute_inplace(&a, &b, &mut step);
    }
    #[unroll]
    for n in 0..4u32 {
        let pair = step[comptime!((n / 2) as usize)];
        sums[comptime!((to + n) as usize)] += pair[comptime!((n % 2) as usize)];
    }
}

#[cube]
fn units() -> cmma::MmaDefinition<bf16, bf16, f32> {
    cmma::MmaDefinition::<bf16, bf16, f32>::new(
        comptime!(SHAPE[0] as usize),
        comptime!(SHAPE[1] as usize),
        comptime!(SHAPE[2] as usize),
    )
}
