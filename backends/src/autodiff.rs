//! Gradients: the operations on `Autodiff<B>`, run forward by whatever `B` has.
//!
//! `ternary_linear`, `tuned_linear`, `stored_linear` and `clamped_swiglu` have gradients of their own; `ternary_experts` is
//! composed of them and `sink_attention` of Burn's operations, whose gradients follow.

use burn::tensor::{Int, Tensor, TensorPrimitive, backend::Backend, ops::FloatTensor};
use burn_autodiff::{
    Autodiff, NodeId,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};

use crate::{
    format::{Rotation, TernaryLayout, TernaryWeight},
    ops::{ClampedSwiGlu, ScoreView, StoredMatrix, TernaryBackend},
    reference,
};

impl<B: TernaryBackend, C: CheckpointStrategy> TernaryBackend for Autodiff<B, C> {
    const PROMPT_TOKENS: usize = B::PROMPT_TOKENS;

    fn ternary_linear(x: Tensor<Self, 2>, weight: &TernaryWeight<Self>, matrix: usize) -> Tensor<Self, 2> {
        let x = x.into_primitive().tensor();
        let row_scales = weight.row_scales.clone().into_primitive().tensor();
        let inner = inner_weight(weight);
        let y = unwrap(B::ternary_linear(wrap(x.primitive.clone()), &inner, matrix));
        let nodes = [x.node.clone(), row_scales.node.clone()];
        let y = match TernaryLinear.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let x = prep.checkpoint(&x);
                prep.finish((x, inner, matrix), y)
            }
            OpsKind::UnTracked(prep) => prep.finish(y),
        };
        wrap(y)
    }

    fn tuned_linear(x: Tensor<Self, 2>, trits: &TernaryWeight<Self>, scales: Tensor<Self, 3>) -> Tensor<Self, 2> {
        let (x, scales) = (x.into_primitive().tensor(), scales.into_primitive().tensor());
        let trits = inner_weight(trits);
        let y = unwrap(B::tuned_linear(wrap(x.primitive.clone()), &trits, wrap(scales.primitive.clone())));
        wrap(match TunedLinear.prepare::<C>([x.node.clone(), scales.node]).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let x = prep.checkpoint(&x);
                prep.finish((x, trits, scales.primitive), y)
            }
            OpsKind::UnTracked(prep) => prep.finish(y),
        })
    }

    fn stored_linear(x: Tensor<Self, 2>, matrix: &StoredMatrix<Self>) -> Tensor<Self, 2> {
        let x = x.into_primitive().tensor();
        let matrix = inner_matrix(matrix);
        let y = unwrap(B::stored_linear(wrap(x.primitive.clone()), &matrix));
        let y = match StoredLinear.prepare::<C>([x.node.clone()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(matrix, y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        };
        wrap(y)
    }

    fn stored_rows(matrix: &StoredMatrix<Self>, ids: Tensor<Self, 1, Int>) -> Tensor<Self, 2> {
        let ids = Tensor::from_primitive(ids.into_primitive());
        Tensor::from_inner(B::stored_rows(&inner_matrix(matrix), ids))
    }

    fn sink_softmax(scores: Tensor<Self, 3>, sinks: Tensor<Self, 1>, view: ScoreView) -> Tensor<Self, 3> {
        let (scores, sinks) = (scores.into_primitive().tensor(), sinks.into_primitive().tensor());
        let shares = unwrap(B::sink_softmax(wrap(scores.primitive), wrap(sinks.primitive), view));
        wrap(match SinkSoftmax.prepare::<C>([scores.node, sinks.node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((shares.clone(), view.spec.scale), shares),
            OpsKind::UnTracked(prep) => prep.finish(shares),
        })
    }

    fn clamped_swiglu(gate_up: Tensor<Self, 2>, activation: ClampedSwiGlu) -> Tensor<Self, 2> {
        let gate_up = gate_up.into_primitive().tensor();
        let y = unwrap(B::clamped_swiglu(wrap(gate_up.primitive.clone()), activation));
        wrap(match SwiGlu.prepare::<C>([gate_up.node.clone()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((gate_up.primitive, activation), y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        })
    }

    fn round_activations(x: Tensor<Self, 2>, rotation: Option<Rotation>) -> Tensor<Self, 2> {
        let x = x.into_primitive().tensor();
        let y = unwrap(B::round_activations(wrap(x.primitive), rotation));
        wrap(match RoundActivations.prepare::<C>([x.node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(rotation, y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        })
    }
}

/// The softmax of attention: see [`TernaryBackend::sink_softmax`].
#[derive(Debug)]
struct SinkSoftmax;

impl<B: TernaryBackend> Backward<B, 2> for SinkSoftmax {
    /// The shares, and what the scores were scaled with.
    type State = (FloatTensor<B>, f32);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let (shares, scale) = ops.state;
        let gradient = wrap(grads.consume::<B>(&ops.node));
        let (scores, sinks) = B::sink_softmax_gradient(wrap(shares), gradient, scale);
        let [scores_node, sinks_node] = ops.parents;
        if let Some(node) = scores_node {
            grads.register::<B>(node.id, unwrap(scores));
        }
        if let Some(node) = sinks_node {
            grads.register::<B>(node.id, unwrap(sinks));
        }
    }
}

/// The gate of an expert: see [`crate::clamped_swiglu`].
#[derive(Debug)]
struct SwiGlu;

impl<B: TernaryBackend> Backward<B, 1> for SwiGlu {
    /// What went in, and the constants.
    type State = (FloatTensor<B>, ClampedSwiGlu);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let gradient = wrap(grads.consume::<B>(&ops.node));
        let ((gate_up, activation), [node]) = (ops.state, ops.parents);
        if let Some(node) = node {
            grads.register::<B>(node.id, unwrap(B::clamped_swiglu_gradient(wrap(gate_up), gradient, activation)));
        }
    }
}

/// Activations as a kernel sees them: see [`crate::round_activations`].
#[derive(Debug)]
struct RoundActivations;

impl<B: TernaryBackend> Backward<B, 1> for RoundActivations {
    type State = Option<Rotation>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let gradient = grads.consume::<B>(&ops.node);
        let [node] = ops.parents;
        if let Some(node) = node {
            let gradient = match ops.state {
                Some(rotation) => unwrap(B::rotate_back(wrap(gradient), rotation)),
                None => gradient,
            };
            grads.register::<B>(node.id, gradient);
        }
    }
}

/// `y = sum over planes of f32(total) * (row_scale * s)`.
#[derive(Debug)]
struct TernaryLinear;

impl<B: TernaryBackend> Backward<B, 2> for TernaryLinear {
    /// The node of `x`, the weight and which of its matrices.
    type State = (NodeId, TernaryWeight<B>, usize);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let (x, weight, matrix) = ops.state;
        let grad: Tensor<B, 2> = wrap(grads.consume::<B>(&ops.node));
        let x: Tensor<B, 2> = wrap(checkpointer.retrieve_node_output::<FloatTensor<B>>(x));
        let [x_node, scales_node] = ops.parents;
        if let Some(node) = scales_node {
            grads.register::<B>(node.id, unwrap(row_scale_gradient(x, &weight, matrix, grad.clone())));
        }
        if let Some(node) = x_node {
            grads.register::<B>(node.id, unwrap(input_gradient(grad, weight.to_dense(matrix), weight.layout.rotation)));
        }
    }
}

/// The gradient by `x [tokens, in_features]` from the one by its product with `matrix [rows, in_features]`; the rounding of the
/// activations counts as the identity.
fn input_gradient<B: TernaryBackend>(
    grad: Tensor<B, 2>,
    matrix: Tensor<B, 2>,
    rotation: Option<Rotation>,
) -> Tensor<B, 2> {
    let grad = grad.matmul(matrix);
    match rotation {
        Some(rotation) => B::rotate_back(grad, rotation),
        None => grad,
    }
}

/// A product whose scales are tuned: see [`crate::tuned_linear`].
#[derive(Debug)]
struct TunedLinear;

impl<B: TernaryBackend> Backward<B, 2> for TunedLinear {
    /// The node of `x`, the trits and the scales.
    type State = (NodeId, TernaryWeight<B>, FloatTensor<B>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let (x, trits, scales) = ops.state;
        let grad: Tensor<B, 2> = wrap(grads.consume::<B>(&ops.node));
        let x: Tensor<B, 2> = wrap(checkpointer.retrieve_node_output::<FloatTensor<B>>(x));
        let ([x_node, scales_node], rotation) = (ops.parents, trits.layout.rotation);
        if let Some(node) = scales_node {
            let of_matrix = grad.clone().transpose().matmul(B::round_activations(x, rotation));
            grads.register::<B>(node.id, unwrap(B::scale_gradient(of_matrix, &trits)));
        }
        if let Some(node) = x_node {
            let matrix = B::scaled_trits(&trits, wrap(scales));
            grads.register::<B>(node.id, unwrap(input_gradient(grad, matrix, rotation)));
        }
    }
}

/// `d/d row_scale[p, r] = sum over tokens t of grad[t, r] * total[t, p, r] * s[t]`, zero for the other matrices.
fn row_scale_gradient<B: TernaryBackend>(
    x: Tensor<B, 2>,
    weight: &TernaryWeight<B>,
    matrix: usize,
    grad: Tensor<B, 2>,
) -> Tensor<B, 3> {
    let TernaryLayout { planes, rows, .. } = weight.layout;
    let per_plane = (0..planes).map(|plane| {
        // With row scales of 1 the forward pass gives total * s.
        let part = weight.part([matrix..matrix + 1, plane..plane + 1, 0..rows]);
        let unit = TernaryWeight { row_scales: Tensor::ones_like(&part.row_scales), ..part };
        let totals = B::ternary_linear(x.clone(), &unit, 0);
        (totals * grad.clone()).sum_dim(0).reshape([1, 1, rows])
    });
    let gradient = Tensor::cat(per_plane.collect(), 1);
    let before = weight.row_scales.zeros_like();
    before.slice_assign([matrix..matrix + 1, 0..planes, 0..rows], gradient)
}

/// `y = x * matrix^T` with a matrix that does not learn.
#[derive(Debug)]
struct StoredLinear;

impl<B: TernaryBackend> Backward<B, 1> for StoredLinear {
    type State = StoredMatrix<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let grad = wrap(grads.consume::<B>(&ops.node));
        let [x_node] = ops.parents;
        if let Some(node) = x_node {
            grads.register::<B>(node.id, unwrap(reference::stored_linear_transposed(grad, &ops.state)));
        }
    }
}

fn inner_weight<B: TernaryBackend, C: CheckpointStrategy>(weight: &TernaryWeight<Autodiff<B, C>>) -> TernaryWeight<B> {
    TernaryWeight {
        codes: Tensor::from_primitive(weight.codes.clone().into_primitive()),
        row_scales: wrap(weight.row_scales.clone().into_primitive().tensor().primitive),
        group_scales: weight.group_scales.clone().map(|scales| Tensor::from_primitive(scales.into_primitive())),
        layout: weight.layout,
    }
}

fn inner_matrix<B: TernaryBackend, C: CheckpointStrategy>(matrix: &StoredMatrix<Autodiff<B, C>>) -> StoredMatrix<B> {
    matrix.with_words(Tensor::from_primitive(matrix.words.clone().into_primitive()))
}

fn wrap<B: Backend, const D: usize>(primitive: FloatTensor<B>) -> Tensor<B, D> {
    Tensor::from_primitive(TensorPrimitive::Float(primitive))
}

fn unwrap<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> FloatTensor<B> {
    tensor.into_primitive().tensor()
}
