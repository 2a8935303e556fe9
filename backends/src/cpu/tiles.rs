//! Activations of many tokens in the order in which matrix units take them.
//!
//! A unit multiplies 16 rows with 16 tokens, 64 bytes of each at a time. It wants the tokens' bytes four by four: row `k` of a
//! tile holds the bytes `4k..4k + 4` of each token.

use std::ops::Range;

use super::tokens::Token;

/// Tokens, or rows of weights, in a tile.
pub(super) const TILE: usize = 16;

/// Bytes of a token in a tile.
pub(super) const TILE_BYTES: usize = 64;

/// Tokens from which on matrix units are faster. They take 16 in the time of one, and rows have to be unpacked for them.
pub(super) const LEAST_TOKENS: usize = 9;

/// What a register of a matrix unit holds.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Tile(pub(super) [[u8; TILE_BYTES]; TILE]);

impl Tile {
    pub(super) const ZERO: Self = Self([[0; TILE_BYTES]; TILE]);
}

/// Tokens as matrix units take them, padded with zeros to whole tiles.
pub(super) struct TokenTiles {
    /// `[tiles of tokens, steps]`
    tiles: Vec<Tile>,
    /// Tiles that hold all bytes of 16 tokens.
    pub(super) steps: usize,
    /// What an activation of 1 stands for, one a token.
    pub(super) scales: Vec<f32>,
}

impl TokenTiles {
    pub(super) fn new(tokens: &[Token<'_>]) -> Self {
        let steps = tokens.first().map_or(0, |token| size_of_val(token.quads) / TILE_BYTES);
        let mut tiles = vec![Tile::ZERO; tokens.len().div_ceil(TILE) * steps];
        for (tokens, tiles) in tokens.chunks(TILE).zip(tiles.chunks_exact_mut(steps.max(1))) {
            for (t, token) in tokens.iter().enumerate() {
                let bytes = bytemuck::cast_slice::<_, [[u8; 4]; TILE]>(token.quads);
                for (tile, fours) in tiles.iter_mut().zip(bytes) {
                    for (row, four) in tile.0.iter_mut().zip(fours) {
                        row[4 * t..4 * t + 4].copy_from_slice(four);
                    }
                }
            }
        }
        Self { tiles, steps, scales: tokens.iter().map(|token| token.scale).collect() }
    }

    /// Some steps of 16 tokens.
    pub(super) fn of(&self, tile: usize, steps: Range<usize>) -> &[Tile] {
        &self.tiles[tile * self.steps..][steps]
    }
}

/// Where the products of some rows go.
pub(super) struct Target<'o, 'a> {
    /// `[tokens][rows]`
    pub(super) out: &'o mut [&'a mut [f32]],
    /// Place of the first row.
    pub(super) start: usize,
    /// One for each row.
    pub(super) row_scales: &'o [f32],
    /// Whether what is there is written over, not added to.
    pub(super) is_first: bool,
}
