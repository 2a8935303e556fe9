//! Products with a matrix kept in its checkpoint's float type.
//!
//! The order of a dot product is fixed: lane `l` of [`LANES`] sums the elements `l, l + 16, l + 32, ..` one after the other
//! with fused multiply-adds, the row being padded with zeros to whole lanes; then the upper half of the lanes is added to
//! the lower half until one is left. Every instruction set does exactly this, whatever the batch and the threads.
//!
//! ```
//! use ternoss_backends::{StoredFloat, cpu::{Kernels, stored::{StoredRows, stored_linear}}};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let (float, mut words) = (StoredFloat::Bf16, [0; 2]);
//! float.encode(&[1.0, 2.0, 3.0, 4.0], &mut words);
//! let matrix = StoredRows::new(&words, 2, 2, float)?;
//! let mut out = [0.0; 2];
//! stored_linear(Kernels::detect(), &matrix, &[10.0, 1.0], 1, &mut out)?;
//! assert_eq!(out, [12.0, 34.0]);
//! # Ok(()) }
//! ```

use super::{
    Kernels,
    linear::check,
    tasks::{self, Piece},
};
use crate::{format::FormatError, ops::StoredFloat};

/// Partial sums of a dot product.
pub const LANES: usize = 16;

/// Rows that are kept at hand while the tokens pass.
const ROW_TILE: usize = 32;

/// Rows a kernel takes at a time.
pub(super) const KERNEL_ROWS: usize = 4;

/// Tokens a kernel takes at a time.
pub(super) const KERNEL_TOKENS: usize = 3;

/// A matrix in memory: the kernels' view of a [`StoredMatrix`](crate::StoredMatrix).
#[derive(Debug, Clone, Copy)]
pub struct StoredRows<'a> {
    words: &'a [u32],
    rows: usize,
    columns: usize,
    float: StoredFloat,
}

impl<'a> StoredRows<'a> {
    /// Checks that `words` holds `rows` rows of `columns` elements.
    ///
    /// # Errors
    /// [`FormatError::RaggedRow`] or [`FormatError::Length`].
    pub fn new(words: &'a [u32], rows: usize, columns: usize, float: StoredFloat) -> Result<Self, FormatError> {
        check("stored words", rows * float.words_per_row(columns)?, words.len())?;
        Ok(Self { words, rows, columns, float })
    }

    pub(super) fn row(&self, row: usize) -> &'a [u32] {
        let words = self.words.len() / self.rows;
        &self.words[row * words..(row + 1) * words]
    }

    pub(super) const fn rows(&self) -> usize {
        self.rows
    }

    pub(super) const fn columns(&self) -> usize {
        self.columns
    }

    pub(super) const fn float(&self) -> StoredFloat {
        self.float
    }

    /// Writes a row as floats into `out`, exactly. A row that is not there becomes NaN.
    pub fn decode_row(&self, row: Option<usize>, out: &mut [f32]) {
        match row.filter(|&row| row < self.rows) {
            Some(row) => self.float.decode(self.row(row), out),
            None => out.fill(f32::NAN),
        }
    }
}

/// `out [tokens, rows]` = `x [tokens, columns]` times the matrix.
///
/// # Errors
/// [`FormatError::Length`] if `x` or `out` does not have the size that goes with `tokens`.
pub fn stored_linear(
    kernels: Kernels,
    matrix: &StoredRows<'_>,
    x: &[f32],
    tokens: usize,
    out: &mut [f32],
) -> Result<(), FormatError> {
    check("outputs", tokens * matrix.rows, out.len())?;
    products(kernels, matrix, x, tokens, matrix.rows, &|row| row, out)
}

/// `out [tokens, rows.len()]`: the products with these rows, with the bits of [`stored_linear`]. A row that is not there
/// becomes NaN.
///
/// # Errors
/// [`FormatError::Length`] if `x` or `out` does not have the size that goes with `tokens`.
pub fn stored_linear_at(
    kernels: Kernels,
    matrix: &StoredRows<'_>,
    x: &[f32],
    tokens: usize,
    rows: &[Option<usize>],
    out: &mut [f32],
) -> Result<(), FormatError> {
    check("outputs", tokens * rows.len(), out.len())?;
    let is_there = |row: &Option<usize>| row.is_some_and(|row| row < matrix.rows);
    if matrix.rows > 0 {
        // Another row takes the place of one that is not there.
        let row = |n: usize| rows[n].filter(|row| *row < matrix.rows).unwrap_or(0);
        products(kernels, matrix, x, tokens, rows.len(), &row, out)?;
    }
    if !rows.iter().all(is_there) {
        for out in out.chunks_exact_mut(rows.len()) {
            out.iter_mut().zip(rows).filter(|(_, row)| !is_there(row)).for_each(|(out, _)| *out = f32::NAN);
        }
    }
    Ok(())
}

/// `out [tokens, count]`: product number `n` is with row `row(n)`.
fn products(
    kernels: Kernels,
    matrix: &StoredRows<'_>,
    x: &[f32],
    tokens: usize,
    count: usize,
    row: &(impl Fn(usize) -> usize + Sync),
    out: &mut [f32],
) -> Result<(), FormatError> {
    check("values of the tokens", tokens * matrix.columns, x.len())?;
    if out.is_empty() || x.is_empty() {
        out.fill(0.0);
        return Ok(());
    }
    let padded = pad(x, matrix.columns);
    let tokens: Vec<&[f32]> = padded.chunks_exact(matrix.columns.next_multiple_of(LANES)).collect();
    let parallel = tasks::is_parallel(out.len() * matrix.columns);
    let pieces = tasks::pieces(out, count, parallel);
    tasks::run(pieces, parallel, |piece| multiply(kernels, matrix, &tokens, row, piece));
    Ok(())
}

/// Tokens with zeros up to whole lanes.
fn pad(x: &[f32], columns: usize) -> Vec<f32> {
    let zeros = columns.next_multiple_of(LANES) - columns;
    let padded = |token: &[f32]| token.iter().copied().chain(std::iter::repeat_n(0.0, zeros)).collect::<Vec<_>>();
    x.chunks_exact(columns).flat_map(padded).collect()
}

fn multiply(
    kernels: Kernels,
    matrix: &StoredRows<'_>,
    tokens: &[&[f32]],
    row_of: &impl Fn(usize) -> usize,
    mut piece: Piece<'_>,
) {
    let end = piece.rows();
    for start in (0..end).step_by(ROW_TILE) {
        let tile = start..(start + ROW_TILE).min(end);
        for (tokens, out) in tokens.chunks(KERNEL_TOKENS).zip(piece.out.chunks_mut(KERNEL_TOKENS)) {
            for first in tile.clone().step_by(KERNEL_ROWS) {
                let count = KERNEL_ROWS.min(tile.end - first);
                let mut rows = [[].as_slice(); KERNEL_ROWS];
                for (r, row) in rows[..count].iter_mut().enumerate() {
                    *row = matrix.row(row_of(piece.first + first + r));
                }
                let mut dots = [0.0; KERNEL_ROWS * KERNEL_TOKENS];
                let dots = &mut dots[..count * tokens.len()];
                kernels.stored_dots(matrix.float, &rows[..count], tokens, dots);
                for (r, dots) in dots.chunks_exact(tokens.len()).enumerate() {
                    out.iter_mut().zip(dots).for_each(|(out, dot)| out[first + r] = *dot);
                }
            }
        }
    }
}
