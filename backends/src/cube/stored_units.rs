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
    buffer::{integer_rows, room},
    device::{is_finite, is_nan, multiplies},
};
use crate::ops::{StoredFloat, StoredMatrix};

/// Rows, columns and depth of one product of the units, by a plane of 32.
const SHAPE: [u32; 3] = [16, 8, 16];
/// Units of a plane.
const PLANE: u32 = 32;
/// Planes of a cube, with as many rows each as a product has.
const PLANES: u32 = 8;
/// Products of a plane side by side at most, each of other tokens.
const MOST_SIDES: usize = 4;
/// Words of a row that a product takes.
const STEP: u32 = SHAPE[2] / 2;
/// Products whose weights are fetched together.
const AHEAD: u32 = 3;
/// Numbers of bf16 that one of f32 is the sum of.
const PARTS: u32 = 3;
/// Units of a cube that takes numbers apart.
const UNITS: u32 = 256;

/// Whether this device has them.
pub(super) fn are_there<R: CubeRuntime>(client: &ComputeClient<R>) -> bool {
    multiplies(client, SHAPE, [ElemType::Float(FloatKind::BF16), ElemType::Float(FloatKind::F32)])
}

/// [`stored_linear`](crate::stored_linear) of a matrix of bf16: `[tokens, rows]`. Not for a GPU without such units.
pub(super) fn linear<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    x: CubeTensor<R>,
    matrix: &StoredMatrix<CubeBackend<R, F, I, BT>>,
) -> CubeTensor<R> {
    assert_eq!(matrix.float(), StoredFloat::Bf16, "the numbers that the units take");
    assert_eq!(x.meta.shape()[1], matrix.columns(), "width of x and columns of the stored matrix");
    let (tokens, rows, row_words) = (x.meta.shape()[0], matrix.rows(), matrix.columns() / 2);
    let out = room(&x, [tokens, rows], DType::F32);
    let pairs = tokens * row_words;
    if pairs * rows == 0 {
        return out;
    }
    let (client, parts) = (x.client.clone(), room(&x, [PARTS as usize, pairs], DType::U32));
    take_apart::launch::<R>(
        &client,
        CubeCount::Static((pairs as u32).div_ceil(UNITS), 1, 1),
        CubeDim::new_1d(UNITS),
        x.into_array_arg(),
        parts.clone().into_array_arg(),
        pairs as u32,
    );
    let words = integer_rows(matrix.words.clone()).holding(rows, row_words);
    let sides = tokens.div_ceil(SHAPE[1] as usize).min(MOST_SIDES);
    let cubes = [rows.div_ceil((PLANES * SHAPE[0]) as usize), tokens.div_ceil(sides * SHAPE[1] as usize)];
    // SAFETY: rows are those of the matrix, which has been checked for its size, tokens those of `parts`, and what is past the
    // last word of a row is not looked at.
    unsafe {
        products::launch_unchecked::<R>(
            &client,
            CubeCount::Static(cubes[0] as u32, cubes[1] as u32, 1),
            CubeDim::new_1d(PLANES * PLANE),
            parts.into_array_arg(),
            words.array.into_array_arg(),
            out.clone().into_array_arg(),
            tokens as u32,
            rows as u32,
            row_words as u32,
            words.pitch as u32,
            sides as u32,
        );
    }
    out
}

/// Pairs of numbers as pairs of the bf16 that they are the sums of: first the leading bits of all, then the next ones.
#[cube(launch)]
fn take_apart(x: &Array<f32>, parts: &mut Array<u32>, pairs: u32) {
    let pair = CUBE_POS_X * UNITS + UNIT_POS;
    if pair >= pairs {
        terminate!();
    }
    let mut words = Array::<u32>::new(comptime!(PARTS as usize));
    #[unroll]
    for part in 0..PARTS {
        words[comptime!(part as usize)] = 0;
    }
    #[unroll]
    for n in 0..2u32 {
        let number = x[(2 * pair + n) as usize];
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

/// A plane computes 16 rows of `sides` times eight tokens.
#[cube(launch_unchecked)]
fn products(
    parts: &Array<u32>,
    words: &Array<u32>,
    out: &mut Array<f32>,
    tokens: u32,
    rows: u32,
    row_words: u32,
    pitch: u32,
    #[comptime] sides: u32,
) {
    // How the units' numbers lie in a plane: four neighbours share a row of either matrix.
    let (line, quarter) = (UNIT_POS % PLANE / 4, UNIT_POS % 4);
    let first_row = (CUBE_POS_X * PLANES + UNIT_POS / PLANE) * comptime!(SHAPE[0]) + line;
    let first_token = CUBE_POS_Y * comptime!(sides * SHAPE[1]);
    let pairs = tokens * row_words;
    let mut sources = Array::<u32>::new(2usize);
    #[unroll]
    for half in 0..2u32 {
        sources[comptime!(half as usize)] = min(first_row + 8 * half, rows - 1) * pitch;
    }
    let numbers = comptime!((4 * sides) as usize);
    let mut sums = Array::<f32>::new(numbers);
    #[unroll]
    for number in 0..numbers {
        sums[number] = 0.0;
    }
    let mut weights = Array::<u32>::new(comptime!((4 * AHEAD) as usize));
    let mut next_weights = Array::<u32>::new(comptime!((4 * AHEAD) as usize));
    bring(words, &sources, quarter, row_words, &mut weights);
    let mut at = u32::new(0);
    while at < row_words {
        // Fetched while these are multiplied. Under a condition, or a compiler puts off what it fetches until it is needed.
        let next = at + comptime!(AHEAD * STEP);
        if next < row_words {
            bring(words, &sources, next + quarter, row_words, &mut next_weights);
        }
        #[unroll]
        for ahead in 0..AHEAD {
            let mut a = Array::<Vector<bf16, Const<2>>>::new(4usize);
            #[unroll]
            for n in 0..4u32 {
                a[comptime!(n as usize)] =
                    Vector::<bf16, Const<2>>::reinterpret(weights[comptime!((4 * ahead + n) as usize)]);
            }
            #[unroll]
            for side in 0..sides {
                let token = min(first_token + side * comptime!(SHAPE[1]) + line, tokens - 1);
                // The units do not round what they add up, so they add up a few numbers only.
                let mut step = Array::<Vector<f32, Const<2>>>::new(2usize);
                #[unroll]
                for half in 0..2usize {
                    step[half] = Vector::<f32, Const<2>>::new(0.0);
                }
                #[unroll]
                for part in 0..PARTS {
                    let mut b = Array::<Vector<bf16, Const<2>>>::new(2usize);
                    #[unroll]
                    for half in 0..2u32 {
                        // Weights past the end are zeros already, and these are numbers.
                        let word = min(at + ahead * STEP + half * 4 + quarter, row_words - 1);
                        let found = parts[(part * pairs + token * row_words + word) as usize];
                        b[comptime!(half as usize)] = Vector::<bf16, Const<2>>::reinterpret(found);
                    }
                    units().execute_inplace(&a, &b, &mut step);
                }
                #[unroll]
                for half in 0..2u32 {
                    let pair = step[comptime!(half as usize)];
                    #[unroll]
                    for n in 0..2u32 {
                        sums[comptime!((4 * side + 2 * half + n) as usize)] += pair[comptime!(n as usize)];
                    }
                }
            }
        }
        #[unroll]
        for n in 0..comptime!((4 * AHEAD) as usize) {
            weights[n] = next_weights[n];
        }
        at = next;
    }
    #[unroll]
    for side in 0..sides {
        #[unroll]
        for half in 0..2u32 {
            let row = first_row + 8 * half;
            #[unroll]
            for n in 0..2u32 {
                let token = first_token + side * comptime!(SHAPE[1]) + 2 * quarter + n;
                if row < rows && token < tokens {
                    out[(token * rows + row) as usize] = sums[comptime!((4 * side + 2 * half + n) as usize)];
                }
            }
        }
    }
}

/// Brings a unit's words for [`AHEAD`] products, the first of which is word `at`: of each, both halves of its rows and of its
/// depth. What is past the end of a row is zero.
#[cube]
fn bring(words: &Array<u32>, sources: &Array<u32>, at: u32, row_words: u32, weights: &mut Array<u32>) {
    #[unroll]
    for n in 0..comptime!(4 * AHEAD) {
        let word = at + comptime!(n / 4 * STEP + n % 4 / 2 * 4);
        let mut found = u32::new(0);
        if word < row_words {
            found = words[(sources[comptime!((n % 2) as usize)] + word) as usize];
        }
        weights[comptime!(n as usize)] = found;
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
