//! The key-value cache of one layer in memory, changed in place.
//!
//! Entries lie in blocks of [`ENTRIES`], each head on its own, the entry of position `p` always in lane `p % 16` of its
//! block. Keys are transposed, so that the scores of a block are one row of a matrix product:
//!
//! ```text
//! keys    [block][dimension][16 entries]
//! values  [block][16 entries][dimension]
//! ```
//!
//! A sliding layer forgets whole blocks that no window reaches any more.

use half::f16;

use super::product::{Numbers, PANEL};
use crate::ops::KvFormat;

/// Entries in a block.
pub(super) const ENTRIES: usize = PANEL;

/// Keys and values of all heads, oldest first.
#[derive(Debug, Clone)]
pub struct HeadCaches {
    heads: Vec<HeadCache>,
    head_dim: usize,
    /// Position of the first entry kept: a multiple of [`ENTRIES`].
    first: usize,
    /// Position after the last entry.
    end: usize,
}

/// Keys and values of one head.
#[derive(Debug, Clone)]
pub(super) struct HeadCache {
    pub(super) keys: Cells,
    pub(super) values: Cells,
}

/// Numbers of some blocks.
#[derive(Debug)]
pub(super) enum Cells {
    F32(Vec<f32>),
    F16(Vec<f16>),
    /// Codes, and for each entry what a code of 1 stands for.
    Int8(Vec<i8>, Vec<f32>),
}

impl HeadCaches {
    /// An empty cache.
    #[must_use]
    pub fn new(heads: usize, head_dim: usize, format: KvFormat) -> Self {
        let head = HeadCache { keys: Cells::new(format), values: Cells::new(format) };
        Self { heads: vec![head; heads], head_dim, first: 0, end: 0 }
    }

    pub(super) fn heads(&self) -> &[HeadCache] {
        &self.heads
    }

    /// Numbers in a key.
    pub(super) const fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Position of the first entry kept.
    pub(super) const fn first(&self) -> usize {
        self.first
    }

    /// Position of the next entry.
    #[must_use]
    pub const fn end(&self) -> usize {
        self.end
    }

    /// Appends the entry of one token: `key` and `value` are `[heads, head_dim]`. Shorter ones leave zeros.
    pub fn push(&mut self, key: &[f32], value: &[f32]) {
        let (size, lane) = (self.head_dim, self.end % ENTRIES);
        let of_heads = key.chunks_exact(size).zip(value.chunks_exact(size));
        for (head, (key, value)) in self.heads.iter_mut().zip(of_heads) {
            if lane == 0 {
                head.keys.grow(size);
                head.values.grow(size);
            }
            head.keys.write(key, lane, ENTRIES, lane);
            head.values.write(value, lane * size, 1, lane);
        }
        self.end += 1;
    }

    /// Forgets the blocks that lie before position `first`.
    pub fn forget(&mut self, first: usize) {
        let blocks = first.min(self.end).saturating_sub(self.first) / ENTRIES;
        if blocks == 0 {
            return;
        }
        for head in &mut self.heads {
            head.keys.drop_first(blocks, self.head_dim);
            head.values.drop_first(blocks, self.head_dim);
        }
        self.first += blocks * ENTRIES;
    }

    /// Forgets the entries from position `end` on.
    pub fn truncate(&mut self, end: usize) {
        self.end = end.clamp(self.first, self.end);
        let blocks = (self.end - self.first).div_ceil(ENTRIES);
        for head in &mut self.heads {
            head.keys.keep(blocks, self.head_dim);
            head.values.keep(blocks, self.head_dim);
        }
    }
}

impl Clone for Cells {
    /// A copy is made to be continued, so it has room for some blocks: else its next entry would move all of them.
    fn clone(&self) -> Self {
        fn roomy<T: Copy>(cells: &[T]) -> Vec<T> {
            let mut copy = Vec::with_capacity(cells.len() + (cells.len() / 8).max(1 << 14));
            copy.extend_from_slice(cells);
            copy
        }
        match self {
            Self::F32(cells) => Self::F32(roomy(cells)),
            Self::F16(cells) => Self::F16(roomy(cells)),
            Self::Int8(cells, scales) => Self::Int8(roomy(cells), roomy(scales)),
        }
    }
}

impl Cells {
    fn new(format: KvFormat) -> Self {
        match format {
            KvFormat::F32 => Self::F32(Vec::new()),
            KvFormat::F16 => Self::F16(Vec::new()),
            KvFormat::Int8 => Self::Int8(Vec::new(), Vec::new()),
        }
    }

    fn grow(&mut self, size: usize) {
        match self {
            Self::F32(cells) => cells.resize(cells.len() + ENTRIES * size, 0.0),
            Self::F16(cells) => cells.resize(cells.len() + ENTRIES * size, f16::ZERO),
            Self::Int8(cells, scales) => {
                cells.resize(cells.len() + ENTRIES * size, 0);
                scales.resize(scales.len() + ENTRIES, 0.0);
            }
        }
    }

    fn drop_first(&mut self, blocks: usize, size: usize) {
        let count = blocks * ENTRIES * size;
        match self {
            Self::F32(cells) => drop(cells.drain(..count)),
            Self::F16(cells) => drop(cells.drain(..count)),
            Self::Int8(cells, scales) => {
                cells.drain(..count);
                scales.drain(..blocks * ENTRIES);
            }
        }
    }

    fn keep(&mut self, blocks: usize, size: usize) {
        let count = blocks * ENTRIES * size;
        match self {
            Self::F32(cells) => cells.truncate(count),
            Self::F16(cells) => cells.truncate(count),
            Self::Int8(cells, scales) => {
                cells.truncate(count);
                scales.truncate(blocks * ENTRIES);
            }
        }
    }

    /// Writes an entry into the last block, `step` apart from `start` on; `lane` is the entry's number in the block.
    fn write(&mut self, entry: &[f32], start: usize, step: usize, lane: usize) {
        fn put<T>(cells: &mut [T], block: usize, start: usize, step: usize, values: impl Iterator<Item = T>) {
            let last = cells.len() - block;
            cells[last + start..].iter_mut().step_by(step).zip(values).for_each(|(cell, value)| *cell = value);
        }
        let block = ENTRIES * entry.len();
        match self {
            Self::F32(cells) => put(cells, block, start, step, entry.iter().copied()),
            Self::F16(cells) => put(cells, block, start, step, entry.iter().map(|x| f16::from_f32(*x))),
            Self::Int8(cells, scales) => {
                // NaN becomes the scale, and with it the whole entry.
                let largest = entry.iter().fold(0.0f32, |a, x| if x.abs() > a || x.is_nan() { x.abs() } else { a });
                let scale = largest / 127.0;
                let code = |x: &f32| if scale > 0.0 { (x / scale).round_ties_even() as i8 } else { 0 };
                put(cells, block, start, step, entry.iter().map(code));
                let last = scales.len() - ENTRIES;
                scales[last + lane] = scale;
            }
        }
    }

    /// Some of the numbers, without their entries' scales.
    pub(super) fn numbers(&self, cells: std::ops::Range<usize>) -> Numbers<'_> {
        match self {
            Self::F32(all) => Numbers::F32(&all[cells]),
            Self::F16(all) => Numbers::F16(&all[cells]),
            Self::Int8(all, _) => Numbers::Int8(&all[cells]),
        }
    }

    /// The scale of every entry, where they have one.
    pub(super) fn scales(&self) -> Option<&[f32]> {
        match self {
            Self::Int8(_, scales) => Some(scales),
            _ => None,
        }
    }
}
