//! Ternary products by looking sums up, the way of T-MAC and bitnet.cpp's TL1: two trits are four bits of a t2 byte, which
//! pick one of 16 entries (9 of them used) of a table of sums of two activations. A byte shuffle looks up 32 rows at once.
//!
//! The rows have to lie side by side for that, so they are packed again ([`LookupRows`]). Entries are exact: a sum `v` of two
//! int8 activations is kept as `v = 16 h + l`, `0 <= l < 16`, in two tables of bytes.
//!
//! This is a measured alternative, and not what [`linear`](super::linear) does: multiplying is faster in all but one case (the
//! table stands in [`cpu`](super)), and needs neither another copy of the weights nor tables.
//!
//! ```
//! use ternoss_backends::{CodeFormat, TernaryLayout, cpu::{Kernels, TernaryMatrices, lookup::{LookupRows, Tables, ternary_linear}, tokens::Tokens}};
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
//! let rows = LookupRows::new(&rows).ok_or("not t2")?;
//! ternary_linear(kernels, &rows, &Tables::new(&tokens), &mut out)?;
//! assert_eq!(out, [62.5, 260.0]);
//! # Ok(()) }
//! ```

use super::{
    Kernels, TernaryRows,
    linear::check,
    tokens::{QUAD_BLOCKS, Token, Tokens},
};
use crate::format::{BLOCK, CodeFormat, FormatError, T2_BLOCK_BYTES, TernaryLayout};

/// Rows that are looked up together.
pub(super) const LOOKUP_ROWS: usize = 32;

/// Sums of two activations by the codes of two trits.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(32))]
pub(super) struct Table {
    /// `v mod 16`.
    pub(super) low: [u8; 16],
    /// `v div 16`, rounded down, as a signed byte.
    pub(super) high: [u8; 16],
}

/// The tables of a token: for each t2 byte of a row one for its lower and one for its upper four bits.
pub struct Tables {
    in_features: usize,
    tables: Vec<Table>,
    scales: Vec<f32>,
}

impl Tables {
    /// Those of all tokens.
    #[must_use]
    pub fn new(tokens: &Tokens) -> Self {
        let bytes = tokens.in_features().div_ceil(BLOCK) * T2_BLOCK_BYTES;
        let all = (0..tokens.len()).map(|token| tokens.token(token));
        let scales = all.clone().map(|token| token.scale).collect();
        let tables = all.flat_map(|token| (0..2 * bytes).map(move |at| table(&token, at / 2, at % 2))).collect();
        Self { in_features: tokens.in_features(), tables, scales }
    }

    fn token(&self, token: usize) -> &[Table] {
        let count = self.tables.len() / self.scales.len();
        &self.tables[token * count..(token + 1) * count]
    }
}

/// The table of the lower (`half` 0) or upper bits of byte `at` of a row.
fn table(token: &Token<'_>, at: usize, half: usize) -> Table {
    let (block, j) = (at / T2_BLOCK_BYTES, at % T2_BLOCK_BYTES);
    let quad = &token.quads[block / QUAD_BLOCKS].0[16 * (block % QUAD_BLOCKS) + j..];
    let [first, second] = [quad[128 * half], quad[128 * half + 64]].map(i16::from);
    let mut table = Table { low: [0; 16], high: [0; 16] };
    for code in 0..16 {
        let sum = (code % 4 - 1) * first + (code / 4 - 1) * second;
        table.low[code as usize] = (sum & 15) as u8;
        table.high[code as usize] = (sum >> 4) as u8;
    }
    table
}

/// A t2 matrix packed again: byte `at` of 32 rows side by side, block scales too.
pub struct LookupRows {
    layout: TernaryLayout,
    /// `[planes, rows / 32, bytes of a row]`; past the last row lie zeros.
    codes: Vec<[u8; LOOKUP_ROWS]>,
    /// `[planes, rows / 32, blocks]`.
    scales: Option<Vec<[u8; LOOKUP_ROWS]>>,
    /// `[planes, rows]`.
    row_scales: Vec<f32>,
}

impl LookupRows {
    /// A copy of a matrix, or `None` if it is not t2.
    #[must_use]
    pub fn new(rows: &TernaryRows<'_>) -> Option<Self> {
        let layout = *rows.layout();
        if layout.format != CodeFormat::T2 {
            return None;
        }
        let tiles = layout.rows.div_ceil(LOOKUP_ROWS);
        let blocks = layout.in_features.div_ceil(BLOCK);
        let bytes = blocks * T2_BLOCK_BYTES;
        let mut codes = vec![[0; LOOKUP_ROWS]; layout.planes * tiles * bytes];
        let mut scales = layout.group_size.map(|_| vec![[0; LOOKUP_ROWS]; layout.planes * tiles * blocks]);
        let mut row_scales = Vec::with_capacity(layout.planes * layout.rows);
        for plane in 0..layout.planes {
            row_scales.extend_from_slice(rows.row_scales(plane, 0, layout.rows));
            for row in 0..layout.rows {
                let (tile, lane) = (plane * tiles + row / LOOKUP_ROWS, row % LOOKUP_ROWS);
                let row_codes = bytemuck::cast_slice::<u32, u8>(rows.codes(plane, row, 1));
                codes[tile * bytes..].iter_mut().zip(row_codes).for_each(|(to, code)| to[lane] = *code);
                let groups = rows.group_scales(plane, row, 1).zip(layout.group_size);
                if let (Some(scales), Some((groups, size))) = (&mut scales, groups) {
                    let to = &mut scales[tile * blocks..(tile + 1) * blocks];
                    to.iter_mut().enumerate().for_each(|(block, to)| to[lane] = groups[block * BLOCK / size]);
                }
            }
        }
        Some(Self { layout, codes, scales, row_scales })
    }
}

/// `out [tokens, rows]` = the tokens times the matrix, with the bits of [`linear`](super::linear::ternary_linear). One thread.
///
/// # Errors
/// [`FormatError::Length`] if the tokens are not as wide as the matrix, or `out` does not have its size.
pub fn ternary_linear(
    kernels: Kernels,
    rows: &LookupRows,
    tokens: &Tables,
    out: &mut [f32],
) -> Result<(), FormatError> {
    let TernaryLayout { planes, rows: width, in_features, .. } = rows.layout;
    check("values of a token", in_features, tokens.in_features)?;
    check("outputs", width * tokens.scales.len(), out.len())?;
    let (tiles, blocks) = (width.div_ceil(LOOKUP_ROWS), in_features.div_ceil(BLOCK));
    for first in (0..tiles).step_by(2) {
        let some = first..tiles.min(first + 2);
        for (t, scale) in tokens.scales.iter().enumerate() {
            for plane in 0..planes {
                let part = |size: usize| (plane * tiles + some.start) * size..(plane * tiles + some.end) * size;
                let codes = &rows.codes[part(blocks * T2_BLOCK_BYTES)];
                let scales = rows.scales.as_ref().map(|scales| &scales[part(blocks)]);
                let mut totals = [0; 2 * LOOKUP_ROWS];
                let totals = &mut totals[..some.len() * LOOKUP_ROWS];
                kernels.lookup_totals(codes, scales, tokens.token(t), totals);
                let start = some.start * LOOKUP_ROWS;
                let end = width.min(some.end * LOOKUP_ROWS);
                let row_scales = &rows.row_scales[plane * width..][start..end];
                let out = &mut out[t * width..][start..end];
                for ((y, total), row_scale) in out.iter_mut().zip(totals).zip(row_scales) {
                    let value = *total as f32 * (row_scale * scale);
                    *y = if plane == 0 { value } else { *y + value };
                }
            }
        }
    }
    Ok(())
}
