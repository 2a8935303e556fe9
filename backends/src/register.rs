//! Registration of the backends whose tensors lie in this machine's memory: every operation by the kernels, unless they are
//! switched off.

use std::sync::atomic::{AtomicBool, Ordering};

use burn::tensor::{Int, Tensor};

use crate::{
    cpu,
    format::{Rotation, TernaryWeight},
    host,
    ops::{BiasedWeight, ClampedSwiGlu, LayerCache, ScoreView, Screen, StoredMatrix, TernaryBackend, TernaryExperts},
    reference,
};

/// For the whole process: caches of keys and values are not laid out the same.
static SWITCHED_OFF: AtomicBool = AtomicBool::new(false);

/// Switches the kernels of the processor's backends off for the rest of this process, before any model is loaded, so that the
/// same model can be measured without them. Every operation is then computed by the [`reference`](mod@crate::reference), which
/// does not give a token the same bits in every batch.
pub fn switch_kernels_off() {
    SWITCHED_OFF.store(true, Ordering::Relaxed);
}

fn is_plain() -> bool {
    SWITCHED_OFF.load(Ordering::Relaxed)
}

/// Operations by the kernel of that name, or by the reference of that name.
macro_rules! operations {
    ($(fn $name:ident($($argument:ident: $type:ty),* $(,)?) -> $result:ty;)*) => {
        $(fn $name($($argument: $type),*) -> $result {
            if is_plain() { reference::$name($($argument),*) } else { host::$name($($argument),*) }
        })*
    };
}

macro_rules! host_backend {
    ($backend:ty) => {
        impl TernaryBackend for $backend {
            const BATCH_INVARIANT: bool = true;

            operations! {
                fn ternary_linear(x: Tensor<Self, 2>, weight: &TernaryWeight<Self>, matrix: usize) -> Tensor<Self, 2>;
                fn scaled_trits(trits: &TernaryWeight<Self>, scales: Tensor<Self, 3>) -> Tensor<Self, 2>;
                fn scale_gradient(of_matrix: Tensor<Self, 2>, trits: &TernaryWeight<Self>) -> Tensor<Self, 3>;
                fn ternary_linears(x: Tensor<Self, 2>, linears: &[BiasedWeight<Self>]) -> Vec<Tensor<Self, 2>>;
                fn norm_linears(
                    x: Tensor<Self, 2>,
                    gamma: Tensor<Self, 1>,
                    epsilon: f64,
                    linears: &[BiasedWeight<Self>],
                ) -> Vec<Tensor<Self, 2>>;
                fn rms_norm(x: Tensor<Self, 2>, gamma: Tensor<Self, 1>, epsilon: f64) -> Tensor<Self, 2>;
                fn route(
                    x: Tensor<Self, 2>,
                    weight: Tensor<Self, 2>,
                    bias: Tensor<Self, 1>,
                    k: usize,
                ) -> (Tensor<Self, 2, Int>, Tensor<Self, 2>);
                fn cached_attention(
                    qkv: [Tensor<Self, 2>; 3],
                    rope: [Tensor<Self, 2>; 2],
                    sinks: Tensor<Self, 1>,
                    scale: f32,
                    caches: &mut [&mut LayerCache<Self>],
                ) -> Tensor<Self, 2>;
                fn ternary_experts(
                    x: Tensor<Self, 2>,
                    chosen: Tensor<Self, 2, Int>,
                    weights: Tensor<Self, 2>,
                    experts: &TernaryExperts<Self>,
                ) -> Tensor<Self, 2>;
                fn clamped_swiglu(gate_up: Tensor<Self, 2>, activation: ClampedSwiGlu) -> Tensor<Self, 2>;
                fn clamped_swiglu_gradient(
                    gate_up: Tensor<Self, 2>,
                    gradient: Tensor<Self, 2>,
                    activation: ClampedSwiGlu,
                ) -> Tensor<Self, 2>;
                fn stored_linear(x: Tensor<Self, 2>, matrix: &StoredMatrix<Self>) -> Tensor<Self, 2>;
                fn stored_linear_at(
                    x: Tensor<Self, 2>,
                    matrix: &StoredMatrix<Self>,
                    rows: Tensor<Self, 1, Int>,
                ) -> Tensor<Self, 2>;
                fn stored_rows(matrix: &StoredMatrix<Self>, ids: Tensor<Self, 1, Int>) -> Tensor<Self, 2>;
                fn sink_softmax(scores: Tensor<Self, 3>, sinks: Tensor<Self, 1>, view: ScoreView) -> Tensor<Self, 3>;
                fn sink_softmax_gradient(
                    shares: Tensor<Self, 3>,
                    gradient: Tensor<Self, 3>,
                    scale: f32,
                ) -> (Tensor<Self, 3>, Tensor<Self, 1>);
                fn round_activations(x: Tensor<Self, 2>, rotation: Option<Rotation>) -> Tensor<Self, 2>;
                fn rotate_back(y: Tensor<Self, 2>, rotation: Rotation) -> Tensor<Self, 2>;
                fn ternary_rows(weight: &TernaryWeight<Self>, matrix: usize, ids: Tensor<Self, 1, Int>) -> Tensor<Self, 2>;
            }

            fn screen(matrix: &StoredMatrix<Self>, pause: &mut dyn FnMut()) -> Option<Screen> {
                if is_plain() { None } else { host::screen(matrix, pause) }
            }

            fn session<R>(work: impl FnOnce() -> R) -> R {
                if is_plain() { work() } else { cpu::session(work) }
            }
        }
    };
}

#[cfg(feature = "flex")]
host_backend!(burn_flex::Flex);
#[cfg(feature = "ndarray")]
host_backend!(burn_ndarray::NdArray);
