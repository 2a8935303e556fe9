//! The NdArray backend: how to reach the elements of its tensors.

use std::borrow::Cow;

use burn_ndarray::{NdArray, NdArrayTensor};

use crate::host::HostBackend;

/// The elements of a tensor if it is of that type. The type of the storage inside has no public name.
macro_rules! elements {
    ($tensor:expr, $variant:ident) => {
        match $tensor {
            NdArrayTensor::$variant(storage) => {
                let view = storage.view();
                match view.to_slice() {
                    Some(slice) => Cow::Borrowed(slice),
                    None => Cow::Owned(view.iter().copied().collect()),
                }
            }
            _ => Cow::default(),
        }
    };
}

impl HostBackend for NdArray {
    fn floats(tensor: &NdArrayTensor) -> Cow<'_, [f32]> {
        elements!(tensor, F32)
    }

    fn words(tensor: &NdArrayTensor) -> Cow<'_, [u32]> {
        elements!(tensor, U32)
    }

    fn octets(tensor: &NdArrayTensor) -> Cow<'_, [u8]> {
        elements!(tensor, U8)
    }
}
