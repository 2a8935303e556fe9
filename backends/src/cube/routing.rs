//! Norms, and the choice of experts.

use burn::tensor::DType;
use burn_cubecl::{CubeRuntime, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{
    buffer::room,
    device::{Join, is_nan, joined, nan, units_for},
};

/// Units of a cube.
const UNITS: u32 = 256;
/// Numbers that a unit norms.
const NORMED: usize = 4;
/// Units that norm a token at most.
const MOST_UNITS: usize = 1024;
/// Inputs of the router that a cube looks at.
const PART: usize = 128;

/// [`rms_norm`](crate::rms_norm) of `x [tokens, hidden]`.
pub(super) fn rms_norm<R: CubeRuntime>(x: CubeTensor<R>, gamma: CubeTensor<R>, epsilon: f32) -> CubeTensor<R> {
    let [tokens, hidden] = [x.meta.shape()[0], x.meta.shape()[1]];
    let out = room(&x, [tokens, hidden], DType::F32);
    if tokens > 0 {
        let units = units_for(&x.client, hidden.div_ceil(NORMED), MOST_UNITS);
        rms_norm_kernel::launch::<R>(
            &x.client.clone(),
            CubeCount::Static(tokens as u32, 1, 1),
            CubeDim::new_1d(units),
            x.into_array_arg(),
            gamma.into_array_arg(),
            out.clone().into_array_arg(),
            hidden as u32,
            units,
            epsilon,
        );
    }
    out
}

/// One cube a token.
#[cube(launch)]
fn rms_norm_kernel(
    x: &Array<f32>,
    gamma: &Array<f32>,
    out: &mut Array<f32>,
    #[comptime] hidden: u32,
    #[comptime] units: u32,
    epsilon: f32,
) {
    let mut sums = SharedMemory::<f32>::new(comptime!(units as usize));
    let at = CUBE_POS_X * hidden;
    let own = comptime!(hidden.div_ceil(units));
    let mut values = Array::<f32>::new(comptime!(own as usize));
    let mut sum = f32::new(0.0);
    #[unroll]
    for n in 0..own {
        let i = n * units + UNIT_POS;
        let mut value = f32::new(0.0);
        if i < hidden {
            value = x[(at + i) as usize];
        }
        values[comptime!(n as usize)] = value;
        sum += value * value;
    }
    let rms = f32::sqrt(joined(sum, &mut sums, units, Join::Sum) / f32::cast_from(hidden) + epsilon);
    #[unroll]
    for n in 0..own {
        let i = n * units + UNIT_POS;
        if i < hidden {
            out[(at + i) as usize] = values[comptime!(n as usize)] / rms * gamma[i as usize];
        }
    }
}

/// A norm that is yet to be applied to tokens: its `gamma`, and what each token is multiplied with besides, `[tokens]`.
pub(super) struct PendingNorm<R: CubeRuntime> {
    pub(super) gamma: CubeTensor<R>,
    pub(super) factors: CubeTensor<R>,
}

/// [`route`](crate::route): the numbers of the chosen experts, `I32`, and their weights, `[tokens, k]` each.
pub(super) fn route<R: CubeRuntime>(
    x: CubeTensor<R>,
    norm: Option<PendingNorm<R>>,
    weight: CubeTensor<R>,
    bias: CubeTensor<R>,
    k: usize,
) -> (CubeTensor<R>, CubeTensor<R>) {
    let [tokens, hidden] = [x.meta.shape()[0], x.meta.shape()[1]];
    let experts = weight.meta.shape()[1];
    let (chosen, weights) = (room(&x, [tokens, k], DType::I32), room(&x, [tokens, k], DType::F32));
    if tokens * k == 0 {
        return (chosen, weights);
    }
    // One cube would read the router's weights all alone.
    let parts = hidden.div_ceil(PART).max(1);
    let scores = room(&x, [tokens, parts, experts], DType::F32);
    let (client, normed) = (x.client.clone(), norm.is_some());
    let (gamma, factors) = norm.map_or_else(|| (x.clone(), x.clone()), |norm| (norm.gamma, norm.factors));
    score::launch::<R>(
        &client,
        CubeCount::Static(parts as u32, tokens as u32, 1),
        CubeDim::new_1d(UNITS),
        x.into_array_arg(),
        gamma.into_array_arg(),
        weight.into_array_arg(),
        scores.clone().into_array_arg(),
        hidden as u32,
        experts as u32,
        normed,
    );
    choose::launch::<R>(
        &client,
        CubeCount::Static(tokens as u32, 1, 1),
        CubeDim::new_1d(UNITS),
        scores.into_array_arg(),
        factors.into_array_arg(),
        bias.into_array_arg(),
        chosen.clone().into_array_arg(),
        weights.clone().into_array_arg(),
        k as u32,
        parts as u32,
        experts as u32,
        normed,
    );
    (chosen, weights)
}

/// What [`PART`] inputs of a token add to the score of each expert. Runs of units look after as many experts and share the
/// inputs.
#[cube(launch)]
fn score(
    x: &Array<f32>,
    gamma: &Array<f32>,
    weight: &Array<f32>,
    scores: &mut Array<f32>,
    hidden: u32,
    #[comptime] experts: u32,
    #[comptime] normed: bool,
) {
    let (part, token) = (CUBE_POS_X, CUBE_POS_Y);
    let run_width = comptime!(if experts < UNITS { experts.next_power_of_two() } else { UNITS });
    let mut sums = SharedMemory::<f32>::new(comptime!(UNITS as usize));
    let (run, own) = (UNIT_POS / run_width, UNIT_POS % run_width);
    let end = min((part + 1) * comptime!(PART as u32), hidden);
    #[unroll]
    for block in 0..comptime!(experts.div_ceil(run_width)) {
        let expert = block * run_width + own;
        let mut sum = f32::new(0.0);
        if expert < experts {
            #[unroll]
            for n in 0..comptime!((PART as u32).div_ceil(UNITS / run_width)) {
                let i = part * comptime!(PART as u32) + run + n * comptime!(UNITS / run_width);
                if i < end {
                    let mut value = x[(token * hidden + i) as usize];
                    if comptime!(normed) {
                        value *= gamma[i as usize];
                    }
                    sum += value * weight[(i * experts + expert) as usize];
                }
            }
        }
        sums[UNIT_POS as usize] = sum;
        sync_cube();
        if run == 0 && expert < experts {
            let mut score = f32::new(0.0);
            #[unroll]
            for other in 0..comptime!(UNITS / run_width) {
                score += sums[(other * run_width + own) as usize];
            }
            scores[((token * CUBE_COUNT_X + part) * experts + expert) as usize] = score;
        }
        sync_cube();
    }
}

/// One cube a token. An expert's rank is how many are better, or as good and before it.
#[cube(launch)]
fn choose(
    parts_of_scores: &Array<f32>,
    factors: &Array<f32>,
    bias: &Array<f32>,
    chosen: &mut Array<i32>,
    weights: &mut Array<f32>,
    #[comptime] k: u32,
    #[comptime] parts: u32,
    #[comptime] experts: u32,
    #[comptime] normed: bool,
) {
    let token = CUBE_POS_X;
    let mut scores = SharedMemory::<f32>::new(comptime!(experts as usize));
    let mut best = SharedMemory::<f32>::new(comptime!(k as usize));
    let mut broken = SharedMemory::<u32>::new(comptime!(UNITS as usize));
    let mut is_broken = u32::new(0);
    let mut expert = UNIT_POS;
    while expert < experts {
        let mut score = f32::new(0.0);
        #[unroll]
        for part in 0..parts {
            score += parts_of_scores[((token * parts + part) * experts + expert) as usize];
        }
        if comptime!(normed) {
            score *= factors[token as usize];
        }
        score += bias[expert as usize];
        // NaN has no rank, so that it does not leave a place empty.
        if is_nan(score) {
            is_broken = 1;
            score = f32::new(f32::MIN);
        }
        scores[expert as usize] = score;
        expert += UNITS;
    }
    let is_broken = joined(is_broken, &mut broken, UNITS, Join::Largest);
    expert = UNIT_POS;
    while expert < experts {
        let score = scores[expert as usize];
        let mut rank = u32::new(0);
        for other in 0..experts {
            let rival = scores[other as usize];
            if rival > score || (rival == score && other < expert) {
                rank += 1;
            }
        }
        if rank < k {
            best[rank as usize] = score;
            chosen[(token * k + rank) as usize] = i32::cast_from(expert);
        }
        expert += UNITS;
    }
    sync_cube();
    if UNIT_POS < k {
        let mut total = f32::new(0.0);
        for slot in 0..k {
            total += f32::exp(best[slot as usize] - best[0]);
        }
        let weight = f32::exp(best[UNIT_POS as usize] - best[0]) / total;
        weights[(token * k + UNIT_POS) as usize] = select(is_broken == 1, nan(), weight);
    }
}
