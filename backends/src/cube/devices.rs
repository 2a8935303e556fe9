//! The GPUs of this machine, as their drivers describe them. Ask before anything is computed: where there is no device,
//! CubeCL panics.
//!
//! ```
//! # #[cfg(feature = "wgpu")]
//! match ternoss_backends::cube::devices::wgpu_devices() {
//!     Ok(gpus) => gpus.iter().for_each(|gpu| println!("{} by {}, {}", gpu.name, gpu.api, gpu.driver)),
//!     Err(reason) => println!("none: {reason}"),
//! }
//! ```
#![allow(unsafe_code)]

/// A GPU, or a program that stands for one.
#[derive(Clone, Debug)]
pub struct Gpu<D> {
    /// As the driver names it.
    pub name: String,
    /// How it is spoken to, such as Vulkan or CUDA.
    pub api: &'static str,
    /// The driver and its version.
    pub driver: String,
    /// Bytes of its own memory, where that is known.
    pub memory: Option<u64>,
    /// Bytes of the largest tensor that it takes, where that is known.
    pub largest_tensor: Option<u64>,
    /// Whether the processor does the work.
    pub software: bool,
    /// What Burn calls it.
    pub device: D,
}

/// Why no GPU can be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// Nothing on this machine speaks to GPUs.
    #[error("no {api} driver on this machine")]
    NoDriver {
        /// How devices are spoken to.
        api: &'static str,
    },
    /// A driver has no device.
    #[error("no {api} device on this machine")]
    NoDevice {
        /// How devices are spoken to.
        api: &'static str,
    },
    /// The driver answers with an error.
    #[error("the {api} driver says {message}")]
    Driver {
        /// How devices are spoken to.
        api: &'static str,
        /// Its own words.
        message: String,
    },
    /// Kernels cannot be compiled.
    #[error("{missing} is missing: kernels are compiled on this machine")]
    NoCompiler {
        /// A part of the toolkit.
        missing: &'static str,
    },
}

#[cfg(feature = "wgpu")]
pub use self::wgpu_devices::wgpu_devices;

#[cfg(feature = "wgpu")]
mod wgpu_devices {
    use burn_wgpu::{WgpuDevice, graphics::AutoGraphicsApi, graphics::GraphicsApi};
    use wgpu::{Adapter, DeviceType};

    use super::{DeviceError, Gpu};

    // One wgpu, CubeCL's: another version would look for other devices.
    const _: fn(burn_wgpu::WgpuSetup) -> Adapter = |setup| setup.adapter;

    /// The devices of the interface that the [`Wgpu`](crate::cube::Wgpu) backend uses on this system, the best first:
    /// discrete, integrated, virtual, software.
    ///
    /// # Errors
    /// [`DeviceError`] if there is none.
    pub fn wgpu_devices() -> Result<Vec<Gpu<WgpuDevice>>, DeviceError> {
        let backend = AutoGraphicsApi::backend();
        let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
            backends: backend.into(),
            ..wgpu::InstanceDescriptor::new_without_display_handle()
        });
        let adapters = cubecl::future::block_on(instance.enumerate_adapters(backend.into()));
        // Devices are counted by their kind, in the order of the driver.
        let mut counts = [0; 3];
        let mut found: Vec<_> = adapters.iter().map(|adapter| gpu(adapter, &mut counts)).collect();
        if found.is_empty() {
            let api = name(backend);
            return Err(if has_driver(&instance) {
                DeviceError::NoDevice { api }
            } else {
                DeviceError::NoDriver { api }
            });
        }
        found.sort_by_key(|gpu| rank(&gpu.device));
        Ok(found)
    }

    fn gpu(adapter: &Adapter, counts: &mut [usize; 3]) -> Gpu<WgpuDevice> {
        let info = adapter.get_info();
        let mut next = |kind: usize| {
            counts[kind] += 1;
            counts[kind] - 1
        };
        let device = match info.device_type {
            DeviceType::DiscreteGpu => WgpuDevice::DiscreteGpu(next(0)),
            DeviceType::IntegratedGpu => WgpuDevice::IntegratedGpu(next(1)),
            DeviceType::VirtualGpu => WgpuDevice::VirtualGpu(next(2)),
            DeviceType::Cpu => WgpuDevice::Cpu,
            DeviceType::Other => WgpuDevice::DefaultDevice,
        };
        let driver = [info.driver, info.driver_info].join(" ").trim().to_string();
        Gpu {
            name: info.name,
            api: name(info.backend),
            driver,
            memory: vulkan_memory(adapter),
            largest_tensor: Some(adapter.limits().max_storage_buffer_binding_size),
            software: info.device_type == DeviceType::Cpu,
            device,
        }
    }

    fn rank(device: &WgpuDevice) -> u8 {
        match device {
            WgpuDevice::DiscreteGpu(_) => 0,
            WgpuDevice::IntegratedGpu(_) => 1,
            WgpuDevice::VirtualGpu(_) => 2,
            WgpuDevice::Cpu => 4,
            _ => 3,
        }
    }

    fn name(backend: wgpu::Backend) -> &'static str {
        match backend {
            wgpu::Backend::Vulkan => "Vulkan",
            wgpu::Backend::Metal => "Metal",
            wgpu::Backend::Dx12 => "DirectX 12",
            wgpu::Backend::Gl => "OpenGL",
            wgpu::Backend::BrowserWebGpu => "WebGPU",
            wgpu::Backend::Noop => "no-op",
        }
    }

    /// Whether some driver answered at all.
    #[cfg(target_os = "linux")]
    fn has_driver(instance: &wgpu::Instance) -> bool {
        // SAFETY: the driver's own instance is not used, only whether there is one.
        unsafe { instance.as_hal::<wgpu::hal::api::Vulkan>() }.is_some()
    }

    #[cfg(not(target_os = "linux"))]
    fn has_driver(_: &wgpu::Instance) -> bool {
        true
    }

    /// Bytes of the largest heap that belongs to the device.
    #[cfg(target_os = "linux")]
    fn vulkan_memory(adapter: &Adapter) -> Option<u64> {
        const DEVICE_LOCAL: u32 = 1;
        // SAFETY: nothing of the driver's adapter is changed or given back; it is only asked, while `adapter` is alive.
        let vulkan = unsafe { adapter.as_hal::<wgpu::hal::api::Vulkan>() }?;
        let instance = vulkan.shared_instance().raw_instance();
        // SAFETY: the physical device is one of this very instance, and both live as long as `vulkan`.
        let memory = unsafe { instance.get_physical_device_memory_properties(vulkan.raw_physical_device()) };
        let heaps = memory.memory_heaps.iter().take(memory.memory_heap_count as usize);
        heaps.filter(|heap| heap.flags.as_raw() & DEVICE_LOCAL != 0).map(|heap| heap.size).max()
    }

    #[cfg(not(target_os = "linux"))]
    fn vulkan_memory(_: &Adapter) -> Option<u64> {
        None
    }
}

#[cfg(feature = "cuda")]
pub use self::cuda_devices::cuda_devices;

#[cfg(feature = "cuda")]
mod cuda_devices {
    use burn_cuda::CudaDevice;
    use cudarc::{
        driver::{DriverError, result, sys},
        nvrtc,
    };

    use super::{DeviceError, Gpu};

    const API: &str = "CUDA";

    /// NVIDIA's GPUs, in the order of the driver.
    ///
    /// # Errors
    /// [`DeviceError`] if there is none, or if kernels cannot be compiled for it.
    pub fn cuda_devices() -> Result<Vec<Gpu<CudaDevice>>, DeviceError> {
        // SAFETY: this loads a library by its name, if there is one, and lets it go; CubeCL loads the same one later.
        if !unsafe { sys::is_culib_present() } {
            return Err(DeviceError::NoDriver { api: API });
        }
        result::init().map_err(failed)?;
        let count = result::device::get_count().map_err(failed)?;
        let found: Vec<_> = (0..count).map(gpu).collect::<Result<_, _>>()?;
        if found.is_empty() {
            return Err(DeviceError::NoDevice { api: API });
        }
        // SAFETY: as above.
        if !unsafe { nvrtc::sys::is_culib_present() } {
            return Err(DeviceError::NoCompiler { missing: "libnvrtc" });
        }
        if cubecl::cuda::install::cuda_path().is_none() {
            return Err(DeviceError::NoCompiler { missing: "the CUDA toolkit (CUDA_PATH)" });
        }
        Ok(found)
    }

    fn gpu(index: i32) -> Result<Gpu<CudaDevice>, DeviceError> {
        let device = result::device::get(index).map_err(failed)?;
        // SAFETY: the device is one that the driver has just named.
        let memory = unsafe { result::device::total_mem(device) }.map_err(failed)? as u64;
        Ok(Gpu {
            name: result::device::get_name(device).map_err(failed)?,
            api: API,
            driver: driver()?,
            memory: Some(memory),
            // CubeCL's limit for one page of its pool.
            largest_tensor: Some(memory / 4),
            software: false,
            device: CudaDevice::new(index as usize),
        })
    }

    /// The newest version of CUDA that the driver can run.
    fn driver() -> Result<String, DeviceError> {
        let mut version = 0;
        // SAFETY: the pointer is to a number of this function, to which the driver writes.
        unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(failed)?;
        Ok(format!("for CUDA {}.{}", version / 1000, version % 1000 / 10))
    }

    fn failed(error: DriverError) -> DeviceError {
        let message = format!("{:?}", error.0);
        match error.0 {
            sys::CUresult::CUDA_ERROR_NO_DEVICE => DeviceError::NoDevice { api: API },
            _ => DeviceError::Driver { api: API, message },
        }
    }
}
