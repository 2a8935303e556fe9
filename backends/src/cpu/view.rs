use crate::format::{FormatError, TernaryLayout};

/// Packed ternary matrices in memory: the kernels' view of a [`TernaryWeight`](crate::TernaryWeight).
#[derive(Debug, Clone, Copy)]
pub struct TernaryMatrices<'a> {
    layout: TernaryLayout,
    codes: &'a [u32],
    row_scales: &'a [f32],
    group_scales: Option<&'a [u8]>,
}

/// One of them: all planes of one matrix.
#[derive(Debug, Clone, Copy)]
pub struct TernaryRows<'a> {
    view: TernaryMatrices<'a>,
}

impl<'a> TernaryMatrices<'a> {
    /// Checks that the slices are what the layout says they are.
    ///
    /// # Errors
    /// Whatever [`TernaryLayout::validate`] finds, or [`FormatError::Length`] for a slice of the wrong length.
    pub fn new(
        layout: TernaryLayout,
        codes: &'a [u32],
        row_scales: &'a [f32],
        group_scales: Option<&'a [u8]>,
    ) -> Result<Self, FormatError> {
        layout.validate()?;
        check_length("codes", codes.len(), &layout.codes_shape())?;
        check_length("row_scales", row_scales.len(), &layout.row_scales_shape())?;
        // Without groups the shape has no elements, so superfluous scales are refused as well.
        check_length("group_scales", group_scales.map_or(0, <[u8]>::len), &layout.group_scales_shape())?;
        Ok(Self { layout, codes, row_scales, group_scales })
    }

    /// The sizes.
    #[must_use]
    pub const fn layout(&self) -> &TernaryLayout {
        &self.layout
    }

    /// One matrix, or `None` if there is no such one.
    #[must_use]
    pub fn matrix(&self, matrix: usize) -> Option<TernaryRows<'a>> {
        if matrix >= self.layout.matrices {
            return None;
        }
        let rows = self.layout.planes * self.layout.rows;
        let part = |per_row: usize| matrix * rows * per_row..(matrix + 1) * rows * per_row;
        let view = Self {
            layout: TernaryLayout { matrices: 1, ..self.layout },
            codes: &self.codes[part(self.layout.words_per_row())],
            row_scales: &self.row_scales[part(1)],
            group_scales: self.group_scales.map(|scales| &scales[part(self.layout.groups())]),
        };
        Some(TernaryRows { view })
    }
}

impl<'a> TernaryRows<'a> {
    /// The sizes, with one matrix.
    #[must_use]
    pub const fn layout(&self) -> &TernaryLayout {
        &self.view.layout
    }

    /// Codes of `count` rows of a plane from row `first` on.
    pub(super) fn codes(&self, plane: usize, first: usize, count: usize) -> &'a [u32] {
        &self.view.codes[self.part(plane, first, count, self.layout().words_per_row())]
    }

    /// Their `f32` scales.
    pub(super) fn row_scales(&self, plane: usize, first: usize, count: usize) -> &'a [f32] {
        &self.view.row_scales[self.part(plane, first, count, 1)]
    }

    /// Their `u8` scales, `groups` a row.
    pub(super) fn group_scales(&self, plane: usize, first: usize, count: usize) -> Option<&'a [u8]> {
        self.view.group_scales.map(|scales| &scales[self.part(plane, first, count, self.layout().groups())])
    }

    /// The `u8` scales from row `first` of a plane to the end of the matrix.
    pub(super) fn group_scales_from(&self, plane: usize, first: usize) -> Option<&'a [u8]> {
        self.view.group_scales.map(|scales| &scales[(plane * self.layout().rows + first) * self.layout().groups()..])
    }

    /// Writes a row as floats into `out` (`in_features` long), with the bits of the
    /// [reference](crate::reference::ternary_rows). A row that is not there becomes NaN, an invalid code trit 0 in all of
    /// its row.
    pub fn decode_row(&self, row: Option<usize>, out: &mut [f32]) {
        let Some(row) = row.filter(|&row| row < self.layout().rows) else { return out.fill(f32::NAN) };
        let TernaryLayout { planes, group_size, rotation, .. } = *self.layout();
        let mut trits = vec![0i8; out.len()];
        for plane in 0..planes {
            self.trits(plane, row, &mut trits);
            let (row_scale, group_scales) = (self.row_scales(plane, row, 1)[0], self.group_scales(plane, row, 1));
            for (input, (out, trit)) in out.iter_mut().zip(&trits).enumerate() {
                let group_scale = match (group_scales, group_size) {
                    (Some(scales), Some(size)) => f32::from(scales[input / size]),
                    _ => 1.0,
                };
                let value = f32::from(*trit) * group_scale * row_scale;
                *out = if plane == 0 { value } else { *out + value };
            }
        }
        if let Some(rotation) = rotation {
            rotation.rotate_back(out);
        }
    }

    /// The trits of a row that is there, zeros where a code is invalid.
    pub(super) fn trits(&self, plane: usize, row: usize, trits: &mut [i8]) {
        if self.layout().format.unpack_row(self.codes(plane, row, 1), trits).is_err() {
            trits.fill(0);
        }
    }

    fn part(&self, plane: usize, first: usize, count: usize, per_row: usize) -> std::ops::Range<usize> {
        let start = plane * self.layout().rows + first;
        start * per_row..(start + count) * per_row
    }
}

fn check_length(what: &'static str, found: usize, shape: &[usize]) -> Result<(), FormatError> {
    let expected = shape.iter().product();
    if found == expected { Ok(()) } else { Err(FormatError::Length { what, expected, found }) }
}
