//! Rows of full-precision matrices as they are stored, and of ternary ones: embedding and output layer.
#![allow(unsafe_code)]

use burn::tensor::{DType, backend::Backend};
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{
    buffer::{integer_rows, room},
    device::{Join, butterflies, factor, joined, nan},
    weight::{Packed, packed},
};
use crate::{
    format::{BLOCK, Rotation, TernaryWeight},
    ops::{StoredFloat, StoredMatrix},
};

/// Units that share a row.
const LANES: u32 = 32;
/// Rows of a cube.
const ROWS: u32 = 8;

/// Rows `ids [n]`, `I32`, of a stored matrix, or as many rows from the first one on: `[n, columns]`.
pub(super) fn rows<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    matrix: &StoredMatrix<CubeBackend<R, F, I, BT>>,
    ids: CubeTensor<R>,
) -> CubeTensor<R> {
    let (count, columns) = (ids.meta.num_elements(), matrix.columns());
    let out = room(&ids, [count, columns], DType::F32);
    if count > 0 {
        let words = integer_rows(matrix.words.clone()).holding(matrix.rows(), words_of_row(matrix));
        rows_kernel::launch::<R>(
            &out.client.clone(),
            CubeCount::Static((columns as u32).div_ceil(LANES * ROWS), count as u32, 1),
            CubeDim::new_1d(LANES * ROWS),
            words.array.into_array_arg(),
            ids.into_array_arg(),
            out.clone().into_array_arg(),
            matrix.rows() as u32,
            columns as u32,
            words.pitch as u32,
            matrix.float(),
        );
    }
    out
}

/// Words that a row takes.
fn words_of_row<B: Backend>(matrix: &StoredMatrix<B>) -> usize {
    matrix.columns() * matrix.float().bytes() / 4
}

#[cube(launch)]
fn rows_kernel(
    words: &Array<u32>,
    ids: &Array<i32>,
    out: &mut Array<f32>,
    rows: u32,
    columns: u32,
    pitch: u32,
    #[comptime] float: StoredFloat,
) {
    let column = CUBE_POS_X * (LANES * ROWS) + UNIT_POS;
    if column >= columns {
        terminate!();
    }
    let id = u32::cast_from(ids[CUBE_POS_Y as usize]);
    let mut value = nan();
    if id < rows {
        let per_word = comptime!(4 / float.bytes() as u32);
        let word = words[(id * pitch + column / per_word) as usize];
        value = decode(word, column % per_word, float);
    }
    out[(CUBE_POS_Y * columns + column) as usize] = value;
}

/// Number `part` of a word.
#[cube]
fn decode(word: u32, part: u32, #[comptime] float: StoredFloat) -> f32 {
    match comptime!(float) {
        StoredFloat::F32 => f32::reinterpret(word),
        StoredFloat::Bf16 => f32::reinterpret((word >> (16 * part)) << 16),
        StoredFloat::F16 => {
            let bits = (word >> (16 * part)) & 0xffff;
            let sign = (bits & 0x8000) << 16;
            let (exponent, mantissa) = ((bits >> 10) & 31, bits & 0x3ff);
            // Subnormal numbers by a product: devices may take those of f32 for zero.
            let small = u32::reinterpret(f32::cast_from(mantissa) * comptime!(2f32.powi(-24)));
            let biased = select(exponent == 31, u32::new(255), exponent + 112);
            let magnitude = select(exponent == 0, small, (biased << 23) | (mantissa << 13));
            f32::reinterpret(magnitude | sign)
        }
    }
}

/// The products of `x [tokens, columns]` with the rows `ids [n]`, `I32`, or with all of them: `[tokens, n]`. A number that is
/// no row gives NaN.
pub(super) fn linear<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    x: CubeTensor<R>,
    matrix: &StoredMatrix<CubeBackend<R, F, I, BT>>,
    ids: Option<CubeTensor<R>>,
) -> CubeTensor<R> {
    let tokens = x.meta.shape()[0];
    assert_eq!(x.meta.shape()[1], matrix.columns(), "width of x and columns of the stored matrix");
    let count = ids.as_ref().map_or(matrix.rows(), |ids| ids.meta.num_elements());
    let out = room(&x, [tokens, count], DType::F32);
    if tokens * count > 0 {
        let words = integer_rows(matrix.words.clone()).holding(matrix.rows(), words_of_row(matrix));
        let some = ids.is_some();
        // SAFETY: rows are those of the matrix, which has been checked for its size, and others are not looked at; columns,
        // tokens and products end at the last one.
        unsafe {
            linear_kernel::launch_unchecked::<R>(
                &out.client.clone(),
                CubeCount::Static((count as u32).div_ceil(ROWS), tokens as u32, 1),
                CubeDim::new_1d(LANES * ROWS),
                x.clone().into_array_arg(),
                words.array.into_array_arg(),
                ids.unwrap_or(x).into_array_arg(),
                out.clone().into_array_arg(),
                matrix.rows() as u32,
                matrix.columns() as u32,
                count as u32,
                words.pitch as u32,
                matrix.float(),
                some,
            );
        }
    }
    out
}

/// A cube computes [`ROWS`] products of one token, [`LANES`] units each of them.
#[cube(launch_unchecked)]
fn linear_kernel(
    x: &Array<f32>,
    words: &Array<u32>,
    ids: &Array<i32>,
    out: &mut Array<f32>,
    rows: u32,
    columns: u32,
    count: u32,
    pitch: u32,
    #[comptime] float: StoredFloat,
    #[comptime] some: bool,
) {
    let mut sums = SharedMemory::<f32>::new(comptime!((LANES * ROWS) as usize));
    let (lane, token) = (UNIT_POS % LANES, CUBE_POS_Y);
    let product = CUBE_POS_X * ROWS + UNIT_POS / LANES;
    let mut row = product;
    if comptime!(some) {
        row = u32::cast_from(ids[min(product, count - 1) as usize]);
    }
    let per_word = comptime!(4 / float.bytes() as u32);
    let row_words = columns / per_word;
    let mut sum = f32::new(0.0);
    if row < rows {
        let mut word = lane;
        while word < row_words {
            let pair = words[(row * pitch + word) as usize];
            #[unroll]
            for part in 0..per_word {
                sum += decode(pair, part.runtime(), float) * x[(token * columns + word * per_word + part) as usize];
            }
            word += LANES;
        }
    }
    let sum = joined(sum, &mut sums, LANES, Join::Sum);
    if lane == 0 && product < count {
        out[(token * count + product) as usize] = select(row < rows, sum, nan());
    }
}

/// Rows `ids [n]`, `I32`, of a ternary matrix, rotated back: `[n, in_features]`.
pub(super) fn ternary_rows<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    weight: &TernaryWeight<CubeBackend<R, F, I, BT>>,
    matrix: usize,
    ids: CubeTensor<R>,
) -> CubeTensor<R> {
    let (count, in_features) = (ids.meta.num_elements(), weight.layout.in_features);
    let out = room(&ids, [count, in_features], DType::F32);
    if count > 0 {
        let seed = weight.layout.rotation.map_or(0, |rotation| rotation.seed);
        ternary_rows_kernel::launch::<R>(
            &out.client.clone(),
            CubeCount::Static(in_features.div_ceil(BLOCK) as u32, count as u32, 1),
            CubeDim::new_1d(BLOCK as u32),
            packed(weight),
            ids.into_array_arg(),
            out.clone().into_array_arg(),
            in_features as u32,
            matrix as u32,
            seed as u32,
            (seed >> 32) as u32,
            weight.layout.rotation.map(|_| Rotation::width(in_features) as u32),
        );
    }
    out
}

/// A cube decodes a block of 64 weights.
#[cube(launch)]
fn ternary_rows_kernel(
    weight: &Packed,
    ids: &Array<i32>,
    out: &mut Array<f32>,
    in_features: u32,
    matrix: u32,
    seed_low: u32,
    seed_high: u32,
    #[comptime] rotation: Option<u32>,
) {
    let mut run = SharedMemory::<f32>::new(comptime!(BLOCK));
    let i = CUBE_POS_X * comptime!(BLOCK as u32) + UNIT_POS;
    let id = u32::cast_from(ids[CUBE_POS_Y as usize]);
    let known = id < weight.rows;
    let mut value = f32::new(0.0);
    if known && i < in_features {
        #[unroll]
        for plane in 0..weight.shape.planes {
            let row = weight.row(matrix, plane, id);
            let codes = weight.codes_at(row, i / 4);
            let trit = i32::cast_from((codes >> (8 * (i % 4))) & 3) - 1;
            value += f32::cast_from(trit * weight.group_scale(row, i / 4)) * weight.row_scale(matrix, plane, id);
        }
    }
    if comptime!(rotation.is_some()) {
        let width = comptime!(rotation.unwrap_or(1));
        value = butterflies(value, &mut run, width) * factor(i, seed_low, seed_high, width);
    }
    if i < in_features {
        out[(CUBE_POS_Y * in_features + i) as usize] = select(known, value, nan());
    }
}
