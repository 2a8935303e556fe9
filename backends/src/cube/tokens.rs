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
    device::{Join, factor_of, is_finite, is_nan, joined_by_planes, nan, plane_of, round, signs, units_for},
    routing::{Choice, Scores, choose, scores},
};
use crate::{
    format::{BLOCK, Rotation, TernaryLayout},
    ops::ClampedSwiGlu,
};

/// Numbers that a unit looks after: eight units rotate a block.
const OWN: u32 = 8;
/// Where they lie in shared memory, so that units do not wait for each other.
const SPREAD: u32 = OWN + 1;
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
}

/// What is done to a token before it is rounded.
pub(super) enum Before<R: CubeRuntime> {
    /// Nothing.
    Nothing,
    /// The norm of [`rms_norm`](crate::rms_norm): its `gamma`, its epsilon.
    Norm(CubeTensor<R>, f32),
    /// The gate of the experts, on twice as many numbers.
    Gate(ClampedSwiGlu),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    Plain,
    Normed,
    Gated,
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
    let tokens = Tokens::room(&x, if matches!(before, Before::Gate(_)) { 2 } else { 1 }, layout);
    if tokens.count > 0 {
        let (kind, gamma, numbers) = match before {
            Before::Nothing => (Kind::Plain, x.clone(), [0.0; 2]),
            Before::Norm(gamma, epsilon) => (Kind::Normed, gamma, [epsilon, 0.0]),
            Before::Gate(gate) => (Kind::Gated, x.clone(), [gate.alpha, gate.limit]),
        };
        assert!(gamma.meta.num_elements() >= layout.in_features, "a norm of other inputs");
        // SAFETY: see the top of the file.
        unsafe {
            quantize_kernel::launch_unchecked::<R>(
                &x.client.clone(),
                CubeCount::Static(tokens.count as u32, 1, 1),
                CubeDim::new_1d(tokens.units()),
                x.into_array_arg(),
                gamma.into_array_arg(),
                tokens.levels.clone().into_array_arg(),
                tokens.scales.clone().into_array_arg(),
                Rounding::launch(&tokens, layout, kind),
                numbers[0],
                numbers[1],
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
        // SAFETY: see the top of the file; scores are those of as many tokens and experts.
        unsafe {
            quantize_and_route_kernel::launch_unchecked::<R>(
                &x.client.clone(),
                CubeCount::Static(tokens.count as u32, 1, 1),
                CubeDim::new_1d(tokens.units()),
                x.into_array_arg(),
                gamma.into_array_arg(),
                scores.parts.into_array_arg(),
                bias.into_array_arg(),
                tokens.levels.clone().into_array_arg(),
                tokens.scales.clone().into_array_arg(),
                chosen,
                weights,
                Rounding::launch(&tokens, layout, Kind::Normed),
                epsilon,
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
        Self { levels: room(x, [count, words], DType::U32), scales: room(x, [count], DType::F32), count, words }
    }

    /// Units of a cube that rounds one.
    fn units(&self) -> u32 {
        units_for(&self.levels.client, (4 * self.words).div_ceil(OWN as usize), MOST_UNITS)
    }
}

/// How tokens are rounded.
#[derive(CubeLaunch, CubeType)]
struct Rounding {
    in_features: u32,
    seed_low: u32,
    seed_high: u32,
    #[cube(comptime)]
    words: u32,
    #[cube(comptime)]
    units: u32,
    #[cube(comptime)]
    kind: Kind,
    /// See [`plane_of`].
    #[cube(comptime)]
    plane: u32,
    /// Numbers that are rotated together.
    #[cube(comptime)]
    rotation: Option<u32>,
}

impl Rounding {
    fn launch<R: CubeRuntime>(tokens: &Tokens<R>, layout: &TernaryLayout, kind: Kind) -> RoundingLaunch<R> {
        let (units, plane) = (tokens.units(), plane_of(&tokens.levels.client));
        let seed = layout.rotation.map_or(0, |rotation| rotation.seed);
        let width = layout.rotation.map(|_| Rotation::width(layout.in_features) as u32);
        let words = level_words(layout) as u32;
        RoundingLaunch::new(
            layout.in_features as u32,
            seed as u32,
            (seed >> 32) as u32,
            words,
            units,
            kind,
            plane,
            width,
        )
    }
}

#[cube(launch_unchecked)]
fn quantize_kernel(
    x: &Array<f32>,
    gamma: &Array<f32>,
    levels: &mut Array<u32>,
    scales: &mut Array<f32>,
    rounding: &Rounding,
    first: f32,
    second: f32,
) {
    let (mut values, _norm) = bring(x, gamma, rounding, first, second);
    let mut run = SharedMemory::<f32>::new(comptime!((SPREAD * rounding.units) as usize));
    round_token(&mut values, levels, scales, rounding, &mut run);
}

#[cube(launch_unchecked)]
fn quantize_and_route_kernel(
    x: &Array<f32>,
    gamma: &Array<f32>,
    parts: &Array<f32>,
    bias: &Array<f32>,
    levels: &mut Array<u32>,
    scales: &mut Array<f32>,
    chosen: &mut Array<i32>,
    weights: &mut Array<f32>,
    rounding: &Rounding,
    epsilon: f32,
    #[comptime] choice: Choice,
) {
    let units = comptime!(rounding.units);
    let scores = scores(parts, units, choice);
    let (mut values, norm) = bring(x, gamma, rounding, epsilon, 0.0);
    choose(&scores, norm, bias, chosen, weights, units, choice);
    let mut run = SharedMemory::<f32>::new(comptime!((SPREAD * units) as usize));
    round_token(&mut values, levels, scales, rounding, &mut run);
}

/// How often the units of a cube take [`OWN`] numbers each of a token of so many words.
const fn rounds_of(words: u32, units: u32) -> u32 {
    (4 * words).div_ceil(OWN * units)
}

/// A unit's numbers of a token, as they are before the rotation, zeros past its end; and what a norm has multiplied them with.
#[cube]
fn bring(x: &Array<f32>, gamma: &Array<f32>, rounding: &Rounding, first: f32, second: f32) -> (Array<f32>, f32) {
    let token = CUBE_POS_X;
    let in_features = rounding.in_features;
    let (units, kind) = comptime!((rounding.units, rounding.kind));
    let rounds = comptime!(rounds_of(rounding.words, units));
    let mut values = Array::<f32>::new(comptime!((OWN * rounds) as usize));
    let mut factors = Array::<f32>::new(comptime!((OWN * rounds) as usize));
    let mut sum = f32::new(0.0);
    #[unroll]
    for n in 0..comptime!(OWN * rounds) {
        let i = n / OWN * OWN * units + OWN * UNIT_POS + n % OWN;
        let mut value = f32::new(0.0);
        if i < in_features {
            value = load(x, token * in_features, i, first, second, kind);
            if comptime!(kind == Kind::Normed) {
                factors[comptime!(n as usize)] = gamma[i as usize];
            }
        }
        values[comptime!(n as usize)] = value;
        sum += value * value;
    }
    let mut norm = f32::new(1.0);
    if comptime!(kind == Kind::Normed) {
        let mut sums = SharedMemory::<f32>::new(comptime!(units as usize));
        let sum = joined_by_planes(sum, &mut sums, units, comptime!(rounding.plane), Join::Sum);
        norm = 1.0 / f32::sqrt(sum / f32::cast_from(in_features) + first);
        #[unroll]
        for n in 0..comptime!(OWN * rounds) {
            let i = n / OWN * OWN * units + OWN * UNIT_POS + n % OWN;
            if i < in_features {
                values[comptime!(n as usize)] = values[comptime!(n as usize)] * norm * factors[comptime!(n as usize)];
            }
        }
    }
    (values, norm)
}

/// A cube rotates and rounds a token.
#[cube]
fn round_token(
    values: &mut Array<f32>,
    levels: &mut Array<u32>,
    scales: &mut Array<f32>,
    rounding: &Rounding,
    run: &mut SharedMemory<f32>,
) {
    let token = CUBE_POS_X;
    let (words, units, rotation) = comptime!((rounding.words, rounding.units, rounding.rotation));
    let rounds = comptime!(rounds_of(words, units));
    // Numbers without a sign are ordered as their bits; what is not finite is the largest.
    let mut largest = u32::new(0);
    #[unroll]
    for n in 0..comptime!(OWN * rounds) {
        if !is_finite(values[comptime!(n as usize)]) {
            largest = 0x7f80_0000u32.runtime();
            values[comptime!(n as usize)] = 0.0;
        }
    }
    if comptime!(rotation.is_some()) {
        #[unroll]
        for round in 0..rounds {
            let seed = (rounding.seed_low, rounding.seed_high);
            rotate(values, comptime!(OWN * round), seed, units, comptime!(rotation.unwrap_or(1)), run);
        }
    }
    #[unroll]
    for n in 0..comptime!(OWN * rounds) {
        largest = max(largest, u32::reinterpret(f32::abs(values[comptime!(n as usize)])));
    }
    let mut keys = SharedMemory::<u32>::new(comptime!(units as usize));
    let largest =
        f32::reinterpret(joined_by_planes(largest, &mut keys, units, comptime!(rounding.plane), Join::Largest));
    let scale = largest / 127.0;
    let divisor = select(scale == 0.0, f32::new(1.0), scale);
    #[unroll]
    for n in 0..comptime!(OWN / 4 * rounds) {
        let word = n / (OWN / 4) * (OWN / 4) * units + OWN / 4 * UNIT_POS + n % (OWN / 4);
        let mut packed = u32::new(0);
        #[unroll]
        for byte in 0..4u32 {
            let level = round(values[comptime!((4 * n + byte) as usize)] / divisor);
            let level = i32::cast_from(clamp(level, -127.0, 127.0));
            packed |= (u32::cast_from(select(scale == 0.0, 0, level)) & 255) << (8 * byte);
        }
        if word < words {
            levels[(token * words + word) as usize] = packed;
        }
    }
    if UNIT_POS == 0 {
        scales[token as usize] = select(is_finite(largest), scale, nan());
    }
}

/// The rotation of [`OWN`] numbers of each unit, from `at` on: signs, then the Walsh-Hadamard transform of each run of `width`
/// numbers, first within units and then, the numbers spread in strides, across them.
#[cube]
fn rotate(
    values: &mut Array<f32>,
    #[comptime] at: u32,
    seed: (u32, u32),
    #[comptime] units: u32,
    #[comptime] width: u32,
    run: &mut SharedMemory<f32>,
) {
    // A block of 64 numbers has 64 signs.
    let first = at * units + OWN * UNIT_POS;
    let signs = signs(first / 64, seed.0, seed.1);
    let mut own = Array::<f32>::new(comptime!(OWN as usize));
    #[unroll]
    for n in 0..OWN {
        own[comptime!(n as usize)] = values[comptime!((at + n) as usize)] * factor_of(signs, first % 64 + n, width);
    }
    stages(&mut own, 1u32, width);
    if comptime!(width > OWN) {
        let spread = UNIT_POS / OWN * OWN * SPREAD + UNIT_POS % OWN;
        sync_cube();
        #[unroll]
        for n in 0..OWN {
            run[(UNIT_POS * SPREAD + n) as usize] = own[comptime!(n as usize)];
        }
        sync_cube();
        #[unroll]
        for n in 0..OWN {
            own[comptime!(n as usize)] = run[(spread + n * SPREAD) as usize];
        }
        stages(&mut own, OWN, width);
        #[unroll]
        for n in 0..OWN {
            run[(spread + n * SPREAD) as usize] = own[comptime!(n as usize)];
        }
        sync_cube();
        #[unroll]
        for n in 0..OWN {
            own[comptime!(n as usize)] = run[(UNIT_POS * SPREAD + n) as usize];
        }
    }
    #[unroll]
    for n in 0..OWN {
        values[comptime!((at + n) as usize)] = own[comptime!(n as usize)];
    }
}

/// The stages of the transform among numbers that are `stride` apart.
#[cube]
fn stages(own: &mut Array<f32>, #[comptime] stride: u32, #[comptime] width: u32) {
    #[unroll]
    for stage in 0..3u32 {
        let half = comptime!(1u32 << stage);
        if comptime!(half * stride < width) {
            #[unroll]
            for n in 0..OWN {
                if comptime!(n & half == 0) {
                    let (low, high) = (own[comptime!(n as usize)], own[comptime!((n + half) as usize)]);
                    own[comptime!(n as usize)] = low + high;
                    own[comptime!((n + half) as usize)] = low - high;
                }
            }
        }
    }
}

/// Number `i` of a token, before it is normed, rotated and rounded.
#[cube]
fn load(x: &Array<f32>, at: u32, i: u32, alpha: f32, limit: f32, #[comptime] kind: Kind) -> f32 {
    match comptime!(kind) {
        Kind::Plain | Kind::Normed => x[(at + i) as usize],
        Kind::Gated => gated(x[(2 * (at + i)) as usize], x[(2 * (at + i) + 1) as usize], alpha, limit),
    }
}

/// [`ClampedSwiGlu`] of a gate and its up.
#[cube]
fn gated(gate: f32, up: f32, alpha: f32, limit: f32) -> f32 {
    // A minimum may forget a NaN.
    let broken = is_nan(gate) || is_nan(up);
    let gate = min(gate, limit);
    let up = clamp(up, -limit, limit);
    select(broken, nan(), (up + 1.0) * gate / (1.0 + f32::exp(-alpha * gate)))
}
