//! Burn tensors as the arrays that kernels take.

use burn::tensor::{DType, Int, Shape, Tensor, TensorMetadata, TensorPrimitive};
use burn_cubecl::{
    BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement, kernel::into_contiguous,
    ops::numeric::empty_device_dtype, tensor::CubeTensor,
};

/// The elements of a float tensor, in order.
pub(super) fn floats<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement, const D: usize>(
    tensor: Tensor<CubeBackend<R, F, I, BT>, D>,
) -> CubeTensor<R> {
    into_contiguous(tensor.into_primitive().tensor())
}

/// The elements of an integer tensor, in order.
pub(super) fn integers<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement, const D: usize>(
    tensor: Tensor<CubeBackend<R, F, I, BT>, D, Int>,
) -> CubeTensor<R> {
    into_contiguous(tensor.into_primitive())
}

/// The bytes of a `U8` tensor as words: WGSL has no smaller integers. What is past the end is nobody's.
///
/// A buffer that does not end at a word is copied by way of the host: small weights only.
pub(super) fn words_of_bytes<R: CubeRuntime>(bytes: CubeTensor<R>) -> CubeTensor<R> {
    let count = bytes.shape().num_elements();
    let words = count.div_ceil(4);
    let handle = if count.is_multiple_of(4) {
        bytes.handle
    } else {
        let mut padded = bytes.client.read_one_unchecked(bytes.handle).to_vec();
        padded.resize(4 * words, 0);
        bytes.client.create_from_slice(&padded)
    };
    CubeTensor::new_contiguous(bytes.client, bytes.device, Shape::new([words]), handle, DType::U32)
}

/// Room for a tensor beside another one, not initialized.
pub(super) fn room<R: CubeRuntime, const D: usize>(
    beside: &CubeTensor<R>,
    shape: [usize; D],
    dtype: DType,
) -> CubeTensor<R> {
    empty_device_dtype(beside.client.clone(), beside.device.clone(), Shape::new(shape), dtype)
}

/// A float tensor of what a kernel wrote.
pub(super) fn tensor<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement, const D: usize>(
    floats: CubeTensor<R>,
) -> Tensor<CubeBackend<R, F, I, BT>, D> {
    Tensor::from_primitive(TensorPrimitive::Float(floats))
}
