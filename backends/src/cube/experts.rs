//! The routed experts: the choices stay on the device.

use burn::tensor::DType;
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{
    buffer::{begin, float_rows, floats, room},
    device::{Join, joined, nan},
    few_units,
    linear::{is_tiled, products},
    matrix_units,
    operands::{Matrices, Plan, Routes, TILE, Term},
    rounding::Before,
    tokens::{Tokens, quantize, quantize_and_route},
};
use crate::ops::{ExpertLayer, TernaryExperts};

/// Units of a cube.
const UNITS: u32 = 256;

/// [`expert_layer`](crate::expert_layer).
pub(super) fn expert_layer<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    x: CubeTensor<R>,
    layer: &ExpertLayer<CubeBackend<R, F, I, BT>>,
) -> CubeTensor<R> {
    let norm = (floats(layer.gamma.clone()), layer.epsilon as f32);
    let router = [floats(layer.router.clone()), floats(layer.router_bias.clone())];
    let layout = &layer.experts.gate_up.layout;
    let (rounded, [chosen, weights]) = quantize_and_route(x.clone(), norm, layout, router, layer.experts_per_token);
    let out = mixed(&rounded, chosen, weights, &layer.experts, Some(x));
    begin(&out);
    out
}

/// `x [tokens, hidden]`, `chosen` and `weights` `[tokens, k]`, the former `I32`: `[tokens, hidden]`.
pub(super) fn experts<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    x: CubeTensor<R>,
    chosen: CubeTensor<R>,
    weights: CubeTensor<R>,
    experts: &TernaryExperts<CubeBackend<R, F, I, BT>>,
) -> CubeTensor<R> {
    let rounded = quantize(x, Before::Nothing, &experts.gate_up.layout);
    mixed(&rounded, chosen, weights, experts, None)
}

/// What the experts say of rounded tokens, weighted, plus `residual [tokens, hidden]`.
fn mixed<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    x: &Tokens<R>,
    chosen: CubeTensor<R>,
    weights: CubeTensor<R>,
    experts: &TernaryExperts<CubeBackend<R, F, I, BT>>,
    residual: Option<CubeTensor<R>>,
) -> CubeTensor<R> {
    let [tokens, k] = [chosen.meta.shape()[0], chosen.meta.shape()[1]];
    let out = room(&x.levels, [tokens, experts.hidden()], DType::F32);
    if tokens == 0 {
        return out;
    }
    let plan = tile(&chosen, experts.experts()).map(|tile| plan(&chosen, experts.experts(), tile));
    let routes = |per_input| Matrices::Routed(Routes { chosen: chosen.clone(), per_input, plan: plan.clone() });
    let (gate_up, down) = (&experts.gate_up, &experts.down);
    let bias = Some(float_rows(experts.gate_up_bias.clone()).holding(experts.experts(), gate_up.layout.rows));
    let hidden = products(x, Term { weight: gate_up, bias, residual: None }, routes(k.max(1)));
    let rounded = quantize(hidden, Before::Gate(experts.activation), &down.layout);
    assert_eq!(rounded.count, tokens * k, "the experts' matrices do not follow each other");
    let bias = Some(float_rows(experts.down_bias.clone()).holding(experts.experts(), down.layout.rows));
    let outputs = products(&rounded, Term { weight: down, bias, residual: None }, routes(1));
    let onto = residual.is_some();
    weighted_sum::launch::<R>(
        &out.client.clone(),
        CubeCount::Static((experts.hidden() as u32).div_ceil(UNITS), tokens as u32, 1),
        CubeDim::new_1d(UNITS),
        outputs.into_array_arg(),
        chosen.into_array_arg(),
        weights.into_array_arg(),
        // Not looked at where there is none.
        residual.unwrap_or_else(|| x.scales.clone()).into_array_arg(),
        out.clone().into_array_arg(),
        experts.hidden() as u32,
        k as u32,
        experts.experts() as u32,
        onto,
    );
    out
}

/// Adds up what the experts of each token said, in the order of its choices. One that is no expert makes it NaN.
#[cube(launch)]
fn weighted_sum(
    outputs: &Array<f32>,
    chosen: &Array<i32>,
    weights: &Array<f32>,
    residual: &Array<f32>,
    out: &mut Array<f32>,
    hidden: u32,
    #[comptime] k: u32,
    experts: u32,
    #[comptime] onto: bool,
) {
    let (i, token) = (CUBE_POS_X * UNITS + UNIT_POS, CUBE_POS_Y);
    if i >= hidden {
        terminate!();
    }
    let mut sum = f32::new(0.0);
    #[unroll]
    for slot in 0..k {
        let choice = token * k + slot;
        let known = u32::cast_from(chosen[choice as usize]) < experts;
        let y = select(known, outputs[(choice * hidden + i) as usize], nan());
        sum += y * weights[choice as usize];
    }
    if comptime!(onto) {
        sum += residual[(token * hidden + i) as usize];
    }
    out[(token * hidden + i) as usize] = sum;
}

/// How many choices of an expert are worth being looked at together, if that is worth a plan.
fn tile<R: CubeRuntime>(chosen: &CubeTensor<R>, experts: usize) -> Option<u32> {
    let choices = chosen.meta.num_elements();
    if is_tiled(choices / experts.max(1)) {
        Some(TILE)
    } else {
        (choices > experts && matrix_units::are_there(&chosen.client)).then_some(few_units::FEW)
    }
}

/// Sorts choices `[tokens, k]` by expert and cuts them into tiles of so many.
fn plan<R: CubeRuntime>(chosen: &CubeTensor<R>, experts: usize, tile: u32) -> Plan<R> {
    let choices = chosen.meta.num_elements();
    let count = choices / tile as usize + experts;
    let order = room(chosen, [choices], DType::U32);
    let tiles = room(chosen, [count, 3], DType::I32);
    sort_choices::launch::<R>(
        &chosen.client.clone(),
        CubeCount::Static(experts as u32, 1, 1),
        CubeDim::new_1d(UNITS),
        chosen.clone().into_array_arg(),
        order.clone().into_array_arg(),
        tiles.clone().into_array_arg(),
        choices as u32,
        count as u32,
        tile,
    );
    Plan { order, tiles, count, tile }
}

/// A cube looks after one expert, a unit after a run of the choices. What is no expert comes after all of them.
#[cube(launch)]
fn sort_choices(
    chosen: &Array<i32>,
    order: &mut Array<u32>,
    tiles: &mut Array<i32>,
    choices: u32,
    tile_count: u32,
    #[comptime] tile_size: u32,
) {
    let expert = CUBE_POS_X;
    let mut counts = SharedMemory::<u32>::new(comptime!(UNITS as usize));
    let mut sums = SharedMemory::<u32>::new(comptime!(UNITS as usize));
    let run = choices.div_ceil(UNITS);
    let (first, end) = (min(UNIT_POS * run, choices), min((UNIT_POS + 1) * run, choices));
    let (mut own, mut before) = (u32::new(0), u32::new(0));
    for choice in first..end {
        let other = u32::cast_from(chosen[choice as usize]);
        if other == expert {
            own += 1;
        } else if other < expert {
            before += 1;
        }
    }
    counts[UNIT_POS as usize] = own;
    let start = joined(before, &mut sums, UNITS, Join::Sum);
    let count = joined(own, &mut sums, UNITS, Join::Sum);
    let mut next = start;
    for unit in 0..UNIT_POS {
        next += counts[unit as usize];
    }
    for choice in first..end {
        if u32::cast_from(chosen[choice as usize]) == expert {
            order[next as usize] = choice;
            next += 1;
        }
    }
    // Experts before take up at most as many tiles as they are, and as their choices fill.
    let first_tile = start / tile_size + expert;
    let mut end_tile = (start + count) / tile_size + expert + 1;
    if expert == CUBE_COUNT_X - 1 {
        end_tile = tile_count;
    }
    let mut tile = first_tile + UNIT_POS;
    while tile < end_tile {
        let from = start + (tile - first_tile) * tile_size;
        let mut matrix = i32::new(-1);
        if from < start + count {
            matrix = i32::cast_from(expert);
        }
        tiles[(3 * tile) as usize] = matrix;
        tiles[(3 * tile + 1) as usize] = i32::cast_from(from);
        tiles[(3 * tile + 2) as usize] = i32::cast_from(min(start + count, from + tile_size));
        tile += UNITS;
    }
}
