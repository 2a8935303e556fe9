//! Gradients: the operations on `Autodiff<B>`, run forward by whatever `B` has.
//!
//! `ternary_linear` and `stored_linear` have gradients of their own; `ternary_experts` is composed of them and
//! `sink_attention` of Burn's operations, whose gradients follow.

use burn::tensor::{Int, Tensor, TensorPrimitive, backend::Backend, ops::FloatTensor};
use burn_autodiff::{
    Autodiff, NodeId,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};

use crate::{
    format::{Rotation, TernaryLayout, TernaryWeight, part_of_bytes},
    ops::{ScoreView, StoredMatrix, TernaryBackend},
    reference,
};

impl<B: TernaryBackend, C: CheckpointStrategy> TernaryBackend for Autodiff<B, C> {
    const PROMPT_TOKENS: usize = B::PROMPT_TOKENS;

    fn ternary_linear(x: Tensor<Self, 2>, weight: &TernaryWeight<Self>, matrix: usize) -> Tensor<Self, 2> {
        let x = x.into_primitive().tensor();
        let row_scales = weight.row_scales.clone().into_primitive().tensor();
        let inner = TernaryWeight {
            codes: Tensor::from_primitive(weight.codes.clone().into_primitive()),
            row_scales: wrap(row_scales.primitive.clone()),
            group_scales: weight.group_scales.clone().map(|scales| Tensor::from_primitive(scales.into_primitive())),
            layout: weight.layout,
        };
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
            // The rounding of the activations counts as the identity.
            let grad = grad.matmul(weight.to_dense(matrix));
            let grad = match weight.layout.rotation {
                Some(rotation) => reference::rotate_back(grad, rotation),
                None => grad,
            };
            grads.register::<B>(node.id, unwrap(grad));
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
        let part = [matrix..matrix + 1, plane..plane + 1, 0..rows];
        let unit = TernaryWeight {
            codes: weight.codes.clone().slice(part.clone()),
            row_scales: Tensor::ones_like(&weight.row_scales.clone().slice(part.clone())),
            group_scales: weight.group_scales.clone().map(|scales| part_of_bytes(scales, part)),
            layout: TernaryLayout { matrices: 1, planes: 1, ..weight.layout },
        };
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

fn inner_matrix<B: TernaryBackend, C: CheckpointStrategy>(matrix: &StoredMatrix<Autodiff<B, C>>) -> StoredMatrix<B> {
    matrix.with_words(Tensor::from_primitive(matrix.words.clone().into_primitive()))
}

fn wrap<B: Backend, const D: usize>(primitive: FloatTensor<B>) -> Tensor<B, D> {
    Tensor::from_primitive(TensorPrimitive::Float(primitive))
}

fn unwrap<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> FloatTensor<B> {
    tensor.into_primitive().tensor()
}
