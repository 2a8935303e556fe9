//! GPU backends: kernels in CubeCL, one source for Vulkan, Metal, DirectX, WebGPU and CUDA.
//!
//! They are written for Burn's [`CubeBackend`] without fusion, for which [`Wgpu`] and [`Cuda`] stand here whatever features
//! an app has switched on in Burn itself.

pub mod devices;

use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement};

use crate::ops::TernaryBackend;

/// Vulkan, Metal, DirectX 12 or WebGPU.
#[cfg(feature = "wgpu")]
pub type Wgpu = CubeBackend<burn_wgpu::WgpuRuntime, f32, i32, u32>;

/// NVIDIA's CUDA.
#[cfg(feature = "cuda")]
pub type Cuda = CubeBackend<cubecl::cuda::CudaRuntime, f32, i32, u8>;

impl<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement> TernaryBackend for CubeBackend<R, F, I, BT> {}
