use std::fmt;

use burn::tensor::{DType, Int, Tensor, backend::Backend};
use half::{bf16, f16};
use serde::{Deserialize, Serialize};

use super::{Screen, TernaryBackend, restore, single, timed};
use crate::{
    format::{FormatError, check_dtype, check_shape},
    reference,
};

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

/// A linear layer whose matrix is kept as it is stored (bf16, f16 or f32): `x [tokens, columns]`, `[tokens, rows]`.
///
/// Arithmetic is `f32` with fused multiply-adds. On the CPU kernels the order of the sums is fixed (see
/// [`cpu::stored`](crate::cpu::stored)), so bits do not depend on threads, instruction set or batch. The matrix is never
/// converted as a whole. Gradients flow to `x`.
///
/// # Panics
/// If the width of `x` is not the matrix's number of columns.
#[must_use]
pub fn stored_linear<B: TernaryBackend>(x: Tensor<B, 2>, matrix: &StoredMatrix<B>) -> Tensor<B, 2> {
    assert_eq!(x.dims()[1], matrix.columns(), "width of x and columns of the stored matrix");
    let dtype = x.dtype();
    restore(timed(|| B::stored_linear(single(x), matrix)), dtype)
}

/// The products with some rows of a stored matrix alone: `x [tokens, columns]`, `rows [n]`, `[tokens, n]`. Where the CPU
/// kernels run they have the bits of [`stored_linear`]. A number that is no row gives NaN.
///
/// # Panics
/// If the width of `x` is not the matrix's number of columns.
#[must_use]
pub fn stored_linear_at<B: TernaryBackend>(
    x: Tensor<B, 2>,
    matrix: &StoredMatrix<B>,
    rows: Tensor<B, 1, Int>,
) -> Tensor<B, 2> {
    assert_eq!(x.dims()[1], matrix.columns(), "width of x and columns of the stored matrix");
    let dtype = x.dtype();
    restore(timed(|| B::stored_linear_at(single(x), matrix, rows)), dtype)
}

/// A copy of a stored matrix in 4 bits a weight, in this machine's memory, that says which rows cannot have a large product:
/// see [`cpu::screen`](crate::cpu::screen). `None` on a backend that has no kernel for it, where [`stored_linear`] is all
/// there is. Takes all threads for a while, with a `pause` now and then, in which what was read can be let go.
#[must_use]
pub fn screen<B: TernaryBackend>(matrix: &StoredMatrix<B>, mut pause: impl FnMut()) -> Option<Screen> {
    B::screen(matrix, &mut pause)
}

/// What each product of `x [tokens, columns]` with a row of the matrix behind `screen` is at most: `[tokens, rows]`. Reads 3
/// of the 4 bits.
///
/// A product is above its bound with a probability of at most 1.3e-14. That is also the probability that the largest of a
/// token's products belongs to a row whose bound is below another product: see [`cpu::screen`](crate::cpu::screen). Bounds
/// are never NaN; a token or a row that could leave the range of floats has infinite ones. No gradients.
///
/// # Panics
/// If the width of `x` is not the screen's number of columns.
#[must_use]
pub fn screen_bounds<B: TernaryBackend>(x: Tensor<B, 2>, screen: &Screen) -> Tensor<B, 2> {
    assert_eq!(x.dims()[1], screen.columns(), "width of x and columns of the screen");
    timed(|| B::screen_bounds(single(x), screen))
}

/// Closer bounds of the products of one token `x [1, columns]` with some `rows`, in the place of those that
/// [`screen_bounds`] gave for them: with the fourth bit of the screen. They are wrong as seldom.
///
/// # Panics
/// If `x` is not one token of the screen's width, or there are not as many `bounds` as `rows`.
pub fn closer_bounds<B: TernaryBackend>(x: Tensor<B, 2>, screen: &Screen, rows: &[u32], bounds: &mut [f32]) {
    assert_eq!(x.dims(), [1, screen.columns()], "one token of the screen's width");
    timed(|| reference::closer_bounds(x, screen, rows, bounds));
}

/// Rows of a stored matrix (an embedding): `ids [n]`, `[n, columns]` in `F32`. An id that is no row gives a row of NaN.
#[must_use]
pub fn stored_rows<B: TernaryBackend>(matrix: &StoredMatrix<B>, ids: Tensor<B, 1, Int>) -> Tensor<B, 2> {
    timed(|| B::stored_rows(matrix, ids))
}
