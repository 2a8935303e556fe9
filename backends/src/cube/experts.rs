//! The routed experts: the choices stay on the device.

use burn::tensor::DType;
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{
    buffer::{float_rows, room},
    device::nan,
    linear::{Matrices, Plan, Routes, TILE, is_tiled, products},
    tokens::{Before, quantize},
};
use crate::ops::TernaryExperts;

/// Units of a cube.
const UNITS: u32 = 256;

/// `x [tokens, hidden]`, `chosen` and `weights` `[tokens, k]`, the former `I32`: `[tokens, hidden]`.
pub(super) fn experts<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    x: CubeTensor<R>,
    chosen: CubeTensor<R>,
    weights: CubeTensor<R>,
    experts: &TernaryExperts<CubeBackend<R, F, I, BT>>,
) -> CubeTensor<R> {
    let [tokens, k] = [chosen.meta.shape()[0], chosen.meta.shape()[1]];
    let out = room(&x, [tokens, experts.hidden()], DType::F32);
    if tokens == 0 {
        return out;
    }
    let plan = is_tiled(tokens * k / experts.experts().max(1)).then(|| plan(&chosen, experts.experts()));
    let routes = |per_input| Matrices::Routed(Routes { chosen: chosen.clone(), per_input, plan: plan.clone() });
    let rounded = quantize(x, Before::Nothing, &experts.gate_up.layout);
    let bias = float_rows(experts.gate_up_bias.clone());
    let hidden = products(&rounded, &experts.gate_up, Some(bias), routes(k.max(1)));
    let rounded = quantize(hidden, Before::Gate(experts.activation), &experts.down.layout);
    let bias = float_rows(experts.down_bias.clone());
    let outputs = products(&rounded, &experts.down, Some(bias), routes(1));
    weighted_sum::launch::<R>(
        &out.client.clone(),
        CubeCount::Static((experts.hidden() as u32).div_ceil(UNITS), tokens as u32, 1),
        CubeDim::new_1d(UNITS),
        outputs.into_array_arg(),
        chosen.into_array_arg(),
        weights.into_array_arg(),
        out.clone().into_array_arg(),
        experts.hidden() as u32,
        k as u32,
        experts.experts() as u32,
    );
    out
}

/// Adds up what the experts of each token said, in the order of its choices. One that is no expert makes it NaN.
#[cube(launch)]
fn weighted_sum(
    outputs: &Array<f32>,
    chosen: &Array<i32>,
    weights: &Array<f32>,
    out: &mut Array<f32>,
    hidden: u32,
    k: u32,
    experts: u32,
) {
    let (i, token) = (CUBE_POS_X * UNITS + UNIT_POS, CUBE_POS_Y);
    if i >= hidden {
        terminate!();
    }
    let mut sum = f32::new(0.0);
    for slot in 0..k {
        let choice = token * k + slot;
        let known = u32::cast_from(chosen[choice as usize]) < experts;
        let y = select(known, outputs[(choice * hidden + i) as usize], nan());
        sum += y * weights[choice as usize];
    }
    out[(token * hidden + i) as usize] = sum;
}

/// Sorts choices `[tokens, k]` by expert and cuts them into tiles.
fn plan<R: CubeRuntime>(chosen: &CubeTensor<R>, experts: usize) -> Plan<R> {
    let choices = chosen.meta.num_elements();
    let count = choices / TILE as usize + experts;
    let order = room(chosen, [choices], DType::U32);
    let tiles = room(chosen, [count, 3], DType::I32);
    sort_choices::launch::<R>(
        &chosen.client.clone(),
        CubeCount::Static(1, 1, 1),
        CubeDim::new_1d(UNITS),
        chosen.clone().into_array_arg(),
        order.clone().into_array_arg(),
        tiles.clone().into_array_arg(),
        choices as u32,
        count as u32,
        experts as u32,
    );
    Plan { order, tiles, count }
}

/// One cube; a unit looks after one expert.
#[cube(launch)]
fn sort_choices(
    chosen: &Array<i32>,
    order: &mut Array<u32>,
    tiles: &mut Array<i32>,
    choices: u32,
    count: u32,
    #[comptime] experts: u32,
) {
    let mut counts = SharedMemory::<u32>::new(comptime!(experts as usize));
    let mut expert = UNIT_POS;
    while expert < experts {
        let mut own = u32::new(0);
        for choice in 0..choices {
            if u32::cast_from(chosen[choice as usize]) == expert {
                own += 1;
            }
        }
        counts[expert as usize] = own;
        expert += UNITS;
    }
    sync_cube();
    expert = UNIT_POS;
    while expert < experts {
        let (mut start, mut tile) = (u32::new(0), u32::new(0));
        for before in 0..expert {
            start += counts[before as usize];
            tile += counts[before as usize].div_ceil(TILE);
        }
        let end = start + counts[expert as usize];
        let mut next = start;
        for choice in 0..choices {
            if u32::cast_from(chosen[choice as usize]) == expert {
                order[next as usize] = choice;
                next += 1;
            }
        }
        while start < end {
            tiles[(3 * tile) as usize] = i32::cast_from(expert);
            tiles[(3 * tile + 1) as usize] = i32::cast_from(start);
            tiles[(3 * tile + 2) as usize] = i32::cast_from(min(end, start + TILE));
            start += TILE;
            tile += 1;
        }
        // Who looks after the last expert knows how many tiles there are.
        if expert == experts - 1 {
            while tile < count {
                tiles[(3 * tile) as usize] = -1;
                tile += 1;
            }
        }
        expert += UNITS;
    }
}
