//! Activations to int8, one cube a token.
//!
//! No access is checked on the device: numbers end at the last one of a token, and words at the last one of a row; tokens are as many
//! as the arrays hold.
#![allow(unsafe_code)]

use burn::tensor::DType;
use burn_cubecl::{CubeRuntime, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{
    buffer::room,
    device::units_for,
    matrix_units,
    rounding::{Before, Fresh, OWN, SPREAD, Unrounded, UnroundedLaunch, own_words, spread_room},
    routing::{Choice, Scores, choose, scores},
};
use crate::format::{BLOCK, TernaryLayout};

/// Units of a cube at most: the numbers of all fit the shared memory of every device.
const MOST_UNITS: usize = 512;

/// Activations as the products take them.
#[derive(Clone)]
pub(super) struct Tokens<R: CubeRuntime> {
    /// `[tokens, words]`, four int8 a word, zeros past the end of a token.
    pub(super) levels: CubeTensor<R>,
    /// `[tokens]`: NaN for a token that is not finite.
    pub(super) scales: CubeTensor<R>,
    pub(super) count: usize,
    pub(super) words: usize,
    /// Where the products round them themselves, what they round: levels and scales are not there then.
    pub(super) unrounded: Option<Fresh<R>>,
}

/// Words of shared memory that [`quantize_and_route`] takes, experts apart: numbers that are rotated, and a sum and a maximum for
/// each unit.
pub(super) const SHARED_WORDS: usize = (SPREAD as usize + 2) * MOST_UNITS;

/// Words of a rounded token: a kernel reads as many inputs as there are codes.
pub(super) const fn level_words(layout: &TernaryLayout) -> usize {
    layout.packed_inputs().next_multiple_of(BLOCK) / 4
}

/// Rounds tokens for a weight of this layout: `x` has `in_features` numbers a token, twice as many before the gate.
pub(super) fn quantize<R: CubeRuntime>(x: CubeTensor<R>, before: Before<R>, layout: &TernaryLayout) -> Tokens<R> {
    let tokens = Tokens::room(&x, before.numbers(), layout);
    if tokens.count > 0 {
        let units = tokens.units();
        let client = x.client.clone();
        // SAFETY: see the top of the file.
        unsafe {
            quantize_kernel::launch_unchecked::<R>(
                &client,
                CubeCount::Static(tokens.count as u32, 1, 1),
                CubeDim::new_1d(units),
                Fresh { x, before, layout: *layout }.launch(units),
                tokens.levels.clone().into_array_arg(),
                tokens.scales.clone().into_array_arg(),
            );
        }
    }
    tokens
}

/// The norm of [`rms_norm`](crate::rms_norm), then rounding for a weight of this layout, and the choice of `k` experts,
/// their numbers, `I32`, and their weights, `[tokens, k]` each: see [`choose`]. Not where a router does not
/// [fit](super::routing::fits).
pub(super) fn quantize_and_route<R: CubeRuntime>(
    x: CubeTensor<R>,
    (gamma, epsilon): (CubeTensor<R>, f32),
    layout: &TernaryLayout,
    [router, bias]: [CubeTensor<R>; 2],
    k: usize,
) -> (Tokens<R>, [CubeTensor<R>; 2]) {
    let tokens = Tokens::room(&x, 1, layout);
    let choice = [DType::I32, DType::F32].map(|dtype| room(&x, [tokens.count, k], dtype));
    if tokens.count * k > 0 {
        let experts = router.meta.shape()[1];
        assert!(router.meta.shape()[0] == layout.in_features && bias.meta.num_elements() >= experts, "another router");
        let scores = Scores::of(x.clone(), Some(gamma.clone()), router);
        let [chosen, weights] = choice.clone().map(CubeTensor::into_array_arg);
        let (units, client) = (tokens.units(), x.client.clone());
        // SAFETY: see the top of the file; scores are those of as many tokens and experts.
        unsafe {
            quantize_and_route_kernel::launch_unchecked::<R>(
                &client,
                CubeCount::Static(tokens.count as u32, 1, 1),
                CubeDim::new_1d(units),
                Fresh { x, before: Before::Norm(gamma, epsilon), layout: *layout }.launch(units),
                scores.parts.into_array_arg(),
                bias.into_array_arg(),
                tokens.levels.clone().into_array_arg(),
                tokens.scales.clone().into_array_arg(),
                chosen,
                weights,
                Choice { k: k as u32, experts: experts as u32, slices: scores.slices },
            );
        }
    }
    (tokens, choice)
}

impl<R: CubeRuntime> Tokens<R> {
    /// Room for tokens of `x`, which has so many numbers for each that is rounded.
    fn room(x: &CubeTensor<R>, numbers: usize, layout: &TernaryLayout) -> Self {
        let (count, words) = (x.meta.num_elements() / (numbers * layout.in_features), level_words(layout));
        let (levels, scales) = (room(x, [count, words], DType::U32), room(x, [count], DType::F32));
        Self { levels, scales, count, words, unrounded: None }
    }

    /// Tokens for products that round them themselves: see [`quantize`].
    pub(super) fn unrounded(x: CubeTensor<R>, before: Before<R>, layout: &TernaryLayout) -> Self {
        let (count, words) = (x.meta.num_elements() / (before.numbers() * layout.in_features), level_words(layout));
        let (levels, scales) = (x.clone(), x.clone());
        Self { levels, scales, count, words, unrounded: Some(Fresh { x, before, layout: *layout }) }
    }

    /// What products round themselves, as kernels take it; looked at only where there is something.
    pub(super) fn fresh(&self) -> UnroundedLaunch<R> {
        match &self.unrounded {
            Some(fresh) => fresh.clone().launch(matrix_units::UNITS),
            None => Unrounded::none(&self.scales),
        }
    }

    /// Units of a cube that rounds one.
    fn units(&self) -> u32 {
        units_for(&self.levels.client, (4 * self.words).div_ceil(OWN as usize), MOST_UNITS)
    }
}

#[cube(launch_unchecked)]
fn quantize_kernel(tokens: &Unrounded, levels: &mut Array<u32>, scales: &mut Array<f32>) {
    let (mut values, _norm) = tokens.bring(CUBE_POS_X);
    let mut run = SharedMemory::<f32>::new(comptime!(spread_room(tokens.rounding.units) as usize));
    let scale = tokens.rounding.round(&mut values, &mut run);
    put(&values, scale, tokens, levels, scales);
}

#[cube(launch_unchecked)]
fn quantize_and_route_kernel(
    tokens: &Unrounded,
    parts: &Array<f32>,
    bias: &Array<f32>,
    levels: &mut Array<u32>,
    scales: &mut Array<f32>,
    chosen: &mut Array<i32>,
    weights: &mut Array<f32>,
    #[comptime] choice: Choice,
) {
    let units = comptime!(tokens.rounding.units);
    let scores = scores(parts, units, choice);
    let (mut values, norm) = tokens.bring(CUBE_POS_X);
    choose(&scores, norm, bias, chosen, weights, units, choice);
    let mut run = SharedMemory::<f32>::new(comptime!(spread_room(units) as usize));
    let scale = tokens.rounding.round(&mut values, &mut run);
    put(&values, scale, tokens, levels, scales);
}

/// Writes what a unit has rounded of the cube's token.
#[cube]
fn put(values: &Array<f32>, scale: f32, tokens: &Unrounded, levels: &mut Array<u32>, scales: &mut Array<f32>) {
    let (words, units) = comptime!((tokens.rounding.words, tokens.rounding.units));
    #[unroll]
    for n in 0..comptime!(own_words(words, units)) {
        let word = tokens.rounding.place(n);
        if word < words {
            levels[(CUBE_POS_X * words + word) as usize] = tokens.rounding.word(values, scale, n);
        }
    }
    if UNIT_POS == 0 {
        scales[CUBE_POS_X as usize] = scale;
    }
}
