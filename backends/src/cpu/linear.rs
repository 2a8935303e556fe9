//! Ternary products over rows and tokens.
//!
//! A product is cut by rows among the threads. A thread takes 64 rows at a time, which fit its cache, brings them
//! into the one form the kernels know (t2 codes, a scale a block), and passes them by 8 tokens at a time, whose
//! activations stay in the first cache level. So a row is read from memory once, whatever the batch. A few tokens may be
//! multiplied with t5 as it lies (`t5.rs`), and many by matrix units (`tiles.rs`).
//!
//! ```
//! use ternoss_backends::{CodeFormat, TernaryLayout, cpu::{Kernels, TernaryMatrices, linear::ternary_linear, tokens::Tokens}};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let layout = TernaryLayout { format: CodeFormat::T2, matrices: 1, planes: 1, rows: 2, in_features: 3, group_size: None, rotation: None };
//! let mut codes = vec![0; 2 * layout.words_per_row()];
//! for (trits, row) in [[1, 0, -1], [1, 1, 1]].iter().zip(codes.chunks_mut(layout.words_per_row())) {
//!     layout.format.pack_row(trits, row);
//! }
//! let kernels = Kernels::detect();
//! let rows = TernaryMatrices::new(layout, &codes, &[0.5, 2.0], None)?.matrix(0).ok_or("no matrix")?;
//! let tokens = Tokens::quantize(kernels, &[127.0, 1.0, 2.0], 3, None);
//! let mut out = [0.0; 2];
//! ternary_linear(kernels, &rows, &tokens, &mut out)?;
//! assert_eq!(out, [62.5, 260.0]);
//! # Ok(()) }
//! ```

use rayon::prelude::*;

use super::{
    Kernels, TernaryRows,
    t5::{Straight, T5Rows},
    tasks::{self, Piece},
    tiles::{Target, TokenTiles},
    tokens::{self, Token, Tokens},
};
use crate::format::{BLOCK, CodeFormat, FormatError};

/// Tokens that pass a row together.
pub(super) const TOKEN_TILE: usize = 8;

/// Rows that are kept at hand while the tokens pass.
pub(super) const ROW_TILE: usize = 64;

/// Tokens that are multiplied with t5 as it lies, one after the other. For more, rows are sooner rewritten as t2.
const STRAIGHT_TOKENS: usize = 4;

/// Some rows of a plane as the kernels take them.
#[derive(Debug, Clone, Copy)]
pub(super) struct T2Rows<'a> {
    /// Blocks of 64 in a row.
    pub(super) blocks: usize,
    /// t2 codes, `4 * blocks` words a row.
    pub(super) codes: &'a [u32],
    /// A scale for each block; `None` if all are 1.
    pub(super) scales: Option<&'a [u8]>,
    /// From the scales of a row to those of the next. A row can be read up to a multiple of 16 scales: what follows its own
    /// belongs to others and meets zeros.
    pub(super) scale_stride: usize,
}

impl<'a> T2Rows<'a> {
    /// The rows that come after the first `rows`.
    #[cfg(target_arch = "aarch64")]
    pub(super) fn after(&self, rows: usize) -> Self {
        let scales = self.scales.map(|scales| &scales[rows * self.scale_stride..]);
        Self { codes: &self.codes[rows * 4 * self.blocks..], scales, ..*self }
    }

    /// The words of a row.
    pub(super) fn row(&self, row: usize) -> &'a [u32] {
        &self.codes[row * 4 * self.blocks..(row + 1) * 4 * self.blocks]
    }

    /// The block scales of a row, and as many of the following as fill up a multiple of 16.
    pub(super) fn row_scales(&self, row: usize) -> Option<&'a [u8]> {
        self.scales.map(|scales| &scales[row * self.scale_stride..][..self.padded()])
    }

    /// The number of blocks, padded as their scales and sums are.
    pub(super) fn padded(&self) -> usize {
        self.blocks.next_multiple_of(tokens::SUM_LANES)
    }

    /// What kernels that load without checks rely on: codes and scales of `rows` rows, and the tokens' activations.
    ///
    /// # Panics
    /// If something is shorter.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn check(&self, rows: usize, tokens: &[Token<'_>]) {
        let padded = self.padded();
        let last = rows.saturating_sub(1) * self.scale_stride;
        assert!(self.codes.len() >= rows * 4 * self.blocks, "codes of the rows");
        assert!(self.scales.is_none_or(|scales| scales.len() >= last + padded), "scales of the rows");
        for token in tokens {
            assert!(token.quads.len() >= self.blocks.div_ceil(tokens::QUAD_BLOCKS), "activations of a token");
            assert!(token.block_sums.len() >= padded, "sums of a token");
        }
    }
}

/// A product to be done: all rows of a matrix with some tokens.
pub struct Product<'a> {
    pub(super) rows: TernaryRows<'a>,
    pub(super) tokens: Vec<Token<'a>>,
    /// Added to the product, one a row.
    pub(super) bias: Option<&'a [f32]>,
    /// `[tokens, rows]`.
    pub(super) out: &'a mut [f32],
}

impl<'a> Product<'a> {
    /// All tokens times one matrix, plus a number a row: `out` is `[tokens, rows]`.
    ///
    /// # Errors
    /// [`FormatError::Length`] if the tokens are not as wide as the matrix, or `bias` or `out` does not have its size.
    pub fn new(
        rows: TernaryRows<'a>,
        tokens: &'a Tokens,
        bias: Option<&'a [f32]>,
        out: &'a mut [f32],
    ) -> Result<Self, FormatError> {
        let layout = rows.layout();
        check("values of a token", layout.in_features, tokens.in_features())?;
        check("outputs", layout.rows * tokens.len(), out.len())?;
        check("biases", layout.rows, bias.map_or(layout.rows, <[f32]>::len))?;
        let tokens = (0..tokens.len()).map(|token| tokens.token(token)).collect();
        Ok(Self { rows, tokens, bias, out })
    }
}

/// `out [tokens, rows]` = the tokens times one matrix.
///
/// # Errors
/// [`FormatError::Length`] if the tokens are not as wide as the matrix, or `out` does not have its size.
pub fn ternary_linear(
    kernels: Kernels,
    rows: &TernaryRows<'_>,
    tokens: &Tokens,
    out: &mut [f32],
) -> Result<(), FormatError> {
    run(kernels, vec![Product::new(*rows, tokens, None, out)?]);
    Ok(())
}

pub(super) fn check(what: &'static str, expected: usize, found: usize) -> Result<(), FormatError> {
    if expected == found { Ok(()) } else { Err(FormatError::Length { what, expected, found }) }
}

/// Does several products at once, sharing all threads among them.
pub fn run(kernels: Kernels, products: Vec<Product<'_>>) {
    let work = |p: &Product<'_>| p.out.len() * p.rows.layout().planes * p.rows.layout().in_features;
    let parallel = tasks::is_parallel(products.iter().map(work).sum());
    let mut inputs = Vec::with_capacity(products.len());
    let mut pieces = Vec::new();
    for (n, Product { rows, tokens, bias, out }) in products.into_iter().enumerate() {
        pieces.extend(tasks::pieces(out, rows.layout().rows, parallel).into_iter().map(|piece| (n, piece)));
        let few = rows.layout().format == CodeFormat::T5 && tokens.len() <= STRAIGHT_TOKENS && kernels.multiply_t5();
        let straight = if few { tokens.iter().map(Straight::new).collect() } else { Vec::new() };
        let tiles = kernels.token_tiles(&tokens);
        inputs.push(Input { rows, tokens, straight, tiles, bias });
    }
    tasks::run(pieces, parallel, |(n, piece)| multiply(kernels, &inputs[n], piece));
}

/// A product's rows and tokens, and the tokens once more in the order of a special kernel, if one is to take them.
struct Input<'a> {
    rows: TernaryRows<'a>,
    tokens: Vec<Token<'a>>,
    straight: Vec<Straight<'a>>,
    tiles: Option<TokenTiles>,
    bias: Option<&'a [f32]>,
}

/// One piece, by tiles of rows.
fn multiply(kernels: Kernels, input: &Input<'_>, mut piece: Piece<'_>) {
    let Input { rows, tokens, straight, tiles, bias } = input;
    let mut scratch = Scratch::default();
    let mut totals = [0i32; ROW_TILE * TOKEN_TILE];
    let end = piece.rows();
    for start in (0..end).step_by(ROW_TILE) {
        let count = ROW_TILE.min(end - start);
        let first = piece.first + start;
        for plane in 0..rows.layout().planes {
            let row_scales = rows.row_scales(plane, first, count);
            if !straight.is_empty() {
                let tile = scratch.t5_tile(rows, plane, first, count);
                let each = straight.iter().zip(tokens.chunks(1)).zip(piece.out.chunks_mut(1));
                for ((straight, token), out) in each {
                    let totals = &mut totals[..count];
                    kernels.t5_totals(&tile, straight, totals);
                    add_plane(totals, row_scales, token, plane == 0, start, out);
                }
                continue;
            }
            let tile = scratch.tile(kernels, rows, plane, first, count);
            if let Some(tiles) = tiles {
                let target = Target { out: &mut piece.out, start, row_scales, is_first: plane == 0 };
                kernels.multiply_tiles(&tile, tiles, target);
                continue;
            }
            for (tokens, out) in tokens.chunks(TOKEN_TILE).zip(piece.out.chunks_mut(TOKEN_TILE)) {
                let totals = &mut totals[..count * tokens.len()];
                kernels.t2_totals(&tile, tokens, totals);
                add_plane(totals, row_scales, tokens, plane == 0, start, out);
            }
        }
        if let Some(bias) = bias {
            for out in &mut piece.out {
                let bias = &bias[first..first + count];
                out[start..start + count].iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
            }
        }
    }
}

/// Turns the totals of a plane into floats, in the one order that fixes their bits.
fn add_plane(
    totals: &[i32],
    row_scales: &[f32],
    tokens: &[Token<'_>],
    is_first: bool,
    start: usize,
    out: &mut [&mut [f32]],
) {
    for (t, (token, out)) in tokens.iter().zip(out).enumerate() {
        let out = &mut out[start..start + row_scales.len()];
        for ((y, totals), row_scale) in out.iter_mut().zip(totals.chunks_exact(tokens.len())).zip(row_scales) {
            let value = totals[t] as f32 * (row_scale * token.scale);
            *y = if is_first { value } else { *y + value };
        }
    }
}

/// Where a tile of rows is brought into the kernels' form.
#[derive(Default)]
struct Scratch {
    codes: Vec<u32>,
    scales: Vec<u8>,
}

impl Scratch {
    fn tile<'a>(
        &'a mut self,
        kernels: Kernels,
        rows: &TernaryRows<'a>,
        plane: usize,
        first: usize,
        count: usize,
    ) -> T2Rows<'a> {
        let in_features = rows.layout().in_features;
        let blocks = in_features.div_ceil(BLOCK);
        let (scales, scale_stride) = block_scales(rows, plane, first, count, &mut self.scales);
        let codes = rows.codes(plane, first, count);
        let codes = match rows.layout().format {
            CodeFormat::T2 => codes,
            CodeFormat::T5 => {
                self.codes.resize(count * 4 * blocks, 0);
                let per_row = rows.layout().words_per_row();
                for (t5, t2) in codes.chunks_exact(per_row).zip(self.codes.chunks_exact_mut(4 * blocks)) {
                    kernels.t5_to_t2(t5, in_features, t2);
                }
                &self.codes
            }
        };
        T2Rows { blocks, codes, scales, scale_stride }
    }

    /// The same without rewriting t5 codes.
    fn t5_tile<'a>(&'a mut self, rows: &TernaryRows<'a>, plane: usize, first: usize, count: usize) -> T5Rows<'a> {
        let (scales, scale_stride) = block_scales(rows, plane, first, count, &mut self.scales);
        T5Rows { words: rows.layout().words_per_row(), codes: rows.codes(plane, first, count), scales, scale_stride }
    }
}

/// The scales of some rows, one a block, and from those of a row to those of the next.
fn block_scales<'a>(
    rows: &TernaryRows<'a>,
    plane: usize,
    first: usize,
    count: usize,
    scratch: &'a mut Vec<u8>,
) -> (Option<&'a [u8]>, usize) {
    let blocks = rows.layout().in_features.div_ceil(BLOCK);
    let size = rows.layout().group_size.unwrap_or(BLOCK);
    let padded = blocks.next_multiple_of(tokens::SUM_LANES);
    match rows.group_scales_from(plane, first) {
        None => (None, 0),
        // Used in place, where enough follows the last row.
        Some(scales) if size == BLOCK && scales.len() >= (count - 1) * blocks + padded => (Some(scales), blocks),
        Some(scales) => {
            spread(&scales[..count * rows.layout().groups()], size / BLOCK, blocks, scratch);
            (Some(scratch.as_slice()), padded)
        }
    }
}

/// t5 rows of `in_features` weights as t2 rows.
#[must_use]
pub fn unpack(kernels: Kernels, t5: &[u32], in_features: usize) -> Vec<u32> {
    let (from, to) = (CodeFormat::T5.words_per_row(in_features), CodeFormat::T2.words_per_row(in_features));
    let mut t2 = vec![0; t5.len() / from.max(1) * to];
    let rows = t5.par_chunks_exact(from.max(1)).zip(t2.par_chunks_exact_mut(to.max(1)));
    rows.for_each(|(t5, t2)| kernels.t5_to_t2(t5, in_features, t2));
    t2
}

/// Group scales of some rows to padded block scales, each group being `repeat` blocks.
fn spread(groups: &[u8], repeat: usize, blocks: usize, scales: &mut Vec<u8>) {
    let per_row = blocks.div_ceil(repeat);
    let padding = blocks.next_multiple_of(tokens::SUM_LANES) - blocks;
    scales.clear();
    for row in groups.chunks_exact(per_row) {
        if repeat == 1 {
            scales.extend_from_slice(row);
        } else {
            scales.extend((0..blocks).map(|block| row[block / repeat]));
        }
        scales.extend(std::iter::repeat_n(0, padding));
    }
}
