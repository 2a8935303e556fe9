//! Registration of the backends whose tensors lie in this machine's memory: every operation by the kernels.

use burn::tensor::{Int, Tensor};

use crate::{
    format::{Rotation, TernaryWeight},
    ops::{BiasedWeight, LayerCache, ScoreView, Screen, StoredMatrix, TernaryBackend, TernaryExperts},
    plain as host,
};

macro_rules! host_backend {
    ($backend:ty) => {
        impl TernaryBackend for $backend {
            const BATCH_INVARIANT: bool = true;

            fn ternary_linear(x: Tensor<Self, 2>, weight: &TernaryWeight<Self>, matrix: usize) -> Tensor<Self, 2> {
                host::ternary_linear(x, weight, matrix)
            }

            fn ternary_linears(x: Tensor<Self, 2>, linears: &[BiasedWeight<Self>]) -> Vec<Tensor<Self, 2>> {
                host::ternary_linears(x, linears)
            }

            fn norm_linears(
                x: Tensor<Self, 2>,
                gamma: Tensor<Self, 1>,
                epsilon: f64,
                linears: &[BiasedWeight<Self>],
            ) -> Vec<Tensor<Self, 2>> {
                host::norm_linears(x, gamma, epsilon, linears)
            }

            fn rms_norm(x: Tensor<Self, 2>, gamma: Tensor<Self, 1>, epsilon: f64) -> Tensor<Self, 2> {
                host::rms_norm(x, gamma, epsilon)
            }

            fn route(
                x: Tensor<Self, 2>,
                weight: Tensor<Self, 2>,
                bias: Tensor<Self, 1>,
                k: usize,
            ) -> (Tensor<Self, 2, Int>, Tensor<Self, 2>) {
                host::route(x, weight, bias, k)
            }

            fn cached_attention(
                qkv: [Tensor<Self, 2>; 3],
                rope: [Tensor<Self, 2>; 2],
                sinks: Tensor<Self, 1>,
                scale: f32,
                cache: &mut LayerCache<Self>,
            ) -> Tensor<Self, 2> {
                host::cached_attention(qkv, rope, sinks, scale, cache)
            }

            fn session<R>(work: impl FnOnce() -> R) -> R {
                host::session(work)
            }

            fn ternary_experts(
                x: Tensor<Self, 2>,
                chosen: Tensor<Self, 2, Int>,
                weights: Tensor<Self, 2>,
                experts: &TernaryExperts<Self>,
            ) -> Tensor<Self, 2> {
                host::ternary_experts(x, chosen, weights, experts)
            }

            fn stored_linear(x: Tensor<Self, 2>, matrix: &StoredMatrix<Self>) -> Tensor<Self, 2> {
                host::stored_linear(x, matrix)
            }

            fn stored_linear_at(
                x: Tensor<Self, 2>,
                matrix: &StoredMatrix<Self>,
                rows: Tensor<Self, 1, Int>,
            ) -> Tensor<Self, 2> {
                host::stored_linear_at(x, matrix, rows)
            }

            fn screen(matrix: &StoredMatrix<Self>, pause: &mut dyn FnMut()) -> Option<Screen> {
                host::screen(matrix, pause)
            }

            fn stored_rows(matrix: &StoredMatrix<Self>, ids: Tensor<Self, 1, Int>) -> Tensor<Self, 2> {
                host::stored_rows(matrix, ids)
            }

            fn sink_softmax(scores: Tensor<Self, 3>, sinks: Tensor<Self, 1>, view: ScoreView) -> Tensor<Self, 3> {
                host::sink_softmax(scores, sinks, view)
            }

            fn sink_softmax_gradient(
                shares: Tensor<Self, 3>,
                gradient: Tensor<Self, 3>,
                scale: f32,
            ) -> (Tensor<Self, 3>, Tensor<Self, 1>) {
                host::sink_softmax_gradient(shares, gradient, scale)
            }

            fn round_activations(x: Tensor<Self, 2>, rotation: Option<Rotation>) -> Tensor<Self, 2> {
                host::round_activations(x, rotation)
            }

            fn rotate_back(y: Tensor<Self, 2>, rotation: Rotation) -> Tensor<Self, 2> {
                host::rotate_back(y, rotation)
            }

            fn ternary_rows(weight: &TernaryWeight<Self>, matrix: usize, ids: Tensor<Self, 1, Int>) -> Tensor<Self, 2> {
                host::ternary_rows(weight, matrix, ids)
            }
        }
    };
}

#[cfg(feature = "flex")]
host_backend!(burn_flex::Flex);
#[cfg(feature = "ndarray")]
host_backend!(burn_ndarray::NdArray);
