//! The operations, and the trait a Burn backend implements to run them.
//!
//! Call the free functions: they take and return Burn tensors of any float type, check shapes and hand `F32` to the
//! backend. Shapes that do not fit panic, as they do in Burn's own operations; nothing in the *values* of a tensor does.
//!
//! ```
//! use burn::tensor::Tensor;
//! use ternoss_backends::{Rotation, round_activations};
//! type B = burn_flex::Flex;
//!
//! // As a kernel sees them: 127 levels a side, scaled to the token's largest magnitude.
//! let x = Tensor::<B, 2>::from_floats([[127.0, -63.4, 0.2]], &Default::default());
//! let rounded: Vec<f32> = round_activations(x, None::<Rotation>).into_data().iter().collect();
//! assert_eq!(rounded, [127.0, -63.0, 0.0]);
//! ```

mod attention;
#[cfg_attr(
    not(all(any(feature = "flex", feature = "ndarray"), any(feature = "wgpu", feature = "cuda"))),
    allow(dead_code, reason = "heads need a host backend, rings a GPU")
)]
mod cache;
mod experts;
mod stopwatch;
mod stored;
mod tuned;

use std::slice;

use burn::tensor::{DType, Int, Tensor, backend::Backend};

pub use attention::{AttentionSpec, ScoreView, cached_attention, sink_attention};
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub(crate) use cache::Ring;
pub use cache::{KvFormat, LayerCache};
#[cfg(any(feature = "cuda", feature = "wgpu"))]
pub(crate) use experts::layer_by_parts;
pub use experts::{ClampedSwiGlu, ExpertLayer, TernaryExperts, clamped_swiglu, expert_layer};
pub use stopwatch::time_in_operations;
pub use stored::{
    StoredFloat, StoredMatrix, closer_bounds, screen, screen_bounds, stored_linear, stored_linear_at, stored_rows,
};

pub use tuned::tuned_linear;

pub use crate::cpu::screen::Screen;

use crate::{
    format::{Rotation, TernaryWeight},
    reference,
};
use stopwatch::timed;

/// A Burn backend that can run the operations of this crate.
///
/// Every function has a default that computes the same with Burn's own operations ([`mod@reference`]), so
/// an empty `impl` makes any backend work; a backend overrides what it has a kernel for. Float arguments are `F32`,
/// shapes have been checked.
pub trait TernaryBackend: Backend {
    /// Whether a token's bits never depend on what else is in a batch, in all operations of this trait.
    const BATCH_INVARIANT: bool = false;

    /// Tokens of a prompt that go through a model at once: enough to keep the kernels busy, and few enough to bound memory.
    const PROMPT_TOKENS: usize = 512;

    /// See [`ternary_linear`]; `x` is `[tokens, in_features]`.
    #[must_use]
    fn ternary_linear(x: Tensor<Self, 2>, weight: &TernaryWeight<Self>, matrix: usize) -> Tensor<Self, 2> {
        reference::ternary_linear(x, weight, matrix)
    }

    /// See [`tuned_linear`].
    #[must_use]
    fn tuned_linear(x: Tensor<Self, 2>, trits: &TernaryWeight<Self>, scales: Tensor<Self, 3>) -> Tensor<Self, 2> {
        reference::tuned_linear(x, trits, scales)
    }

    /// The matrix of [`tuned_linear`]: see [`reference::scaled_trits`].
    #[must_use]
    fn scaled_trits(trits: &TernaryWeight<Self>, scales: Tensor<Self, 3>) -> Tensor<Self, 2> {
        reference::scaled_trits(trits, scales)
    }

    /// The gradient by the scales of [`tuned_linear`]: see [`reference::scale_gradient`].
    #[must_use]
    fn scale_gradient(of_matrix: Tensor<Self, 2>, trits: &TernaryWeight<Self>) -> Tensor<Self, 3> {
        reference::scale_gradient(of_matrix, trits)
    }

    /// See [`ternary_linears`].
    #[must_use]
    fn ternary_linears(x: Tensor<Self, 2>, linears: &[BiasedWeight<Self>]) -> Vec<Tensor<Self, 2>> {
        reference::ternary_linears(x, linears)
    }

    /// See [`norm_linears`].
    #[must_use]
    fn norm_linears(
        x: Tensor<Self, 2>,
        gamma: Tensor<Self, 1>,
        epsilon: f64,
        linears: &[BiasedWeight<Self>],
    ) -> Vec<Tensor<Self, 2>> {
        reference::norm_linears(x, gamma, epsilon, linears)
    }

    /// See [`linear_onto`].
    #[must_use]
    fn linear_onto(residual: Tensor<Self, 2>, x: Tensor<Self, 2>, linear: &BiasedWeight<Self>) -> Tensor<Self, 2> {
        Self::ternary_linears(x, slice::from_ref(linear)).into_iter().fold(residual, |residual, y| residual + y)
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

    /// See [`clamped_swiglu`].
    #[must_use]
    fn clamped_swiglu(gate_up: Tensor<Self, 2>, activation: ClampedSwiGlu) -> Tensor<Self, 2> {
        reference::clamped_swiglu(gate_up, activation)
    }

    /// The gradient of [`clamped_swiglu`]: see [`reference::clamped_swiglu_gradient`].
    #[must_use]
    fn clamped_swiglu_gradient(
        gate_up: Tensor<Self, 2>,
        gradient: Tensor<Self, 2>,
        activation: ClampedSwiGlu,
    ) -> Tensor<Self, 2> {
        reference::clamped_swiglu_gradient(gate_up, gradient, activation)
    }

    /// See [`expert_layer`].
    #[must_use]
    fn expert_layer(x: Tensor<Self, 2>, layer: &ExpertLayer<Self>) -> Tensor<Self, 2> {
        experts::layer_by_parts(x, layer)
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

    /// See [`largest`]: none, unless reading a few numbers back from the backend's memory is better than reading all.
    #[must_use]
    fn largest(_x: Tensor<Self, 2>, _k: usize) -> Option<(Vec<u32>, Vec<f32>)> {
        None
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
        caches: &mut [&mut LayerCache<Self>],
    ) -> Tensor<Self, 2> {
        reference::cached_attention(qkv, rope, sinks, scale, caches)
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
    check_linears(&x, linears);
    let dtype = x.dtype();
    timed(|| B::ternary_linears(single(x), linears)).into_iter().map(|y| restore(y, dtype)).collect()
}

/// [`ternary_linears`] of the [norm](rms_norm) of `x`, with the same bits: norm, rotation and rounding are one pass over
/// each token.
///
/// # Panics
/// If the last dimension of `x` is not `in_features` of each, or a bias does not have `rows` numbers, or `gamma` not as
/// many as a token.
#[must_use]
pub fn norm_linears<B: TernaryBackend>(
    x: Tensor<B, 2>,
    gamma: Tensor<B, 1>,
    epsilon: f64,
    linears: &[BiasedWeight<B>],
) -> Vec<Tensor<B, 2>> {
    assert_eq!(x.dims()[1..], gamma.dims(), "width of x and of the norm");
    check_linears(&x, linears);
    let dtype = x.dtype();
    let products = timed(|| B::norm_linears(single(x), single(gamma), epsilon, linears));
    products.into_iter().map(|y| restore(y, dtype)).collect()
}

/// `residual [tokens, rows]` plus one of [`ternary_linears`] of `x [tokens, in_features]`.
///
/// # Panics
/// If shapes do not fit each other.
#[must_use]
pub fn linear_onto<B: TernaryBackend>(
    residual: Tensor<B, 2>,
    x: Tensor<B, 2>,
    linear: &BiasedWeight<B>,
) -> Tensor<B, 2> {
    check_linears(&x, slice::from_ref(linear));
    assert_eq!(residual.dims(), [x.dims()[0], linear.weight.layout.rows], "shape of the residual");
    let dtype = residual.dtype();
    restore(timed(|| B::linear_onto(single(residual), single(x), linear)), dtype)
}

/// # Panics
/// If the tokens do not fit a matrix, or a bias does not.
fn check_linears<B: Backend>(x: &Tensor<B, 2>, linears: &[BiasedWeight<B>]) {
    for BiasedWeight { weight, bias } in linears {
        let layout = weight.layout;
        assert!(x.dims()[1] == layout.in_features, "x of shape {:?} times weights of {layout:?}", x.dims());
        assert!(bias.as_ref().is_none_or(|bias| bias.dims() == [layout.rows]), "a bias for {layout:?}");
    }
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

/// The `k` largest numbers of each row of `x [rows, n]`, best first, of equal ones the first: where they are and what they are,
/// `[rows, k]` each, read back. NaN counts as the largest. `None` on a backend that has no use for it, or for so many.
///
/// # Panics
/// If a row has fewer than `k` numbers, or `k` is 0.
#[must_use]
pub fn largest<B: TernaryBackend>(x: Tensor<B, 2>, k: usize) -> Option<(Vec<u32>, Vec<f32>)> {
    assert!(k > 0 && k <= x.dims()[1], "the {k} largest of {}", x.dims()[1]);
    timed(|| B::largest(single(x), k))
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

/// The tensor in `F32`, for free if it already is.
fn single<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    restore(x, DType::F32)
}

fn restore<B: Backend, const D: usize>(y: Tensor<B, D>, dtype: DType) -> Tensor<B, D> {
    if y.dtype() == dtype { y } else { y.cast(dtype) }
}
