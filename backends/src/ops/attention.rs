use std::ops::Range;

use burn::tensor::Tensor;

use super::{LayerCache, TernaryBackend, restore, single, timed};

/// How queries see keys in [`sink_attention`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionSpec {
    /// What scores are multiplied with before the softmax: 1 / sqrt(head size) in gpt-oss.
    pub scale: f32,
    /// How many positions a query sees, itself included; `None` for all that came before.
    pub window: Option<usize>,
}

/// Which queries and keys a block of scores is of.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScoreView {
    /// How queries see keys.
    pub spec: AttentionSpec,
    /// Position of the first query.
    pub query: usize,
    /// Position of the first key.
    pub key: usize,
}

impl ScoreView {
    /// The keys of the block, of `keys` there are, that the block's query number `query` sees.
    #[must_use]
    pub fn seen(&self, query: usize, keys: usize) -> Range<usize> {
        let position = self.query + query;
        let end = (position + 1).saturating_sub(self.key).min(keys);
        let start = self.spec.window.map_or(0, |window| (position + 1).saturating_sub(window + self.key));
        start.min(end)..end
    }
}

/// Grouped-query attention with sinks, causal, with an optional sliding window: `[T, q_heads * d]`.
///
/// `q` is `[q_heads, T, d]`, `k` and `v` are `[kv_heads, L, d]` with `L >= T`, `sinks` is `[q_heads]`. Query `i` stands
/// at position `p = L - T + i` and sees the keys `j <= p`, with a window only those with `j > p - window`. Query head `h`
/// uses key head `h / (q_heads / kv_heads)`. The softmax runs over the scores and one more, the head's sink, whose share
/// is then dropped (gpt-oss model card, section 2.2): a head can attend to nothing.
///
/// # Panics
/// If shapes do not fit each other, or `window` is 0.
#[must_use]
pub fn sink_attention<B: TernaryBackend>(
    q: Tensor<B, 3>,
    k: Tensor<B, 3>,
    v: Tensor<B, 3>,
    sinks: Tensor<B, 1>,
    spec: AttentionSpec,
) -> Tensor<B, 2> {
    let [q_heads, queries, size] = q.dims();
    let [kv_heads, keys, _] = k.dims();
    assert!(kv_heads > 0 && q_heads.is_multiple_of(kv_heads), "{q_heads} query heads on {kv_heads} key heads");
    assert_eq!(k.dims(), [kv_heads, keys, size], "shape of the keys");
    assert_eq!(v.dims(), [kv_heads, keys, size], "shape of the values");
    assert_eq!(sinks.dims(), [q_heads], "one sink a query head");
    assert!(keys >= queries, "{queries} queries at the end of {keys} keys");
    assert!(spec.window != Some(0), "a window includes the query's own position");
    let dtype = q.dtype();
    restore(timed(|| B::sink_attention(single(q), single(k), single(v), single(sinks), spec)), dtype)
}

/// [`sink_attention`] of new tokens over caches that take them in: `[tokens, q_heads * head_dim]`. Tokens are as many of each
/// sequence, one sequence after the other, and each sequence has its cache.
///
/// `qkv` are the new tokens' queries `[tokens, q_heads * head_dim]`, keys and values `[tokens, kv_heads * head_dim]`, one head
/// after the other; `rope` the cosines and sines of their positions, `[tokens, head_dim / 2]`. Queries and keys are rotated:
/// a pair is dimension `i` and `i + head_dim / 2` of a head. The window is the caches'. What a query gives does not
/// depend on how many tokens came with it.
///
/// # Panics
/// If shapes do not fit each other, there is no cache, caches have different windows, or they do not share the tokens evenly.
#[must_use]
pub fn cached_attention<B: TernaryBackend>(
    qkv: [Tensor<B, 2>; 3],
    rope: [Tensor<B, 2>; 2],
    sinks: Tensor<B, 1>,
    scale: f32,
    caches: &mut [&mut LayerCache<B>],
) -> Tensor<B, 2> {
    let ([tokens, half], heads) = (rope[0].dims(), sinks.dims()[0]);
    let ([q, k, v], size) = (qkv.each_ref().map(Tensor::dims), 2 * half);
    assert_eq!(q, [tokens, heads * size], "queries of {heads} heads of {size}");
    assert!(k == v && k[0] == tokens && k[1] > 0 && k[1].is_multiple_of(size), "keys {k:?} and values {v:?}");
    assert!((heads * size).is_multiple_of(k[1]), "{heads} query heads on {} key heads", k[1] / size);
    assert_eq!(rope[1].dims(), [tokens, half], "sines of the positions");
    let sequences = caches.len();
    assert!(sequences > 0 && tokens.is_multiple_of(sequences), "{tokens} tokens of {sequences} sequences");
    assert!(caches.iter().all(|cache| cache.window() == caches[0].window()), "caches of one layer");
    let dtype = qkv[0].dtype();
    restore(timed(|| B::cached_attention(qkv.map(single), rope.map(single), single(sinks), scale, caches)), dtype)
}
