//! The operations on backends whose tensors lie in this machine's memory: Burn tensors in, slices to the
//! [kernels](crate::cpu), Burn tensors out. Flex and NdArray only say how to reach their slices.

use std::borrow::Cow;

use burn::tensor::{
    DType, Int, Tensor, TensorData,
    backend::Backend,
    ops::{FloatTensor, IntTensor},
};

use rayon::prelude::*;

use crate::{
    cpu::{
        Kernels, TernaryMatrices, TernaryRows, attention,
        experts::{self, Experts},
        linear::{self, Product},
        routing,
        screen::Screen,
        stored::{self, StoredRows},
        tokens::{self, Tokens},
        tuned,
    },
    format::{FormatError, Rotation, TernaryLayout, TernaryWeight},
    ops::{
        AttentionSpec, BiasedWeight, ClampedSwiGlu, LayerCache, ScoreView, StoredMatrix, TernaryBackend, TernaryExperts,
    },
};

/// A backend whose tensors can be read as slices: borrowed where they are contiguous, copied otherwise.
///
/// Each function returns an empty slice for a tensor of another element type; the public types are checked, so that
/// only happens to those put together by hand, and the length checks of the kernels' views then refuse it.
pub(crate) trait HostBackend: TernaryBackend {
    /// The elements of an `F32` tensor.
    fn floats(tensor: &FloatTensor<Self>) -> Cow<'_, [f32]>;
    /// The elements of a `U32` tensor.
    fn words(tensor: &IntTensor<Self>) -> Cow<'_, [u32]>;
    /// The elements of a `U8` tensor.
    fn octets(tensor: &IntTensor<Self>) -> Cow<'_, [u8]>;
}

/// The primitives of a ternary weight, which keep its slices alive.
struct WeightParts<B: Backend> {
    layout: TernaryLayout,
    codes: IntTensor<B>,
    row_scales: FloatTensor<B>,
    group_scales: Option<IntTensor<B>>,
}

impl<B: HostBackend> WeightParts<B> {
    fn new(weight: &TernaryWeight<B>) -> Self {
        Self {
            layout: weight.layout,
            codes: weight.codes.clone().into_primitive(),
            row_scales: primitive(weight.row_scales.clone()),
            group_scales: weight.group_scales.clone().map(Tensor::into_primitive),
        }
    }

    fn slices(&self) -> WeightSlices<'_> {
        WeightSlices {
            layout: self.layout,
            codes: B::words(&self.codes),
            row_scales: B::floats(&self.row_scales),
            group_scales: self.group_scales.as_ref().map(|scales| B::octets(scales)),
        }
    }

    /// Runs something on the kernels' view of the weight.
    fn with<R>(&self, run: impl FnOnce(TernaryMatrices<'_>) -> Result<R, FormatError>) -> Result<R, FormatError> {
        run(self.slices().view()?)
    }
}

/// The slices of a ternary weight.
struct WeightSlices<'a> {
    layout: TernaryLayout,
    codes: Cow<'a, [u32]>,
    row_scales: Cow<'a, [f32]>,
    group_scales: Option<Cow<'a, [u8]>>,
}

impl WeightSlices<'_> {
    /// The kernels' view of the weight.
    fn view(&self) -> Result<TernaryMatrices<'_>, FormatError> {
        TernaryMatrices::new(self.layout, &self.codes, &self.row_scales, self.group_scales.as_deref())
    }
}

/// [`TernaryBackend::ternary_linear`] by the kernels.
pub(crate) fn ternary_linear<B: HostBackend>(
    x: Tensor<B, 2>,
    weight: &TernaryWeight<B>,
    matrix: usize,
) -> Tensor<B, 2> {
    let ([tokens, in_features], device) = (x.dims(), x.device());
    let rows = weight.layout.rows;
    let x = primitive(x);
    let kernels = Kernels::detect();
    let mut out = vec![0.0; tokens * rows];
    let result = WeightParts::new(weight).with(|view| {
        let matrix = one_matrix(&view, matrix)?;
        let x = Tokens::quantize(kernels, &B::floats(&x), in_features, weight.layout.rotation);
        linear::ternary_linear(kernels, &matrix, &x, &mut out)
    });
    finish(result, out, [tokens, rows], &device)
}

/// [`TernaryBackend::scaled_trits`] on the host.
pub(crate) fn scaled_trits<B: HostBackend>(trits: &TernaryWeight<B>, scales: Tensor<B, 3>) -> Tensor<B, 2> {
    let (shape, device) = ([trits.layout.rows, trits.layout.in_features], scales.device());
    let (scales, mut out) = (primitive(scales), vec![0.0; shape[0] * shape[1]]);
    let result =
        WeightParts::new(trits).with(|view| tuned::scaled_trits(&one_matrix(&view, 0)?, &B::floats(&scales), &mut out));
    finish(result, out, shape, &device)
}

/// [`TernaryBackend::scale_gradient`] on the host.
pub(crate) fn scale_gradient<B: HostBackend>(of_matrix: Tensor<B, 2>, trits: &TernaryWeight<B>) -> Tensor<B, 3> {
    let (layout, device) = (trits.layout, of_matrix.device());
    let of_matrix = primitive(of_matrix);
    let gradient =
        WeightParts::new(trits).with(|view| tuned::scale_gradient(&one_matrix(&view, 0)?, &B::floats(&of_matrix)));
    let (result, out) = match gradient {
        Ok(out) => (Ok(()), out),
        Err(error) => (Err(error), Vec::new()),
    };
    finish(result, out, [layout.planes, layout.rows, layout.groups().max(1)], &device)
}

/// [`TernaryBackend::ternary_linears`] by the kernels.
pub(crate) fn ternary_linears<B: HostBackend>(x: Tensor<B, 2>, linears: &[BiasedWeight<B>]) -> Vec<Tensor<B, 2>> {
    let ([_, in_features], device, x) = (x.dims(), x.device(), primitive(x));
    let quantize = |rotation| Tokens::quantize(Kernels::detect(), &B::floats(&x), in_features, rotation);
    linears_by_rotation(quantize, linears, &device)
}

/// [`TernaryBackend::norm_linears`] by the kernels.
pub(crate) fn norm_linears<B: HostBackend>(
    x: Tensor<B, 2>,
    gamma: Tensor<B, 1>,
    epsilon: f64,
    linears: &[BiasedWeight<B>],
) -> Vec<Tensor<B, 2>> {
    let (device, x, gamma) = (x.device(), primitive(x), primitive(gamma));
    let quantize =
        |rotation| Tokens::normed(Kernels::detect(), &B::floats(&x), &B::floats(&gamma), epsilon as f32, rotation);
    linears_by_rotation(quantize, linears, &device)
}

/// Products with tokens that `quantize` rounds: once if all matrices rotate them alike.
fn linears_by_rotation<B: HostBackend>(
    quantize: impl Fn(Option<Rotation>) -> Tokens,
    linears: &[BiasedWeight<B>],
    device: &B::Device,
) -> Vec<Tensor<B, 2>> {
    let rotation = |linear: &BiasedWeight<B>| linear.weight.layout.rotation;
    let alike = linears.chunk_by(|a, b| rotation(a) == rotation(b));
    alike.flat_map(|linears| linears_of(&quantize(rotation(&linears[0])), linears, device)).collect()
}

/// The same tokens times several matrices.
fn linears_of<B: HostBackend>(x: &Tokens, linears: &[BiasedWeight<B>], device: &B::Device) -> Vec<Tensor<B, 2>> {
    let (tokens, kernels) = (x.len(), Kernels::detect());
    let parts: Vec<_> = linears.iter().map(|linear| WeightParts::new(&linear.weight)).collect();
    let slices: Vec<_> = parts.iter().map(WeightParts::slices).collect();
    let biases: Vec<_> = linears.iter().map(|linear| linear.bias.clone().map(primitive)).collect();
    let biases: Vec<_> = biases.iter().map(|bias| bias.as_ref().map(|bias| B::floats(bias))).collect();
    let mut outs: Vec<_> = linears.iter().map(|linear| vec![0.0; tokens * linear.weight.layout.rows]).collect();
    let products = slices.iter().zip(&biases).zip(&mut outs).map(|((slices, bias), out)| {
        let rows = one_matrix(&slices.view()?, 0)?;
        Product::new(rows, x, bias.as_deref(), out)
    });
    let result = products.collect::<Result<_, _>>().map(|products| linear::run(kernels, products));
    if let Err(error) = result {
        return vec![finish(Err(error), Vec::new(), [0, 0], device)];
    }
    let outs = outs.into_iter().zip(linears);
    outs.map(|(out, linear)| finish(Ok(()), out, [tokens, linear.weight.layout.rows], device)).collect()
}

/// [`TernaryBackend::rms_norm`] by the kernels.
pub(crate) fn rms_norm<B: HostBackend>(x: Tensor<B, 2>, gamma: Tensor<B, 1>, epsilon: f64) -> Tensor<B, 2> {
    let (shape, device) = (x.dims(), x.device());
    let (x, gamma) = (primitive(x), primitive(gamma));
    let mut out = vec![0.0; shape[0] * shape[1]];
    let result = routing::rms_norm(Kernels::detect(), &B::floats(&x), &B::floats(&gamma), epsilon as f32, &mut out);
    finish(result, out, shape, &device)
}

/// [`TernaryBackend::route`] by the kernels.
pub(crate) fn route<B: HostBackend>(
    x: Tensor<B, 2>,
    weight: Tensor<B, 2>,
    bias: Tensor<B, 1>,
    k: usize,
) -> (Tensor<B, 2, Int>, Tensor<B, 2>) {
    let (shape, device) = ([x.dims()[0], k], x.device());
    let (x, weight, bias) = (primitive(x), primitive(weight), primitive(bias));
    let routes = routing::route(Kernels::detect(), &B::floats(&x), &B::floats(&weight), &B::floats(&bias), k);
    match routes {
        Ok((chosen, weights)) => {
            (Tensor::from_data(TensorData::new(chosen, shape), &device), finish(Ok(()), weights, shape, &device))
        }
        Err(error) => (Tensor::zeros(shape, &device), finish(Err(error), Vec::new(), [0, 0], &device)),
    }
}

/// [`TernaryBackend::cached_attention`] by the kernels.
pub(crate) fn cached_attention<B: HostBackend>(
    [q, k, v]: [Tensor<B, 2>; 3],
    [cos, sin]: [Tensor<B, 2>; 2],
    sinks: Tensor<B, 1>,
    scale: f32,
    caches: &mut [&mut LayerCache<B>],
) -> Tensor<B, 2> {
    let (shape @ [tokens, _], device, head_dim) = (q.dims(), q.device(), 2 * cos.dims()[1]);
    let kv_heads = k.dims()[1] / head_dim;
    let (mut q, mut k, v) = (elements(q), elements(k), primitive(v));
    let (cos, sin, sinks) = (primitive(cos), primitive(sin), primitive(sinks));
    let tables = [B::floats(&cos), B::floats(&sin)];
    let tables = tables.each_ref().map(|table| &**table);
    attention::rotate(&mut q, head_dim, tables, tokens);
    attention::rotate(&mut k, head_dim, tables, tokens);
    let spec = AttentionSpec { scale, window: caches[0].window() };
    let mut all: Vec<_> = caches.iter_mut().map(|cache| cache.take_heads(kv_heads, head_dim)).collect();
    let (width, new) = (kv_heads * head_dim, tokens / all.len());
    let v = B::floats(&v);
    for (token, entry) in k.chunks_exact(width).zip(v.chunks_exact(width)).enumerate() {
        all[token / new].push(entry.0, entry.1);
    }
    let mut out = vec![0.0; shape[0] * shape[1]];
    let heads: Vec<_> = all.iter().collect();
    let result = attention::cached_attention(Kernels::detect(), &q, &heads, &B::floats(&sinks), spec, &mut out);
    caches.iter_mut().zip(all).for_each(|(cache, heads)| cache.put_heads(heads));
    finish(result, out, shape, &device)
}

/// [`TernaryBackend::ternary_rows`] on the host's slices.
pub(crate) fn ternary_rows<B: HostBackend>(
    weight: &TernaryWeight<B>,
    matrix: usize,
    ids: Tensor<B, 1, Int>,
) -> Tensor<B, 2> {
    let device = ids.device();
    let ids: Vec<i64> = ids.into_data().iter::<i64>().collect();
    let in_features = weight.layout.in_features;
    let mut out = vec![0.0; ids.len() * in_features];
    let result = WeightParts::new(weight).with(|view| {
        let matrix = one_matrix(&view, matrix)?;
        for (id, out) in ids.iter().zip(out.chunks_exact_mut(in_features)) {
            matrix.decode_row(usize::try_from(*id).ok(), out);
        }
        Ok(())
    });
    finish(result, out, [ids.len(), in_features], &device)
}

/// One matrix of a weight.
fn one_matrix<'a>(view: &TernaryMatrices<'a>, matrix: usize) -> Result<TernaryRows<'a>, FormatError> {
    let missing = FormatError::Length { what: "matrices", expected: matrix + 1, found: view.layout().matrices };
    view.matrix(matrix).ok_or(missing)
}

/// [`TernaryBackend::ternary_experts`] by the kernels.
pub(crate) fn ternary_experts<B: HostBackend>(
    x: Tensor<B, 2>,
    chosen: Tensor<B, 2, Int>,
    weights: Tensor<B, 2>,
    moe: &TernaryExperts<B>,
) -> Tensor<B, 2> {
    let (shape, device) = (x.dims(), x.device());
    let chosen: Vec<i64> = chosen.into_data().iter::<i64>().collect();
    let (x, weights) = (primitive(x), primitive(weights));
    let (gate_up, down) = (WeightParts::new(&moe.gate_up), WeightParts::new(&moe.down));
    let (gate_up_bias, down_bias) = (primitive(moe.gate_up_bias.clone()), primitive(moe.down_bias.clone()));
    let mut out = vec![0.0; shape[0] * shape[1]];
    let result = gate_up.with(|gate_up| {
        down.with(|down| {
            let (gate_up_bias, down_bias) = (B::floats(&gate_up_bias), B::floats(&down_bias));
            let view = Experts::new(gate_up, &gate_up_bias, down, &down_bias, moe.activation)?;
            experts::ternary_experts(Kernels::detect(), &view, &B::floats(&x), &chosen, &B::floats(&weights), &mut out)
        })
    });
    finish(result, out, shape, &device)
}

/// [`TernaryBackend::stored_linear`] by the kernels.
pub(crate) fn stored_linear<B: HostBackend>(x: Tensor<B, 2>, matrix: &StoredMatrix<B>) -> Tensor<B, 2> {
    let (tokens, device) = (x.dims()[0], x.device());
    let (x, words) = (primitive(x), matrix.words.clone().into_primitive());
    let mut out = vec![0.0; tokens * matrix.rows()];
    let words = B::words(&words);
    let result = StoredRows::new(&words, matrix.rows(), matrix.columns(), matrix.float())
        .and_then(|rows| stored::stored_linear(Kernels::detect(), &rows, &B::floats(&x), tokens, &mut out));
    finish(result, out, [tokens, matrix.rows()], &device)
}

/// [`TernaryBackend::stored_linear_at`] by the kernels.
pub(crate) fn stored_linear_at<B: HostBackend>(
    x: Tensor<B, 2>,
    matrix: &StoredMatrix<B>,
    ids: Tensor<B, 1, Int>,
) -> Tensor<B, 2> {
    let (tokens, device) = (x.dims()[0], x.device());
    let ids: Vec<Option<usize>> = ids.into_data().iter::<i64>().map(|id| usize::try_from(id).ok()).collect();
    let (x, words) = (primitive(x), matrix.words.clone().into_primitive());
    let mut out = vec![0.0; tokens * ids.len()];
    let words = B::words(&words);
    let result = StoredRows::new(&words, matrix.rows(), matrix.columns(), matrix.float())
        .and_then(|rows| stored::stored_linear_at(Kernels::detect(), &rows, &B::floats(&x), tokens, &ids, &mut out));
    finish(result, out, [tokens, ids.len()], &device)
}

/// [`TernaryBackend::screen`] by the kernels. A matrix that does not follow its own shape has none.
pub(crate) fn screen<B: HostBackend>(matrix: &StoredMatrix<B>, pause: &mut dyn FnMut()) -> Option<Screen> {
    let words = matrix.words.clone().into_primitive();
    let words = B::words(&words);
    let rows = StoredRows::new(&words, matrix.rows(), matrix.columns(), matrix.float()).ok()?;
    Some(Screen::new(Kernels::detect(), &rows, pause))
}

/// [`TernaryBackend::clamped_swiglu`] by the kernels.
pub(crate) fn clamped_swiglu<B: HostBackend>(gate_up: Tensor<B, 2>, activation: ClampedSwiGlu) -> Tensor<B, 2> {
    let ([tokens, width], device) = (gate_up.dims(), gate_up.device());
    let (gate_up, mut out) = (primitive(gate_up), vec![0.0; tokens * (width / 2)]);
    experts::swiglu(Kernels::detect(), activation, &B::floats(&gate_up), &mut out);
    finish(Ok(()), out, [tokens, width / 2], &device)
}

/// [`TernaryBackend::clamped_swiglu_gradient`] by the kernels.
pub(crate) fn clamped_swiglu_gradient<B: HostBackend>(
    gate_up: Tensor<B, 2>,
    gradient: Tensor<B, 2>,
    activation: ClampedSwiGlu,
) -> Tensor<B, 2> {
    let (shape, device) = (gate_up.dims(), gate_up.device());
    let (gate_up, gradient) = (primitive(gate_up), primitive(gradient));
    let mut out = vec![0.0; shape[0] * shape[1]];
    experts::swiglu_gradient(Kernels::detect(), activation, &B::floats(&gate_up), &B::floats(&gradient), &mut out);
    finish(Ok(()), out, shape, &device)
}

/// [`TernaryBackend::stored_rows`] by the kernels.
pub(crate) fn stored_rows<B: HostBackend>(matrix: &StoredMatrix<B>, ids: Tensor<B, 1, Int>) -> Tensor<B, 2> {
    let device = ids.device();
    let ids: Vec<i64> = ids.into_data().iter::<i64>().collect();
    let words = matrix.words.clone().into_primitive();
    let words = B::words(&words);
    let mut out = vec![0.0; ids.len() * matrix.columns()];
    let rows = StoredRows::new(&words, matrix.rows(), matrix.columns(), matrix.float());
    let result = rows.map(|rows| {
        for (id, out) in ids.iter().zip(out.chunks_exact_mut(matrix.columns())) {
            rows.decode_row(usize::try_from(*id).ok(), out);
        }
    });
    finish(result, out, [ids.len(), matrix.columns()], &device)
}

/// [`TernaryBackend::sink_softmax`] by the kernels.
pub(crate) fn sink_softmax<B: HostBackend>(scores: Tensor<B, 3>, sinks: Tensor<B, 1>, view: ScoreView) -> Tensor<B, 3> {
    let (shape @ [_, queries, keys], device) = (scores.dims(), scores.device());
    let mut scores = elements(scores);
    attention::sink_softmax(Kernels::detect(), &mut scores, &elements(sinks), [queries, keys], view);
    finish(Ok(()), scores, shape, &device)
}

/// [`TernaryBackend::sink_softmax_gradient`] by the kernels.
pub(crate) fn sink_softmax_gradient<B: HostBackend>(
    shares: Tensor<B, 3>,
    gradient: Tensor<B, 3>,
    scale: f32,
) -> (Tensor<B, 3>, Tensor<B, 1>) {
    let (shape @ [heads, queries, keys], device) = (shares.dims(), shares.device());
    let (shares, mut gradient) = (primitive(shares), elements(gradient));
    let kernels = Kernels::detect();
    let mut sinks =
        attention::sink_softmax_gradient(kernels, &B::floats(&shares), &mut gradient, [queries, keys], scale);
    sinks.resize(heads, 0.0);
    (finish(Ok(()), gradient, shape, &device), finish(Ok(()), sinks, [heads], &device))
}

/// [`TernaryBackend::round_activations`] by the kernels.
pub(crate) fn round_activations<B: HostBackend>(x: Tensor<B, 2>, rotation: Option<Rotation>) -> Tensor<B, 2> {
    let (shape, device) = (x.dims(), x.device());
    let mut x = elements(x);
    tokens::round_tokens(Kernels::detect(), &mut x, shape[1], rotation);
    finish(Ok(()), x, shape, &device)
}

/// [`TernaryBackend::rotate_back`] on the host.
pub(crate) fn rotate_back<B: HostBackend>(y: Tensor<B, 2>, rotation: Rotation) -> Tensor<B, 2> {
    let (shape, device) = (y.dims(), y.device());
    let mut y = elements(y);
    y.par_chunks_exact_mut(shape[1].max(1)).for_each(|y| rotation.rotate_back(y));
    finish(Ok(()), y, shape, &device)
}

/// The elements of a tensor, without a copy where nobody else has it.
fn elements<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Vec<f32> {
    tensor.into_data().into_vec().unwrap_or_default()
}

/// The output as a tensor. The parts have been checked when they were put together, so an error can only mean that
/// somebody changed their public fields afterwards: a mistake in the program, like any shape that does not fit.
fn finish<B: Backend, const D: usize>(
    result: Result<(), FormatError>,
    out: Vec<f32>,
    shape: [usize; D],
    device: &B::Device,
) -> Tensor<B, D> {
    if let Err(error) = &result {
        assert!(result.is_ok(), "weights that do not follow their own layout: {error}");
    }
    Tensor::from_data(TensorData::new(out, shape), (device, DType::F32))
}

fn primitive<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> FloatTensor<B> {
    tensor.into_primitive().tensor()
}
