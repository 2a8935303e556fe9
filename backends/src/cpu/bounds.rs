//! Upper bounds of products with a stored matrix, from its [compact copy](super::screen).
//!
//! ```
//! use ternoss_backends::{StoredFloat, cpu::{Kernels, bounds::bounds, screen::{DEVIATIONS, Screen}, stored::StoredRows}};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // Two rows of 64 numbers, +1 and -1.
//! let words: Vec<u32> = [1.0f32, -1.0].iter().flat_map(|x| [x.to_bits(); 64]).collect();
//! let kernels = Kernels::detect();
//! let screen = Screen::new(kernels, &StoredRows::new(&words, 2, 64, StoredFloat::F32)?, &mut || {});
//! let (token, mut most) = ([0.5; 64], [0.0; 2]);
//! bounds(kernels, &screen, &token, 1, DEVIATIONS, &mut most)?;
//! // The products are 32 and -32: the second row cannot be the larger one, and need not be read.
//! assert!(most[0] >= 32.0 && most[1] >= -32.0 && most[1] < 32.0);
//! # Ok(()) }
//! ```

use super::{
    Kernels,
    linear::check,
    screen::{BLOCK_BYTES, Dither, RANGE, Screen, row_bytes},
    tasks::{self, Piece},
};
use crate::format::{BLOCK, FormatError};

/// Largest int8 activation.
const QMAX: f32 = 127.0;

/// Rows that are kept at hand while the tokens pass.
const ROW_TILE: usize = 64;

/// Tokens that pass a row together.
pub(super) const TOKEN_TILE: usize = 8;

/// Some rows of codes as the kernels take them.
#[derive(Debug, Clone, Copy)]
pub(super) struct ScreenRows<'a> {
    /// Blocks in a row.
    pub(super) blocks: usize,
    /// `[rows, blocks * 32]`.
    pub(super) codes: &'a [u8],
}

impl<'a> ScreenRows<'a> {
    /// The codes of a row.
    pub(super) fn row(&self, row: usize) -> &'a [u8] {
        &self.codes[row * BLOCK_BYTES * self.blocks..(row + 1) * BLOCK_BYTES * self.blocks]
    }
}

/// A token rounded to int8, and what its products have in common. Quantities are in units of its scale.
#[derive(Debug)]
struct Token {
    /// Whole blocks, padded with zeros.
    levels: Vec<i8>,
    terms: TokenTerms,
}

/// See [`bound`].
#[derive(Debug, Clone, Copy)]
pub(super) struct TokenTerms {
    /// What an activation of 1 stands for; NaN for a token that has no bounds.
    scale: f32,
    /// The product of the activations with the zero points: a whole number and the rest.
    zero: (i32, f32),
    /// Squared deviations that belong to the rounding of a row, and, for a length of 1, of the token.
    variances: [f32; 2],
    /// Length of the token, rounded up.
    length: f32,
    /// What a row of length 1 may lose to rounded floats.
    slack: f32,
}

impl Token {
    fn new(dither: &Dither, x: &[f32], deviations: f32) -> Self {
        let mut x = x.to_vec();
        dither.mix(&mut x);
        let largest = x.iter().fold(0u32, |largest, x| largest.max(x.to_bits() & 0x7fff_ffff));
        let scale = f32::from_bits(largest) / QMAX;
        let mut levels = vec![0; x.len().next_multiple_of(BLOCK)];
        if !RANGE.contains(&scale) {
            let terms = TokenTerms { scale: f32::NAN, zero: (0, 0.0), variances: [0.0; 2], length: 0.0, slack: 0.0 };
            return Self { levels, terms };
        }
        let (mut zero, mut squares) = (0.0, 0.0);
        for (i, (level, x)) in levels.iter_mut().zip(&x).enumerate() {
            *level = (x / scale + dither.thresholds[i]).floor().clamp(-QMAX, QMAX) as i8;
            zero += f64::from(*level) * f64::from(dither.zero_points[i]);
            squares += f64::from(*x).powi(2);
        }
        let columns = x.len() as f64;
        let length = (squares.sqrt() / f64::from(scale) + columns.sqrt()) as f32;
        let terms = TokenTerms {
            scale,
            zero: (zero.round() as i32, (zero - zero.round()) as f32),
            variances: [deviations * deviations / 12.0 * length * length, deviations * deviations / 4.0],
            length,
            slack: (columns / 16.0 + 64.0) as f32 / (1 << 23) as f32 * length,
        };
        Self { levels, terms }
    }
}

/// `out [tokens, rows]`: what each product of `x [tokens, columns]` with a row is at most, with `deviations` standard
/// deviations of the copy's error between the estimate and the bound ([`DEVIATIONS`](super::screen::DEVIATIONS) for the
/// promise of [`screen`](super::screen)). Infinite where a product could leave the range of floats, never NaN.
///
/// # Errors
/// [`FormatError::Length`] if `x` or `out` does not have the size that goes with `tokens`.
pub fn bounds(
    kernels: Kernels,
    screen: &Screen,
    x: &[f32],
    tokens: usize,
    deviations: f32,
    out: &mut [f32],
) -> Result<(), FormatError> {
    check("values of the tokens", tokens * screen.columns, x.len())?;
    check("outputs", tokens * screen.rows, out.len())?;
    if out.is_empty() || x.is_empty() {
        out.fill(f32::INFINITY);
        return Ok(());
    }
    let tokens: Vec<Token> =
        x.chunks_exact(screen.columns).map(|x| Token::new(&screen.dither, x, deviations)).collect();
    let parallel = tasks::is_parallel(out.len() * screen.columns);
    let pieces = tasks::pieces(out, screen.rows, parallel);
    tasks::run(pieces, parallel, |piece| piece_bounds(kernels, screen, &tokens, piece));
    Ok(())
}

fn piece_bounds(kernels: Kernels, screen: &Screen, tokens: &[Token], mut piece: Piece<'_>) {
    let (end, row_bytes) = (piece.rows(), row_bytes(screen.columns));
    for start in (0..end).step_by(ROW_TILE) {
        let count = ROW_TILE.min(end - start);
        let rows = piece.first + start..piece.first + start + count;
        let codes = &screen.codes[rows.start * row_bytes..rows.end * row_bytes];
        let tile = ScreenRows { blocks: row_bytes / BLOCK_BYTES, codes };
        for (tokens, out) in tokens.chunks(TOKEN_TILE).zip(piece.out.chunks_mut(TOKEN_TILE)) {
            let mut levels = [[].as_slice(); TOKEN_TILE];
            levels.iter_mut().zip(tokens).for_each(|(levels, token)| *levels = &token.levels);
            let mut totals = [0i32; ROW_TILE * TOKEN_TILE];
            let totals = &mut totals[..count * tokens.len()];
            kernels.screen_totals(&tile, &levels[..tokens.len()], totals);
            for ((token, totals), out) in tokens.iter().zip(totals.chunks_exact(count)).zip(out) {
                let (steps, lengths) = (&screen.steps[rows.clone()], &screen.lengths[rows.clone()]);
                kernels.screen_bounds(token.terms, totals, steps, lengths, &mut out[start..start + count]);
            }
        }
    }
}

/// The bounds of some rows with one token: `totals` are the products of codes and activations.
#[inline(always)]
pub(super) fn screen_bounds(token: TokenTerms, totals: &[i32], steps: &[f32], lengths: &[f32], out: &mut [f32]) {
    for (((out, total), step), length) in out.iter_mut().zip(totals).zip(steps).zip(lengths) {
        *out = bound(token, *total, *step, *length);
    }
}

/// One bound. `row` is the row's length in steps.
#[inline(always)]
fn bound(token: TokenTerms, total: i32, step: f32, row: f32) -> f32 {
    let unit = step * token.scale;
    let estimate = (total - token.zero.0) as f32 - token.zero.1;
    let reach = (token.variances[0] + token.variances[1] * row * row).sqrt() + token.slack * row;
    // The smallest float for products that are too small to be told from zero.
    let bound = unit * (estimate + reach) + f32::MIN_POSITIVE;
    // No sum of a part of the product is above the product of the lengths.
    let largest = unit * row * token.length * 2.0;
    if bound.is_finite() && largest.is_finite() { bound } else { f32::INFINITY }
}

/// `totals[token * rows + row]` in plain Rust.
#[inline(always)]
pub(super) fn screen_totals(rows: &ScreenRows<'_>, tokens: &[&[i8]], totals: &mut [i32]) {
    let count = totals.len() / tokens.len().max(1);
    for (token, totals) in tokens.iter().zip(totals.chunks_exact_mut(count.max(1))) {
        for (row, total) in totals.iter_mut().enumerate() {
            let blocks = rows.row(row).chunks_exact(BLOCK_BYTES).zip(token.chunks_exact(BLOCK));
            *total = blocks.map(|(codes, levels)| block_dot(codes, levels)).sum();
        }
    }
}

#[inline(always)]
fn block_dot(codes: &[u8], levels: &[i8]) -> i32 {
    let (low, high) = levels.split_at(BLOCK_BYTES);
    let product = |((code, low), high): ((&u8, &i8), &i8)| {
        i32::from(code & 15) * i32::from(*low) + i32::from(code >> 4) * i32::from(*high)
    };
    codes.iter().zip(low).zip(high).map(product).sum()
}
