//! Norms, and the choice of experts.

use burn::tensor::DType;
use burn_cubecl::{CubeRuntime, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{
    buffer::room,
    device::{Join, is_nan, joined, nan, units_for},
};

/// Numbers that a unit norms.
const NORMED: usize = 4;
/// Units that norm a token at most.
const MOST_UNITS: usize = 1024;
/// Units that route a token at most.
const MOST_ROUTERS: usize = 512;
/// Experts that a unit looks after.
const OWN: u32 = 4;
/// Inputs whose weights a unit fetches together.
const AHEAD: u32 = 8;

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

/// [`route`](crate::route): the numbers of the chosen experts, `I32`, and their weights, `[tokens, k]` each.
pub(super) fn route<R: CubeRuntime>(
    x: CubeTensor<R>,
    weight: CubeTensor<R>,
    bias: CubeTensor<R>,
    k: usize,
) -> (CubeTensor<R>, CubeTensor<R>) {
    let [tokens, hidden] = [x.meta.shape()[0], x.meta.shape()[1]];
    let experts = weight.meta.shape()[1];
    let (chosen, weights) = (room(&x, [tokens, k], DType::I32), room(&x, [tokens, k], DType::F32));
    if tokens * k > 0 {
        let units = units_for(&x.client, hidden, MOST_ROUTERS);
        route_kernel::launch::<R>(
            &x.client.clone(),
            CubeCount::Static(tokens as u32, 1, 1),
            CubeDim::new_1d(units),
            x.into_array_arg(),
            weight.into_array_arg(),
            bias.into_array_arg(),
            chosen.clone().into_array_arg(),
            weights.clone().into_array_arg(),
            hidden as u32,
            k as u32,
            experts as u32,
            units,
        );
    }
    (chosen, weights)
}

/// One cube a token.
#[cube(launch)]
fn route_kernel(
    x: &Array<f32>,
    weight: &Array<f32>,
    bias: &Array<f32>,
    chosen: &mut Array<i32>,
    weights: &mut Array<f32>,
    hidden: u32,
    #[comptime] k: u32,
    #[comptime] experts: u32,
    #[comptime] units: u32,
) {
    // Without a norm, its array is not looked at.
    choose(x, x, 1.0, weight, bias, chosen, weights, CUBE_POS_X, hidden, k, experts, units, false);
}

/// A cube chooses the experts of a token: what it is multiplied with is `norm`, and where it is `normed`, `gamma` as well.
/// Runs of units share the inputs. An expert's rank is how many are better, or as good and before it.
#[cube]
pub(super) fn choose(
    x: &Array<f32>,
    gamma: &Array<f32>,
    norm: f32,
    weight: &Array<f32>,
    bias: &Array<f32>,
    chosen: &mut Array<i32>,
    weights: &mut Array<f32>,
    token: u32,
    hidden: u32,
    #[comptime] k: u32,
    #[comptime] experts: u32,
    #[comptime] units: u32,
    #[comptime] normed: bool,
) {
    let run_width = comptime!(experts.div_ceil(OWN).next_power_of_two().min(units));
    let (runs, width) = comptime!((units / run_width, run_width * OWN));
    let (run, place) = (UNIT_POS / run_width, UNIT_POS % run_width * OWN);
    let mut sums = SharedMemory::<f32>::new(comptime!((units * OWN) as usize));
    let mut scores = SharedMemory::<f32>::new(comptime!(experts as usize));
    let mut broken = SharedMemory::<u32>::new(comptime!(experts as usize));
    let mut best = SharedMemory::<f32>::new(comptime!(k as usize));
    #[unroll]
    for block in 0..comptime!(experts.div_ceil(width)) {
        let first = block * width;
        let mut own = Array::<f32>::new(comptime!(OWN as usize));
        #[unroll]
        for e in 0..OWN {
            own[comptime!(e as usize)] = 0.0;
        }
        let mut input = run;
        while input < hidden {
            // Nothing here depends on a condition, so that all is fetched together.
            #[unroll]
            for n in 0..AHEAD {
                let known = min(input + n * runs, hidden - 1);
                let mut value = x[(token * hidden + known) as usize];
                if comptime!(normed) {
                    value *= gamma[known as usize];
                }
                let value = select(input + n * runs < hidden, value, f32::new(0.0));
                #[unroll]
                for e in 0..OWN {
                    let expert = min(first + place + e, comptime!(experts - 1));
                    own[comptime!(e as usize)] += value * weight[(known * experts + expert) as usize];
                }
            }
            input += comptime!(AHEAD * runs);
        }
        #[unroll]
        for e in 0..OWN {
            sums[(run * width + place + e) as usize] = own[comptime!(e as usize)];
        }
        sync_cube();
        let mut number = UNIT_POS;
        while number < width {
            let expert = first + number;
            if expert < experts {
                let mut score = f32::new(0.0);
                for run in 0..runs {
                    score += sums[(run * width + number) as usize];
                }
                score = score * norm + bias[expert as usize];
                // NaN has no rank, so that it does not leave a place empty.
                let is_broken = is_nan(score);
                broken[expert as usize] = u32::cast_from(is_broken);
                scores[expert as usize] = select(is_broken, f32::new(f32::MIN), score);
            }
            number += units;
        }
        sync_cube();
    }
    let mut expert = UNIT_POS;
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
        expert += units;
    }
    sync_cube();
    if UNIT_POS < k {
        let mut total = f32::new(0.0);
        for slot in 0..k {
            total += f32::exp(best[slot as usize] - best[0]);
        }
        let mut is_broken = u32::new(0);
        for expert in 0..experts {
            is_broken = max(is_broken, broken[expert as usize]);
        }
        let weight = f32::exp(best[UNIT_POS as usize] - best[0]) / total;
        weights[(token * k + UNIT_POS) as usize] = select(is_broken == 1, nan(), weight);
    }
}
