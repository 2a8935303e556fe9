use std::ops::Range;

use burn::tensor::{Bool, Tensor, TensorData, backend::Backend};

use crate::ops::AttentionSpec;

/// Scores that are held at a time: 64 MiB of `f32`.
const MAX_SCORES: usize = 16 << 20;

/// Fewest queries worth a pass of their own under a short window.
const MIN_CHUNK: usize = 64;

/// [`sink_attention`](crate::sink_attention) with Burn's operations.
///
/// The queries of one key head are stacked, so keys and values are never repeated; queries are cut into chunks, so that
/// the scores stay below 16 M numbers, and each chunk takes only the keys that its windows reach.
#[must_use]
pub fn sink_attention<B: Backend>(
    q: Tensor<B, 3>,
    k: Tensor<B, 3>,
    v: Tensor<B, 3>,
    sinks: Tensor<B, 1>,
    spec: AttentionSpec,
) -> Tensor<B, 2> {
    let [heads, queries, size] = q.dims();
    let [kv_heads, keys, _] = k.dims();
    let group = heads / kv_heads;
    if queries == 0 {
        return Tensor::zeros([0, heads * size], &q.device());
    }
    let q = q.reshape([kv_heads, group, queries, size]);
    let sinks = sinks.reshape([kv_heads, group, 1, 1]);
    let step = chunk_of_queries(heads, queries, keys, spec.window);
    let chunks = (0..queries).step_by(step).map(|start| {
        let chunk = start..(start + step).min(queries);
        let seen = seen_keys(&chunk, keys - queries, spec.window);
        let q = q.clone().slice([0..kv_heads, 0..group, chunk.clone(), 0..size]);
        let k = k.clone().slice([0..kv_heads, seen.clone()]);
        let v = v.clone().slice([0..kv_heads, seen.clone()]);
        let hidden = hidden_keys(&chunk, &seen, keys - queries, spec.window, &q.device());
        attend(q, k, v, sinks.clone(), hidden, spec.scale)
    });
    Tensor::cat(chunks.collect(), 0)
}

/// One chunk: `q [kv_heads, group, n, d]`, `k` and `v` `[kv_heads, m, d]`, to `[n, heads * d]`.
fn attend<B: Backend>(
    q: Tensor<B, 4>,
    k: Tensor<B, 3>,
    v: Tensor<B, 3>,
    sinks: Tensor<B, 4>,
    hidden: Option<Tensor<B, 2, Bool>>,
    scale: f32,
) -> Tensor<B, 2> {
    let [kv_heads, group, n, size] = q.dims();
    let m = k.dims()[1];
    let scores = q.reshape([kv_heads, group * n, size]).matmul(k.transpose()) * scale;
    let mut scores = scores.reshape([kv_heads, group, n, m]);
    if let Some(hidden) = hidden {
        let hidden = hidden.reshape([1, 1, n, m]).expand([kv_heads, group, n, m]);
        scores = scores.mask_fill(hidden, f32::NEG_INFINITY);
    }
    // The softmax over the scores and the sink; the sink only adds to the denominator.
    let top = scores.clone().detach().max_dim(3);
    let top = top.max_pair(sinks.clone().detach().expand([kv_heads, group, n, 1]));
    let shares = (scores - top.clone()).exp();
    let total = shares.clone().sum_dim(3) + (sinks - top).exp();
    let mixed = shares.reshape([kv_heads, group * n, m]).matmul(v);
    let mixed = mixed.reshape([kv_heads, group, n, size]) / total;
    mixed.reshape([kv_heads * group, n, size]).swap_dims(0, 1).reshape([n, kv_heads * group * size])
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

/// Which of those keys each query must not see, `[n, m]`; `None` if every query sees all of them.
fn hidden_keys<B: Backend>(
    chunk: &Range<usize>,
    seen: &Range<usize>,
    before: usize,
    window: Option<usize>,
    device: &B::Device,
) -> Option<Tensor<B, 2, Bool>> {
    if chunk.len() == 1 {
        return None;
    }
    let hides = |query: usize, key: usize| {
        let position = before + query;
        key > position || window.is_some_and(|window| key + window <= position)
    };
    let mask: Vec<bool> = chunk.clone().flat_map(|query| seen.clone().map(move |key| hides(query, key))).collect();
    Some(Tensor::from_data(TensorData::new(mask, [chunk.len(), seen.len()]), device))
}
