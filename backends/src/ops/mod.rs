//! The operations, and the trait a Burn backend implements to run them.
//!
//! Call the free functions: they take and return Burn tensors of any float type, check shapes and hand `F32` to the
//! backend. Shapes that do not fit panic, as they do in Burn's own operations; nothing in the *values* of a tensor does.

#[cfg_attr(not(any(feature = "flex", feature = "ndarray")), allow(dead_code, reason = "heads need a host backend"))]
mod cache;
mod experts;
mod stopwatch;
mod stored;

use std::ops::Range;

use burn::tensor::{DType, Int, Tensor, backend::Backend};

pub use cache::{KvFormat, LayerCache};
pub use experts::{ClampedSwiGlu, TernaryExperts};
pub use stopwatch::time_in_operations;
pub use stored::{StoredFloat, StoredMatrix};

pub use crate::cpu::screen::Screen;

use crate::{
    format::{Rotation, TernaryWeight},
    reference,
};
use stopwatch::timed;

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

/// A Burn backend that can run the operations of this crate.
///
/// Every function has a default that computes the same with Burn's own operations ([`mod@reference`]), so
/// an empty `impl` makes any backend work; a backend overrides what it has a kernel for. Float arguments are `F32`,
/// shapes have been checked.
pub trait TernaryBackend: Backend {
    /// Whether a token's bits never depend on what else is in a batch, in all operations of this trait.
    const BATCH_INVARIANT: bool = false;

    /// See [`ternary_linear`]; `x` is `[tokens, in_features]`.
    #[must_use]
    fn ternary_linear(x: Tensor<Self, 2>, weight: &TernaryWeight<Self>, matrix: usize) -> Tensor<Self, 2> {
        reference::ternary_linear(x, weight, matrix)
    }

    /// See [`ternary_linears`].
    #[must_use]
    fn ternary_linears(x: Tensor<Self, 2>, linears: &[BiasedWeight<Self>]) -> Vec<Tensor<Self, 2>> {
        let product = |linear: &BiasedWeight<Self>| {
            let y = Self::ternary_linear(x.clone(), &linear.weight, 0);
            match &linear.bias {
                Some(bias) => y + bias.clone().unsqueeze(),
                None => y,
            }
        };
        linears.iter().map(product).collect()
    }

    /// See [`rms_norm`].
    #[must_use]
    fn rms_norm(x: Tensor<Self, 2>, gamma: Tensor<Self, 1>, epsilon: f64) -> Tensor<Self, 2> {
        reference::rms_norm(x, gamma, epsilon)
    }

    /// See [`route`].
    #[must_use]
    fn route(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 2>,
        bias: Tensor<Self, 1>,
        k: usize,
    ) -> (Tensor<Self, 2, Int>, Tensor<Self, 2>) {
        reference::route(x, weight, bias, k)
    }

    /// See [`ternary_experts`].
    #[must_use]
    fn ternary_experts(
        x: Tensor<Self, 2>,
        chosen: Tensor<Self, 2, Int>,
        weights: Tensor<Self, 2>,
        experts: &TernaryExperts<Self>,
    ) -> Tensor<Self, 2> {
        reference::ternary_experts(x, chosen, weights, experts)
    }

    /// See [`stored_linear`].
    #[must_use]
    fn stored_linear(x: Tensor<Self, 2>, matrix: &StoredMatrix<Self>) -> Tensor<Self, 2> {
        reference::stored_linear(x, matrix)
    }

    /// See [`stored_linear_at`].
    #[must_use]
    fn stored_linear_at(
        x: Tensor<Self, 2>,
        matrix: &StoredMatrix<Self>,
        rows: Tensor<Self, 1, Int>,
    ) -> Tensor<Self, 2> {
        reference::stored_linear_at(x, matrix, rows)
    }

    /// See [`screen()`]: none, unless the backend can read the matrix where it lies.
    #[must_use]
    fn screen(_matrix: &StoredMatrix<Self>, _pause: &mut dyn FnMut()) -> Option<Screen> {
        None
    }

    /// See [`screen_bounds`].
    #[must_use]
    fn screen_bounds(x: Tensor<Self, 2>, screen: &Screen) -> Tensor<Self, 2> {
        reference::screen_bounds(x, screen)
    }

    /// See [`stored_rows`].
    #[must_use]
    fn stored_rows(matrix: &StoredMatrix<Self>, ids: Tensor<Self, 1, Int>) -> Tensor<Self, 2> {
        reference::stored_rows(matrix, ids)
    }

    /// See [`ternary_rows`].
    #[must_use]
    fn ternary_rows(weight: &TernaryWeight<Self>, matrix: usize, ids: Tensor<Self, 1, Int>) -> Tensor<Self, 2> {
        reference::ternary_rows(weight, matrix, ids)
    }

    /// See [`sink_attention`].
    #[must_use]
    fn sink_attention(
        q: Tensor<Self, 3>,
        k: Tensor<Self, 3>,
        v: Tensor<Self, 3>,
        sinks: Tensor<Self, 1>,
        spec: AttentionSpec,
    ) -> Tensor<Self, 2> {
        reference::attention_by(q, k, v, sinks, spec, Self::sink_softmax)
    }

    /// See [`cached_attention`].
    #[must_use]
    fn cached_attention(
        qkv: [Tensor<Self, 2>; 3],
        rope: [Tensor<Self, 2>; 2],
        sinks: Tensor<Self, 1>,
        scale: f32,
        cache: &mut LayerCache<Self>,
    ) -> Tensor<Self, 2> {
        reference::cached_attention(qkv, rope, sinks, scale, cache)
    }

    /// Runs a long piece of work whose operations follow each other closely. Backends that compute on this machine's
    /// processor keep their threads awake meanwhile.
    fn session<R>(work: impl FnOnce() -> R) -> R {
        work()
    }

    /// The softmax of [`sink_attention`]: `scores [heads, queries, keys]`, not scaled yet, and `sinks [heads]` to shares
    /// `[heads, queries, keys]`, zero for keys that a query does not see. The sink's own share is what is missing to 1.
    #[must_use]
    fn sink_softmax(scores: Tensor<Self, 3>, sinks: Tensor<Self, 1>, view: ScoreView) -> Tensor<Self, 3> {
        reference::sink_softmax(scores, sinks, view)
    }

    /// The gradients of [`sink_softmax`](Self::sink_softmax): see [`reference::sink_softmax_gradient`].
    #[must_use]
    fn sink_softmax_gradient(
        shares: Tensor<Self, 3>,
        gradient: Tensor<Self, 3>,
        scale: f32,
    ) -> (Tensor<Self, 3>, Tensor<Self, 1>) {
        reference::sink_softmax_gradient(shares, gradient, scale)
    }

    /// See [`round_activations`].
    #[must_use]
    fn round_activations(x: Tensor<Self, 2>, rotation: Option<Rotation>) -> Tensor<Self, 2> {
        reference::round_activations(x, rotation)
    }

    /// See [`reference::rotate_back`].
    #[must_use]
    fn rotate_back(y: Tensor<Self, 2>, rotation: Rotation) -> Tensor<Self, 2> {
        reference::rotate_back(y, rotation)
    }
}

/// Activations as a ternary kernel sees them: `x [tokens, in_features]` rotated where there is a rotation, and rounded to
/// int8 as in [`ternary_linear`], back in floats: `q * s`. The rounding counts as the identity for gradients.
#[must_use]
pub fn round_activations<B: TernaryBackend>(x: Tensor<B, 2>, rotation: Option<Rotation>) -> Tensor<B, 2> {
    let dtype = x.dtype();
    restore(timed(|| B::round_activations(single(x), rotation)), dtype)
}

/// A ternary linear layer without bias: `x [.., in_features]` times matrix `matrix` of `weight`, `[.., rows]`.
///
/// Each token (a vector of `in_features`) is rounded to int8 with one scale, as in BitNet b1.58 (Ma et al. 2024):
/// `s = max|x| / 127`, `q = clamp(round(x / s), -127, 127)` with halves to even, all zeros if `s` is zero; where the layout
/// has a [`Rotation`], `x` is rotated before. Then
///
/// ```text
/// total[p, r] = sum over groups g of group_scale[p, r, g] * dot(q, trits[p, r])_g        an exact i32
/// y[r]        = sum over planes p, in order, of  f32(total[p, r]) * (row_scale[p, r] * s)
/// ```
///
/// in `f32`, so the CPU kernels give the same bits on every instruction set, for every number of threads and whatever
/// else is in the batch. A token with a NaN or an infinity gives NaN in its whole output row.
///
/// Gradients: the rounding counts as the identity for `x`; the row scales get theirs; codes and group scales have none.
///
/// # Panics
/// If the last dimension of `x` is not `in_features`, or `matrix` is not below the layout's `matrices`.
#[must_use]
pub fn ternary_linear<B: TernaryBackend, const D: usize>(
    x: Tensor<B, D>,
    weight: &TernaryWeight<B>,
    matrix: usize,
) -> Tensor<B, D> {
    let mut shape = x.dims();
    let layout = weight.layout;
    assert!(D > 0 && shape[D - 1] == layout.in_features, "x of shape {shape:?} times weights of {layout:?}");
    assert!(matrix < layout.matrices, "matrix {matrix} of {layout:?}");
    let tokens = shape[..D - 1].iter().product::<usize>();
    let dtype = x.dtype();
    let y = timed(|| B::ternary_linear(single(x.reshape([tokens, layout.in_features])), weight, matrix));
    shape[D - 1] = layout.rows;
    restore(y.reshape(shape), dtype)
}

/// A ternary matrix with its bias `[rows]`.
#[derive(Debug, Clone)]
pub struct BiasedWeight<B: Backend> {
    /// The matrix: the first one of the weight.
    pub weight: TernaryWeight<B>,
    /// Added to the product.
    pub bias: Option<Tensor<B, 1>>,
}

/// Ternary linear layers that share their input: `x [tokens, in_features]` times each matrix, plus its bias,
/// `[tokens, rows]` each. As [`ternary_linear`] for each of them, but `x` is rounded once and the products share the threads.
///
/// # Panics
/// If the last dimension of `x` is not `in_features` of each, or a bias does not have `rows` numbers.
#[must_use]
pub fn ternary_linears<B: TernaryBackend>(x: Tensor<B, 2>, linears: &[BiasedWeight<B>]) -> Vec<Tensor<B, 2>> {
    for BiasedWeight { weight, bias } in linears {
        let layout = weight.layout;
        assert!(x.dims()[1] == layout.in_features, "x of shape {:?} times weights of {layout:?}", x.dims());
        assert!(bias.as_ref().is_none_or(|bias| bias.dims() == [layout.rows]), "a bias for {layout:?}");
    }
    let dtype = x.dtype();
    timed(|| B::ternary_linears(single(x), linears)).into_iter().map(|y| restore(y, dtype)).collect()
}

/// Root mean square norm of tokens `x [tokens, hidden]`: `x / sqrt(mean(x^2) + epsilon) * gamma` (Zhang and Sennrich,
/// arXiv 1910.07467), in `F32`.
///
/// # Panics
/// If `gamma` does not have `hidden` numbers.
#[must_use]
pub fn rms_norm<B: TernaryBackend>(x: Tensor<B, 2>, gamma: Tensor<B, 1>, epsilon: f64) -> Tensor<B, 2> {
    assert_eq!(x.dims()[1..], gamma.dims(), "width of x and of the norm");
    let dtype = x.dtype();
    restore(timed(|| B::rms_norm(single(x), single(gamma), epsilon)), dtype)
}

/// Which experts tokens go to: `x [tokens, hidden]` times `weight [hidden, experts]` plus `bias [experts]`, and of each
/// token's scores the `k` largest, best first: their numbers and the softmax over them, each `[tokens, k]`
/// (`GptOssTopKRouter` of transformers).
///
/// # Panics
/// If shapes do not fit each other.
#[must_use]
pub fn route<B: TernaryBackend>(
    x: Tensor<B, 2>,
    weight: Tensor<B, 2>,
    bias: Tensor<B, 1>,
    k: usize,
) -> (Tensor<B, 2, Int>, Tensor<B, 2>) {
    let [hidden, experts] = weight.dims();
    assert_eq!(x.dims()[1], hidden, "width of x and of the router");
    assert_eq!(bias.dims(), [experts], "one bias an expert");
    assert!(k <= experts, "{k} of {experts} experts");
    let dtype = x.dtype();
    let (chosen, weights) = timed(|| B::route(single(x), single(weight), single(bias), k));
    (chosen, restore(weights, dtype))
}

/// The routed feed-forward block: `x [tokens, hidden]` through the experts that each token chose, `[tokens, hidden]`.
///
/// `chosen` and `weights` are `[tokens, k]`: for each token the experts it goes to and what their outputs count.
///
/// ```text
/// y[t] = sum over j, in order, of  weights[t, j] * (down_e(act(gate_up_e(x[t]) + gate_up_bias_e)) + down_bias_e),   e = chosen[t, j]
/// ```
///
/// where `gate_up_e` and `down_e` are [`ternary_linear`] with matrix `e`. Tokens are gathered by expert, so that each
/// weight row is read once for the whole batch, and experts that nobody chose are never touched: their pages stay on disk.
/// An index that is no expert makes that token's whole output row NaN.
///
/// # Panics
/// If shapes do not fit each other.
#[must_use]
pub fn ternary_experts<B: TernaryBackend>(
    x: Tensor<B, 2>,
    chosen: Tensor<B, 2, Int>,
    weights: Tensor<B, 2>,
    experts: &TernaryExperts<B>,
) -> Tensor<B, 2> {
    let [tokens, hidden] = x.dims();
    assert_eq!(hidden, experts.hidden(), "width of x and of the experts");
    assert_eq!(chosen.dims(), weights.dims(), "chosen experts and their weights");
    assert_eq!(chosen.dims()[0], tokens, "tokens in x and in the chosen experts");
    let dtype = x.dtype();
    restore(timed(|| B::ternary_experts(single(x), chosen, single(weights), experts)), dtype)
}

/// A linear layer whose matrix is kept as it is stored (bf16, f16 or f32): `x [tokens, columns]`, `[tokens, rows]`.
///
/// Arithmetic is `f32` with fused multiply-adds. On the CPU kernels the order of the sums is fixed (see
/// [`cpu::stored`](crate::cpu::stored)), so bits do not depend on threads, instruction set or batch. The matrix is never
/// converted as a whole. Gradients flow to `x`.
///
/// # Panics
/// If the width of `x` is not the matrix's number of columns.
#[must_use]
pub fn stored_linear<B: TernaryBackend>(x: Tensor<B, 2>, matrix: &StoredMatrix<B>) -> Tensor<B, 2> {
    assert_eq!(x.dims()[1], matrix.columns(), "width of x and columns of the stored matrix");
    let dtype = x.dtype();
    restore(timed(|| B::stored_linear(single(x), matrix)), dtype)
}

/// The products with some rows of a stored matrix alone: `x [tokens, columns]`, `rows [n]`, `[tokens, n]`. Where the CPU
/// kernels run they have the bits of [`stored_linear`]. A number that is no row gives NaN.
///
/// # Panics
/// If the width of `x` is not the matrix's number of columns.
#[must_use]
pub fn stored_linear_at<B: TernaryBackend>(
    x: Tensor<B, 2>,
    matrix: &StoredMatrix<B>,
    rows: Tensor<B, 1, Int>,
) -> Tensor<B, 2> {
    assert_eq!(x.dims()[1], matrix.columns(), "width of x and columns of the stored matrix");
    let dtype = x.dtype();
    restore(timed(|| B::stored_linear_at(single(x), matrix, rows)), dtype)
}

/// A copy of a stored matrix in 4 bits a weight, in this machine's memory, that says which rows cannot have a large product:
/// see [`cpu::screen`](crate::cpu::screen). `None` on a backend that has no kernel for it, where [`stored_linear`] is all
/// there is. Takes all threads for a while, with a `pause` now and then, in which what was read can be let go.
#[must_use]
pub fn screen<B: TernaryBackend>(matrix: &StoredMatrix<B>, mut pause: impl FnMut()) -> Option<Screen> {
    B::screen(matrix, &mut pause)
}

/// What each product of `x [tokens, columns]` with a row of the matrix behind `screen` is at most: `[tokens, rows]`.
///
/// A product is above its bound with a probability of at most 1.3e-14. That is also the probability that the largest of a
/// token's products belongs to a row whose bound is below another product: see [`cpu::screen`](crate::cpu::screen). Bounds
/// are never NaN; a token or a row that could leave the range of floats has infinite ones. No gradients.
///
/// # Panics
/// If the width of `x` is not the screen's number of columns.
#[must_use]
pub fn screen_bounds<B: TernaryBackend>(x: Tensor<B, 2>, screen: &Screen) -> Tensor<B, 2> {
    assert_eq!(x.dims()[1], screen.columns(), "width of x and columns of the screen");
    timed(|| B::screen_bounds(single(x), screen))
}

/// Rows of a stored matrix (an embedding): `ids [n]`, `[n, columns]` in `F32`. An id that is no row gives a row of NaN.
#[must_use]
pub fn stored_rows<B: TernaryBackend>(matrix: &StoredMatrix<B>, ids: Tensor<B, 1, Int>) -> Tensor<B, 2> {
    timed(|| B::stored_rows(matrix, ids))
}

/// Rows of a ternary matrix (a compact embedding): `ids [n]`, `[n, in_features]` in `F32`,
///
/// ```text
/// y[n] = sum over planes p, in order, of  row_scale[p, id] * group_scale[p, id, .] * trit[p, id, .],   id = ids[n]
/// ```
///
/// rotated back where the layout has a [`Rotation`], so that the rows are those of the matrix before it
/// was rotated. Nothing but these rows is read. An id that is no row gives a row of NaN. Gradients flow to the row scales.
///
/// # Panics
/// If `matrix` is not below the layout's `matrices`.
#[must_use]
pub fn ternary_rows<B: TernaryBackend>(
    weight: &TernaryWeight<B>,
    matrix: usize,
    ids: Tensor<B, 1, Int>,
) -> Tensor<B, 2> {
    assert!(matrix < weight.layout.matrices, "matrix {matrix} of {:?}", weight.layout);
    timed(|| B::ternary_rows(weight, matrix, ids))
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

/// [`sink_attention`] of new tokens over a cache that takes them in: `[tokens, q_heads * head_dim]`.
///
/// `qkv` are the new tokens' queries `[tokens, q_heads * head_dim]`, keys and values `[tokens, kv_heads * head_dim]`, one head
/// after the other; `rope` the cosines and sines of their positions, `[tokens, head_dim / 2]`. Queries and keys are rotated:
/// a pair is dimension `i` and `i + head_dim / 2` of a head. The window is the cache's. What a query gives does not
/// depend on how many tokens came with it.
///
/// # Panics
/// If shapes do not fit each other.
#[must_use]
pub fn cached_attention<B: TernaryBackend>(
    qkv: [Tensor<B, 2>; 3],
    rope: [Tensor<B, 2>; 2],
    sinks: Tensor<B, 1>,
    scale: f32,
    cache: &mut LayerCache<B>,
) -> Tensor<B, 2> {
    let ([tokens, half], heads) = (rope[0].dims(), sinks.dims()[0]);
    let ([q, k, v], size) = (qkv.each_ref().map(Tensor::dims), 2 * half);
    assert_eq!(q, [tokens, heads * size], "queries of {heads} heads of {size}");
    assert!(k == v && k[0] == tokens && k[1] > 0 && k[1].is_multiple_of(size), "keys {k:?} and values {v:?}");
    assert!((heads * size).is_multiple_of(k[1]), "{heads} query heads on {} key heads", k[1] / size);
    assert_eq!(rope[1].dims(), [tokens, half], "sines of the positions");
    let dtype = qkv[0].dtype();
    restore(timed(|| B::cached_attention(qkv.map(single), rope.map(single), single(sinks), scale, cache)), dtype)
}

/// The tensor in `F32`, for free if it already is.
fn single<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    restore(x, DType::F32)
}

fn restore<B: Backend, const D: usize>(y: Tensor<B, D>, dtype: DType) -> Tensor<B, D> {
    if y.dtype() == dtype { y } else { y.cast(dtype) }
}
