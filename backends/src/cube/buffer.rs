//! Burn tensors as the arrays that kernels take.

use std::{any::TypeId, cell::RefCell, collections::HashMap, hint::spin_loop, sync::mpsc};

use burn::tensor::{DType, Int, Shape, Tensor, TensorMetadata, TensorPrimitive};
use burn_cubecl::{
    BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement, kernel::into_contiguous,
    ops::numeric::empty_device_contiguous_dtype, tensor::CubeTensor,
};
use cubecl::{
    bytes::Bytes,
    device::{Device, DeviceId},
    device_handle::DeviceHandle,
    future::block_on,
    server::{ComputeServer, CopyDescriptor, Handle},
    stream_id::StreamId,
};

/// The elements of a float tensor, in order.
pub(super) fn floats<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement, const D: usize>(
    tensor: Tensor<CubeBackend<R, F, I, BT>, D>,
) -> CubeTensor<R> {
    in_order(tensor.into_primitive().tensor())
}

/// The elements of an integer tensor, in order.
pub(super) fn integers<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement, const D: usize>(
    tensor: Tensor<CubeBackend<R, F, I, BT>, D, Int>,
) -> CubeTensor<R> {
    in_order(tensor.into_primitive())
}

fn in_order<R: CubeRuntime>(tensor: CubeTensor<R>) -> CubeTensor<R> {
    let (shape, strides) = (tensor.meta.shape(), tensor.meta.strides());
    // A single row is in order wherever the next one would begin.
    let mut next = 1;
    let ordered = shape.iter().zip(strides.iter()).rev().all(|(size, stride)| {
        let fits = *size == 1 || *stride == next;
        next *= size;
        fits
    });
    if ordered {
        let shape = shape.clone();
        CubeTensor::new_contiguous(tensor.client, tensor.device, shape, tensor.handle, tensor.dtype)
    } else {
        into_contiguous(tensor)
    }
}

/// A tensor as rows of its last dimension, each of which begins `pitch` elements after the one before.
pub(super) struct Rows<R: CubeRuntime> {
    /// `[rows * pitch]`
    pub(super) array: CubeTensor<R>,
    pub(super) pitch: usize,
}

impl<R: CubeRuntime> Rows<R> {
    /// The same, if it has so many rows of so many elements: kernels do not check.
    ///
    /// # Panics
    /// If it has not: somebody changed a weight's public fields.
    pub(super) fn holding(self, rows: usize, width: usize) -> Self {
        let needed = rows.checked_sub(1).map_or(0, |last| last * self.pitch + width);
        let found = self.array.meta.num_elements();
        assert!(
            needed <= found,
            "{rows} rows of {width} in {found} elements: weights that do not follow their own layout"
        );
        self
    }
}

/// The rows of a float tensor.
pub(super) fn float_rows<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement, const D: usize>(
    tensor: Tensor<CubeBackend<R, F, I, BT>, D>,
) -> Rows<R> {
    rows(tensor.into_primitive().tensor())
}

/// The rows of an integer tensor.
pub(super) fn integer_rows<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement, const D: usize>(
    tensor: Tensor<CubeBackend<R, F, I, BT>, D, Int>,
) -> Rows<R> {
    rows(tensor.into_primitive())
}

/// Where rows are where CUDA put them, aligned, they are not copied.
fn rows<R: CubeRuntime>(tensor: CubeTensor<R>) -> Rows<R> {
    let width = tensor.meta.shape().last().copied().unwrap_or(1);
    let count = tensor.meta.num_elements() / width.max(1);
    let pitch = pitch(tensor.meta.shape(), tensor.meta.strides());
    let (tensor, pitch) = match pitch {
        Some(pitch) => (tensor, pitch),
        None => (into_contiguous(tensor), width),
    };
    let CubeTensor { client, device, handle, dtype, .. } = tensor;
    // The room after the last row need not be there.
    let elements = (count * pitch).min(handle.size() as usize / dtype.size());
    Rows { array: CubeTensor::new_contiguous(client, device, Shape::new([elements]), handle, dtype), pitch }
}

/// How far apart rows are, if all are equally far.
fn pitch(shape: &[usize], strides: &[usize]) -> Option<usize> {
    let (width, leading) = (*shape.last()?, shape.len().saturating_sub(1));
    let aligned = (0..leading).rev().find(|dim| shape[*dim] > 1).map_or(width, |dim| strides[dim]);
    let mut next = aligned;
    let even = (0..leading).rev().all(|dim| {
        let fits = shape[dim] == 1 || strides[dim] == next;
        next *= shape[dim];
        fits
    });
    (even && aligned >= width && (width == 1 || strides[leading] == 1)).then_some(aligned)
}

/// Whether an array begins where 16 bytes can be read at once.
pub(super) fn begins_even<R: CubeRuntime>(array: &CubeTensor<R>) -> bool {
    array.handle.offset_start.unwrap_or(0).is_multiple_of(16)
}

/// The rows of a `U8` tensor as words: WGSL has no smaller integers. What is past the end of a row is nobody's; `pitch` stays
/// in bytes.
///
/// A buffer that does not end at a word is copied by way of the host: small weights only.
pub(super) fn words_of_bytes<R: CubeRuntime>(Rows { array: bytes, pitch }: Rows<R>) -> Rows<R> {
    let count = bytes.shape().num_elements();
    let words = count.div_ceil(4);
    let handle = if count.is_multiple_of(4) {
        bytes.handle
    } else {
        let mut padded = bytes.client.read_one_unchecked(bytes.handle).to_vec();
        padded.resize(4 * words, 0);
        bytes.client.create_from_slice(&padded)
    };
    let array = CubeTensor::new_contiguous(bytes.client, bytes.device, Shape::new([words]), handle, DType::U32);
    Rows { array, pitch }
}

/// Has the device begin with what it was asked for: CubeCL keeps back launches until there are 32, and where a pass begins, a
/// GPU has nothing else to do meanwhile.
pub(super) fn begin<R: CubeRuntime>(beside: &CubeTensor<R>) {
    DeviceHandle::<R::Server>::new(beside.device.to_id()).flush_queue();
}

/// The bytes of two tensors whose elements are in order. Nobody sleeps until they are there, as the device has nothing to do then: the
/// device's own thread, which sleeps 150 microseconds at a time when it waits for work, waits for them, and so does this one.
///
/// # Panics
/// If the device failed, as Burn's reads do.
pub(super) fn read<R: CubeRuntime>(tensors: [CubeTensor<R>; 2]) -> [Bytes; 2] {
    let (device, stream) = (tensors[0].device.to_id(), StreamId::current());
    let descriptors = tensors.map(|tensor| {
        let (shape, strides) = (tensor.meta.shape().clone(), tensor.meta.strides().clone());
        CopyDescriptor::new(tensor.handle.binding(), shape, strides, tensor.dtype.size())
    });
    let (send, receive) = mpsc::channel();
    let device = DeviceHandle::<R::Server>::new(device);
    device.submit(move |server| {
        // Nobody waits any more if this fails.
        let _ = send.send(block_on(server.read(descriptors.into(), stream)));
    });
    device.flush_queue();
    let soon = (0..MOST_SPINS).find_map(|_| {
        spin_loop();
        receive.try_recv().ok()
    });
    let read = soon.or_else(|| receive.recv().ok()).expect("a device that answers");
    read.expect("what the device has computed").try_into().expect("as many as asked for")
}

/// How often [`read`] looks for an answer before it sleeps: some 10 milliseconds.
const MOST_SPINS: u32 = 200_000;

/// Room for a tensor beside another one, its elements in order, not initialized: for a short time, most likely.
pub(super) fn room<R: CubeRuntime, const D: usize>(
    beside: &CubeTensor<R>,
    shape: [usize; D],
    dtype: DType,
) -> CubeTensor<R> {
    let bytes = (shape.iter().product::<usize>() * dtype.size()) as u64;
    if !(1..=MOST_SPARED).contains(&bytes) {
        return lasting_room(beside, shape, dtype);
    }
    let key = (TypeId::of::<R>(), beside.device.to_id(), StreamId::current(), bytes);
    let handle = SPARES.with_borrow_mut(|spares| spares.find(key, || beside.client.empty(bytes as usize)));
    CubeTensor::new_contiguous(beside.client.clone(), beside.device.clone(), Shape::new(shape), handle, dtype)
}

/// [`room`] for a tensor that stays, and that nobody else has a handle of.
pub(super) fn lasting_room<R: CubeRuntime, const D: usize>(
    beside: &CubeTensor<R>,
    shape: [usize; D],
    dtype: DType,
) -> CubeTensor<R> {
    empty_device_contiguous_dtype(beside.client.clone(), beside.device.clone(), Shape::new(shape), dtype)
}

/// Bytes of a buffer that is worth keeping at most, of all that are kept, and how many of a size are.
const MOST_SPARED: u64 = 1 << 20;
const MOST_SPARED_TOGETHER: u64 = 64 << 20;
const MOST_SPARED_ALIKE: usize = 32;

thread_local! {
    static SPARES: RefCell<Spares> = RefCell::default();
}

/// A runtime, a device, a queue of work, and a size in bytes.
type Key = (TypeId, DeviceId, StreamId, u64);

/// Buffers for results, of which every operation needs some: CubeCL looks for free memory so slowly that a GPU would wait for
/// it (2.5 of the 6 milliseconds of a token of the 20B model on an H200). The work of a queue is done in order, so
/// a buffer is free as soon as no tensor has it.
#[derive(Default)]
struct Spares {
    buffers: HashMap<Key, Vec<Handle>>,
    bytes: u64,
}

impl Spares {
    fn find(&mut self, key: Key, new: impl FnOnce() -> Handle) -> Handle {
        let alike = self.buffers.entry(key).or_default();
        if let Some(free) = alike.iter().find(|buffer| buffer.can_mut()) {
            return free.clone();
        }
        let buffer = new();
        if alike.len() < MOST_SPARED_ALIKE {
            alike.push(buffer.clone());
            self.bytes += key.3;
        }
        if self.bytes > MOST_SPARED_TOGETHER {
            *self = Self::default();
        }
        buffer
    }
}

/// A float tensor of what a kernel wrote.
pub(super) fn tensor<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement, const D: usize>(
    floats: CubeTensor<R>,
) -> Tensor<CubeBackend<R, F, I, BT>, D> {
    Tensor::from_primitive(TensorPrimitive::Float(floats))
}
