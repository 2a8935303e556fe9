//! GPU backends: kernels in CubeCL, one source for Vulkan, Metal, DirectX, WebGPU and CUDA.
//!
//! They are written for Burn's [`CubeBackend`] without fusion, for which [`Wgpu`] and [`Cuda`] stand here whatever features
//! an app has switched on in Burn itself.

mod buffer;
mod device;
mod linear;
mod tokens;
mod weight;

use burn::tensor::Tensor;
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement, tensor::CubeTensor};

use crate::{
    format::{Rotation, TernaryWeight},
    ops::{BiasedWeight, TernaryBackend},
};
use buffer::{floats, tensor};
use linear::{Matrices, products};
use tokens::{Before, Tokens, quantize};

/// Vulkan, Metal, DirectX 12 or WebGPU.
#[cfg(feature = "wgpu")]
pub type Wgpu = CubeBackend<burn_wgpu::WgpuRuntime, f32, i32, u32>;

/// NVIDIA's CUDA.
#[cfg(feature = "cuda")]
pub type Cuda = CubeBackend<cubecl::cuda::CudaRuntime, f32, i32, u8>;

impl<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement> TernaryBackend for CubeBackend<R, F, I, BT> {
    fn ternary_linear(x: Tensor<Self, 2>, weight: &TernaryWeight<Self>, matrix: usize) -> Tensor<Self, 2> {
        let tokens = quantize(floats(x), Before::Nothing, &weight.layout);
        tensor(products(&tokens, weight, None, Matrices::One(matrix)))
    }

    fn ternary_linears(x: Tensor<Self, 2>, linears: &[BiasedWeight<Self>]) -> Vec<Tensor<Self, 2>> {
        linears_of(floats(x), || Before::Nothing, linears)
    }
}

/// Products of one input with several matrices; weights packed alike share the rounded input.
fn linears_of<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    x: CubeTensor<R>,
    before: impl Fn() -> Before<R>,
    linears: &[BiasedWeight<CubeBackend<R, F, I, BT>>],
) -> Vec<Tensor<CubeBackend<R, F, I, BT>, 2>> {
    let mut rounded: Option<((usize, Option<Rotation>), Tokens<R>)> = None;
    let product = |BiasedWeight { weight, bias }: &BiasedWeight<CubeBackend<R, F, I, BT>>| {
        let key = (weight.layout.packed_inputs(), weight.layout.rotation);
        let tokens = match rounded.take() {
            Some((known, tokens)) if known == key => tokens,
            _ => quantize(x.clone(), before(), &weight.layout),
        };
        rounded = Some((key, tokens.clone()));
        tensor(products(&tokens, weight, bias.clone().map(floats), Matrices::One(0)))
    };
    linears.iter().map(product).collect()
}
