//! Reading single weights out of a checkpoint, as floats or packed, shapes checked.

use burn::tensor::{DType, Tensor, TensorData, backend::Backend};
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::Dtype;
use ternoss_backends::{StoredFloat, StoredMatrix, TernaryLayout, TernaryWeight};
use ternoss_quant::mxfp4;

use super::{
    Checkpoint, CheckpointError, ExpertMatrix, TableName, TensorEntry, TernaryPath,
    names::{CODES, GROUP_SCALES, ROW_SCALES},
};
use crate::config::{Quantization, TernaryQuantization};

/// How a layer's experts stand in the checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ExpertStorage {
    /// `[experts, in, out]` floats.
    Float,
    /// `[experts, out, in / 32]` blocks.
    Mxfp4,
    /// Codes and scales.
    Ternary,
}

impl Checkpoint {
    /// A float tensor of any stored precision, widened to f32.
    ///
    /// # Errors
    /// [`CheckpointError`] when it is missing, of another shape or no float.
    pub fn floats(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, CheckpointError> {
        let entry = self.expect_shape(name, shape)?;
        widen(self.bytes(name)?, entry.dtype).ok_or_else(|| self.wrong_dtype(name, entry, FLOATS))
    }

    /// Rows of a float matrix of that shape, widened to f32: for matrices that are never in memory as a whole.
    ///
    /// # Errors
    /// As [`floats`](Self::floats).
    ///
    /// # Panics
    /// If there are no such rows.
    pub fn float_rows(
        &self,
        name: &str,
        shape: [usize; 2],
        rows: std::ops::Range<usize>,
    ) -> Result<Vec<f32>, CheckpointError> {
        let entry = self.expect_shape(name, &shape)?;
        let row_bytes = entry.bytes() / shape[0];
        let bytes = &self.bytes(name)?[rows.start * row_bytes..rows.end * row_bytes];
        widen(bytes, entry.dtype).ok_or_else(|| self.wrong_dtype(name, entry, FLOATS))
    }

    /// Planes of a ternary table; `None` where it is in full precision.
    pub fn table_planes(&self, table: TableName) -> Option<usize> {
        let codes = self.entry(&format!("{}.{CODES}", table.path()))?;
        codes.shape.first().copied()
    }

    /// [`floats`](Self::floats) on a device.
    ///
    /// # Errors
    /// As [`floats`](Self::floats).
    pub fn float_tensor<B: Backend, const D: usize>(
        &self,
        name: &str,
        shape: [usize; D],
        device: &B::Device,
    ) -> Result<Tensor<B, D>, CheckpointError> {
        Ok(Tensor::from_data(TensorData::new(self.floats(name, &shape)?, shape), device))
    }

    /// A float matrix `[rows, columns]` as it stands in the file, mapped where the file's alignment allows.
    ///
    /// # Errors
    /// As [`floats`](Self::floats).
    pub(crate) fn stored_matrix<B: Backend>(
        &self,
        name: &str,
        [rows, columns]: [usize; 2],
        device: &B::Device,
    ) -> Result<StoredMatrix<B>, CheckpointError> {
        let entry = self.expect_shape(name, &[rows, columns])?;
        let float = match entry.dtype {
            Dtype::F32 => StoredFloat::F32,
            Dtype::F16 => StoredFloat::F16,
            Dtype::BF16 => StoredFloat::Bf16,
            _ => return Err(self.wrong_dtype(name, entry, FLOATS)),
        };
        let row_bytes = columns * entry.dtype.bitsize() / 8;
        let (float, data) = if row_bytes % 4 == 0 {
            (float, self.mapped(name, vec![rows, row_bytes / 4], DType::U32)?)
        } else {
            // A row that is no whole number of words: widened, which only happens to odd widths.
            let words: Vec<u32> = self.floats(name, &[rows, columns])?.into_iter().map(f32::to_bits).collect();
            (StoredFloat::F32, TensorData::new(words, [rows, columns]))
        };
        let words = Tensor::from_data(data, (device, DType::U32));
        StoredMatrix::new(words, columns, float).map_err(|source| self.bad_format(name, source))
    }

    /// A ternary weight, pointing into the mapped file.
    ///
    /// # Errors
    /// [`CheckpointError`] when a part is missing or does not fit the configuration.
    pub(super) fn ternary_weight<B: Backend>(
        &self,
        path: &TernaryPath,
        [in_features, rows]: [usize; 2],
        device: &B::Device,
    ) -> Result<TernaryWeight<B>, CheckpointError> {
        let codes_name = path.part(CODES);
        let entry = self.require(&codes_name)?;
        let Quantization::Ternary(quantization) = &self.config().quantization else {
            return Err(self.wrong_dtype(&codes_name, entry, "no codes without a quantization_config of ternoss"));
        };
        let matrices = match path {
            TernaryPath::Linear(_) => 1,
            TernaryPath::Experts(_) => self.config().num_local_experts,
        };
        // Planes may differ from tensor to tensor: the shape says how many there are.
        let planes = entry.shape.iter().rev().nth(2).copied().unwrap_or(1);
        let &TernaryQuantization { format, group_size, rotation, .. } = quantization;
        let layout = TernaryLayout { format, matrices, planes, rows, in_features, group_size, rotation };
        let bad_format = |source| self.bad_format(&codes_name, source);
        layout.validate().map_err(bad_format)?;
        let codes = self.ternary_part(path, CODES, &layout.codes_shape(), (Dtype::U32, DType::U32))?;
        let row_scales = self.ternary_part(path, ROW_SCALES, &layout.row_scales_shape(), (Dtype::F32, DType::F32))?;
        let group_scales = match layout.group_size {
            Some(_) => {
                let shape = layout.group_scales_shape();
                let data = self.ternary_part(path, GROUP_SCALES, &shape, (Dtype::U8, DType::U8))?;
                Some(Tensor::from_data(data, (device, DType::U8)))
            }
            None => None,
        };
        let codes = Tensor::from_data(codes, (device, DType::U32));
        TernaryWeight::new(codes, Tensor::from_data(row_scales, device), group_scales, layout).map_err(bad_format)
    }

    fn ternary_part(
        &self,
        path: &TernaryPath,
        suffix: &str,
        shape: &[usize],
        (stored, dtype): (Dtype, DType),
    ) -> Result<TensorData, CheckpointError> {
        let name = path.part(suffix);
        let entry = self.expect_shape(&name, path.file_shape(shape))?;
        match entry.dtype == stored {
            true => self.mapped(&name, shape.to_vec(), dtype),
            false => Err(self.wrong_dtype(&name, entry, "U32 codes, F32 row scales and U8 group scales")),
        }
    }

    /// One expert's matrix in f32, `[out, in]` row-major, whatever it is stored as.
    ///
    /// # Errors
    /// [`CheckpointError`] when a part is missing, of another shape, no float or MXFP4, or (MXFP4) decodes to infinity.
    pub fn expert_rows(&self, layer: usize, matrix: ExpertMatrix, expert: usize) -> Result<Vec<f32>, CheckpointError> {
        let [in_features, out_features] = matrix.shape(self.config());
        let path = matrix.path(layer);
        match self.expert_storage(layer, matrix)? {
            ExpertStorage::Mxfp4 => self.mxfp4_rows(&path, expert, [in_features, out_features]),
            _ => {
                let columns = self.float_expert(&path, expert, [in_features, out_features])?;
                Ok(transpose(&columns, in_features, out_features))
            }
        }
    }

    /// One expert's matrix in f32, `[in, out]` row-major, as a dense linear wants it.
    ///
    /// # Errors
    /// As [`expert_rows`](Self::expert_rows).
    pub(crate) fn expert_columns(
        &self,
        layer: usize,
        matrix: ExpertMatrix,
        expert: usize,
    ) -> Result<Vec<f32>, CheckpointError> {
        let [in_features, out_features] = matrix.shape(self.config());
        let path = matrix.path(layer);
        match self.expert_storage(layer, matrix)? {
            ExpertStorage::Mxfp4 => {
                let rows = self.mxfp4_rows(&path, expert, [in_features, out_features])?;
                Ok(transpose(&rows, out_features, in_features))
            }
            _ => self.float_expert(&path, expert, [in_features, out_features]),
        }
    }

    pub(super) fn expert_storage(&self, layer: usize, matrix: ExpertMatrix) -> Result<ExpertStorage, CheckpointError> {
        let path = matrix.path(layer);
        if self.entry(&format!("{path}.{CODES}")).is_some() {
            return Ok(ExpertStorage::Ternary);
        }
        if self.entry(&format!("{path}_blocks")).is_some() {
            return Ok(ExpertStorage::Mxfp4);
        }
        self.require(&path).map(|_| ExpertStorage::Float)
    }

    /// The names of the tensors one expert matrix of full precision is read from.
    pub fn expert_tensors(&self, layer: usize, matrix: ExpertMatrix) -> Vec<String> {
        let path = matrix.path(layer);
        match self.entry(&path) {
            Some(_) => vec![path],
            None => vec![format!("{path}_blocks"), format!("{path}_scales")],
        }
    }

    fn float_expert(
        &self,
        path: &str,
        expert: usize,
        [rows, columns]: [usize; 2],
    ) -> Result<Vec<f32>, CheckpointError> {
        let experts = self.config().num_local_experts;
        let entry = self.expect_shape(path, &[experts, rows, columns])?;
        let bytes = nth(self.bytes(path)?, experts, expert);
        widen(bytes, entry.dtype).ok_or_else(|| self.wrong_dtype(path, entry, FLOATS))
    }

    fn mxfp4_rows(&self, path: &str, expert: usize, [columns, rows]: [usize; 2]) -> Result<Vec<f32>, CheckpointError> {
        let experts = self.config().num_local_experts;
        let (blocks, scales) = self.mxfp4_parts(path, [columns, rows])?;
        let (blocks, scales) = (nth(blocks, experts, expert), nth(scales, experts, expert));
        let mut weights = vec![0.0f32; rows * columns];
        let decoded: Result<(), mxfp4::BlockMismatch> = weights
            .par_chunks_mut(columns)
            .zip(blocks.par_chunks(columns / 2))
            .zip(scales.par_chunks(columns / mxfp4::BLOCK))
            .try_for_each(|((row, blocks), scales)| mxfp4::decode(blocks, scales, row));
        let blocks_name = format!("{path}_blocks");
        decoded.map_err(|_| CheckpointError::Truncated { path: self.path_of(&blocks_name) })?;
        // Only scales near the top of the range can overflow: the scan of the weights is rarely needed.
        if may_overflow(scales) {
            self.expect_finite(&blocks_name, &weights)?;
        }
        Ok(weights)
    }

    /// Blocks and scales of all experts, their shapes and types checked.
    fn mxfp4_parts(&self, path: &str, [columns, rows]: [usize; 2]) -> Result<(&[u8], &[u8]), CheckpointError> {
        let experts = self.config().num_local_experts;
        let blocks_per_row = columns / mxfp4::BLOCK;
        let part = |suffix: &str, shape: &[usize]| {
            let name = format!("{path}_{suffix}");
            let entry = self.expect_shape(&name, shape)?;
            match entry.dtype == Dtype::U8 && columns.is_multiple_of(mxfp4::BLOCK) {
                true => self.bytes(&name),
                false => Err(self.wrong_dtype(&name, entry, "U8, rows of whole blocks of 32 weights")),
            }
        };
        let blocks = part("blocks", &[experts, rows, blocks_per_row, mxfp4::BLOCK_BYTES])?;
        Ok((blocks, part("scales", &[experts, rows, blocks_per_row])?))
    }

    /// Checks all that decoding a layer's full-precision experts can trip over, without decoding them.
    ///
    /// # Errors
    /// As [`expert_rows`](Self::expert_rows).
    pub(super) fn check_experts(&self, layer: usize) -> Result<(), CheckpointError> {
        let experts = self.config().num_local_experts;
        for matrix in ExpertMatrix::ALL {
            let path = matrix.path(layer);
            let shape @ [in_features, out_features] = matrix.shape(self.config());
            if self.expert_storage(layer, matrix)? == ExpertStorage::Mxfp4 {
                let (_, scales) = self.mxfp4_parts(&path, shape)?;
                for expert in (0..experts).filter(|expert| may_overflow(nth(scales, experts, *expert))) {
                    self.mxfp4_rows(&path, expert, shape)?;
                }
                continue;
            }
            let entry = self.expect_shape(&path, &[experts, in_features, out_features])?;
            if widen(&[], entry.dtype).is_none() {
                return Err(self.wrong_dtype(&path, entry, FLOATS));
            }
        }
        Ok(())
    }

    /// Refuses a tensor that holds NaN or infinity.
    ///
    /// # Errors
    /// [`CheckpointError::NotFinite`] with the first such element.
    pub fn expect_finite(&self, name: &str, values: &[f32]) -> Result<(), CheckpointError> {
        self.expect_finite_from(name, values, 0)
    }

    fn expect_finite_from(&self, name: &str, values: &[f32], first: usize) -> Result<(), CheckpointError> {
        match values.par_iter().position_first(|value| !value.is_finite()) {
            None => Ok(()),
            Some(position) => Err(CheckpointError::NotFinite {
                path: self.path_of(name),
                tensor: name.into(),
                position: first + position,
                value: values[position],
            }),
        }
    }

    fn expect_shape(&self, name: &str, shape: &[usize]) -> Result<&TensorEntry, CheckpointError> {
        let entry = self.require(name)?;
        match entry.shape == shape {
            true => Ok(entry),
            false => Err(CheckpointError::Shape {
                path: self.path_of(name),
                tensor: name.into(),
                expected: shape.into(),
                found: entry.shape.clone(),
            }),
        }
    }

    fn mapped(&self, name: &str, shape: Vec<usize>, dtype: DType) -> Result<TensorData, CheckpointError> {
        let entry = self.require(name)?;
        let (path, map) = self.file(entry);
        map.tensor_data(entry.range.clone(), shape, dtype).map_err(|_| CheckpointError::Truncated { path: path.into() })
    }

    /// Refuses a float tensor that holds NaN or infinity; other types pass.
    ///
    /// # Errors
    /// [`CheckpointError::NotFinite`] with the first such element.
    pub fn expect_finite_stored(&self, name: &str) -> Result<(), CheckpointError> {
        const BYTES_AT_ONCE: usize = 1 << 26;
        let dtype = self.require(name)?.dtype;
        for (chunk, bytes) in self.bytes(name)?.chunks(BYTES_AT_ONCE).enumerate() {
            let Some(values) = widen(bytes, dtype) else {
                return Ok(());
            };
            let first = chunk * values.len();
            self.expect_finite_from(name, &values, first)?;
        }
        Ok(())
    }

    fn wrong_dtype(&self, name: &str, entry: &TensorEntry, expected: &'static str) -> CheckpointError {
        CheckpointError::Dtype { path: self.path_of(name), tensor: name.into(), expected, found: entry.dtype }
    }

    fn bad_format(&self, name: &str, source: ternoss_backends::FormatError) -> CheckpointError {
        CheckpointError::Format { path: self.path_of(name), tensor: name.into(), source }
    }
}

const FLOATS: &str = "BF16, F16 or F32";

/// Whether a block can decode to infinity: 2^(252 - 127) times the largest code, 6, is still a finite f32.
fn may_overflow(scales: &[u8]) -> bool {
    scales.iter().any(|scale| *scale > 252)
}

/// The bytes of one of `count` equal parts.
fn nth(bytes: &[u8], count: usize, index: usize) -> &[u8] {
    let size = bytes.len() / count;
    &bytes[index * size..(index + 1) * size]
}

fn widen(bytes: &[u8], dtype: Dtype) -> Option<Vec<f32>> {
    fn each<const N: usize>(bytes: &[u8], value: impl Fn([u8; N]) -> f32 + Sync) -> Vec<f32> {
        let (chunks, _) = bytes.as_chunks::<N>();
        chunks.par_iter().with_min_len(1 << 14).map(|chunk| value(*chunk)).collect()
    }
    match dtype {
        Dtype::F32 => Some(each(bytes, f32::from_le_bytes)),
        Dtype::F16 => Some(each(bytes, |pair| f16::from_le_bytes(pair).to_f32())),
        Dtype::BF16 => Some(each(bytes, |pair| bf16::from_le_bytes(pair).to_f32())),
        _ => None,
    }
}

/// `[rows, columns]` to `[columns, rows]`, in tiles that stay in cache.
pub(crate) fn transpose(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    const TILE: usize = 32;
    let mut out = vec![0.0; values.len()];
    out.par_chunks_mut(TILE * rows).enumerate().for_each(|(tile, out)| {
        let first = tile * TILE;
        for row_tile in (0..rows).step_by(TILE) {
            for (column, out) in out.chunks_exact_mut(rows).enumerate() {
                for row in row_tile..(row_tile + TILE).min(rows) {
                    out[row] = values[row * columns + first + column];
                }
            }
        }
    });
    out
}
