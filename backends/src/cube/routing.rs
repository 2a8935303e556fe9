//! Norms, and the choice of experts.

use burn::tensor::DType;
use burn_cubecl::{CubeRuntime, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{
    buffer::room,
    device::{Join, is_nan, joined, nan},
};

/// Units of a cube.
const UNITS: u32 = 256;

/// [`rms_norm`](crate::rms_norm) of `x [tokens, hidden]`.
pub(super) fn rms_norm<R: CubeRuntime>(x: CubeTensor<R>, gamma: CubeTensor<R>, epsilon: f32) -> CubeTensor<R> {
    let [tokens, hidden] = [x.meta.shape()[0], x.meta.shape()[1]];
    let out = room(&x, [tokens, hidden], DType::F32);
    if tokens > 0 {
        rms_norm_kernel::launch::<R>(
            &x.client.clone(),
            CubeCount::Static(tokens as u32, 1, 1),
            CubeDim::new_1d(UNITS),
            x.into_array_arg(),
            gamma.into_array_arg(),
            out.clone().into_array_arg(),
            hidden as u32,
            epsilon,
        );
    }
    out
}

/// One cube a token.
#[cube(launch)]
fn rms_norm_kernel(x: &Array<f32>, gamma: &Array<f32>, out: &mut Array<f32>, hidden: u32, epsilon: f32) {
    let mut sums = SharedMemory::<f32>::new(comptime!(UNITS as usize));
    let at = CUBE_POS_X * hidden;
    let mut sum = f32::new(0.0);
    let mut i = UNIT_POS;
    while i < hidden {
        let value = x[(at + i) as usize];
        sum += value * value;
        i += UNITS;
    }
    let rms = f32::sqrt(joined(sum, &mut sums, UNITS, Join::Sum) / f32::cast_from(hidden) + epsilon);
    i = UNIT_POS;
    while i < hidden {
        out[(at + i) as usize] = x[(at + i) as usize] / rms * gamma[i as usize];
        i += UNITS;
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
        // So many parts of the sum as there is room for.
        let parts = (UNITS as usize / experts.max(1)).clamp(1, hidden.max(1)) as u32;
        route_kernel::launch::<R>(
            &x.client.clone(),
            CubeCount::Static(tokens as u32, 1, 1),
            CubeDim::new_1d(UNITS),
            x.into_array_arg(),
            weight.into_array_arg(),
            bias.into_array_arg(),
            chosen.clone().into_array_arg(),
            weights.clone().into_array_arg(),
            hidden as u32,
            k as u32,
            experts as u32,
            parts,
        );
    }
    (chosen, weights)
}

/// One cube a token: a unit adds up one part of one expert's score, then one unit chooses.
#[cube(launch)]
fn route_kernel(
    x: &Array<f32>,
    weight: &Array<f32>,
    bias: &Array<f32>,
    chosen: &mut Array<i32>,
    weights: &mut Array<f32>,
    hidden: u32,
    k: u32,
    #[comptime] experts: u32,
    #[comptime] parts: u32,
) {
    let token = CUBE_POS_X;
    let mut scores = SharedMemory::<f32>::new(comptime!((experts * parts) as usize));
    let mut slot = UNIT_POS;
    while slot < experts * parts {
        let (expert, part) = (slot % experts, slot / experts);
        let mut score = f32::new(0.0);
        let mut i = part;
        while i < hidden {
            score += x[(token * hidden + i) as usize] * weight[(i * experts + expert) as usize];
            i += parts;
        }
        scores[slot as usize] = score;
        slot += UNITS;
    }
    sync_cube();
    if UNIT_POS == 0 {
        for expert in 0..experts {
            let mut score = bias[expert as usize];
            for part in 0..parts {
                score += scores[(part * experts + expert) as usize];
            }
            scores[expert as usize] = score;
        }
        let (mut first, mut total) = (f32::new(0.0), f32::new(0.0));
        let mut broken = u32::new(0);
        for expert in 0..experts {
            if is_nan(scores[expert as usize]) {
                broken = 1;
            }
        }
        for slot in 0..k {
            let mut best = u32::new(0);
            for expert in 1..experts {
                if scores[expert as usize] > scores[best as usize] {
                    best = expert;
                }
            }
            let score = scores[best as usize];
            if slot == 0 {
                first = score;
            }
            let share = f32::exp(score - first);
            total += share;
            chosen[(token * k + slot) as usize] = i32::cast_from(best);
            weights[(token * k + slot) as usize] = share;
            // Not again.
            scores[best as usize] = f32::new(f32::MIN);
        }
        for slot in 0..k {
            let weight = weights[(token * k + slot) as usize] / total;
            weights[(token * k + slot) as usize] = select(broken == 1, nan(), weight);
        }
    }
}
