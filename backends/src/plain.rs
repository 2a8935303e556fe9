//! The operations of the processor's backends, by kernels unless they are switched off: what they are worth is measured by
//! running the same model by Burn's own operations.

use std::sync::atomic::{AtomicBool, Ordering};

use burn::tensor::{Int, Tensor};

pub(crate) use crate::host::*;
use crate::{
    cpu,
    format::{Rotation, TernaryWeight},
    host,
    ops::{BiasedWeight, LayerCache, ScoreView, Screen, StoredMatrix, TernaryExperts},
    reference,
};

/// For the whole process: caches of keys and values are not laid out the same.
static SWITCHED_OFF: AtomicBool = AtomicBool::new(false);

/// Switches the kernels off for the rest of this process, before any model is loaded. Every operation is then computed by the
/// [`reference`](mod@crate::reference).
pub fn switch_kernels_off() {
    SWITCHED_OFF.store(true, Ordering::Relaxed);
}

fn is_plain() -> bool {
    SWITCHED_OFF.load(Ordering::Relaxed)
}

macro_rules! switched {
    ($(fn $name:ident($($argument:ident: $type:ty),*) -> $result:ty;)*) => {
        $(pub(crate) fn $name<B: HostBackend>($($argument: $type),*) -> $result {
            if is_plain() { reference::$name($($argument),*) } else { host::$name($($argument),*) }
        })*
    };
}

switched! {
    fn ternary_linear(x: Tensor<B, 2>, weight: &TernaryWeight<B>, matrix: usize) -> Tensor<B, 2>;
    fn rms_norm(x: Tensor<B, 2>, gamma: Tensor<B, 1>, epsilon: f64) -> Tensor<B, 2>;
    fn route(x: Tensor<B, 2>, weight: Tensor<B, 2>, bias: Tensor<B, 1>, k: usize) -> (Tensor<B, 2, Int>, Tensor<B, 2>);
    fn cached_attention(
        qkv: [Tensor<B, 2>; 3],
        rope: [Tensor<B, 2>; 2],
        sinks: Tensor<B, 1>,
        scale: f32,
        cache: &mut LayerCache<B>
    ) -> Tensor<B, 2>;
    fn ternary_experts(
        x: Tensor<B, 2>,
        chosen: Tensor<B, 2, Int>,
        weights: Tensor<B, 2>,
        experts: &TernaryExperts<B>
    ) -> Tensor<B, 2>;
    fn stored_linear(x: Tensor<B, 2>, matrix: &StoredMatrix<B>) -> Tensor<B, 2>;
    fn stored_linear_at(x: Tensor<B, 2>, matrix: &StoredMatrix<B>, rows: Tensor<B, 1, Int>) -> Tensor<B, 2>;
    fn stored_rows(matrix: &StoredMatrix<B>, ids: Tensor<B, 1, Int>) -> Tensor<B, 2>;
    fn sink_softmax(scores: Tensor<B, 3>, sinks: Tensor<B, 1>, view: ScoreView) -> Tensor<B, 3>;
    fn sink_softmax_gradient(
        shares: Tensor<B, 3>,
        gradient: Tensor<B, 3>,
        scale: f32
    ) -> (Tensor<B, 3>, Tensor<B, 1>);
    fn round_activations(x: Tensor<B, 2>, rotation: Option<Rotation>) -> Tensor<B, 2>;
    fn rotate_back(y: Tensor<B, 2>, rotation: Rotation) -> Tensor<B, 2>;
    fn ternary_rows(weight: &TernaryWeight<B>, matrix: usize, ids: Tensor<B, 1, Int>) -> Tensor<B, 2>;
}

pub(crate) fn ternary_linears<B: HostBackend>(x: Tensor<B, 2>, linears: &[BiasedWeight<B>]) -> Vec<Tensor<B, 2>> {
    if is_plain() { reference::ternary_linears(x, linears) } else { host::ternary_linears(x, linears) }
}

pub(crate) fn screen<B: HostBackend>(matrix: &StoredMatrix<B>, pause: &mut dyn FnMut()) -> Option<Screen> {
    if is_plain() { None } else { host::screen(matrix, pause) }
}

pub(crate) fn session<R>(work: impl FnOnce() -> R) -> R {
    if is_plain() { work() } else { cpu::session(work) }
}
