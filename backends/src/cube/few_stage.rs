//! What [`few_units`](super::few_units) brings into shared memory before anything is multiplied.

use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement};
use cubecl::{client::ComputeClient, prelude::*};

use super::{
    few_units::{FEW, FEW_ROWS},
    matrix_units::UNITS,
    operands::{Operands, Quad},
    rounding::{Unrounded, own_words, spread_room},
    tokens::level_words,
    weight::{Packed, has_quads},
};
use crate::format::TernaryWeight;

/// What a cube for a few tokens has in shared memory, in words: so rows are read one after the other, 16 bytes at a time, and
/// nothing waits until all is on its way. What the units are kept busy with is bringing it, so it takes few instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Stage {
    /// Code words of a row.
    pub(super) codes: u32,
    /// Group scales of a row.
    pub(super) groups: u32,
    /// Words of a token.
    pub(super) levels: u32,
    /// Tokens at most.
    tokens: u32,
    /// Whether rows are read 16 bytes at a time.
    pub(super) in_quads: bool,
    /// Whether a cube rounds its token itself.
    pub(super) rounds: bool,
}

impl Stage {
    /// None where a cube of this device has no room for it.
    pub(super) fn of<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
        weight: &TernaryWeight<CubeBackend<R, F, I, BT>>,
        tokens: usize,
        rounds: bool,
        client: &ComputeClient<R>,
    ) -> Option<Self> {
        let layout = &weight.layout;
        let stage = Self {
            codes: layout.words_per_row() as u32,
            groups: if layout.group_size.is_some() { layout.groups() as u32 } else { 0 },
            levels: level_words(layout) as u32,
            tokens: if tokens > 1 { FEW } else { 1 },
            in_quads: has_quads(weight),
            rounds,
        };
        let rows = FEW_ROWS * (code_stride(stage.codes) + stage.groups.max(1));
        // Numbers that are rotated, and a sum and a maximum for each unit.
        let rounding = if rounds { spread_room(UNITS) + 2 * UNITS } else { 0 };
        let words = rows + stage.tokens * level_stride(stage.levels) + 4 * UNITS + rounding;
        (4 * words as usize <= client.properties().hardware.max_shared_memory_size).then_some(stage)
    }
}

/// From one row of so many words to the next one: the same four words of neighbouring rows are in different banks.
pub(super) const fn code_stride(words: u32) -> u32 {
    words + (12 - words % 8) % 8
}

/// From one token of so many words to the next one: sixteen neighbouring words of both are in different banks.
pub(super) const fn level_stride(words: u32) -> u32 {
    words + (48 - words % 32) % 32
}

/// See [`Stage`].
#[derive(CubeType)]
pub(super) struct Staged {
    pub(super) codes: SharedMemory<u32>,
    /// Of each group, those of all rows.
    pub(super) scales: SharedMemory<i32>,
    pub(super) levels: SharedMemory<u32>,
    /// What the planes of a cube found.
    pub(super) parts: SharedMemory<i32>,
}

#[cube]
pub(super) fn staged(#[comptime] stage: Stage) -> Staged {
    Staged {
        codes: SharedMemory::<u32>::new_aligned(comptime!((FEW_ROWS * code_stride(stage.codes)) as usize), 16usize),
        scales: SharedMemory::<i32>::new(comptime!((FEW_ROWS * stage.groups.max(1)) as usize)),
        levels: SharedMemory::<u32>::new_aligned(
            comptime!((stage.tokens * level_stride(stage.levels)) as usize),
            16usize,
        ),
        parts: SharedMemory::<i32>::new(comptime!((4 * UNITS) as usize)),
    }
}

/// Rounds a token into shared memory, and gives its scale.
#[cube]
pub(super) fn round_token(tokens: &Unrounded, token: u32, staged: &mut Staged) -> f32 {
    let (words, units) = comptime!((tokens.rounding.words, tokens.rounding.units));
    let mut run = SharedMemory::<f32>::new(comptime!(spread_room(units) as usize));
    let (mut values, _norm) = tokens.bring(token);
    let scale = tokens.rounding.round(&mut values, &mut run);
    #[unroll]
    for n in 0..comptime!(own_words(words, units)) {
        let word = tokens.rounding.place(n);
        if word < words {
            staged.levels[word as usize] = tokens.rounding.word(&values, scale, n);
        }
    }
    scale
}

/// The words of `width` tokens, whose choices stand from place `first` on, as far as a unit brings them.
///
/// Nothing depends on a condition that units of a plane do not share, so that all is fetched together: what there is nothing for
/// brings the last words once more.
#[cube]
pub(super) fn fetch_tokens(x: &Operands, first: u32, width: u32, #[comptime] stage: Stage) -> Array<Quad> {
    let (quads, sharers) = comptime!((stage.levels / 4, sharers(stage)));
    let mut fetched = Array::<Quad>::new(comptime!(own_quads(stage) as usize));
    let token = UNIT_POS / sharers;
    if token < width {
        let input = x.input_of(x.choice_at(first + token));
        #[unroll]
        for n in 0..comptime!(own_quads(stage)) {
            let place = min(n * sharers + UNIT_POS % sharers, comptime!(quads - 1));
            fetched[comptime!(n as usize)] = x.level_quad(input * quads + place);
        }
    }
    fetched
}

/// Puts them into shared memory.
#[cube]
pub(super) fn put_tokens(fetched: &Array<Quad>, staged: &mut Staged, width: u32, #[comptime] stage: Stage) {
    let (quads, sharers) = comptime!((stage.levels / 4, sharers(stage)));
    let token = UNIT_POS / sharers;
    let mut levels = staged.levels.to_slice_mut().into_vectorized().with_vector_size::<Const<4>>();
    if token < width {
        #[unroll]
        for n in 0..comptime!(own_quads(stage)) {
            let place = min(n * sharers + UNIT_POS % sharers, comptime!(quads - 1));
            levels[(token * comptime!(level_stride(stage.levels) / 4) + place) as usize] =
                fetched[comptime!(n as usize)];
        }
    }
}

/// Units that bring a token: all of a cube, or a plane.
const fn sharers(stage: Stage) -> u32 {
    UNITS / stage.tokens
}

/// How often each of them brings four words.
const fn own_quads(stage: Stage) -> u32 {
    (stage.levels / 4).div_ceil(sharers(stage))
}

/// What a unit brings of a block of rows.
#[derive(CubeType)]
pub(super) struct Fetched {
    quads: Array<Quad>,
    words: Array<u32>,
    scales: Array<i32>,
}

#[cube]
impl Fetched {
    pub(super) fn new(#[comptime] stage: Stage) -> Self {
        let own = comptime!((FEW_ROWS * stage.codes).div_ceil(UNITS));
        let own_scales = comptime!((FEW_ROWS * stage.groups).div_ceil(UNITS).max(1));
        Fetched {
            quads: Array::new(comptime!(own.div_ceil(4) as usize)),
            words: Array::new(comptime!((if stage.in_quads { 1 } else { own }) as usize)),
            scales: Array::new(comptime!(own_scales as usize)),
        }
    }

    /// Brings the codes and the group scales of a matrix's plane, whose row 0 is `matrix_row`.
    pub(super) fn fetch(&mut self, weight: &Packed, matrix_row: u32, first_row: u32, #[comptime] stage: Stage) {
        if comptime!(stage.in_quads) {
            let (width, all) = comptime!((stage.codes / 4, FEW_ROWS * stage.codes / 4));
            #[unroll]
            for n in 0..comptime!(all.div_ceil(UNITS)) {
                let place = min(n * UNITS + UNIT_POS, comptime!(all - 1));
                let row = matrix_row + min(first_row + place / width, weight.rows - 1);
                self.quads[comptime!(n as usize)] = weight.quad(row, place % width);
            }
        } else {
            let (width, all) = comptime!((stage.codes, FEW_ROWS * stage.codes));
            #[unroll]
            for n in 0..comptime!(all.div_ceil(UNITS)) {
                let place = min(n * UNITS + UNIT_POS, comptime!(all - 1));
                let row = matrix_row + min(first_row + place / width, weight.rows - 1);
                self.words[comptime!(n as usize)] = weight.word(row, place % width);
            }
        }
        let scales = comptime!(FEW_ROWS * stage.groups);
        #[unroll]
        for n in 0..comptime!(scales.div_ceil(UNITS)) {
            let place = min(n * UNITS + UNIT_POS, comptime!(scales - 1));
            let row = matrix_row + min(first_row + place % FEW_ROWS, weight.rows - 1);
            self.scales[comptime!(n as usize)] = weight.scale_of_group(row, place / FEW_ROWS);
        }
    }

    /// Puts them into shared memory.
    pub(super) fn put(&self, staged: &mut Staged, #[comptime] stage: Stage) {
        if comptime!(stage.in_quads) {
            let (width, all) = comptime!((stage.codes / 4, FEW_ROWS * stage.codes / 4));
            let mut codes = staged.codes.to_slice_mut().into_vectorized().with_vector_size::<Const<4>>();
            #[unroll]
            for n in 0..comptime!(all.div_ceil(UNITS)) {
                let place = min(n * UNITS + UNIT_POS, comptime!(all - 1));
                let to = place / width * comptime!(code_stride(stage.codes) / 4) + place % width;
                codes[to as usize] = self.quads[comptime!(n as usize)];
            }
        } else {
            let (width, all) = comptime!((stage.codes, FEW_ROWS * stage.codes));
            #[unroll]
            for n in 0..comptime!(all.div_ceil(UNITS)) {
                let place = min(n * UNITS + UNIT_POS, comptime!(all - 1));
                let to = place / width * comptime!(code_stride(stage.codes)) + place % width;
                staged.codes[to as usize] = self.words[comptime!(n as usize)];
            }
        }
        let scales = comptime!(FEW_ROWS * stage.groups);
        #[unroll]
        for n in 0..comptime!(scales.div_ceil(UNITS)) {
            let place = min(n * UNITS + UNIT_POS, comptime!(scales - 1));
            staged.scales[place as usize] = self.scales[comptime!(n as usize)];
        }
    }
}
