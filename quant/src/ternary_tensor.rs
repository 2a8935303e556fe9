//! Packed ternary matrices: on the host for files, on a device as a Burn module.
//!
//! ```
//! use burn::tensor::{Distribution, Tensor};
//! use ternoss_backends::CodeFormat;
//! use ternoss_quant::{Granularity, PackedTernary, TernaryTensor, absmean};
//! type B = burn_flex::Flex;
//!
//! let device = Default::default();
//! let weight = Tensor::<B, 2>::random([8, 128], Distribution::Default, &device);
//! let packed = PackedTernary::pack(&[absmean(weight, Granularity::Row)], CodeFormat::T5, None).unwrap();
//! let tensor = TernaryTensor::<B>::from_packed(packed.clone(), &device).unwrap();
//! assert_eq!(tensor.to_packed(), packed);
//! ```

use burn::{
    module::{Module, Param, ParamId},
    tensor::{DType, Int, Tensor, TensorData, backend::Backend},
};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use ternoss_backends::{CodeFormat, FormatError, Rotation, TernaryLayout, TernaryWeight};

use crate::{Granularity, TernaryParts, absmean::snap_group_scales};

/// How a dense weight becomes a ternary one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TernaryConfig {
    /// How many weights share a scale.
    pub granularity: Granularity,
    /// How the trits are packed.
    pub format: CodeFormat,
    /// How the input is rotated before it is rounded, and the weights with it.
    pub rotation: Option<Rotation>,
}

impl Default for TernaryConfig {
    /// Groups of 64 inputs, 2-bit codes, no rotation.
    fn default() -> Self {
        Self { granularity: Granularity::Group(64), format: CodeFormat::T2, rotation: None }
    }
}

/// Packed ternary matrices of one shape in host memory, ready for a file.
#[derive(Clone, Debug, PartialEq)]
pub struct PackedTernary {
    /// Shape and format.
    pub layout: TernaryLayout,
    /// `[matrices, planes, rows, words_per_row]`
    pub codes: Vec<u32>,
    /// `[matrices, planes, rows]`
    pub row_scales: Vec<f32>,
    /// `[matrices, planes, rows, groups]`, empty where a row has one scale.
    pub group_scales: Vec<u8>,
}

impl PackedTernary {
    /// Packs one matrix, given as one or more planes; `rotation` says which rotation of the input they are meant for.
    ///
    /// # Errors
    /// [`FormatError`] when there is no plane, the planes differ in shape, or the layout is not a valid one.
    pub fn pack<B: Backend>(
        planes: &[TernaryParts<B>],
        format: CodeFormat,
        rotation: Option<Rotation>,
    ) -> Result<Self, FormatError> {
        let first = planes.first().ok_or(FormatError::Empty { what: "planes" })?;
        let [rows, in_features] = first.trits.dims();
        let group_size = first.group_size;
        let layout =
            TernaryLayout { format, matrices: 1, planes: planes.len(), rows, in_features, group_size, rotation };
        layout.validate()?;
        let mut packed = Self { layout, codes: Vec::new(), row_scales: Vec::new(), group_scales: Vec::new() };
        for plane in planes {
            let found = plane.trits.dims();
            if found != [rows, in_features] || plane.group_size != group_size {
                let expected = vec![rows, in_features];
                return Err(FormatError::Shape { tensor: "plane", expected, found: found.into() });
            }
            packed.codes.extend(pack_rows(&layout, &host(plane.trits.clone())));
            packed.row_scales.extend(host(plane.row_scales.clone()));
            let group_scales = plane.group_scales.clone().map(host).unwrap_or_default();
            packed.group_scales.extend(group_scales.into_iter().map(|scale| scale as u8));
        }
        Ok(packed)
    }

    /// Matrices of trits and scales that are all zero bits, to be filled by [`set_rows`](Self::set_rows).
    ///
    /// # Errors
    /// [`FormatError`] when the layout is not a valid one.
    pub fn zeros(layout: TernaryLayout) -> Result<Self, FormatError> {
        layout.validate()?;
        let size = |shape: &[usize]| shape.iter().product::<usize>();
        Ok(Self {
            layout,
            codes: vec![0; size(&layout.codes_shape())],
            row_scales: vec![0.0; size(&layout.row_scales_shape())],
            group_scales: vec![0; size(&layout.group_scales_shape())],
        })
    }

    /// Takes over the rows of `part` as those from `first` on; both are one matrix. So a matrix too large to be in memory
    /// in full is packed piece by piece.
    ///
    /// # Errors
    /// [`FormatError::Shape`] when `part` does not fit in there.
    pub fn set_rows(&mut self, first: usize, part: &Self) -> Result<(), FormatError> {
        let TernaryLayout { planes, rows, .. } = self.layout;
        let taken = part.layout.rows;
        if (TernaryLayout { rows, ..part.layout }) != self.layout || self.layout.matrices != 1 || first + taken > rows {
            let (expected, found) = (self.layout.codes_shape().to_vec(), part.layout.codes_shape().to_vec());
            return Err(FormatError::Shape { tensor: "codes", expected, found });
        }
        fn copy<T: Copy>(to: &mut [T], from: &[T], per_row: usize, [plane, rows, first, taken]: [usize; 4]) {
            let start = (plane * rows + first) * per_row;
            to[start..start + taken * per_row].copy_from_slice(&from[plane * taken * per_row..][..taken * per_row]);
        }
        for plane in 0..planes {
            let place = [plane, rows, first, taken];
            copy(&mut self.codes, &part.codes, self.layout.words_per_row(), place);
            copy(&mut self.row_scales, &part.row_scales, 1, place);
            copy(&mut self.group_scales, &part.group_scales, self.layout.groups(), place);
        }
        Ok(())
    }

    /// Puts matrices of one layout behind one another, as the experts of a layer.
    ///
    /// # Errors
    /// [`FormatError`] when there is none or they differ in layout.
    pub fn stack(parts: impl IntoIterator<Item = Self>) -> Result<Self, FormatError> {
        let mut parts = parts.into_iter();
        let mut all = parts.next().ok_or(FormatError::Empty { what: "matrices" })?;
        let single = all.layout;
        for part in parts {
            if part.layout != single {
                let shape = |layout: &TernaryLayout| layout.codes_shape().to_vec();
                let (expected, found) = (shape(&single), shape(&part.layout));
                return Err(FormatError::Shape { tensor: "codes", expected, found });
            }
            all.layout.matrices += part.layout.matrices;
            all.codes.extend(part.codes);
            all.row_scales.extend(part.row_scales);
            all.group_scales.extend(part.group_scales);
        }
        Ok(all)
    }
}

fn pack_rows(layout: &TernaryLayout, trits: &[f32]) -> Vec<u32> {
    let words_per_row = layout.words_per_row();
    let mut words = vec![0; layout.rows * words_per_row];
    words.par_chunks_mut(words_per_row).zip(trits.par_chunks(layout.in_features)).for_each_init(
        Vec::new,
        |row, (words, trits)| {
            row.clear();
            row.extend(trits.iter().map(|trit| *trit as i8));
            layout.format.pack_row(row, words);
        },
    );
    words
}

fn host<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

/// One or more packed ternary matrices of one shape (the experts of a layer, or a single linear's weight).
#[derive(Module, Debug)]
pub struct TernaryTensor<B: Backend> {
    /// U32 words of codes: `[matrices, planes, rows, words_per_row]`.
    pub codes: Param<Tensor<B, 4, Int>>,
    /// `[matrices, planes, rows]`
    pub row_scales: Param<Tensor<B, 3>>,
    /// U8 multiples of the row scale, `[matrices, planes, rows, groups]`; absent where a row has one scale.
    pub group_scales: Option<Param<Tensor<B, 4, Int>>>,
    layout: TernaryLayout,
}

impl<B: Backend> TernaryTensor<B> {
    /// Wraps packed tensors, which may point into a mapped file.
    pub fn new(weight: TernaryWeight<B>) -> Self {
        Self {
            codes: Param::initialized(ParamId::new(), weight.codes),
            row_scales: Param::from_tensor(weight.row_scales),
            group_scales: weight.group_scales.map(|scales| Param::initialized(ParamId::new(), scales)),
            layout: weight.layout,
        }
    }

    /// Moves packed matrices to a device.
    ///
    /// # Errors
    /// [`FormatError`] when the parts do not fit the layout.
    pub fn from_packed(packed: PackedTernary, device: &B::Device) -> Result<Self, FormatError> {
        let layout = packed.layout;
        let group_scales = layout.group_size.map(|_| {
            let data = TensorData::new(packed.group_scales, layout.group_scales_shape());
            Tensor::from_data(data, (device, DType::U8))
        });
        let weight = TernaryWeight::new(
            Tensor::from_data(TensorData::new(packed.codes, layout.codes_shape()), (device, DType::U32)),
            Tensor::from_data(TensorData::new(packed.row_scales, layout.row_scales_shape()), device),
            group_scales,
            layout,
        )?;
        Ok(Self::new(weight))
    }

    /// Copies the matrices to host memory, the opposite of [`from_packed`](Self::from_packed).
    pub fn to_packed(&self) -> PackedTernary {
        let weight = self.weight();
        PackedTernary {
            layout: self.layout,
            codes: weight.codes.into_data().iter::<u32>().collect(),
            row_scales: host(weight.row_scales),
            group_scales: weight.group_scales.map(|s| s.into_data().iter::<u8>().collect()).unwrap_or_default(),
        }
    }

    /// One of the matrices as a tensor of its own.
    ///
    /// # Panics
    /// If there is no such one.
    pub fn matrix(&self, matrix: usize) -> Self {
        Self::new(self.weight().matrix(matrix))
    }

    /// The trits of the only matrix with other scales, `[planes, rows, groups]`, one group where a row has one scale; rounded
    /// as [`TernaryParts::from_scales`] rounds them, and negative ones zero.
    ///
    /// # Panics
    /// If they are not as many as the layout says.
    pub fn with_scales(&self, scales: Tensor<B, 3>) -> Self {
        let layout = self.layout;
        let shape @ [planes, rows, groups] = scales.dims();
        let (expected, device) = ([layout.planes, layout.rows, layout.groups().max(1)], scales.device());
        assert!(shape == expected && layout.matrices == 1, "scales {shape:?} for {layout:?}");
        let scales = scales.clamp_min(0.0).reshape([planes * rows, groups]);
        let (row_scales, group_scales) = match layout.group_size {
            Some(_) => {
                let (row_scales, multiples) = snap_group_scales(scales);
                let multiples: Vec<u8> = multiples.into_data().iter::<f32>().map(|multiple| multiple as u8).collect();
                let multiples = TensorData::new(multiples, layout.group_scales_shape());
                (row_scales, Some(Tensor::from_data(multiples, (&device, DType::U8))))
            }
            None => (scales.squeeze_dim(1), None),
        };
        let row_scales = row_scales.reshape(layout.row_scales_shape());
        Self::new(TernaryWeight { codes: self.codes.val(), row_scales, group_scales, layout })
    }

    /// Shape and format.
    pub fn layout(&self) -> TernaryLayout {
        self.layout
    }

    /// The tensors as the kernels take them; cheap, they are shared.
    pub fn weight(&self) -> TernaryWeight<B> {
        TernaryWeight {
            codes: self.codes.val(),
            row_scales: self.row_scales.val(),
            group_scales: self.group_scales.as_ref().map(Param::val),
            layout: self.layout,
        }
    }
}
