//! Products of t5 rows with one token, without rewriting the rows as t2: there are a fifth fewer bytes to read, and taking
//! five trits out of each nearly keeps up with memory.
//!
//! A byte is `9 * upper + lower`, `upper` three digits and `lower` two; both index tables that fit a register. A digit of 64
//! neighbouring bytes belongs to 64 neighbouring inputs, so one multiply-add takes it whole.

use super::tokens::{QUAD, QUAD_BLOCKS, Quad, Token};
use crate::format::BLOCK;

/// Trits in a byte.
#[cfg(target_arch = "x86_64")]
pub(super) const DIGITS: usize = 5;

/// Bytes that are taken together: a digit of them has as many inputs as a block, and so one scale, or two.
#[cfg(target_arch = "x86_64")]
pub(super) const STEP: usize = BLOCK;

/// Some t5 rows of a plane.
#[derive(Debug, Clone, Copy)]
pub(super) struct T5Rows<'a> {
    /// Words in a row.
    pub(super) words: usize,
    /// Codes, `words` a row.
    pub(super) codes: &'a [u32],
    /// A scale for each block, as in [`T2Rows`](super::linear::T2Rows).
    pub(super) scales: Option<&'a [u8]>,
    /// From the scales of a row to those of the next.
    pub(super) scale_stride: usize,
}

/// One token in the order of its inputs.
#[derive(Debug)]
pub(super) struct Straight<'a> {
    /// The activations; zeros after the last, for what a kernel that takes 64 bytes at a time reads past the end.
    quads: Vec<Quad>,
    /// Sum of each block's activations, padded with zeros to a multiple of [`SUM_LANES`](super::tokens::SUM_LANES).
    pub(super) block_sums: &'a [i16],
}

impl<'a> Straight<'a> {
    pub(super) fn new(token: &Token<'a>) -> Self {
        let mut quads = vec![Quad([0; QUAD]); token.quads.len() + 1];
        for (straight, quad) in quads.iter_mut().zip(token.quads) {
            for (n, run) in straight.0.as_chunks_mut::<16>().0.iter_mut().enumerate() {
                let (block, k) = (n / QUAD_BLOCKS, n % QUAD_BLOCKS);
                run.copy_from_slice(&quad.0[BLOCK * k + 16 * block..][..16]);
            }
        }
        Self { quads, block_sums: token.block_sums }
    }

    /// The activations, in the order of the inputs, and zeros.
    pub(super) fn activations(&self) -> &[i8] {
        bytemuck::cast_slice(&self.quads)
    }
}

impl T5Rows<'_> {
    /// What kernels that load without checks rely on: codes and scales of `rows` rows, and the token's activations.
    ///
    /// # Panics
    /// If something is shorter.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn check(&self, rows: usize, token: &Straight<'_>) {
        let (bytes, sums) = (self.words * 4, token.block_sums.len());
        let last = rows.saturating_sub(1) * self.scale_stride;
        assert!(self.codes.len() >= rows * self.words, "codes of the rows");
        assert!(self.scales.is_none_or(|scales| scales.len() >= last + sums), "scales of the rows");
        assert!(sums.is_multiple_of(super::tokens::SUM_LANES), "sums of whole vectors");
        let read = (DIGITS - 1) * bytes + bytes.next_multiple_of(STEP);
        assert!(token.activations().len() >= read, "activations of a token");
    }
}
