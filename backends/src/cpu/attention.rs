//! The softmax of attention with sinks, and its gradient, over all heads and queries.

use rayon::prelude::*;

use super::Kernels;
use crate::ops::ScoreView;

/// Numbers a task should have at least.
const TASK: usize = 1 << 14;

/// Scores `[heads, queries, keys]` to shares in their place; `sinks` is one number a head.
///
/// Lengths that do not fit each other leave the rest as it is.
pub fn sink_softmax(kernels: Kernels, scores: &mut [f32], sinks: &[f32], [queries, keys]: [usize; 2], view: ScoreView) {
    if keys == 0 || queries == 0 {
        return;
    }
    let rows = scores.par_chunks_exact_mut(keys).with_min_len(TASK.div_ceil(keys));
    rows.enumerate().for_each(|(row, scores)| {
        let Some(sink) = sinks.get(row / queries) else { return };
        let seen = view.seen(row % queries, keys);
        scores[..seen.start].fill(0.0);
        scores[seen.end..].fill(0.0);
        kernels.sink_softmax(&mut scores[seen], view.spec.scale, *sink);
    });
}

/// The gradient of shares `[heads, queries, keys]` to that of the scores, in its place, and that of the sinks.
pub fn sink_softmax_gradient(
    kernels: Kernels,
    shares: &[f32],
    gradient: &mut [f32],
    [queries, keys]: [usize; 2],
    scale: f32,
) -> Vec<f32> {
    if keys == 0 || queries == 0 {
        return Vec::new();
    }
    let heads = shares.par_chunks_exact(keys * queries).zip(gradient.par_chunks_exact_mut(keys * queries));
    let of_head = |(shares, gradient): (&[f32], &mut [f32])| {
        let rows = shares.chunks_exact(keys).zip(gradient.chunks_exact_mut(keys));
        rows.map(|(shares, gradient)| kernels.sink_softmax_gradient(shares, gradient, scale)).sum::<f32>()
    };
    heads.map(of_head).collect()
}
