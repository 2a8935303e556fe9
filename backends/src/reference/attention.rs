use std::ops::Range;

use burn::tensor::{Bool, Tensor, TensorData, backend::Backend};

use crate::ops::{AttentionSpec, LayerCache, ScoreView, TernaryBackend};

/// Scores that are held at a time: 64 MiB of `f32`.
const MAX_SCORES: usize = 16 << 20;

/// Softmax over scores: [`sink_softmax`], or a kernel that gives the same.
pub(crate) type Softmax<B> = fn(Tensor<B, 3>, Tensor<B, 1>, ScoreView) -> Tensor<B, 3>;

/// Fewest queries worth a pass of their own under a short window.
const MIN_CHUNK: usize = 64;

/// [`sink_attention`](crate::sink_attention) with Burn's operations.
#[must_use]
pub fn sink_attention<B: Backend>(
    q: Tensor<B, 3>,
    k: Tensor<B, 3>,
    v: Tensor<B, 3>,
    sinks: Tensor<B, 1>,
    spec: AttentionSpec,
) -> Tensor<B, 2> {
    attention_by(q, k, v, sinks, spec, sink_softmax)
}

/// Attention with Burn's matrix products and a softmax to choose.
///
/// The queries of one key head are stacked, so keys and values are never repeated; queries are cut into chunks, so that
/// the scores stay below 16 M numbers, and each chunk takes only the keys that its windows reach.
pub(crate) fn attention_by<B: Backend>(
    q: Tensor<B, 3>,
    k: Tensor<B, 3>,
    v: Tensor<B, 3>,
    sinks: Tensor<B, 1>,
    spec: AttentionSpec,
    softmax: Softmax<B>,
) -> Tensor<B, 2> {
    let [heads, queries, size] = q.dims();
    let [kv_heads, keys, _] = k.dims();
    let group = heads / kv_heads;
    if queries == 0 {
        return Tensor::zeros([0, heads * size], &q.device());
    }
    let q = q.reshape([kv_heads, group, queries, size]);
    let step = chunk_of_queries(heads, queries, keys, spec.window);
    let chunks = (0..queries).step_by(step).map(|start| {
        let chunk = start..(start + step).min(queries);
        let n = chunk.len();
        let seen = seen_keys(&chunk, keys - queries, spec.window);
        let (m, view) = (seen.len(), ScoreView { spec, query: keys - queries + start, key: seen.start });
        let q = q.clone().slice([0..kv_heads, 0..group, chunk, 0..size]).reshape([kv_heads, group * n, size]);
        let k = k.clone().slice([0..kv_heads, seen.clone()]);
        let v = v.clone().slice([0..kv_heads, seen]);
        let shares = softmax(q.matmul(k.transpose()).reshape([heads, n, m]), sinks.clone(), view);
        let mixed = shares.reshape([kv_heads, group * n, m]).matmul(v);
        mixed.reshape([heads, n, size]).swap_dims(0, 1).reshape([n, heads * size])
    });
    Tensor::cat(chunks.collect(), 0)
}

/// [`cached_attention`](crate::cached_attention) by [`sink_attention`](TernaryBackend::sink_attention) over tensors that grow,
/// each sequence by itself.
#[must_use]
pub fn cached_attention<B: TernaryBackend>(
    qkv: [Tensor<B, 2>; 3],
    rope: [Tensor<B, 2>; 2],
    sinks: Tensor<B, 1>,
    scale: f32,
    caches: &mut [&mut LayerCache<B>],
) -> Tensor<B, 2> {
    each_alone(qkv, rope, caches, |qkv, rope, cache| of_sequence(qkv, rope, sinks.clone(), scale, cache))
}

/// What `attention` makes of each sequence's queries, keys and values, cosines and sines, and cache.
pub(crate) fn each_alone<B: Backend>(
    qkv: [Tensor<B, 2>; 3],
    rope: [Tensor<B, 2>; 2],
    caches: &mut [&mut LayerCache<B>],
    mut attention: impl FnMut([Tensor<B, 2>; 3], [Tensor<B, 2>; 2], &mut LayerCache<B>) -> Tensor<B, 2>,
) -> Tensor<B, 2> {
    if let [cache] = caches {
        return attention(qkv, rope, cache);
    }
    let tokens = qkv[0].dims()[0] / caches.len();
    let mixed = caches.iter_mut().enumerate().map(|(sequence, cache)| {
        let rows = sequence * tokens..(sequence + 1) * tokens;
        let part = |all: &Tensor<B, 2>| all.clone().slice_dim(0, rows.clone());
        attention(qkv.each_ref().map(part), rope.each_ref().map(part), cache)
    });
    Tensor::cat(mixed.collect(), 0)
}

fn of_sequence<B: TernaryBackend>(
    [q, k, v]: [Tensor<B, 2>; 3],
    [cos, sin]: [Tensor<B, 2>; 2],
    sinks: Tensor<B, 1>,
    scale: f32,
    cache: &mut LayerCache<B>,
) -> Tensor<B, 2> {
    let size = 2 * cos.dims()[1];
    let heads = |x: Tensor<B, 2>| {
        let [tokens, width] = x.dims();
        x.reshape([tokens, width / size, size]).swap_dims(0, 1)
    };
    let (q, k) = (rotate_heads(heads(q), cos.clone(), sin.clone()), rotate_heads(heads(k), cos, sin));
    let spec = AttentionSpec { scale, window: cache.window() };
    let (keys, values) = cache.append(k, heads(v));
    B::sink_attention(q, keys, values, sinks, spec)
}

/// Rotary position embedding: `x [heads, tokens, head_dim]`, `cos` and `sin` `[tokens, head_dim / 2]`; a pair is dimension
/// `i` and `i + head_dim / 2`.
#[must_use]
pub fn rotate_heads<B: Backend>(x: Tensor<B, 3>, cos: Tensor<B, 2>, sin: Tensor<B, 2>) -> Tensor<B, 3> {
    let half = cos.dims()[1];
    let first = x.clone().slice_dim(2, 0..half);
    let second = x.slice_dim(2, half..2 * half);
    let (cos, sin) = (cos.unsqueeze::<3>(), sin.unsqueeze::<3>());
    Tensor::cat(vec![first.clone() * cos.clone() - second.clone() * sin.clone(), second * cos + first * sin], 2)
}

/// [`sink_softmax`](crate::TernaryBackend::sink_softmax) with Burn's operations.
#[must_use]
pub fn sink_softmax<B: Backend>(scores: Tensor<B, 3>, sinks: Tensor<B, 1>, view: ScoreView) -> Tensor<B, 3> {
    let [heads, n, m] = scores.dims();
    let mut scores = scores * view.spec.scale;
    if let Some(hidden) = hidden_keys(n, m, view, &scores.device()) {
        scores = scores.mask_fill(hidden.reshape([1, n, m]).expand([heads, n, m]), f32::NEG_INFINITY);
    }
    let sinks = sinks.reshape([heads, 1, 1]);
    // The sink only adds to the denominator.
    let top = scores.clone().detach().max_dim(2);
    let top = top.max_pair(sinks.clone().detach().expand([heads, n, 1]));
    let shares = (scores - top.clone()).exp();
    let total = shares.clone().sum_dim(2) + (sinks - top).exp();
    shares / total
}

/// What [`sink_softmax`] says of its arguments: from the shares it gave and the gradient of those, both
/// `[heads, queries, keys]`, the gradients of the scores and of the sinks.
///
/// With `r = sum over keys of share * gradient`: `scale * share * (gradient - r)` for a score, and minus the sum over
/// queries of `(1 - sum of shares) * r` for a sink.
#[must_use]
pub fn sink_softmax_gradient<B: Backend>(
    shares: Tensor<B, 3>,
    gradient: Tensor<B, 3>,
    scale: f32,
) -> (Tensor<B, 3>, Tensor<B, 1>) {
    let heads = shares.dims()[0];
    let mean = (shares.clone() * gradient.clone()).sum_dim(2);
    let sink = shares.clone().sum_dim(2) - 1.0;
    let sinks = (sink * mean.clone()).sum_dim(1).reshape([heads]);
    ((gradient - mean) * shares * scale, sinks)
}

/// How many queries to take at a time.
fn chunk_of_queries(heads: usize, queries: usize, keys: usize, window: Option<usize>) -> usize {
    let within = |keys: usize| (MAX_SCORES / (heads * keys).max(1)).max(1);
    match window {
        // A chunk of n queries sees n + window - 1 keys: chunks of about a window waste at most half of the scores.
        Some(window) if window < keys => {
            let chunk = window.max(MIN_CHUNK).min(queries);
            chunk.min(within((chunk + window).min(keys)))
        }
        _ => queries.min(within(keys)),
    }
}

/// The keys that some query of the chunk sees.
fn seen_keys(chunk: &Range<usize>, before: usize, window: Option<usize>) -> Range<usize> {
    let first = window.map_or(0, |window| (before + chunk.start + 1).saturating_sub(window));
    first..before + chunk.end
}

/// Which keys each query must not see, `[n, m]`; `None` if every query sees all of them.
fn hidden_keys<B: Backend>(n: usize, m: usize, view: ScoreView, device: &B::Device) -> Option<Tensor<B, 2, Bool>> {
    let seen: Vec<_> = (0..n).map(|query| view.seen(query, m)).collect();
    if seen.iter().all(|seen| *seen == (0..m)) {
        return None;
    }
    let mask: Vec<bool> = seen.iter().flat_map(|seen| (0..m).map(|key| !seen.contains(&key))).collect();
    Some(Tensor::from_data(TensorData::new(mask, [n, m]), device))
}
