use serde::{Deserialize, Serialize};

use super::{BLOCK, CodeFormat, FormatError, Rotation};

/// The longest row whose dot product with int8 activations is exact in an `i32` whatever the scales:
/// 255 (group scale) * 127 (activation) * 65,536 < 2^31.
pub const MAX_IN_FEATURES: usize = 65_536;

/// The sizes of a ternary weight tensor, from which every shape and byte count follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TernaryLayout {
    /// How the trits are coded.
    pub format: CodeFormat,
    /// Matrices in the tensor: the experts of a layer, or 1.
    pub matrices: usize,
    /// Ternary planes that are summed to make one matrix.
    pub planes: usize,
    /// Rows of a matrix (outputs).
    pub rows: usize,
    /// Weights in a row (inputs).
    pub in_features: usize,
    /// Inputs that share a `u8` scale, a multiple of [`BLOCK`]; `None` if rows have only their `f32` scale.
    pub group_size: Option<usize>,
    /// How the input is rotated before it is rounded to int8, if it is.
    pub rotation: Option<Rotation>,
}

impl TernaryLayout {
    /// Words of one packed row.
    #[must_use]
    pub const fn words_per_row(&self) -> usize {
        self.format.words_per_row(self.in_features)
    }

    /// Inputs that a packed row has codes for, the padding included.
    #[must_use]
    pub const fn packed_inputs(&self) -> usize {
        self.words_per_row() * self.format.weights_per_word()
    }

    /// Group scales of one row, the last group possibly short; 0 if the layout has no groups.
    #[must_use]
    pub const fn groups(&self) -> usize {
        match self.group_size {
            Some(size) if size > 0 => self.in_features.div_ceil(size),
            _ => 0,
        }
    }

    /// Shape of the codes: `[matrices, planes, rows, words]`, elements `u32`.
    #[must_use]
    pub const fn codes_shape(&self) -> [usize; 4] {
        [self.matrices, self.planes, self.rows, self.words_per_row()]
    }

    /// Shape of the row scales: `[matrices, planes, rows]`, elements `f32`.
    #[must_use]
    pub const fn row_scales_shape(&self) -> [usize; 3] {
        [self.matrices, self.planes, self.rows]
    }

    /// Shape of the group scales: `[matrices, planes, rows, groups]`, elements `u8`.
    #[must_use]
    pub const fn group_scales_shape(&self) -> [usize; 4] {
        [self.matrices, self.planes, self.rows, self.groups()]
    }

    /// Weights of the whole tensor. Planes do not add weights, they add bits to them.
    #[must_use]
    pub const fn weights(&self) -> usize {
        self.matrices * self.rows * self.in_features
    }

    /// Bytes of codes, row scales and group scales together.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.matrices * self.planes * self.rows * self.row_bytes()
    }

    /// Bits a weight costs, all scales and padding included.
    #[must_use]
    pub fn bits_per_weight(&self) -> f64 {
        self.bytes() as f64 * 8.0 / self.weights() as f64
    }

    /// Checks that the sizes make sense and that a kernel's integers cannot overflow.
    ///
    /// # Errors
    /// [`FormatError::Empty`], [`FormatError::GroupSize`], [`FormatError::TooWide`] or [`FormatError::TooLarge`].
    pub fn validate(&self) -> Result<(), FormatError> {
        let sizes = [
            ("matrices", self.matrices),
            ("planes", self.planes),
            ("rows", self.rows),
            ("in_features", self.in_features),
        ];
        if let Some((what, _)) = sizes.into_iter().find(|&(_, size)| size == 0) {
            return Err(FormatError::Empty { what });
        }
        if let Some(group_size) = self.group_size.filter(|&size| size == 0 || size % BLOCK != 0) {
            return Err(FormatError::GroupSize { group_size });
        }
        if self.in_features > MAX_IN_FEATURES {
            return Err(FormatError::TooWide { in_features: self.in_features, limit: MAX_IN_FEATURES });
        }
        // Dense f32 rows are larger than packed ones: if those can be counted, everything else can.
        [self.matrices, self.planes, self.rows, self.in_features.max(BLOCK), 8]
            .into_iter()
            .try_fold(1usize, usize::checked_mul)
            .filter(|&bytes| bytes <= isize::MAX as usize)
            .map(|_| ())
            .ok_or_else(|| FormatError::TooLarge { layout: format!("{self:?}") })
    }

    const fn row_bytes(&self) -> usize {
        self.words_per_row() * 4 + 4 + self.groups()
    }
}
