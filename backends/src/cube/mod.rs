//! GPU backends: kernels in CubeCL, one source for Vulkan, Metal, DirectX, WebGPU and CUDA.
//!
//! They are written for Burn's [`CubeBackend`] without fusion, for which `Wgpu` and `Cuda` stand here whatever features
//! an app has switched on in Burn itself.
//!
//! ```
//! # #[cfg(feature = "wgpu")]
//! # {
//! use burn::tensor::Tensor;
//! use ternoss_backends::{cube::{Wgpu, devices::wgpu_devices}, rms_norm};
//!
//! if let Some(gpu) = wgpu_devices().ok().and_then(|gpus| gpus.into_iter().next()) {
//!     let x = Tensor::<Wgpu, 2>::from_data([[3.0, 4.0, 0.0, 0.0]], &gpu.device);
//!     let normed = rms_norm(x, Tensor::ones([4], &gpu.device), 0.0);
//!     normed.into_data().assert_approx_eq::<f32>(&[[1.2, 1.6, 0.0, 0.0]].into(), Default::default());
//! }
//! # }
//! ```

mod attend;
mod attention;
mod attention_parts;
mod attention_tiles;
mod buffer;
mod device;
pub mod devices;
mod experts;
mod few_stage;
mod few_units;
mod largest;
mod linear;
mod matrix_units;
mod operands;
mod ring;
mod rounding;
mod routing;
mod stored;
mod stored_units;
mod tokens;
mod weight;

use std::sync::Arc;

use burn::tensor::{DType, Int, Tensor};
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement, tensor::CubeTensor};
use cubecl::config::{CubeClRuntimeConfig, RuntimeConfig};

use crate::{
    format::TernaryWeight,
    ops::{BiasedWeight, ExpertLayer, LayerCache, StoredMatrix, TernaryBackend, TernaryExperts, layer_by_parts},
    reference::{self, each_alone},
};
use buffer::{float_rows, floats, integers, read, tensor};
use linear::{products, rounded, three_products};
use operands::{Matrices, Term};
use rounding::Before;
use tokens::quantize;

/// Vulkan, Metal, DirectX 12 or WebGPU.
#[cfg(feature = "wgpu")]
pub type Wgpu = CubeBackend<burn_wgpu::WgpuRuntime, f32, i32, u32>;

/// NVIDIA's CUDA.
#[cfg(feature = "cuda")]
pub type Cuda = CubeBackend<cubecl::cuda::CudaRuntime, f32, i32, u8>;

/// Has all threads of this process share one queue of work on a GPU. Call it before a GPU is first used.
///
/// CubeCL 0.10 gives every thread a queue of its own, and what one thread wrote may not be there yet when another one reads
/// it: a calibration, whose threads hand tensors to each other, then meets numbers that are none.
pub fn share_one_queue() {
    let mut config = CubeClRuntimeConfig::get().as_ref().clone();
    config.streaming.max_streams = 1;
    *CubeClRuntimeConfig::storage().lock() = Some(Arc::new(config));
}

/// Elements of a stored matrix that are decoded at a time: 128 MiB.
const DECODED: usize = 32 << 20;
/// Tokens for which they are, where matrix units multiply fewer with the matrix as it is stored.
const DECODED_FOR: usize = 128;

impl<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement> TernaryBackend for CubeBackend<R, F, I, BT> {
    const PROMPT_TOKENS: usize = 2048;

    fn ternary_linear(x: Tensor<Self, 2>, weight: &TernaryWeight<Self>, matrix: usize) -> Tensor<Self, 2> {
        let tokens = quantize(floats(x), Before::Nothing, &weight.layout);
        tensor(products(&tokens, Term { weight, bias: None, residual: None }, Matrices::One(matrix)))
    }

    fn ternary_linears(x: Tensor<Self, 2>, linears: &[BiasedWeight<Self>]) -> Vec<Tensor<Self, 2>> {
        linears_of(floats(x), || Before::Nothing, linears)
    }

    fn norm_linears(
        x: Tensor<Self, 2>,
        gamma: Tensor<Self, 1>,
        epsilon: f64,
        linears: &[BiasedWeight<Self>],
    ) -> Vec<Tensor<Self, 2>> {
        let gamma = floats(gamma);
        linears_of(floats(x), || Before::Norm(gamma.clone(), epsilon as f32), linears)
    }

    fn linear_onto(residual: Tensor<Self, 2>, x: Tensor<Self, 2>, linear: &BiasedWeight<Self>) -> Tensor<Self, 2> {
        let tokens = rounded(floats(x), Before::Nothing, [&linear.weight]);
        let term = Term { residual: Some(floats(residual)), ..term(linear) };
        tensor(products(&tokens, term, Matrices::One(0)))
    }

    fn rms_norm(x: Tensor<Self, 2>, gamma: Tensor<Self, 1>, epsilon: f64) -> Tensor<Self, 2> {
        tensor(routing::rms_norm(floats(x), floats(gamma), epsilon as f32))
    }

    fn route(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 2>,
        bias: Tensor<Self, 1>,
        k: usize,
    ) -> (Tensor<Self, 2, Int>, Tensor<Self, 2>) {
        let inputs = floats(x.clone());
        if !routing::fits(&inputs.client, weight.dims()[1]) {
            return reference::route(x, weight, bias, k);
        }
        let (chosen, weights) = routing::route(inputs, floats(weight), floats(bias), k);
        (Tensor::from_primitive(chosen), tensor(weights))
    }

    fn ternary_experts(
        x: Tensor<Self, 2>,
        chosen: Tensor<Self, 2, Int>,
        weights: Tensor<Self, 2>,
        experts: &TernaryExperts<Self>,
    ) -> Tensor<Self, 2> {
        tensor(experts::experts(floats(x), ids(chosen), floats(weights), experts))
    }

    fn expert_layer(x: Tensor<Self, 2>, layer: &ExpertLayer<Self>) -> Tensor<Self, 2> {
        let inputs = floats(x.clone());
        if !routing::fits(&inputs.client, layer.router.dims()[1]) {
            return layer_by_parts(x, layer);
        }
        tensor(experts::expert_layer(inputs, layer))
    }

    fn stored_linear(x: Tensor<Self, 2>, matrix: &StoredMatrix<Self>) -> Tensor<Self, 2> {
        stored_linear(x, matrix)
    }

    fn stored_linear_at(
        x: Tensor<Self, 2>,
        matrix: &StoredMatrix<Self>,
        rows: Tensor<Self, 1, Int>,
    ) -> Tensor<Self, 2> {
        tensor(stored::linear(floats(x), matrix, Some(ids(rows))))
    }

    fn largest(x: Tensor<Self, 2>, k: usize) -> Option<(Vec<u32>, Vec<f32>)> {
        if k > largest::MOST {
            return None;
        }
        let [places, numbers] = read(largest::largest(floats(x), k).into());
        Some((bytemuck::pod_collect_to_vec(&places), bytemuck::pod_collect_to_vec(&numbers)))
    }

    fn stored_rows(matrix: &StoredMatrix<Self>, rows: Tensor<Self, 1, Int>) -> Tensor<Self, 2> {
        tensor(stored::rows(matrix, ids(rows)))
    }

    fn ternary_rows(weight: &TernaryWeight<Self>, matrix: usize, rows: Tensor<Self, 1, Int>) -> Tensor<Self, 2> {
        tensor(stored::ternary_rows(weight, matrix, ids(rows)))
    }

    fn cached_attention(
        qkv: [Tensor<Self, 2>; 3],
        rope: [Tensor<Self, 2>; 2],
        sinks: Tensor<Self, 1>,
        scale: f32,
        caches: &mut [&mut LayerCache<Self>],
    ) -> Tensor<Self, 2> {
        let attend = |qkv: [_; 3], rope: [_; 2], caches: &mut [&mut _]| {
            tensor(attention::attention(qkv.map(floats), rope.map(floats), floats(sinks.clone()), scale, caches))
        };
        let [tokens, width] = qkv[1].dims();
        let most = qkv[1].clone().into_primitive().tensor().client.properties().memory.max_page_size;
        if attention::takes_together(caches, tokens / caches.len(), width, most) {
            attend(qkv, rope, caches)
        } else {
            each_alone(qkv, rope, caches, |qkv, rope, cache| attend(qkv, rope, &mut [cache]))
        }
    }
}

/// Indices as the kernels take them.
fn ids<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement, const D: usize>(
    ids: Tensor<CubeBackend<R, F, I, BT>, D, Int>,
) -> CubeTensor<R> {
    integers(if ids.dtype() == DType::I32 { ids } else { ids.cast(DType::I32) })
}

/// [`stored_linear`](crate::stored_linear): products one by one for a token, on matrix units for several, where a device has
/// them, and for many, whose rows are worth being decoded, Burn's product with some of the rows at a time.
fn stored_linear<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    x: Tensor<CubeBackend<R, F, I, BT>, 2>,
    matrix: &StoredMatrix<CubeBackend<R, F, I, BT>>,
) -> Tensor<CubeBackend<R, F, I, BT>, 2> {
    let tokens = x.dims()[0];
    if (2..DECODED_FOR).contains(&tokens) {
        let x = floats(x.clone());
        if stored_units::take(&x.client, matrix) {
            return tensor(stored_units::linear(x, matrix));
        }
    }
    if !linear::is_tiled(tokens) || matrix.rows() == 0 {
        return tensor(stored::linear(floats(x), matrix, None));
    }
    let (step, device) = ((DECODED / matrix.columns()).max(1), x.device());
    let products = (0..matrix.rows()).step_by(step).map(|start| {
        let end = (start + step).min(matrix.rows());
        let rows = Tensor::<CubeBackend<R, F, I, BT>, 1, Int>::arange(start as i64..end as i64, &device);
        let decoded: Tensor<_, 2> = tensor(stored::rows(matrix, ids(rows)));
        x.clone().matmul(decoded.transpose())
    });
    Tensor::cat(products.collect(), 1)
}

/// A weight with its bias.
fn term<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    linear: &BiasedWeight<CubeBackend<R, F, I, BT>>,
) -> Term<'_, R, F, I, BT> {
    let bias = linear.bias.clone().map(|bias| float_rows(bias).holding(1, linear.weight.layout.rows));
    Term { weight: &linear.weight, bias, residual: None }
}

/// Products of one input with several matrices; weights packed alike share the rounded input.
fn linears_of<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    x: CubeTensor<R>,
    before: impl Fn() -> Before<R>,
    linears: &[BiasedWeight<CubeBackend<R, F, I, BT>>],
) -> Vec<Tensor<CubeBackend<R, F, I, BT>, 2>> {
    // What rounded tokens depend on.
    let key = |linear: &BiasedWeight<_>| (linear.weight.layout.packed_inputs(), linear.weight.layout.rotation);
    let alike = linears.chunk_by(|a, b| key(a) == key(b)).flat_map(|alike| {
        let tokens = rounded(x.clone(), before(), alike.iter().map(|linear| &linear.weight));
        match alike {
            [a, b, c] => three_products(&tokens, [a, b, c].map(term)).to_vec(),
            _ => alike.iter().map(|linear| products(&tokens, term(linear), Matrices::One(0))).collect(),
        }
    });
    alike.map(tensor).collect()
}
