//! How a cube rounds a token: it is normed or gated, rotated, and rounded to int8.

use burn_cubecl::{CubeRuntime, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{
    device::{Join, factor_of, is_finite, is_nan, joined_by_planes, nan, plane_of, round, signs},
    tokens::level_words,
};
use crate::{
    format::{Rotation, TernaryLayout},
    ops::ClampedSwiGlu,
};

/// Numbers that a unit looks after: eight units rotate a block.
pub(super) const OWN: u32 = 8;
/// Where they lie in shared memory, so that units do not wait for each other.
pub(super) const SPREAD: u32 = OWN + 1;

/// Numbers of shared memory in which so many units rotate theirs.
pub(super) const fn spread_room(units: u32) -> u32 {
    SPREAD * units
}

/// Tokens that are not rounded yet.
#[derive(Clone)]
pub(super) struct Fresh<R: CubeRuntime> {
    pub(super) x: CubeTensor<R>,
    pub(super) before: Before<R>,
    pub(super) layout: TernaryLayout,
}

/// What is done to a token before it is rounded.
#[derive(Clone)]
pub(super) enum Before<R: CubeRuntime> {
    /// Nothing.
    Nothing,
    /// The norm of [`rms_norm`](crate::rms_norm): its `gamma`, its epsilon.
    Norm(CubeTensor<R>, f32),
    /// The gate of the experts, on twice as many numbers.
    Gate(ClampedSwiGlu),
}

impl<R: CubeRuntime> Before<R> {
    /// Numbers of `x` for each that is rounded.
    pub(super) const fn numbers(&self) -> usize {
        if matches!(self, Self::Gate(_)) { 2 } else { 1 }
    }
}

impl<R: CubeRuntime> Fresh<R> {
    /// The kernels' view of them, for cubes of so many units.
    ///
    /// # Panics
    /// If a norm is of fewer inputs: kernels do not check.
    pub(super) fn launch(self, units: u32) -> UnroundedLaunch<R> {
        let Self { x, before, layout } = self;
        let (kind, gamma, numbers) = match before {
            Before::Nothing => (Kind::Plain, x.clone(), [0.0; 2]),
            Before::Norm(gamma, epsilon) => (Kind::Normed, gamma, [epsilon, 0.0]),
            Before::Gate(gate) => (Kind::Gated, x.clone(), [gate.alpha, gate.limit]),
        };
        assert!(gamma.meta.num_elements() >= layout.in_features, "a norm of other inputs");
        let seed = layout.rotation.map_or(0, |rotation| rotation.seed);
        let width = layout.rotation.map(|_| Rotation::width(layout.in_features) as u32);
        let plane = plane_of(&x.client);
        let (x, gamma, words) = (x.into_array_arg(), gamma.into_array_arg(), level_words(&layout) as u32);
        let (low, high) = (seed as u32, (seed >> 32) as u32);
        let rounding = RoundingLaunch::new(layout.in_features as u32, low, high, words, units, kind, plane, width);
        UnroundedLaunch::new(x, gamma, numbers[0], numbers[1], rounding)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    Plain,
    Normed,
    Gated,
}

/// Tokens that are yet to be rounded.
#[derive(CubeLaunch, CubeType)]
pub(super) struct Unrounded {
    x: Array<f32>,
    gamma: Array<f32>,
    /// The epsilon of a norm, or of a gate its alpha and its limit.
    first: f32,
    second: f32,
    pub(super) rounding: Rounding,
}

impl Unrounded {
    /// Nothing, for a kernel that does not look at it.
    pub(super) fn none<R: CubeRuntime>(other: &CubeTensor<R>) -> UnroundedLaunch<R> {
        let [x, gamma] = [other, other].map(|other| other.clone().into_array_arg());
        UnroundedLaunch::new(x, gamma, 0.0, 0.0, RoundingLaunch::new(0, 0, 0, 0, 1, Kind::Plain, 1, None))
    }
}

/// How tokens are rounded.
#[derive(CubeLaunch, CubeType)]
pub(super) struct Rounding {
    in_features: u32,
    seed_low: u32,
    seed_high: u32,
    #[cube(comptime)]
    pub(super) words: u32,
    #[cube(comptime)]
    pub(super) units: u32,
    #[cube(comptime)]
    kind: Kind,
    /// See [`plane_of`].
    #[cube(comptime)]
    plane: u32,
    /// Numbers that are rotated together.
    #[cube(comptime)]
    rotation: Option<u32>,
}

/// How often the units of a cube take [`OWN`] numbers each of a token of so many words.
const fn rounds_of(words: u32, units: u32) -> u32 {
    (4 * words).div_ceil(OWN * units)
}

/// Words of a token of so many that one of so many units rounds.
pub(super) const fn own_words(words: u32, units: u32) -> u32 {
    OWN / 4 * rounds_of(words, units)
}

#[cube]
impl Unrounded {
    /// A unit's numbers of a token, as they are before the rotation, zeros past its end; and what a norm has multiplied them with.
    pub(super) fn bring(&self, token: u32) -> (Array<f32>, f32) {
        let in_features = self.rounding.in_features;
        let (units, kind) = comptime!((self.rounding.units, self.rounding.kind));
        let rounds = comptime!(rounds_of(self.rounding.words, units));
        let mut values = Array::<f32>::new(comptime!((OWN * rounds) as usize));
        let mut factors = Array::<f32>::new(comptime!((OWN * rounds) as usize));
        let mut sum = f32::new(0.0);
        #[unroll]
        for n in 0..comptime!(OWN * rounds) {
            let i = n / OWN * OWN * units + OWN * UNIT_POS + n % OWN;
            let mut value = f32::new(0.0);
            if i < in_features {
                value = load(&self.x, token * in_features, i, self.first, self.second, kind);
                if comptime!(kind == Kind::Normed) {
                    factors[comptime!(n as usize)] = self.gamma[i as usize];
                }
            }
            values[comptime!(n as usize)] = value;
            sum += value * value;
        }
        let mut norm = f32::new(1.0);
        if comptime!(kind == Kind::Normed) {
            let mut sums = SharedMemory::<f32>::new(comptime!(units as usize));
            let sum = joined_by_planes(sum, &mut sums, units, comptime!(self.rounding.plane), Join::Sum);
            norm = 1.0 / f32::sqrt(sum / f32::cast_from(in_features) + self.first);
            #[unroll]
            for n in 0..comptime!(OWN * rounds) {
                let i = n / OWN * OWN * units + OWN * UNIT_POS + n % OWN;
                if i < in_features {
                    let factor = factors[comptime!(n as usize)];
                    values[comptime!(n as usize)] = values[comptime!(n as usize)] * norm * factor;
                }
            }
        }
        (values, norm)
    }
}

#[cube]
impl Rounding {
    /// Rotates a token and finds its scale, NaN if a number is not finite, in all units of the cube.
    pub(super) fn round(&self, values: &mut Array<f32>, run: &mut SharedMemory<f32>) -> f32 {
        let (units, rotation) = comptime!((self.units, self.rotation));
        let rounds = comptime!(rounds_of(self.words, units));
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
                let seed = (self.seed_low, self.seed_high);
                rotate(values, comptime!(OWN * round), seed, units, comptime!(rotation.unwrap_or(1)), run);
            }
        }
        #[unroll]
        for n in 0..comptime!(OWN * rounds) {
            largest = max(largest, u32::reinterpret(f32::abs(values[comptime!(n as usize)])));
        }
        let mut keys = SharedMemory::<u32>::new(comptime!(units as usize));
        let largest = joined_by_planes(largest, &mut keys, units, comptime!(self.plane), Join::Largest);
        let largest = f32::reinterpret(largest);
        select(is_finite(largest), largest / 127.0, nan())
    }

    /// Which word of the token a unit's word `n` is.
    pub(super) fn place(&self, #[comptime] n: u32) -> u32 {
        let (units, own) = comptime!((self.units, OWN / 4));
        n / own * own * units + own * UNIT_POS + n % own
    }

    /// A unit's word `n`, of numbers that [`round`](Self::round) has rotated.
    pub(super) fn word(&self, values: &Array<f32>, scale: f32, #[comptime] n: u32) -> u32 {
        // A token that is not finite has levels too, which its scale spoils.
        let is_empty = scale == 0.0 || is_nan(scale);
        let divisor = select(is_empty, f32::new(1.0), scale);
        let mut packed = u32::new(0);
        #[unroll]
        for byte in 0..4u32 {
            let level = round(values[comptime!((4 * n + byte) as usize)] / divisor);
            let level = i32::cast_from(clamp(level, -127.0, 127.0));
            packed |= (u32::cast_from(select(is_empty, 0, level)) & 255) << (8 * byte);
        }
        packed
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
