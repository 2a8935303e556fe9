//! Norms, and the choice of experts.

use burn::tensor::DType;
use burn_cubecl::{CubeRuntime, tensor::CubeTensor};
use cubecl::{client::ComputeClient, prelude::*};

use super::{
    buffer::room,
    device::{Join, is_nan, joined, nan, units_for},
    tokens::shared_words,
};

/// Numbers that a unit norms.
const NORMED: usize = 4;
/// Units that norm a token at most.
const MOST_UNITS: usize = 1024;
/// Units that route a token at most.
const MOST_ROUTERS: usize = 512;
/// Inputs whose weights a unit fetches together.
const AHEAD: u32 = 20;

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

/// Whether a cube of this device has room for the inputs of a router `[hidden, experts]`.
pub(super) fn fits<R: CubeRuntime>(client: &ComputeClient<R>, [hidden, experts]: [usize; 2]) -> bool {
    4 * (shared_words(hidden as u32) + 3 * experts) <= client.properties().hardware.max_shared_memory_size
}

/// [`route`](crate::route): the numbers of the chosen experts, `I32`, and their weights, `[tokens, k]` each. Not where a router
/// does not [fit](fits).
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
    #[comptime] hidden: u32,
    #[comptime] k: u32,
    #[comptime] experts: u32,
    #[comptime] units: u32,
) {
    let token = CUBE_POS_X;
    let mut inputs = SharedMemory::<f32>::new(comptime!(inputs_room(hidden) as usize));
    let mut i = UNIT_POS;
    while i < hidden {
        inputs[place_of(i) as usize] = x[(token * hidden + i) as usize];
        i += units;
    }
    sync_cube();
    choose(&inputs, weight, bias, chosen, weights, token, hidden, k, experts, units);
}

/// Where input `i` of a token is kept: units that bring eight of them each do not wait for each other.
#[cube]
pub(super) fn place_of(i: u32) -> u32 {
    i + i / 8
}

/// Room for so many inputs.
pub(super) const fn inputs_room(count: u32) -> u32 {
    count + count.div_ceil(8)
}

/// A cube chooses the experts of a token from its inputs, which are in shared memory: see [`place_of`]. Neighbouring units look
/// at neighbouring experts, and runs of them share the inputs. An expert's rank is how many are better, or as good and before it.
#[cube]
pub(super) fn choose(
    inputs: &SharedMemory<f32>,
    weight: &Array<f32>,
    bias: &Array<f32>,
    chosen: &mut Array<i32>,
    weights: &mut Array<f32>,
    token: u32,
    #[comptime] hidden: u32,
    #[comptime] k: u32,
    #[comptime] experts: u32,
    #[comptime] units: u32,
) {
    let width = comptime!(experts.next_power_of_two().min(units));
    let runs = comptime!(units / width);
    let (run, place) = (UNIT_POS / width, UNIT_POS % width);
    let mut sums = SharedMemory::<f32>::new(comptime!(units as usize));
    let mut scores = SharedMemory::<f32>::new(comptime!(experts as usize));
    let mut broken = SharedMemory::<u32>::new(comptime!(experts as usize));
    let mut best = SharedMemory::<f32>::new(comptime!(k as usize));
    #[unroll]
    for block in 0..comptime!(experts.div_ceil(width)) {
        let expert = block * width + place;
        let known_expert = min(expert, comptime!(experts - 1));
        let mut own = f32::new(0.0);
        let mut input = run;
        while input < hidden {
            // Nothing here depends on a condition, so that all is fetched together.
            #[unroll]
            for n in 0..AHEAD {
                let known = min(input + n * runs, comptime!(hidden - 1));
                let value = select(input + n * runs < hidden, inputs[place_of(known) as usize], f32::new(0.0));
                own += value * weight[(known * experts + known_expert) as usize];
            }
            input += comptime!(AHEAD * runs);
        }
        sums[UNIT_POS as usize] = own;
        sync_cube();
        if run == 0 && expert < experts {
            let mut score = f32::new(0.0);
            #[unroll]
            for run in 0..runs {
                score += sums[(run * width + place) as usize];
            }
            score += bias[expert as usize];
            // NaN has no rank, so that it does not leave a place empty.
            let is_broken = is_nan(score);
            broken[expert as usize] = u32::cast_from(is_broken);
            scores[expert as usize] = select(is_broken, f32::new(f32::MIN), score);
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
