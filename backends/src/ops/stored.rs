use std::fmt;

use burn::tensor::{DType, Int, Tensor, backend::Backend};
use half::{bf16, f16};
use serde::{Deserialize, Serialize};

use crate::format::{FormatError, check_dtype, check_shape};

/// The float type a frozen matrix is stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StoredFloat {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an `f32`.
    Bf16,
}

impl StoredFloat {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// Bytes an element.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// `u32` words in a row of `columns` elements.
    ///
    /// # Errors
    /// [`FormatError::RaggedRow`] if the row does not end at a word: an odd number of 2-byte elements.
    pub const fn words_per_row(self, columns: usize) -> Result<usize, FormatError> {
        let element_bytes = self.bytes();
        if (columns * element_bytes).is_multiple_of(4) {
            Ok(columns * element_bytes / 4)
        } else {
            Err(FormatError::RaggedRow { columns, element_bytes })
        }
    }

    /// Writes a row as words, rounding to nearest even. `words` must be [`words_per_row`](Self::words_per_row) long;
    /// what lies beyond either end is left out.
    pub fn encode(self, row: &[f32], words: &mut [u32]) {
        let pairs = row.chunks_exact(2).zip(words.iter_mut());
        match self {
            Self::F32 => row.iter().zip(words).for_each(|(x, word)| *word = x.to_bits()),
            Self::F16 => {
                pairs.for_each(|(x, word)| *word = pair(f16::from_f32(x[0]).to_bits(), f16::from_f32(x[1]).to_bits()))
            }
            Self::Bf16 => {
                pairs.for_each(|(x, word)| *word = pair(bf16::from_f32(x[0]).to_bits(), bf16::from_f32(x[1]).to_bits()))
            }
        }
    }

    /// Reads a row of words as floats, exactly.
    pub fn decode(self, words: &[u32], row: &mut [f32]) {
        let halves = words.iter().flat_map(|&word| [word as u16, (word >> 16) as u16]);
        match self {
            Self::F32 => row.iter_mut().zip(words).for_each(|(x, &word)| *x = f32::from_bits(word)),
            Self::F16 => row.iter_mut().zip(halves).for_each(|(x, bits)| *x = f16::from_bits(bits).to_f32()),
            Self::Bf16 => row.iter_mut().zip(halves).for_each(|(x, bits)| *x = f32::from_bits(u32::from(bits) << 16)),
        }
    }
}

const fn pair(low: u16, high: u16) -> u32 {
    low as u32 | (high as u32) << 16
}

impl fmt::Display for StoredFloat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        })
    }
}

/// A frozen full-precision matrix in the type its checkpoint has, usually in a mapped file: embedding, output layer.
#[derive(Debug, Clone)]
pub struct StoredMatrix<B: Backend> {
    /// `[rows, words]`, `U32`: the elements of a row one after the other, little-endian.
    pub words: Tensor<B, 2, Int>,
    /// Elements a row.
    pub columns: usize,
    /// The type of its elements.
    pub float: StoredFloat,
}

impl<B: Backend> StoredMatrix<B> {
    /// A matrix of `columns` elements a row.
    ///
    /// # Errors
    /// [`FormatError::RaggedRow`] if rows are not whole words, [`FormatError::Empty`] without columns,
    /// [`FormatError::Shape`] or [`FormatError::ElementType`] if `words` does not hold such rows.
    pub fn new(words: Tensor<B, 2, Int>, columns: usize, float: StoredFloat) -> Result<Self, FormatError> {
        if columns == 0 {
            return Err(FormatError::Empty { what: "columns" });
        }
        let [rows, per_row] = words.dims();
        check_shape("stored words", &[rows, per_row], &[rows, float.words_per_row(columns)?])?;
        check_dtype("stored words", words.dtype(), DType::U32)?;
        Ok(Self { words, columns, float })
    }

    /// The same matrix held by another backend's tensor of the same words.
    #[cfg(feature = "autodiff")]
    pub(crate) fn with_words<B2: Backend>(&self, words: Tensor<B2, 2, Int>) -> StoredMatrix<B2> {
        StoredMatrix { words, columns: self.columns, float: self.float }
    }

    /// Rows of the matrix.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.words.dims()[0]
    }

    /// Elements a row.
    #[must_use]
    pub const fn columns(&self) -> usize {
        self.columns
    }

    /// The type of its elements.
    #[must_use]
    pub const fn float(&self) -> StoredFloat {
        self.float
    }
}
