//! Splitting products over rows among threads.

use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use super::team;

/// Multiply-adds below which a product stays on one thread: waking the others would take longer.
const PARALLEL_WORK: usize = 1 << 20;

/// Pieces a thread, so that a late one does not hold up the rest for long.
const PIECES: usize = 4;

/// Rows below which a piece is not cut.
const MIN_ROWS: usize = 32;

/// Some rows of a product, and where they go.
pub(super) struct Piece<'a> {
    /// First row.
    pub(super) first: usize,
    /// For each token, the outputs of the rows from `first` on: all of the same length, never empty.
    pub(super) out: Vec<&'a mut [f32]>,
}

impl Piece<'_> {
    /// Rows of the piece.
    pub(super) fn rows(&self) -> usize {
        self.out.first().map_or(0, |out| out.len())
    }
}

/// Whether so many multiply-adds are worth more than one thread.
pub(super) fn is_parallel(work: usize) -> bool {
    work >= PARALLEL_WORK && team::threads() > 1
}

/// Cuts `out [tokens, rows]` by rows, into one piece if not `parallel`.
pub(super) fn pieces(out: &mut [f32], rows: usize, parallel: bool) -> Vec<Piece<'_>> {
    if out.is_empty() || rows == 0 {
        return Vec::new();
    }
    let count = if parallel { team::threads() * PIECES } else { 1 };
    let step = rows.div_ceil(count).max(MIN_ROWS).min(rows);
    let empty = |first| Piece { first, out: Vec::with_capacity(out.len() / rows) };
    let mut pieces: Vec<_> = (0..rows).step_by(step).map(empty).collect();
    for token in out.chunks_exact_mut(rows) {
        for (piece, part) in pieces.iter_mut().zip(token.chunks_mut(step)) {
            piece.out.push(part);
        }
    }
    pieces
}

/// Runs every piece of work, on several threads if `parallel`.
pub(super) fn run<T: Send>(work: Vec<T>, parallel: bool, each: impl Fn(T) + Send + Sync) {
    if !parallel {
        return work.into_iter().for_each(each);
    }
    let queue = Mutex::new(work.into_iter());
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    let on_team = team::run(&|| {
        while let Some(piece) = next() {
            each(piece);
        }
    });
    if !on_team {
        let work: Vec<T> = queue.into_inner().unwrap_or_else(PoisonError::into_inner).collect();
        work.into_par_iter().with_max_len(1).for_each(each);
    }
}
