//! Weights and activations to test with, and the slow ways to multiply them.

use burn::tensor::{DType, Tensor, TensorData, backend::Backend};
use proptest::prelude::*;
use ternoss::backends::{
    CodeFormat, Rotation, TernaryLayout, TernaryWeight,
    cpu::{Isa, Kernels, TernaryMatrices, TernaryRows},
};

/// Numbers without a pattern, the same every time (Marsaglia's xorshift).
pub(crate) struct Noise(u64);

impl Noise {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 16
    }

    /// Evenly between -1 and 1.
    pub(crate) fn float(&mut self) -> f32 {
        (self.next() % (1 << 24)) as f32 / (1 << 23) as f32 - 1.0
    }

    pub(crate) fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }

    pub(crate) fn trits(&mut self, n: usize) -> Vec<i8> {
        (0..n).map(|_| (self.next() % 3) as i8 - 1).collect()
    }
}

pub(crate) fn layout(format: CodeFormat, rows: usize, in_features: usize) -> TernaryLayout {
    TernaryLayout { format, matrices: 1, planes: 1, rows, in_features, group_size: None, rotation: None }
}

/// Weights as numbers and packed.
#[derive(Clone)]
pub(crate) struct Weights {
    pub(crate) layout: TernaryLayout,
    /// `[matrices, planes, rows, in_features]`.
    pub(crate) trits: Vec<i8>,
    pub(crate) codes: Vec<u32>,
    pub(crate) row_scales: Vec<f32>,
    pub(crate) group_scales: Option<Vec<u8>>,
}

impl Weights {
    pub(crate) fn new(layout: TernaryLayout, seed: u64) -> Self {
        let mut noise = Noise::new(seed);
        let rows = layout.matrices * layout.planes * layout.rows;
        let trits = noise.trits(rows * layout.in_features);
        let mut codes = vec![0; rows * layout.words_per_row()];
        for (row, words) in trits.chunks(layout.in_features).zip(codes.chunks_mut(layout.words_per_row())) {
            layout.format.pack_row(row, words);
        }
        let groups = rows * layout.groups();
        let group_scales = layout.group_size.map(|_| (0..groups).map(|_| noise.next() as u8).collect());
        Self { layout, trits, codes, row_scales: noise.floats(rows), group_scales }
    }

    pub(crate) fn view(&self) -> TernaryMatrices<'_> {
        TernaryMatrices::new(self.layout, &self.codes, &self.row_scales, self.group_scales.as_deref()).unwrap()
    }

    pub(crate) fn rows(&self, matrix: usize) -> TernaryRows<'_> {
        self.view().matrix(matrix).unwrap()
    }

    pub(crate) fn tensor<B: Backend>(&self) -> TernaryWeight<B> {
        let device = B::Device::default();
        let codes = TensorData::new(self.codes.clone(), self.layout.codes_shape());
        let row_scales = TensorData::new(self.row_scales.clone(), self.layout.row_scales_shape());
        let group_scales = self.group_scales.clone().map(|scales| {
            let scales = TensorData::new(scales, self.layout.group_scales_shape());
            Tensor::from_data(scales, (&device, DType::U8))
        });
        TernaryWeight::new(
            Tensor::from_data(codes, (&device, DType::U32)),
            Tensor::from_data(row_scales, (&device, DType::F32)),
            group_scales,
            self.layout,
        )
        .unwrap()
    }

    /// The definition, one weight at a time in 64-bit integers.
    pub(crate) fn multiply(&self, matrix: usize, x: &[f32]) -> Vec<f32> {
        let TernaryLayout { planes, rows, in_features, group_size, rotation, .. } = self.layout;
        let mut x = x.to_vec();
        if let Some(rotation) = rotation {
            rotation.rotate(&mut x);
        }
        let (levels, scale) = quantize(&x);
        let row = |plane: usize, row: usize| (matrix * planes + plane) * rows + row;
        let total = |row: usize| -> i64 {
            let trits = &self.trits[row * in_features..(row + 1) * in_features];
            let group = |i: usize| match (&self.group_scales, group_size) {
                (Some(scales), Some(size)) => i64::from(scales[row * self.layout.groups() + i / size]),
                _ => 1,
            };
            (0..in_features).map(|i| group(i) * i64::from(trits[i]) * i64::from(levels[i])).sum()
        };
        let value = |row: usize| total(row) as f32 * (self.row_scales[row] * scale);
        (0..rows)
            .map(|r| (0..planes).map(|plane| value(row(plane, r))).reduce(|sum, value| sum + value).unwrap())
            .collect()
    }
}

/// One token to int8 by the definition.
pub(crate) fn quantize(x: &[f32]) -> (Vec<i8>, f32) {
    if !x.iter().all(|x| x.is_finite()) {
        return (vec![0; x.len()], f32::NAN);
    }
    let scale = x.iter().fold(0.0f32, |largest, x| largest.max(x.abs())) / 127.0;
    if scale == 0.0 {
        return (vec![0; x.len()], 0.0);
    }
    (x.iter().map(|x| (x / scale).round_ties_even().clamp(-127.0, 127.0) as i8).collect(), scale)
}

pub(crate) fn all_kernels() -> impl Iterator<Item = Kernels> {
    Isa::available().iter().map(|isa| Kernels::new(*isa).unwrap())
}

/// Equal bit for bit, except that every NaN is like every other.
#[track_caller]
pub(crate) fn assert_same(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        let same = f.to_bits() == e.to_bits() || f.is_nan() && e.is_nan();
        assert!(same, "{what}: element {i} is {f:e}, expected {e:e}");
    }
}

/// Within a fraction of the largest element.
#[track_caller]
pub(crate) fn assert_close(found: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let finite = expected.iter().filter(|x| x.is_finite());
    let largest = finite.fold(f32::MIN_POSITIVE, |largest, x| largest.max(x.abs()));
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        let close = (f - e).abs() <= tolerance * largest || f == e || f.is_nan() && e.is_nan();
        assert!(close, "{what}: element {i} is {f:e}, expected {e:e} (largest {largest:e})");
    }
}

pub(crate) fn matrix<B: Backend>(values: &[f32], shape: [usize; 2]) -> Tensor<B, 2> {
    Tensor::from_data(TensorData::new(values.to_vec(), shape), (&B::Device::default(), DType::F32))
}

pub(crate) fn values<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

pub(crate) fn any_format() -> impl Strategy<Value = CodeFormat> {
    prop_oneof![Just(CodeFormat::T2), Just(CodeFormat::T5)]
}

/// Layouts of every kind, small: widths around the multiples of 64 and 16 matter most.
pub(crate) fn any_layout() -> impl Strategy<Value = TernaryLayout> {
    let width = prop_oneof![1..=200usize, Just(320), Just(576), Just(2880), Just(1025)];
    let group = prop_oneof![Just(None), Just(Some(64)), Just(Some(128)), Just(Some(192)), Just(Some(4096))];
    let rotation = prop::option::of(any::<u64>().prop_map(|seed| Rotation { seed }));
    let rows = prop_oneof![3 => 1..=9usize, 1 => 10..=70usize];
    (any_format(), 1..=2usize, 1..=3usize, rows, width, group, rotation).prop_map(
        |(format, matrices, planes, rows, in_features, group_size, rotation)| TernaryLayout {
            format,
            matrices,
            planes,
            rows,
            in_features,
            group_size,
            rotation,
        },
    )
}
