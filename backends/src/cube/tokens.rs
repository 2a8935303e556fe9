//! Activations to int8, one cube a token.

use burn::tensor::DType;
use burn_cubecl::{CubeRuntime, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{
    buffer::room,
    device::{Join, butterflies, factor, is_finite, is_nan, joined, nan, round},
};
use crate::{
    format::{BLOCK, Rotation, TernaryLayout},
    ops::ClampedSwiGlu,
};

/// Units of a cube: four blocks are rotated at a time.
const UNITS: u32 = 256;

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

/// Rounds tokens for a weight of this layout: `x` has `in_features` numbers a token, twice as many before the gate.
pub(super) fn quantize<R: CubeRuntime>(x: CubeTensor<R>, before: Before<R>, layout: &TernaryLayout) -> Tokens<R> {
    let in_features = layout.in_features;
    let width = if matches!(before, Before::Gate(_)) { 2 * in_features } else { in_features };
    let count = x.meta.num_elements() / width;
    // A kernel reads as many inputs as there are codes.
    let words = layout.packed_inputs().next_multiple_of(BLOCK) / 4;
    let levels = room(&x, [count, words], DType::U32);
    let scales = room(&x, [count], DType::F32);
    if count > 0 {
        let rotated = room(&x, [count, 4 * words], DType::F32);
        let (kind, gamma, numbers) = match before {
            Before::Nothing => (Kind::Plain, x.clone(), [0.0; 2]),
            Before::Norm(gamma, epsilon) => (Kind::Normed, gamma, [epsilon, 0.0]),
            Before::Gate(gate) => (Kind::Gated, x.clone(), [gate.alpha, gate.limit]),
        };
        let seed = layout.rotation.map_or(0, |rotation| rotation.seed);
        quantize_kernel::launch::<R>(
            &x.client.clone(),
            CubeCount::Static(count as u32, 1, 1),
            CubeDim::new_1d(UNITS),
            x.into_array_arg(),
            gamma.into_array_arg(),
            rotated.into_array_arg(),
            levels.clone().into_array_arg(),
            scales.clone().into_array_arg(),
            in_features as u32,
            words as u32,
            seed as u32,
            (seed >> 32) as u32,
            numbers[0],
            numbers[1],
            kind,
            layout.rotation.map(|_| Rotation::width(in_features) as u32),
        );
    }
    Tokens { levels, scales, count, words }
}

#[cube(launch)]
fn quantize_kernel(
    x: &Array<f32>,
    gamma: &Array<f32>,
    rotated: &mut Array<f32>,
    levels: &mut Array<u32>,
    scales: &mut Array<f32>,
    in_features: u32,
    words: u32,
    seed_low: u32,
    seed_high: u32,
    first: f32,
    second: f32,
    #[comptime] kind: Kind,
    #[comptime] rotation: Option<u32>,
) {
    let token = CUBE_POS_X;
    let mut sums = SharedMemory::<f32>::new(comptime!(UNITS as usize));
    let mut run = SharedMemory::<f32>::new(comptime!(UNITS as usize));
    let unit = UNIT_POS as usize;
    let mut norm = f32::new(1.0);
    if comptime!(kind == Kind::Normed) {
        let mut sum = f32::new(0.0);
        let mut i = UNIT_POS;
        while i < in_features {
            let value = x[(token * in_features + i) as usize];
            sum += value * value;
            i += UNITS;
        }
        norm = 1.0 / f32::sqrt(joined(sum, &mut sums, UNITS, Join::Sum) / f32::cast_from(in_features) + first);
    }
    let (mut largest, mut broken) = (f32::new(0.0), u32::new(0));
    let mut start = u32::new(0);
    while start < 4 * words {
        let i = start + UNIT_POS;
        let mut value = f32::new(0.0);
        if i < in_features {
            value = load(x, gamma, token * in_features, i, norm, first, second, kind);
            if !is_finite(value) {
                broken = 1;
                value = f32::new(0.0);
            }
        }
        if comptime!(rotation.is_some()) {
            let width = comptime!(rotation.unwrap_or(1));
            value = butterflies(value * factor(i, seed_low, seed_high, width), &mut run, width);
        }
        largest = max(largest, f32::abs(value));
        run[unit] = value;
        sync_cube();
        // Who packs four of them later is who writes them now.
        if UNIT_POS < UNITS / 4 && start + 4 * UNIT_POS < 4 * words {
            #[unroll]
            for j in 0..4u32 {
                rotated[(token * 4 * words + start + 4 * UNIT_POS + j) as usize] = run[(4 * UNIT_POS + j) as usize];
            }
        }
        sync_cube();
        start += UNITS;
    }
    let scale = joined(largest, &mut sums, UNITS, Join::Largest) / 127.0;
    let broken = joined(f32::cast_from(broken), &mut sums, UNITS, Join::Largest) > 0.0;
    let divisor = select(scale == 0.0, f32::new(1.0), scale);
    let mut word = UNIT_POS;
    while word < words && UNIT_POS < UNITS / 4 {
        let mut packed = u32::new(0);
        #[unroll]
        for j in 0..4u32 {
            let level = round(rotated[(token * 4 * words + 4 * word + j) as usize] / divisor);
            let level = i32::cast_from(clamp(level, -127.0, 127.0));
            packed |= (u32::cast_from(select(scale == 0.0, 0, level)) & 255) << (8 * j);
        }
        levels[(token * words + word) as usize] = packed;
        word += UNITS / 4;
    }
    if UNIT_POS == 0 {
        scales[token as usize] = select(broken, nan(), scale);
    }
}

/// Number `i` of a token, before it is rotated and rounded.
#[cube]
fn load(
    x: &Array<f32>,
    gamma: &Array<f32>,
    at: u32,
    i: u32,
    norm: f32,
    alpha: f32,
    limit: f32,
    #[comptime] kind: Kind,
) -> f32 {
    match comptime!(kind) {
        Kind::Plain => x[(at + i) as usize],
        Kind::Normed => x[(at + i) as usize] * norm * gamma[i as usize],
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
