//! The Flex backend: how to reach the elements of its tensors.

use std::borrow::Cow;

use burn::tensor::Element;
use burn_flex::{Flex, FlexTensor};

use crate::host::HostBackend;

impl HostBackend for Flex {
    fn floats(tensor: &FlexTensor) -> Cow<'_, [f32]> {
        elements(tensor)
    }

    fn words(tensor: &FlexTensor) -> Cow<'_, [u32]> {
        elements(tensor)
    }

    fn octets(tensor: &FlexTensor) -> Cow<'_, [u8]> {
        elements(tensor)
    }
}

fn elements<E: Element + bytemuck::Pod>(tensor: &FlexTensor) -> Cow<'_, [E]> {
    if let Some(slice) = tensor.as_slice() {
        return Cow::Borrowed(slice);
    }
    Cow::Owned(tensor.to_contiguous().as_slice().map_or_else(Vec::new, <[E]>::to_vec))
}
