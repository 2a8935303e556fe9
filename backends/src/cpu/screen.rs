//! A compact copy of a stored matrix that tells which rows cannot have a large product.
//!
//! A language model's output layer is read for every token, and almost all of its rows are far from the best one. A
//! [`Screen`] has 4 bits a weight, of which the upper 3 are read for every token. They give an upper bound of every product
//! ([`bounds`](super::bounds)); where it does not rule a row out, the last bits give a closer one; the exact product is then
//! computed for the rows that may still matter.
//!
//! The copy is dithered, so that its error is random by construction and not by assumption. A row `w` is mixed
//! (an orthogonal transform that makes its largest weight small and is undone by mixing `x`), then
//!
//! ```text
//! step     = max|w| / 7
//! code[i]  = round(w[i] / step + zero[i])                      0 to 15,  zero[i] a fixed random number in [6.5, 8.5)
//! copy[i]  = step * (code[i] - zero[i])
//! rough[i] = step * (2 * (code[i] / 2) + 1/2 - zero[i])        without the code's last bit
//! ```
//!
//! With a random zero point the error `copy[i] - w[i]` is uniform in `step * [-1/2, 1/2]` whatever `w[i]` is, that of
//! `rough[i]` in `step * [-1, 1]`, and independent for different `i` (subtractive dither: Lipshitz, Wannamaker and
//! Vanderkooy 1992). As `zero` is the same for all rows, a product with the copy takes integers and one correction a token.
//! Tokens are rounded to int8 at random as well, `q[i] = floor(x[i] / s + threshold[i])` with `s = max|x| / 127`, whose error
//! has mean zero and a range of `s`.
//!
//! A sum of independent errors of mean zero with ranges `r[i]` is at least `t` with a probability of at most
//! `exp(-t^2 / (2 sigma^2))`, where `sigma^2 = sum r[i]^2 / 4` (Hoeffding 1963), and `sum r[i]^2 / 12` where they are
//! uniform. So for a row and a token that were chosen without a look at the random numbers,
//!
//! ```text
//! sigma^2 = (range * |x|)^2 / 12 + (s * |w|)^2 / 4       range = 2 * step for rough, step for copy
//!                                                        |x| <= |x| before rounding + s * sqrt(columns)
//! P(product > product with the copy + 8 sigma) <= exp(-32) = 1.3e-14
//! ```
//!
//! Who takes the best row only goes wrong if one of the two bounds of that one row fails: 2.6e-14 a token. All bounds of a
//! token over 201,088 rows hold with a probability of 1 - 5.2e-9. The bounds use [`DEVIATIONS`] = 8.1, which covers what the
//! zero points have too few bits for, and add the rounding of floats:
//! `(columns / 16 + 96) * 2^-23 * |w| * |x|`, more than the sums of [`stored`](super::stored) and the mixing can be off.
//!
//! A row, padded with zeros to whole blocks, is cut into 8 runs of `n` weights. The last bit of weight `j` of run `k` is bit
//! `k` of byte `j`, of `n`. The other 3 bits are two bits of a byte each, then one: run `k` has bits `2 * (k / 2)` and up of
//! the `n` bytes that `k % 2` counts, and the third is laid like the last.
//!
//! ```
//! use ternoss_backends::{StoredFloat, cpu::{Kernels, screen::Screen, stored::StoredRows}};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let words = vec![0x3f80_3f80; 1000 * 1440];
//! let matrix = StoredRows::new(&words, 1000, 2880, StoredFloat::Bf16)?;
//! // Three bits a weight, and two floats a row.
//! assert_eq!(Screen::new(Kernels::detect(), &matrix, &mut || {}).bytes(), 1000 * (2880 * 3 / 8 + 8));
//! # Ok(()) }
//! ```

use rayon::prelude::*;

use super::{Kernels, stored::StoredRows};
use crate::{
    format::{BLOCK, Rotation},
    ops::StoredFloat,
};

/// Standard deviations between the estimate of a product and its bound.
pub const DEVIATIONS: f32 = 8.1;

/// Runs that a row is cut into: bits of a byte.
pub(super) const RUNS: usize = 8;

/// The largest weight of a row in steps.
const LARGEST: f32 = 7.0;

/// 1.5 * 2^23: adding it rounds a small float to an integer that then stands in the low bits.
const ROUND: f32 = 12_582_912.0;

/// Numbers that are added up side by side.
const LANES: usize = 16;

/// Rows that a task copies.
const TASK_ROWS: usize = 256;

/// Rows outside of this range, other than zeros, have no bound: their squares could leave the range of floats.
pub(super) const RANGE: std::ops::Range<f32> = 1e-30..1e30;

const SIGNS: Rotation = Rotation { seed: 0x0073_6967_6e73 };
const ZERO_POINTS: u64 = 0x7a65_726f;
const THRESHOLDS: u64 = 0x0072_6f75_6e64;

/// Rows copied between two pauses: some 90 MB of gpt-oss's output layer.
pub const ROWS_BETWEEN_PAUSES: usize = 1 << 14;

/// A compact copy of a stored matrix: see [the module](self).
#[derive(Debug, Clone, PartialEq)]
pub struct Screen {
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// The upper bits, `[rows, 3 * run]`: twice a run's bytes of two bits, then a run's bytes of one.
    pub(super) codes: Vec<u8>,
    /// The last bits, `[rows, run]`.
    pub(super) last: Vec<u8>,
    /// What a code of 1 stands for in each row: infinite where a row has no bound.
    pub(super) steps: Vec<f32>,
    /// Length of each row in steps.
    pub(super) lengths: Vec<f32>,
    pub(super) dither: Dither,
}

/// The random numbers that all rows, and all tokens, share.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Dither {
    /// What inputs are multiplied with before they are mixed: `1 / sqrt(width)` with a random sign.
    factors: Vec<f32>,
    /// `zero[i]`, in [6.5, 8.5).
    pub(super) zero_points: Vec<f32>,
    /// `threshold[i]`, in [0, 1).
    pub(super) thresholds: Vec<f32>,
}

impl Dither {
    fn new(columns: usize) -> Self {
        // SplitMix64 makes the numbers, as it makes the signs; 21 bits are what a float has of numbers in such a range.
        let uniform = |seed, i| (Rotation { seed }.signs(i) >> 43) as f32 / (1 << 21) as f32;
        Self {
            factors: (0..columns).map(|i| SIGNS.factor(i, Rotation::width(columns))).collect(),
            zero_points: (0..columns).map(|i| 6.5 + 2.0 * uniform(ZERO_POINTS, i)).collect(),
            thresholds: (0..columns).map(|i| uniform(THRESHOLDS, i)).collect(),
        }
    }

    /// Mixes a row, or a token: random signs, then a Walsh-Hadamard transform over the inputs `i, i + n, i + 2n, ..` for each
    /// `i < n = columns / width`. It keeps products. (A [`Rotation`] mixes neighbours, which takes three times as long.)
    #[inline(always)]
    pub(super) fn mix(&self, x: &mut [f32]) {
        x.iter_mut().zip(&self.factors).for_each(|(x, factor)| *x *= factor);
        let mut run = x.len() / Rotation::width(x.len());
        // Two steps of the transform at a time save half of the loads and stores.
        while 4 * run <= x.len() {
            for four in x.chunks_exact_mut(4 * run) {
                let (low, high) = four.split_at_mut(2 * run);
                let ((a, b), (c, d)) = (low.split_at_mut(run), high.split_at_mut(run));
                for (((a, b), c), d) in a.iter_mut().zip(b).zip(c).zip(d) {
                    let (sum, difference) = ([*a + *b, *c + *d], [*a - *b, *c - *d]);
                    (*a, *c) = (sum[0] + sum[1], sum[0] - sum[1]);
                    (*b, *d) = (difference[0] + difference[1], difference[0] - difference[1]);
                }
            }
            run *= 4;
        }
        if 2 * run <= x.len() {
            let (low, high) = x.split_at_mut(run);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
    }
}

impl Screen {
    /// Copies a matrix, on all threads, with a pause after every [`ROWS_BETWEEN_PAUSES`] rows.
    #[must_use]
    pub fn new(kernels: Kernels, matrix: &StoredRows<'_>, pause: &mut dyn FnMut()) -> Self {
        let (rows, columns) = (matrix.rows(), matrix.columns());
        let dither = Dither::new(columns);
        let run = run(columns);
        let (mut codes, mut last) = (vec![0; rows * 3 * run], vec![0; rows * run]);
        let (mut steps, mut lengths) = (vec![0.0; rows], vec![0.0; rows]);
        for first in (0..rows).step_by(ROWS_BETWEEN_PAUSES) {
            let part = first..(first + ROWS_BETWEEN_PAUSES).min(rows);
            let codes = codes[part.start * 3 * run..part.end * 3 * run].par_chunks_mut((TASK_ROWS * 3 * run).max(1));
            let last = last[part.start * run..part.end * run].par_chunks_mut((TASK_ROWS * run).max(1));
            let (steps, lengths) = (&mut steps[part.clone()], &mut lengths[part]);
            let scales = steps.par_chunks_mut(TASK_ROWS).zip(lengths.par_chunks_mut(TASK_ROWS));
            let tasks = codes.zip(last).zip(scales).enumerate();
            tasks.for_each_init(Vec::new, |scratch, (part, ((codes, last), (steps, lengths)))| {
                scratch.resize(RUNS * run, 0.0);
                let bits = codes.chunks_exact_mut(3 * run).zip(last.chunks_exact_mut(run));
                for (r, (bits, (step, length))) in bits.zip(steps.iter_mut().zip(lengths)).enumerate() {
                    let words = matrix.row(first + part * TASK_ROWS + r);
                    [*step, *length] = kernels.screen_row(matrix.float(), words, &dither, scratch, bits);
                }
            });
            pause();
        }
        Self { rows, columns, codes, last, steps, lengths, dither }
    }

    /// Rows of the matrix.
    #[must_use]
    pub const fn rows(&self) -> usize {
        self.rows
    }

    /// Elements a row.
    #[must_use]
    pub const fn columns(&self) -> usize {
        self.columns
    }

    /// Bytes that are read for a token: all but the last bits, which are read of few rows.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.codes.len() + 4 * (self.steps.len() + self.lengths.len())
    }
}

/// Weights in a run of a row, and so bytes that have a bit of each.
pub(super) const fn run(columns: usize) -> usize {
    columns.div_ceil(BLOCK) * BLOCK / RUNS
}

/// One row's codes and last bits; returns its step and its length in steps. `x` is as long as the padded row and zero past
/// its end.
#[inline(always)]
pub(super) fn screen_row(
    float: StoredFloat,
    words: &[u32],
    dither: &Dither,
    x: &mut [f32],
    (codes, last): (&mut [u8], &mut [u8]),
) -> [f32; 2] {
    let x_row = &mut x[..dither.zero_points.len()];
    decode(float, words, x_row);
    dither.mix(x_row);
    // Floats without sign are ordered like their bits, and everything that is not finite comes last.
    let largest = x_row.iter().fold(0u32, |largest, x| largest.max(x.to_bits() & 0x7fff_ffff));
    let largest = f32::from_bits(largest);
    codes.fill(0);
    last.fill(0);
    if !RANGE.contains(&largest) {
        // Padding stays zero, and NaN must not stay in what the next row shares.
        x_row.fill(0.0);
        return if largest == 0.0 { [0.0; 2] } else { [f32::INFINITY; 2] };
    }
    let per_step = LARGEST / largest;
    let mut squares = [0.0f32; LANES];
    for x in x.chunks_exact_mut(LANES) {
        for (x, square) in x.iter_mut().zip(&mut squares) {
            *x *= per_step;
            *square += *x * *x;
        }
    }
    let run = last.len();
    let (pairs, thirds) = codes.split_at_mut(2 * run);
    let runs = x.chunks_exact(run.max(1)).zip(dither.zero_points.chunks(run.max(1)));
    for (k, (x, zero_points)) in runs.enumerate() {
        let pairs = &mut pairs[k % 2 * run..][..run];
        let bytes = pairs.iter_mut().zip(thirds.iter_mut()).zip(last.iter_mut());
        for (((pair, third), last), (x, zero)) in bytes.zip(x.iter().zip(zero_points)) {
            let code = ((*x + zero).clamp(0.0, 15.0) + ROUND).to_bits() as u8 & 15;
            *pair |= (code >> 1 & 3) << (k / 2 * 2);
            *third |= (code >> 3) << k;
            *last |= (code & 1) << k;
        }
    }
    [largest / LARGEST, squares.iter().sum::<f32>().sqrt()]
}

/// A row as floats; bf16 in a loop that becomes vectors.
#[inline(always)]
fn decode(float: StoredFloat, words: &[u32], row: &mut [f32]) {
    if float != StoredFloat::Bf16 {
        return float.decode(words, row);
    }
    for (pair, word) in row.chunks_exact_mut(2).zip(words) {
        pair[0] = f32::from_bits(word << 16);
        pair[1] = f32::from_bits(word & 0xffff_0000);
    }
}
