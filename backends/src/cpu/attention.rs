//! Attention with sinks: over a cache in memory, and its softmax alone with the gradient.

use rayon::prelude::*;

use super::{
    Kernels,
    kv::{ENTRIES, HeadCaches},
    linear::check,
    product::{Panels, Rows, Sums},
    tasks, team,
};
use crate::{
    format::FormatError,
    ops::{AttentionSpec, ScoreView},
};

/// Groups of queries that one thread takes at most at a time, all of one head if there are so many.
const QUERIES: usize = 16;

/// Pieces a thread at least, where there are so many groups of queries.
const PIECES: usize = 4;

/// Entries whose values are added up while they are in the first cache.
const VALUES: usize = 8 * ENTRIES;

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

/// Rotates the heads of some tokens in place: `x` is `[tokens, heads * head_dim]`, `cos` and `sin` `[tokens, head_dim / 2]`;
/// a pair is dimension `i` and `i + head_dim / 2`.
pub fn rotate(x: &mut [f32], head_dim: usize, [cos, sin]: [&[f32]; 2], tokens: usize) {
    let (half, width) = (head_dim / 2, x.len() / tokens.max(1));
    if half == 0 || width == 0 {
        return;
    }
    let tables = cos.chunks_exact(half).zip(sin.chunks_exact(half));
    for (x, (cos, sin)) in x.chunks_exact_mut(width).zip(tables) {
        for head in x.chunks_exact_mut(head_dim) {
            let (first, second) = head.split_at_mut(half);
            for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
}

/// The queries of one token that share a head of keys, and where their result goes.
struct Query<'a> {
    head: usize,
    position: usize,
    /// `[group, head_dim]`
    q: &'a [f32],
    /// One a query.
    sinks: &'a [f32],
    out: &'a mut [f32],
}

/// Attention over a cache that the tokens are already part of: `q` and `out` are `[tokens, q_heads * head_dim]`, and the
/// last token is the cache's last entry.
///
/// Sums run over dimensions and entries in order, with fused multiply-adds, so a query's bits depend on nothing but itself
/// and what it sees.
///
/// # Errors
/// [`FormatError::Length`] if the slices do not fit each other.
pub fn cached_attention(
    kernels: Kernels,
    q: &[f32],
    cache: &HeadCaches,
    sinks: &[f32],
    spec: AttentionSpec,
    out: &mut [f32],
) -> Result<(), FormatError> {
    let (kv_heads, size) = (cache.heads().len(), cache.head_dim());
    let (width, group) = (sinks.len() * size, sinks.len() / kv_heads.max(1));
    check("outputs", q.len(), out.len())?;
    let tokens = q.len().checked_div(width).unwrap_or(0);
    check("values of the queries", tokens * width, q.len())?;
    check("query heads", group * kv_heads, sinks.len())?;
    let before = cache.end().saturating_sub(tokens);
    let mut queries = Vec::with_capacity(tokens * kv_heads);
    for (token, (q, out)) in q.chunks_exact(width).zip(out.chunks_exact_mut(width)).enumerate() {
        let groups =
            q.chunks_exact(group * size).zip(out.chunks_exact_mut(group * size)).zip(sinks.chunks_exact(group));
        let position = before + token;
        queries.extend(groups.enumerate().map(|(head, ((q, out), sinks))| Query { head, position, q, sinks, out }));
    }
    // Those of a head follow each other, while its keys are in the cache.
    queries.sort_by_key(|query| query.head);
    let seen = |query: &Query<'_>| spec.window.unwrap_or(usize::MAX).min(query.position + 1);
    let work = queries.iter().map(|query| 2 * query.q.len() * seen(query)).sum();
    let parallel = tasks::is_parallel(work);
    let most = if parallel { queries.len().div_ceil(PIECES * team::threads()).min(QUERIES) } else { usize::MAX };
    let mut pieces = Vec::new();
    while !queries.is_empty() {
        let rest = queries.split_off(queries.len().min(most));
        pieces.push(std::mem::replace(&mut queries, rest));
    }
    tasks::run(pieces, parallel, |queries| {
        let mut scores = Vec::new();
        queries.into_iter().for_each(|query| attend(kernels, cache, query, spec, &mut scores));
    });
    Ok(())
}

/// One token's queries of one head; `scores` is room for them.
fn attend(kernels: Kernels, cache: &HeadCaches, query: Query<'_>, spec: AttentionSpec, scores: &mut Vec<f32>) {
    let (head, size) = (&cache.heads()[query.head], cache.head_dim());
    let position = query.position - cache.first();
    let seen = spec.window.map_or(0, |window| (position + 1).saturating_sub(window))..position + 1;
    let blocks = seen.start / ENTRIES..seen.end.div_ceil(ENTRIES);
    // Rows of scores whose distance is a power of two would share a set of the first cache.
    let (offset, stride) = (blocks.start * ENTRIES, (blocks.len() + 1) * ENTRIES);
    scores.clear();
    scores.resize(query.sinks.len() * stride, 0.0);
    let numbers = head.keys.numbers(offset * size..blocks.end * ENTRIES * size);
    let keys = Panels { numbers, columns: blocks.len() * ENTRIES, stride: ENTRIES, panel: ENTRIES * size };
    kernels.add_product(Rows { numbers: query.q, stride: size }, keys, size, Sums { numbers: scores, stride });

    let inner = seen.start - offset..seen.end - offset;
    let mut totals = Vec::with_capacity(query.sinks.len());
    for (scores, sink) in scores.chunks_exact_mut(stride).zip(query.sinks) {
        let scores = &mut scores[inner.clone()];
        scale_by(scores, head.keys.scales(), seen.start);
        totals.push(kernels.sink_exponentials(scores, spec.scale, *sink));
        scale_by(scores, head.values.scales(), seen.start);
    }

    query.out.fill(0.0);
    for first in seen.clone().step_by(VALUES) {
        let entries = first..(first + VALUES).min(seen.end);
        let values = Panels::of_rows(head.values.numbers(entries.start * size..entries.end * size), size);
        let shares = Rows { numbers: &scores[first - offset..], stride };
        kernels.add_product(shares, values, entries.len(), Sums { numbers: query.out, stride: size });
    }
    for (out, total) in query.out.chunks_exact_mut(size).zip(totals) {
        out.iter_mut().for_each(|out| *out /= total);
    }
}

fn scale_by(numbers: &mut [f32], scales: Option<&[f32]>, first: usize) {
    if let Some(scales) = scales {
        numbers.iter_mut().zip(&scales[first..]).for_each(|(x, scale)| *x *= scale);
    }
}
