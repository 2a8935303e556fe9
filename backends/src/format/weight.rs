use std::ops::Range;

use burn::tensor::{DType, Int, Tensor, TensorData, backend::Backend};

use super::{CodeFormat, FormatError, TernaryLayout};
use crate::cpu::{self, Kernels};

/// Packed ternary weights on a Burn backend: codes, scales and the layout that gives them a meaning.
///
/// The tensors are handles: cloning one does not copy it, and their bytes may lie in a mapped file.
/// A kernel that meets an invalid code (see [`CodeFormat::validate_rows`](super::CodeFormat::validate_rows)) computes
/// some number from it and nothing worse.
#[derive(Debug, Clone)]
pub struct TernaryWeight<B: Backend> {
    /// `[matrices, planes, rows, words]`, `U32`.
    pub codes: Tensor<B, 4, Int>,
    /// `[matrices, planes, rows]`, `F32`.
    pub row_scales: Tensor<B, 3>,
    /// `[matrices, planes, rows, groups]`, `U8`; only where the layout has groups.
    pub group_scales: Option<Tensor<B, 4, Int>>,
    /// The sizes all three follow.
    pub layout: TernaryLayout,
}

impl<B: Backend> TernaryWeight<B> {
    /// Puts the parts together.
    ///
    /// The integer tensors must keep the element type of their bytes whatever integer type the backend prefers: make
    /// them with `Tensor::from_data(data, (&device, DType::U32))`, and `DType::U8` for the group scales.
    ///
    /// # Errors
    /// Whatever [`TernaryLayout::validate`] finds, [`FormatError::Shape`] or [`FormatError::ElementType`] for a tensor
    /// that does not follow the layout, [`FormatError::GroupScales`] if group scales are missing or superfluous.
    pub fn new(
        codes: Tensor<B, 4, Int>,
        row_scales: Tensor<B, 3>,
        group_scales: Option<Tensor<B, 4, Int>>,
        layout: TernaryLayout,
    ) -> Result<Self, FormatError> {
        layout.validate()?;
        check_shape("codes", &codes.dims(), &layout.codes_shape())?;
        check_shape("row_scales", &row_scales.dims(), &layout.row_scales_shape())?;
        check_dtype("codes", codes.dtype(), DType::U32)?;
        check_dtype("row_scales", row_scales.dtype(), DType::F32)?;
        let groups = layout.groups();
        match &group_scales {
            Some(scales) if groups > 0 => {
                check_shape("group_scales", &scales.dims(), &layout.group_scales_shape())?;
                check_dtype("group_scales", scales.dtype(), DType::U8)?;
            }
            None if groups == 0 => {}
            Some(_) => {
                return Err(FormatError::GroupScales { found: "given", groups });
            }
            None => {
                return Err(FormatError::GroupScales { found: "missing", groups });
            }
        }
        Ok(Self { codes, row_scales, group_scales, layout })
    }

    /// One matrix as floats: `[rows, in_features]`, differentiable in the row scales; of the rotated input where the
    /// layout has a rotation.
    ///
    /// Reads the codes of that matrix on the host; an invalid code reads as trit 0.
    ///
    /// # Panics
    /// If `matrix` is not below [`TernaryLayout::matrices`].
    #[must_use]
    pub fn to_dense(&self, matrix: usize) -> Tensor<B, 2> {
        (0..self.layout.planes)
            .map(|plane| self.trits(matrix, plane) * self.row_scale_column(matrix, plane))
            .reduce(|sum, plane| sum + plane)
            .expect("a validated layout has planes")
    }

    /// One plane taken apart: its trits `[rows, in_features]` and their scales `[rows, groups]` (one group where a row has
    /// one scale), the weight being their product.
    ///
    /// # Panics
    /// As [`to_dense`](Self::to_dense).
    #[must_use]
    pub fn parts(&self, matrix: usize, plane: usize) -> (Tensor<B, 2>, Tensor<B, 2>) {
        let ungrouped = Self { group_scales: None, ..self.clone() };
        (ungrouped.trits(matrix, plane), self.scales(matrix, plane))
    }

    /// The scales of one plane as floats: `[rows, groups]`, one group where a row has one scale.
    ///
    /// # Panics
    /// As [`to_dense`](Self::to_dense).
    #[must_use]
    pub fn scales(&self, matrix: usize, plane: usize) -> Tensor<B, 2> {
        let scales = self.row_scale_column(matrix, plane);
        match self.plane_group_scales(matrix, plane) {
            Some(factors) => {
                let factors = factors.into_iter().map(f32::from).collect::<Vec<_>>();
                let data = TensorData::new(factors, [self.layout.rows, self.layout.groups()]);
                scales * Tensor::from_data(data, (&self.codes.device(), DType::F32))
            }
            None => scales,
        }
    }

    /// One matrix as a weight of its own.
    ///
    /// # Panics
    /// As [`to_dense`](Self::to_dense).
    #[must_use]
    pub fn matrix(&self, matrix: usize) -> Self {
        if matrix == 0 && self.layout.matrices == 1 {
            return self.clone();
        }
        assert!(matrix < self.layout.matrices, "matrix {matrix} of {}", self.layout.matrices);
        self.part([matrix..matrix + 1, 0..self.layout.planes, 0..self.layout.rows])
    }

    /// The same weight with [`CodeFormat::T2`] codes, rewritten in memory where they are [`CodeFormat::T5`].
    #[must_use]
    pub fn unpacked(self) -> Self {
        if self.layout.format == CodeFormat::T2 {
            return self;
        }
        let layout = TernaryLayout { format: CodeFormat::T2, ..self.layout };
        let device = self.codes.device();
        let codes = self.codes.into_data();
        let converted;
        let words = match codes.as_slice::<u32>() {
            Ok(words) => words,
            Err(_) => {
                converted = codes.iter::<u32>().collect::<Vec<_>>();
                &converted
            }
        };
        let words = cpu::unpack(Kernels::detect(), words, layout.in_features);
        let codes = Tensor::from_data(TensorData::new(words, layout.codes_shape()), (&device, DType::U32));
        Self { codes, layout, ..self }
    }

    /// One row of one matrix as a weight of its own, both below the layout's bounds.
    pub(crate) fn row(&self, matrix: usize, row: usize) -> Self {
        self.part([matrix..matrix + 1, 0..self.layout.planes, row..row + 1])
    }

    /// Some matrices, planes and rows of it.
    pub(crate) fn part(&self, part: [Range<usize>; 3]) -> Self {
        let [matrices, planes, rows] = part.each_ref().map(ExactSizeIterator::len);
        Self {
            codes: self.codes.clone().slice(part.clone()),
            row_scales: self.row_scales.clone().slice(part.clone()),
            group_scales: self.group_scales.clone().map(|scales| part_of_bytes(scales, part)),
            layout: TernaryLayout { matrices, planes, rows, ..self.layout },
        }
    }

    /// The trits of one plane times their group scales: `[rows, in_features]`, whole numbers in `F32`.
    pub(crate) fn trits(&self, matrix: usize, plane: usize) -> Tensor<B, 2> {
        assert!(matrix < self.layout.matrices, "matrix {matrix} of {}", self.layout.matrices);
        let TernaryLayout { format, rows, in_features, group_size, .. } = self.layout;
        let codes = self.codes.clone().slice([matrix..matrix + 1, plane..plane + 1]).into_data();
        let words: Vec<u32> = codes.iter::<u32>().collect();
        let scales = self.plane_group_scales(matrix, plane);
        let groups = self.layout.groups();
        let mut trits = vec![0i8; in_features];
        let mut dense = Vec::with_capacity(rows * in_features);
        for (row, words) in words.chunks_exact(self.layout.words_per_row()).enumerate() {
            if format.unpack_row(words, &mut trits).is_err() {
                trits.fill(0);
            }
            match (&scales, group_size) {
                (Some(scales), Some(size)) => dense.extend(
                    trits.iter().enumerate().map(|(i, &t)| f32::from(t) * f32::from(scales[row * groups + i / size])),
                ),
                _ => dense.extend(trits.iter().map(|&trit| f32::from(trit))),
            }
        }
        let data = TensorData::new(dense, [rows, in_features]);
        Tensor::from_data(data, (&self.codes.device(), DType::F32))
    }

    /// The row scales of one plane as a column: `[rows, 1]`.
    pub(crate) fn row_scale_column(&self, matrix: usize, plane: usize) -> Tensor<B, 2> {
        let scales = self.row_scales.clone().slice([matrix..matrix + 1, plane..plane + 1]);
        scales.reshape([self.layout.rows, 1])
    }

    fn plane_group_scales(&self, matrix: usize, plane: usize) -> Option<Vec<u8>> {
        let scales = self.group_scales.as_ref()?.clone();
        let part = [matrix..matrix + 1, plane..plane + 1, 0..self.layout.rows];
        Some(part_of_bytes(scales, part).into_data().iter::<u8>().collect())
    }
}

/// Some matrices, planes and rows of group scales. A device that cannot compute with bytes has them cut out on the host.
fn part_of_bytes<B: Backend>(
    scales: Tensor<B, 4, Int>,
    [matrices, planes, rows]: [Range<usize>; 3],
) -> Tensor<B, 4, Int> {
    let device = scales.device();
    if B::supports_dtype(&device, DType::U8) {
        return scales.slice([matrices, planes, rows]);
    }
    let [_, all_planes, all_rows, groups] = scales.dims();
    let shape = [matrices.len(), planes.len(), rows.len(), groups];
    let bytes: Vec<u8> = scales.into_data().iter::<u8>().collect();
    let planes = matrices.flat_map(|matrix| planes.clone().map(move |plane| matrix * all_planes + plane));
    let rows = planes.flat_map(|plane| {
        let at = |row: usize| (plane * all_rows + row) * groups;
        &bytes[at(rows.start)..at(rows.end)]
    });
    let part: Vec<u8> = rows.copied().collect();
    Tensor::from_data(TensorData::new(part, shape), (&device, DType::U8))
}

pub(crate) fn check_shape(tensor: &'static str, found: &[usize], expected: &[usize]) -> Result<(), FormatError> {
    if found == expected {
        Ok(())
    } else {
        Err(FormatError::Shape { tensor, expected: expected.to_vec(), found: found.to_vec() })
    }
}

pub(crate) fn check_dtype(tensor: &'static str, found: DType, expected: DType) -> Result<(), FormatError> {
    if found == expected {
        Ok(())
    } else {
        Err(FormatError::ElementType { tensor, expected: expected.name(), found: found.name() })
    }
}
