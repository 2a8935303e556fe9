use std::{io::Write, ops::Range};

use burn::tensor::{DType, Int, Tensor, TensorPrimitive};
use burn_flex::Flex;
use burn_ndarray::{NdArray, NdArrayTensor};
use ternoss::backends::{CodeFormat, MappedError, MappedFile, TernaryWeight, ternary_linear};

use crate::support::{Noise, Weights, assert_same, layout, matrix, values};

fn file(bytes: &[u8]) -> (tempfile::NamedTempFile, MappedFile) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file.flush().unwrap();
    let map = MappedFile::open(file.path()).unwrap();
    (file, map)
}

fn addresses<T>(slice: &[T]) -> Range<usize> {
    let Range { start, end } = slice.as_ptr_range();
    start.addr()..end.addr()
}

fn lies_in(inner: Range<usize>, outer: Range<usize>) -> bool {
    outer.start <= inner.start && inner.end <= outer.end && !inner.is_empty()
}

#[test]
fn tensors_of_both_backends_point_into_the_file() {
    let (_file, map) = file(&(0..=255).collect::<Vec<u8>>());
    let data = || map.tensor_data(64..192, vec![8, 4], DType::U32).unwrap();

    let flex: Tensor<Flex, 2, Int> = Tensor::from_data(data(), (&Default::default(), DType::U32));
    let primitive = flex.clone().into_primitive();
    assert!(lies_in(addresses(primitive.bytes()), addresses(map.as_slice())));
    assert_eq!(primitive.as_slice::<u32>().unwrap()[0], u32::from_le_bytes([64, 65, 66, 67]));

    let ndarray: Tensor<NdArray, 2, Int> = Tensor::from_data(data(), (&Default::default(), DType::U32));
    let NdArrayTensor::U32(storage) = ndarray.clone().into_primitive() else { panic!("not U32") };
    assert!(lies_in(addresses(storage.view().as_slice().unwrap()), addresses(map.as_slice())));

    let floats: Tensor<Flex, 1> =
        Tensor::from_data(map.tensor_data(0..16, vec![4], DType::F32).unwrap(), (&Default::default(), DType::F32));
    let TensorPrimitive::Float(primitive) = floats.into_primitive() else { panic!("not a float") };
    assert!(lies_in(addresses(primitive.bytes()), addresses(map.as_slice())));
}

#[test]
fn the_mapping_outlives_its_handle() {
    let (file, map) = file(&[7; 64]);
    let data = map.tensor_data(0..64, vec![16], DType::U32).unwrap();
    drop((map, file));
    assert!(data.iter::<u32>().all(|word| word == 0x0707_0707));
}

#[test]
fn an_odd_offset_is_copied() {
    let (_file, map) = file(&(0..=255).collect::<Vec<u8>>());
    let data = map.tensor_data(1..9, vec![2], DType::U32).unwrap();
    assert!(!lies_in(addresses(data.as_bytes()), addresses(map.as_slice())));
    assert_eq!(data.iter::<u32>().collect::<Vec<_>>(), [0x0403_0201, 0x0807_0605]);
    let octets = map.tensor_data(1..9, vec![8], DType::U8).unwrap();
    assert!(lies_in(addresses(octets.as_bytes()), addresses(map.as_slice())));
}

#[test]
#[allow(clippy::reversed_empty_ranges)]
fn ranges_that_are_wrong_are_refused() {
    let (_file, map) = file(&[0; 100]);
    assert_eq!((map.len(), map.is_empty()), (100, false));
    let outside = map.tensor_data(96..104, vec![2], DType::U32).err();
    assert_eq!(outside, Some(MappedError::OutOfFile { start: 96, end: 104, len: 100 }));
    assert!(matches!(map.tensor_data(8..4, vec![1], DType::U32), Err(MappedError::OutOfFile { .. })));
    assert!(matches!(map.tensor_data(0..8, vec![3], DType::U32), Err(MappedError::Size { expected: 12, .. })));
    assert!(matches!(map.tensor_data(0..8, vec![usize::MAX, 2], DType::U8), Err(MappedError::Size { .. })));
    assert_eq!(map.bytes(90..101), None);
    let (_empty, empty) = file(&[]);
    assert!(empty.is_empty() && empty.tensor_data(0..0, vec![0], DType::U32).is_ok());
    assert!(MappedFile::open("/does/not/exist").is_err());
}

#[test]
fn mapped_weights_multiply_like_owned_ones() {
    let weights = Weights::new(layout(CodeFormat::T2, 7, 320), 1);
    let bytes: Vec<u8> = weights.codes.iter().flat_map(|word| word.to_le_bytes()).collect();
    let (_file, map) = file(&bytes);
    let x = Noise::new(2).floats(320);
    let data = || map.tensor_data(0..bytes.len(), weights.layout.codes_shape().to_vec(), DType::U32).unwrap();

    let flex = weights.tensor::<Flex>();
    let codes = Tensor::from_data(data(), (&Default::default(), DType::U32));
    let flex = TernaryWeight::new(codes, flex.row_scales, None, flex.layout).unwrap();
    assert_same(&values(ternary_linear(matrix(&x, [1, 320]), &flex, 0)), &weights.multiply(0, &x), "flex");

    let ndarray = weights.tensor::<NdArray>();
    let codes = Tensor::from_data(data(), (&Default::default(), DType::U32));
    let ndarray = TernaryWeight::new(codes, ndarray.row_scales, None, ndarray.layout).unwrap();
    assert_same(&values(ternary_linear(matrix(&x, [1, 320]), &ndarray, 0)), &weights.multiply(0, &x), "ndarray");
}
