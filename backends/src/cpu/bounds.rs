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
    screen::{Dither, RANGE, RUNS, Screen, run},
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
    /// Bytes that have a bit of each weight of a run.
    pub(super) run: usize,
    /// `[rows, 3 * run]`.
    pub(super) codes: &'a [u8],
}

impl<'a> ScreenRows<'a> {
    /// Two bits of the runs that `k % 2` counts, of even and of odd ones, and the third of all.
    pub(super) fn row(&self, row: usize) -> ([&'a [u8]; 2], &'a [u8]) {
        let (even, rest) = self.codes[row * 3 * self.run..(row + 1) * 3 * self.run].split_at(self.run);
        let (odd, thirds) = rest.split_at(self.run);
        ([even, odd], thirds)
    }
}

/// The last bits of all rows.
#[derive(Debug, Clone, Copy)]
pub(super) struct LastBits<'a> {
    /// Bytes of a row.
    pub(super) run: usize,
    /// `[rows, run]`.
    pub(super) bits: &'a [u8],
}

impl<'a> LastBits<'a> {
    /// Those of a row; nothing where there is no such row.
    pub(super) fn row(&self, row: u32) -> &'a [u8] {
        let start = row as usize * self.run;
        self.bits.get(start..start + self.run).unwrap_or_default()
    }
}

/// A token rounded to int8, and what its products have in common. Quantities are in units of its scale.
#[derive(Debug)]
struct Token {
    /// Run after run, each padded with zeros to [`padded`].
    levels: Vec<i8>,
    terms: TokenTerms,
}

/// Activations from a run to the next: a kernel may read whole blocks.
pub(super) const fn padded(run: usize) -> usize {
    run.next_multiple_of(BLOCK)
}

/// See [`bound`].
#[derive(Debug, Clone, Copy)]
pub(super) struct TokenTerms {
    /// What an activation of 1 stands for; NaN for a token that has no bounds.
    scale: f32,
    /// The product of the activations with the zero points, less half of their sum: a whole number and the rest.
    zero: (i32, f32),
    /// Half of the sum of the activations.
    half: f32,
    /// Squared deviations that belong to the rounding of a row without the last bits, and, for a length of 1, of the token.
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
        let run = run(x.len());
        let mut levels = vec![0; RUNS * padded(run)];
        if !RANGE.contains(&scale) {
            let terms =
                TokenTerms { scale: f32::NAN, zero: (0, 0.0), half: 0.0, variances: [0.0; 2], length: 0.0, slack: 0.0 };
            return Self { levels, terms };
        }
        let (mut zero, mut sum, mut squares) = (0.0, 0, 0.0);
        for (i, x) in x.iter().enumerate() {
            let level = (x / scale + dither.thresholds[i]).floor().clamp(-QMAX, QMAX) as i8;
            levels[i / run * padded(run) + i % run] = level;
            zero += f64::from(level) * f64::from(dither.zero_points[i]);
            sum += i32::from(level);
            squares += f64::from(*x).powi(2);
        }
        let columns = x.len() as f64;
        let length = (squares.sqrt() / f64::from(scale) + columns.sqrt()) as f32;
        let zero = zero - f64::from(sum) / 2.0;
        let terms = TokenTerms {
            scale,
            zero: (zero.round() as i32, (zero - zero.round()) as f32),
            half: sum as f32 / 2.0,
            variances: [deviations * deviations / 3.0 * length * length, deviations * deviations / 4.0],
            length,
            slack: (columns / 16.0 + 96.0) as f32 / (1 << 23) as f32 * length,
        };
        Self { levels, terms }
    }
}

/// `out [tokens, rows]`: what each product of `x [tokens, columns]` with a row is at most, with `deviations` standard
/// deviations of the copy's error between the estimate and the bound ([`DEVIATIONS`](super::screen::DEVIATIONS) for the
/// promise of [`screen`](super::screen)), without the last bits of the copy. Infinite where a product could leave the range of
/// floats, never NaN.
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

/// Closer bounds of the products of one token `x [columns]` with `rows`, in the place of those that [`bounds`] gave with as
/// many `deviations`: with the last bits of the copy, which half its error. A number that is no row keeps its bound.
///
/// # Errors
/// [`FormatError::Length`] if `x` has another width, or `bounds` and `rows` differ in length.
pub fn closer_bounds(
    kernels: Kernels,
    screen: &Screen,
    x: &[f32],
    rows: &[u32],
    deviations: f32,
    bounds: &mut [f32],
) -> Result<(), FormatError> {
    check("values of the token", screen.columns, x.len())?;
    check("bounds of the rows", rows.len(), bounds.len())?;
    let token = Token::new(&screen.dither, x, deviations);
    let parallel = tasks::is_parallel(rows.len() * screen.columns);
    let pieces = tasks::pieces(bounds, rows.len(), parallel);
    tasks::run(pieces, parallel, |mut piece| {
        let rows = &rows[piece.first..piece.first + piece.rows()];
        let mut totals = vec![0; rows.len()];
        kernels.last_totals(
            &LastBits { run: run(screen.columns), bits: &screen.last },
            rows,
            &token.levels,
            &mut totals,
        );
        let bounds = piece.out.iter_mut().flat_map(|out| out.iter_mut());
        for ((row, total), bound) in rows.iter().zip(totals).zip(bounds) {
            let row = *row as usize;
            if row < screen.rows {
                *bound = closer(token.terms, *bound, total, screen.steps[row], screen.lengths[row]);
            }
        }
    });
    Ok(())
}

fn piece_bounds(kernels: Kernels, screen: &Screen, tokens: &[Token], mut piece: Piece<'_>) {
    let (end, run) = (piece.rows(), run(screen.columns));
    let mut totals = [0i32; ROW_TILE * TOKEN_TILE];
    for start in (0..end).step_by(ROW_TILE) {
        let count = ROW_TILE.min(end - start);
        let rows = piece.first + start..piece.first + start + count;
        let tile = ScreenRows { run, codes: &screen.codes[rows.start * 3 * run..rows.end * 3 * run] };
        for (tokens, out) in tokens.chunks(TOKEN_TILE).zip(piece.out.chunks_mut(TOKEN_TILE)) {
            let mut levels = [[].as_slice(); TOKEN_TILE];
            levels.iter_mut().zip(tokens).for_each(|(levels, token)| *levels = &token.levels);
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
    let estimate = (2 * total - token.zero.0) as f32 - token.zero.1;
    let reach = (token.variances[0] + token.variances[1] * row * row).sqrt() + token.slack * row;
    // The smallest float for products that are too small to be told from zero.
    let bound = unit * (estimate + reach) + f32::MIN_POSITIVE;
    // No sum of a part of the product is above the product of the lengths.
    let largest = unit * row * token.length * 2.0;
    if bound.is_finite() && largest.is_finite() { bound } else { f32::INFINITY }
}

/// A bound without the last bits, whose product with the activations is `total`, becomes one with them.
#[inline(always)]
fn closer(token: TokenTerms, bound: f32, total: i32, step: f32, row: f32) -> f32 {
    let of_token = token.variances[1] * row * row;
    let (before, after) = ((token.variances[0] + of_token).sqrt(), (token.variances[0] / 4.0 + of_token).sqrt());
    let closer = bound + step * token.scale * (total as f32 - token.half - (before - after));
    if bound.is_finite() && closer.is_finite() { closer } else { f32::INFINITY }
}

/// `totals[token * rows + row]` in plain Rust.
#[inline(always)]
pub(super) fn screen_totals(rows: &ScreenRows<'_>, tokens: &[&[i8]], totals: &mut [i32]) {
    let count = totals.len() / tokens.len().max(1);
    for (token, totals) in tokens.iter().zip(totals.chunks_exact_mut(count.max(1))) {
        for (row, total) in totals.iter_mut().enumerate() {
            let (pairs, thirds) = rows.row(row);
            let runs = token.chunks_exact(padded(rows.run).max(1)).enumerate();
            *total = runs.map(|(k, levels)| run_dot(k, pairs[k % 2], thirds, levels)).sum();
        }
    }
}

#[inline(always)]
fn run_dot(k: usize, pairs: &[u8], thirds: &[u8], levels: &[i8]) -> i32 {
    let product = |((pair, third), level): ((&u8, &u8), &i8)| {
        i32::from(pair >> (k / 2 * 2) & 3 | (third >> k & 1) << 2) * i32::from(*level)
    };
    pairs.iter().zip(thirds).zip(levels).map(product).sum()
}

/// The product of each row's last bits with the activations, in plain Rust.
#[inline(always)]
pub(super) fn last_totals(last: &LastBits<'_>, rows: &[u32], levels: &[i8], totals: &mut [i32]) {
    let stride = padded(last.run);
    for (row, total) in rows.iter().zip(totals) {
        let (whole, rest) = last.row(*row).as_chunks::<LAST_LANES>();
        let mut lanes = [0; LAST_LANES];
        lanes[..rest.len()].copy_from_slice(rest);
        let chunks = whole.iter().chain(std::iter::once(&lanes).filter(|_| !rest.is_empty())).enumerate();
        *total = chunks.map(|(n, bits)| lanes_dot(bits, &levels[n * LAST_LANES..], stride)).sum();
    }
}

/// Bytes of last bits that are added up side by side.
const LAST_LANES: usize = 32;

#[inline(always)]
fn lanes_dot(bits: &[u8; LAST_LANES], levels: &[i8], stride: usize) -> i32 {
    // At most 8 * 127 in magnitude.
    let mut sums = [0i16; LAST_LANES];
    for k in 0..RUNS {
        let levels = &levels[k * stride..][..LAST_LANES];
        for ((sum, bits), level) in sums.iter_mut().zip(bits).zip(levels) {
            *sum += i16::from(*level & -((bits >> k & 1) as i8));
        }
    }
    sums.iter().map(|sum| i32::from(*sum)).sum()
}
