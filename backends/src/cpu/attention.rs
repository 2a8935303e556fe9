//! Attention with sinks: over a cache in memory, and its softmax alone with the gradient.
//!
//! ```
//! use ternoss_backends::{AttentionSpec, KvFormat, cpu::{HeadCaches, Kernels, attention::cached_attention}};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // One head of two dimensions that has seen two tokens, with keys that suit the query alike.
//! let mut cache = HeadCaches::new(1, 2, KvFormat::F32);
//! cache.push(&[1.0, 0.0], &[4.0, 0.0]);
//! cache.push(&[1.0, 9.0], &[0.0, 8.0]);
//! // A sink of such a score as well takes a third of the attention, and adds nothing.
//! let (query, sink, mut out) = ([3.0, 0.0], [3.0], [0.0; 2]);
//! let spec = AttentionSpec { scale: 1.0, window: None };
//! cached_attention(Kernels::detect(), &query, &[&cache], &sink, spec, &mut out)?;
//! assert!((out[0] - 4.0 / 3.0).abs() < 1e-6 && (out[1] - 8.0 / 3.0).abs() < 1e-6);
//! # Ok(()) }
//! ```

use std::ops::Range;

use rayon::prelude::*;

use super::{
    Kernels,
    kv::{ENTRIES, HeadCache, HeadCaches},
    linear::check,
    math::exp,
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

/// Entries whose scores are held at a time, in the first cache.
const CHUNK: usize = 64 * ENTRIES;

/// Entries whose values are added up while they are in the first cache.
const VALUES: usize = 8 * ENTRIES;

/// From the scores of a query to those of the next: a power of two would make them share a set of the first cache.
const STRIDE: usize = CHUNK + ENTRIES;

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
    sequence: usize,
    head: usize,
    position: usize,
    /// `[group, head_dim]`
    q: &'a [f32],
    /// One a query.
    sinks: &'a [f32],
    out: &'a mut [f32],
}

/// Attention over caches that the tokens are already part of: `q` and `out` are `[tokens, q_heads * head_dim]`, as many tokens
/// of each sequence, one sequence after the other, and a sequence's last token is the last entry of its cache.
///
/// Sums run over dimensions and entries in order, with fused multiply-adds, so a query's bits depend on nothing but itself
/// and what it sees.
///
/// # Errors
/// [`FormatError::Length`] if the slices do not fit each other, or the caches do not have the same heads or not the tokens.
pub fn cached_attention(
    kernels: Kernels,
    q: &[f32],
    caches: &[&HeadCaches],
    sinks: &[f32],
    spec: AttentionSpec,
    out: &mut [f32],
) -> Result<(), FormatError> {
    check("outputs", q.len(), out.len())?;
    let Some(first) = caches.first() else { return check("values of the queries", 0, q.len()) };
    let (kv_heads, size) = (first.heads().len(), first.head_dim());
    let (width, group) = (sinks.len() * size, sinks.len() / kv_heads.max(1));
    let tokens = q.len().checked_div(width * caches.len()).unwrap_or(0);
    check("values of the queries", tokens * width * caches.len(), q.len())?;
    check("query heads", group * kv_heads, sinks.len())?;
    for cache in caches {
        check("heads of a cache", kv_heads, cache.heads().len())?;
        check("numbers of a head", size, cache.head_dim())?;
        // Those that a window has forgotten may be missing, but not the new ones.
        let kept = cache.end() - cache.first();
        check("new entries of a cache", tokens, tokens.min(kept))?;
    }
    let mut queries = Vec::with_capacity(tokens * kv_heads * caches.len());
    for (token, (q, out)) in q.chunks_exact(width).zip(out.chunks_exact_mut(width)).enumerate() {
        let groups =
            q.chunks_exact(group * size).zip(out.chunks_exact_mut(group * size)).zip(sinks.chunks_exact(group));
        let sequence = token / tokens;
        let position = caches[sequence].end() - tokens + token % tokens;
        let query = |(head, ((q, out), sinks))| Query { sequence, head, position, q, sinks, out };
        queries.extend(groups.enumerate().map(query));
    }
    // Those of a head follow each other, while its keys are in the cache.
    queries.sort_by_key(|query| (query.sequence, query.head));
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
        let mut scores = vec![0.0; group * STRIDE];
        queries.into_iter().for_each(|query| attend(kernels, caches[query.sequence], query, spec, &mut scores));
    });
    Ok(())
}

/// One token's queries of one head; `scores [group, STRIDE]` is room for a chunk of them.
///
/// The softmax is carried along from chunk to chunk, as in flash attention (Dao et al., arXiv 2205.14135): numerators are
/// relative to the largest score so far, and what was summed before shrinks when a larger one comes. The first is the sink.
/// Chunks start at the block of the first entry that is seen, so they are the query's own.
fn attend(kernels: Kernels, cache: &HeadCaches, query: Query<'_>, spec: AttentionSpec, scores: &mut [f32]) {
    let (head, size) = (&cache.heads()[query.head], cache.head_dim());
    let position = query.position - cache.first();
    let seen = spec.window.map_or(0, |window| (position + 1).saturating_sub(window))..position + 1;
    let mut states: Vec<[f32; 2]> = query.sinks.iter().map(|sink| [*sink, 1.0]).collect();
    query.out.fill(0.0);
    for first in (seen.start / ENTRIES * ENTRIES..seen.end).step_by(CHUNK) {
        let entries = seen.start.max(first)..seen.end.min(first + CHUNK);
        key_scores(kernels, head, query.q, size, first..entries.end, scores);
        let of_queries = scores.chunks_exact_mut(STRIDE).zip(&mut states).zip(query.out.chunks_exact_mut(size));
        for ((scores, [top, total]), out) in of_queries {
            let scores = &mut scores[entries.start - first..entries.end - first];
            scale_by(scores, head.keys.scales(), entries.start);
            let [larger, sum] = kernels.exponentials(scores, spec.scale, *top);
            scale_by(scores, head.values.scales(), entries.start);
            let shrink = exp(*top - larger);
            (*top, *total) = (larger, *total * shrink + sum);
            out.iter_mut().for_each(|out| *out *= shrink);
        }
        for some in entries.clone().step_by(VALUES) {
            let some = some..(some + VALUES).min(entries.end);
            let values = Panels::of_rows(head.values.numbers(some.start * size..some.end * size), size);
            let shares = Rows { numbers: &scores[some.start - first..], stride: STRIDE };
            kernels.add_product(shares, values, some.len(), Sums { numbers: query.out, stride: size });
        }
    }
    for (out, [_, total]) in query.out.chunks_exact_mut(size).zip(states) {
        out.iter_mut().for_each(|out| *out /= total);
    }
}

/// The scores of some entries, from the first one of a block on, `scores [group, STRIDE]`.
fn key_scores(kernels: Kernels, head: &HeadCache, q: &[f32], size: usize, entries: Range<usize>, scores: &mut [f32]) {
    let columns = entries.len().next_multiple_of(ENTRIES);
    let numbers = head.keys.numbers(entries.start * size..(entries.start + columns) * size);
    let keys = Panels { numbers, columns, stride: ENTRIES, panel: ENTRIES * size };
    scores.chunks_exact_mut(STRIDE).for_each(|scores| scores[..columns].fill(0.0));
    kernels.add_product(Rows { numbers: q, stride: size }, keys, size, Sums { numbers: scores, stride: STRIDE });
}

fn scale_by(numbers: &mut [f32], scales: Option<&[f32]>, first: usize) {
    if let Some(scales) = scales {
        numbers.iter_mut().zip(&scales[first..]).for_each(|(x, scale)| *x *= scale);
    }
}
