//! A packed ternary weight on the device.

use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement};
use cubecl::prelude::*;

use super::{
    buffer::{begins_even, float_rows, integer_rows, words_of_bytes},
    operands::{Quad, quads},
};
use crate::format::{CodeFormat, TernaryLayout, TernaryWeight};

/// The arrays of a weight and their sizes.
#[derive(CubeLaunch, CubeType)]
pub(super) struct Packed {
    codes: Array<u32>,
    row_scales: Array<f32>,
    /// Four to a word; the row scales' bits where there are none.
    group_scales: Array<u32>,
    pub(super) matrices: u32,
    pub(super) rows: u32,
    /// Code words of a row.
    pub(super) words: u32,
    /// From one row's first word to the next one's.
    code_pitch: u32,
    /// From the first scale of a matrix's plane to the next one's.
    row_scale_pitch: u32,
    groups: u32,
    /// From one row's first group scale to the next one's.
    group_scale_pitch: u32,
    #[cube(comptime)]
    pub(super) shape: PackedShape,
}

/// What a kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct PackedShape {
    pub(super) format: CodeFormat,
    pub(super) planes: u32,
    pub(super) group_size: Option<u32>,
}

impl PackedShape {
    /// Groups of four codes in a word.
    pub(super) const fn digits(self) -> u32 {
        self.format.weights_per_word() as u32 / 4
    }
}

/// The arrays of a weight, as a kernel's argument.
pub(super) fn packed<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    weight: &TernaryWeight<CubeBackend<R, F, I, BT>>,
) -> PackedLaunch<R> {
    let layout = weight.layout;
    let TernaryLayout { format, planes, rows, group_size, .. } = layout;
    let (stacked, words, groups) = (layout.matrices * planes, layout.words_per_row(), layout.groups());
    let codes = integer_rows(weight.codes.clone()).holding(stacked * rows, words);
    let row_scales = float_rows(weight.row_scales.clone()).holding(stacked, rows);
    let (group_scales, group_scale_pitch) = match &weight.group_scales {
        Some(scales) => {
            let scales = words_of_bytes(integer_rows(scales.clone()).holding(stacked * rows, groups));
            (scales.array, scales.pitch)
        }
        None => {
            assert!(group_size.is_none(), "no group scales: weights that do not follow their own layout");
            (row_scales.array.clone(), 0)
        }
    };
    PackedLaunch::new(
        codes.array.into_array_arg(),
        row_scales.array.into_array_arg(),
        group_scales.into_array_arg(),
        layout.matrices as u32,
        rows as u32,
        words as u32,
        codes.pitch as u32,
        row_scales.pitch as u32,
        groups as u32,
        group_scale_pitch as u32,
        PackedShape { format, planes: planes as u32, group_size: group_size.map(|size| size as u32) },
    )
}

/// Whether the words of a row can be read four at a time, as the units of a plane share them: those of activations that follow
/// each other.
pub(super) fn has_quads<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    weight: &TernaryWeight<CubeBackend<R, F, I, BT>>,
) -> bool {
    let codes = integer_rows(weight.codes.clone());
    weight.layout.format == CodeFormat::T2 && codes.pitch.is_multiple_of(4) && begins_even(&codes.array)
}

#[cube]
impl Packed {
    /// Which of all rows this is.
    pub(super) fn row(&self, matrix: u32, plane: u32, row: u32) -> u32 {
        let planes = comptime!(self.shape.planes);
        (matrix * planes + plane) * self.rows + row
    }

    pub(super) fn row_scale(&self, matrix: u32, plane: u32, row: u32) -> f32 {
        let planes = comptime!(self.shape.planes);
        self.row_scales[((matrix * planes + plane) * self.row_scale_pitch + row) as usize]
    }

    /// A word of a row.
    pub(super) fn word(&self, row: u32, word: u32) -> u32 {
        self.codes[(row * self.code_pitch + word) as usize]
    }

    /// Four words of a row: see [`has_quads`].
    pub(super) fn quad(&self, row: u32, quad: u32) -> Quad {
        quads(&self.codes)[(row * (self.code_pitch / 4) + quad) as usize]
    }

    /// Where the activations of the codes of [`digit`] `digit` of a word lie, in words of four.
    pub(super) fn place(&self, word: u32, #[comptime] digit: u32) -> u32 {
        match comptime!(self.shape.format) {
            CodeFormat::T2 => word / 4 * 16 + 4 * digit + word % 4,
            CodeFormat::T5 => digit * self.words + word,
        }
    }

    /// Four codes, a byte each, of the activations at `place`: the inverse of [`place`](Self::place).
    pub(super) fn codes_at(&self, row: u32, place: u32) -> u32 {
        self.codes_of(self.word_at(row, place), place)
    }

    /// The word that holds the codes of the activations at `place`.
    pub(super) fn word_at(&self, row: u32, place: u32) -> u32 {
        self.word(row, self.word_of(place))
    }

    /// Which of a row's words that is.
    pub(super) fn word_of(&self, place: u32) -> u32 {
        match comptime!(self.shape.format) {
            CodeFormat::T2 => place / 16 * 4 + place % 4,
            CodeFormat::T5 => place % self.words,
        }
    }

    /// Four codes, a byte each, of the activations at `place`, from the word that holds them.
    pub(super) fn codes_of(&self, word: u32, place: u32) -> u32 {
        match comptime!(self.shape.format) {
            CodeFormat::T2 => (word >> (place % 16 / 4 * 2)) & 0x0303_0303u32,
            CodeFormat::T5 => {
                let digit = place / self.words;
                let mut power = u32::new(81);
                let mut n = u32::new(0);
                while n < digit {
                    power /= 3;
                    n += 1;
                }
                let mut codes = u32::new(0x0101_0101u32 as i64);
                if digit < 5 {
                    codes = digits_of(word, power);
                }
                codes
            }
        }
    }

    /// The group scale of the activations at `place`, 1 without groups.
    pub(super) fn group_scale(&self, row: u32, place: u32) -> i32 {
        self.group_scale_of(self.group_scale_word(row, place), row, place)
    }

    /// The word that holds it, nothing without groups.
    pub(super) fn group_scale_word(&self, row: u32, place: u32) -> u32 {
        let mut word = u32::new(0);
        if comptime!(self.shape.group_size.is_some()) {
            word = self.group_scales[(self.group_scale_at(row, place) / 4) as usize];
        }
        word
    }

    /// The scale in its word.
    pub(super) fn group_scale_of(&self, word: u32, row: u32, place: u32) -> i32 {
        let mut scale = i32::new(1);
        if comptime!(self.shape.group_size.is_some()) {
            scale = i32::cast_from((word >> (self.group_scale_at(row, place) % 4 * 8)) & 255);
        }
        scale
    }

    /// Scale number `group` of a row.
    pub(super) fn scale_of_group(&self, row: u32, group: u32) -> i32 {
        let at = row * self.group_scale_pitch + group;
        i32::cast_from((self.group_scales[(at / 4) as usize] >> (at % 4 * 8)) & 255)
    }

    /// The group of the activations at `place`.
    pub(super) fn group_of(&self, place: u32) -> u32 {
        place * 4 / comptime!(self.shape.group_size.unwrap_or(1))
    }

    /// Which of all group scales.
    fn group_scale_at(&self, row: u32, place: u32) -> u32 {
        row * self.group_scale_pitch + min(self.group_of(place), self.groups - 1)
    }
}

/// Four codes, a byte each, of a word.
#[cube]
pub(super) fn digit(word: u32, #[comptime] digit: u32, #[comptime] format: CodeFormat) -> u32 {
    match comptime!(format) {
        CodeFormat::T2 => (word >> (2 * digit)) & 0x0303_0303u32,
        CodeFormat::T5 => {
            let power = comptime!(3u32.pow(4u32.saturating_sub(digit)));
            digits_of(word, power.runtime())
        }
    }
}

/// The base-3 digit of this power of each byte.
#[cube]
fn digits_of(word: u32, power: u32) -> u32 {
    let mut codes = u32::new(0);
    #[unroll]
    for byte in 0..4u32 {
        codes |= (((word >> (8 * byte)) & 255) / power % 3) << (8 * byte);
    }
    codes
}

/// The product of four trits, as codes, with four int8.
#[cube]
pub(super) fn dot(codes: u32, levels: u32) -> i32 {
    let mut sum = i32::new(0);
    #[unroll]
    for byte in 0..4u32 {
        sum += (i32::cast_from((codes >> (8 * byte)) & 3) - 1) * level(levels, byte);
    }
    sum
}

/// One of four int8.
#[cube]
pub(super) fn level(levels: u32, #[comptime] byte: u32) -> i32 {
    i32::cast_from(levels << (24 - 8 * byte)) >> 24
}
