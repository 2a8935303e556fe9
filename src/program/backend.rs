//! What a command computes on: `--backend`, and the one place where its name becomes a type.

use std::{
    fmt,
    panic::{self, AssertUnwindSafe},
    sync::{Mutex, PoisonError},
};

use clap::{Args, ValueEnum};
#[cfg(feature = "cuda")]
use ternoss::backends::cube::devices::cuda_devices;
#[cfg(feature = "wgpu")]
use ternoss::backends::cube::devices::wgpu_devices;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
use ternoss::backends::cube::{
    devices::{DeviceError, Gpu},
    share_one_queue,
};

/// What `--backend` takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Backend {
    /// A GPU if there is one and this program was built for it, else flex
    #[default]
    Auto,
    /// The processor, with Burn's Flex
    Flex,
    /// The processor, with Burn's NdArray
    Ndarray,
    /// A GPU by Vulkan, Metal or DirectX
    Wgpu,
    /// An NVIDIA GPU by CUDA
    Cuda,
}

impl Backend {
    /// All but [`Auto`](Self::Auto).
    pub(crate) const ALL: [Self; 4] = [Self::Flex, Self::Ndarray, Self::Wgpu, Self::Cuda];
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::Auto => "auto",
            Self::Flex => "flex",
            Self::Ndarray => "ndarray",
            Self::Wgpu => "wgpu",
            Self::Cuda => "cuda",
        };
        f.write_str(name)
    }
}

/// The option.
#[derive(Args, Clone, Copy, Debug, Default)]
pub(crate) struct BackendArgs {
    /// What computes; `ternoss devices` lists what there is. A GPU that is none but a program does not count for auto
    #[arg(long, value_enum, default_value_t = Backend::Auto, hide_possible_values = true, value_name = "auto|flex|ndarray|wgpu|cuda")]
    pub(crate) backend: Backend,
}

/// A device that is there, as it is listed.
pub(crate) enum Found {
    Processor,
    #[cfg_attr(not(any(feature = "wgpu", feature = "cuda")), allow(dead_code, reason = "no GPU was built in"))]
    Gpu {
        name: String,
        api: &'static str,
        driver: String,
        memory: Option<u64>,
        largest_tensor: Option<u64>,
        software: bool,
    },
}

impl Found {
    /// What it is called.
    pub(crate) fn into_name(self) -> String {
        match self {
            Self::Processor => "processor".into(),
            Self::Gpu { name, .. } => name,
        }
    }
}

#[cfg(any(feature = "wgpu", feature = "cuda"))]
impl<D> From<Gpu<D>> for Found {
    fn from(gpu: Gpu<D>) -> Self {
        let Gpu { name, api, driver, memory, largest_tensor, software, .. } = gpu;
        Self::Gpu { name, api, driver, memory, largest_tensor, software }
    }
}

/// A backend with a device that is there.
pub(crate) enum Chosen {
    Flex,
    Ndarray,
    #[cfg(feature = "wgpu")]
    Wgpu(Gpu<burn::tensor::Device<ternoss::backends::cube::Wgpu>>),
    #[cfg(feature = "cuda")]
    Cuda(Gpu<burn::tensor::Device<ternoss::backends::cube::Cuda>>),
}

/// A backend that cannot be used, and why.
#[derive(Debug, thiserror::Error)]
#[error("--backend {backend}: {reason}")]
pub(crate) struct Unavailable {
    pub(crate) backend: Backend,
    #[source]
    pub(crate) reason: Reason,
}

/// Why a backend cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Reason {
    #[error("this program was built without it")]
    #[cfg_attr(all(feature = "wgpu", feature = "cuda"), allow(dead_code, reason = "both were built in"))]
    NotCompiled,
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("the backend failed: {message}")]
    Failed { message: String },
}

impl Unavailable {
    /// What to do about it.
    pub(crate) fn hint(&self) -> &'static str {
        match (&self.reason, self.backend) {
            (Reason::NotCompiled, Backend::Cuda) => "build it with `cargo build --release --features cuda`",
            (Reason::NotCompiled, _) => "build it with `cargo build --release --features wgpu`",
            #[cfg(any(feature = "wgpu", feature = "cuda"))]
            (Reason::Device(DeviceError::NoCompiler { .. }), _) => {
                "install NVIDIA's CUDA toolkit, or take another --backend"
            }
            (Reason::Failed { .. }, _) => "`ternoss devices` shows how much memory it has; take another --backend",
            #[cfg(any(feature = "wgpu", feature = "cuda"))]
            (_, Backend::Cuda) => "install NVIDIA's driver, or take another --backend",
            #[cfg(any(feature = "wgpu", feature = "cuda"))]
            _ => "install the GPU's driver (on Linux its Vulkan package), or take another --backend",
        }
    }
}

impl Backend {
    /// Finds a device for it.
    ///
    /// # Errors
    /// [`Unavailable`] if there is none.
    pub(crate) fn choose(self) -> Result<Chosen, Unavailable> {
        match self {
            Self::Auto => Ok(automatic()),
            Self::Flex => Ok(Chosen::Flex),
            Self::Ndarray => Ok(Chosen::Ndarray),
            Self::Wgpu => wgpu().map_err(|reason| Unavailable { backend: self, reason }),
            Self::Cuda => cuda().map_err(|reason| Unavailable { backend: self, reason }),
        }
    }

    /// Bytes of the device's own memory, where it has any and they are known.
    pub(crate) fn device_memory(self) -> Option<u64> {
        let backend = if self == Self::Auto { automatic().backend() } else { self };
        match backend.found().ok()?.into_iter().next()? {
            Found::Processor => None,
            Found::Gpu { memory, .. } => memory,
        }
    }

    /// Its devices, the best first.
    ///
    /// # Errors
    /// [`Unavailable`] if there is none.
    pub(crate) fn found(self) -> Result<Vec<Found>, Unavailable> {
        let found = match self {
            Self::Auto | Self::Flex | Self::Ndarray => Ok(vec![Found::Processor]),
            #[cfg(feature = "wgpu")]
            Self::Wgpu => wgpu_devices().map(listed).map_err(Reason::from),
            #[cfg(feature = "cuda")]
            Self::Cuda => cuda_devices().map(listed).map_err(Reason::from),
            #[cfg(not(all(feature = "wgpu", feature = "cuda")))]
            _ => Err(Reason::NotCompiled),
        };
        found.map_err(|reason| Unavailable { backend: self, reason })
    }
}

#[cfg(any(feature = "wgpu", feature = "cuda"))]
fn listed<D>(gpus: Vec<Gpu<D>>) -> Vec<Found> {
    gpus.into_iter().map(Found::from).collect()
}

impl Chosen {
    /// Its name.
    pub(crate) fn backend(&self) -> Backend {
        match self {
            Self::Flex => Backend::Flex,
            Self::Ndarray => Backend::Ndarray,
            #[cfg(feature = "wgpu")]
            Self::Wgpu(_) => Backend::Wgpu,
            #[cfg(feature = "cuda")]
            Self::Cuda(_) => Backend::Cuda,
        }
    }
}

/// The best there is: CUDA, another GPU, the processor.
fn automatic() -> Chosen {
    #[cfg(feature = "cuda")]
    if let Ok(chosen) = cuda() {
        return chosen;
    }
    #[cfg(feature = "wgpu")]
    if may_have_gpu()
        && let Ok(chosen @ Chosen::Wgpu(Gpu { software: false, .. })) = wgpu()
    {
        return chosen;
    }
    Chosen::Flex
}

/// Whether it is worth asking drivers, which takes them a while, and some of them complain on stderr that there is no display.
#[cfg(feature = "wgpu")]
fn may_have_gpu() -> bool {
    let nodes = ["/dev/dri", "/dev/nvidiactl", "/dev/dxg"];
    cfg!(not(target_os = "linux")) || nodes.iter().any(|node| std::path::Path::new(node).exists())
}

#[cfg(feature = "wgpu")]
fn wgpu() -> Result<Chosen, Reason> {
    let found = wgpu_devices()?;
    share_one_queue();
    found.into_iter().next().map(Chosen::Wgpu).ok_or(Reason::Device(DeviceError::NoDevice { api: "wgpu" }))
}

#[cfg(not(feature = "wgpu"))]
fn wgpu() -> Result<Chosen, Reason> {
    Err(Reason::NotCompiled)
}

#[cfg(feature = "cuda")]
fn cuda() -> Result<Chosen, Reason> {
    let found = cuda_devices()?;
    share_one_queue();
    found.into_iter().next().map(Chosen::Cuda).ok_or(Reason::Device(DeviceError::NoDevice { api: "CUDA" }))
}

#[cfg(not(feature = "cuda"))]
fn cuda() -> Result<Chosen, Reason> {
    Err(Reason::NotCompiled)
}

/// Calls a function that is generic over the backend with the one that was chosen: `on_backend!(backend, work(&args))` is
/// `work::<B>(&args, &device)` for that backend's type and device.
macro_rules! on_backend {
    ($backend:expr, $work:ident($($argument:expr),*)) => {
        match $backend.choose()? {
            $crate::program::backend::Chosen::Flex => $work::<ternoss::Cpu>($($argument,)* &Default::default()),
            $crate::program::backend::Chosen::Ndarray => $work::<ternoss::NdArray>($($argument,)* &Default::default()),
            #[cfg(feature = "wgpu")]
            $crate::program::backend::Chosen::Wgpu(gpu) => $crate::program::backend::guarded($crate::program::backend::Backend::Wgpu, || {
                $work::<ternoss::backends::cube::Wgpu>($($argument,)* &gpu.device)
            }),
            #[cfg(feature = "cuda")]
            $crate::program::backend::Chosen::Cuda(gpu) => $crate::program::backend::guarded($crate::program::backend::Backend::Cuda, || {
                $work::<ternoss::backends::cube::Cuda>($($argument,)* &gpu.device)
            }),
        }
    };
}

/// Runs work on a backend that may panic, as CubeCL does where memory runs out or a device is lost: that becomes an error of
/// one line.
pub(crate) fn guarded<T>(backend: Backend, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    // The first panic tells the cause, those that follow on other threads do not.
    static FIRST: Mutex<Option<String>> = Mutex::new(None);
    let before = panic::take_hook();
    panic::set_hook(Box::new(|panic| {
        let message = panic.payload_as_str().unwrap_or("unknown").lines().next().unwrap_or_default();
        FIRST.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| message.into());
    }));
    let result = panic::catch_unwind(AssertUnwindSafe(work));
    panic::set_hook(before);
    result.unwrap_or_else(|_| {
        let first = FIRST.lock().unwrap_or_else(PoisonError::into_inner).take();
        let message = first.unwrap_or_else(|| "for no known reason".into());
        Err(Unavailable { backend, reason: Reason::Failed { message } }.into())
    })
}
