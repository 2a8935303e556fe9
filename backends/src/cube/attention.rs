//! Attention with sinks over a cache on the device, which new keys and values are written into in place.

use std::ops::Range;

use burn::tensor::DType;
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{
    buffer::{floats, room, tensor},
    device::{Join, joined},
};
use crate::ops::{LayerCache, Ring};

/// Units of a cube: keys that are looked at together.
const UNITS: u32 = 128;
/// Tokens from which on the query heads of a key head share a cube, and with it the keys and values.
const SHARED: usize = 16;
/// Query heads that share a cube at most.
const MOST_SHARED: usize = 8;

/// Slots of the smallest ring.
const LEAST_SLOTS: usize = 256;
/// Cubes in one direction of a launch, below what every device allows.
const MOST_CUBES: usize = 1 << 15;

/// Rotates queries `[tokens, heads * head_dim]` by `cos` and `sin` `[tokens, head_dim / 2]`, into a new buffer or at their
/// places in a ring of keys; or copies values into theirs, without rotation.
fn place<R: CubeRuntime>(
    x: CubeTensor<R>,
    tables: Option<&[CubeTensor<R>; 2]>,
    head_dim: usize,
    into: &CubeTensor<R>,
    position: usize,
) {
    let [tokens, width] = [x.meta.shape()[0], x.meta.shape()[1]];
    let slots = into.meta.shape()[0];
    let [cos, sin] = tables.cloned().unwrap_or_else(|| [x.clone(), x.clone()]);
    place_kernel::launch::<R>(
        &x.client.clone(),
        CubeCount::Static((width as u32 / 2).div_ceil(UNITS), tokens as u32, 1),
        CubeDim::new_1d(UNITS),
        x.into_array_arg(),
        cos.into_array_arg(),
        sin.into_array_arg(),
        into.clone().into_array_arg(),
        width as u32,
        head_dim as u32 / 2,
        position as u32,
        slots as u32,
        tables.is_some(),
    );
}

/// A unit moves one pair of numbers of a token to the slot of its position.
#[cube(launch)]
fn place_kernel(
    x: &Array<f32>,
    cos: &Array<f32>,
    sin: &Array<f32>,
    out: &mut Array<f32>,
    width: u32,
    half: u32,
    position: u32,
    slots: u32,
    #[comptime] rotated: bool,
) {
    let (pair, token) = (CUBE_POS_X * UNITS + UNIT_POS, CUBE_POS_Y);
    if pair >= width / 2 {
        terminate!();
    }
    let first = pair / half * 2 * half + pair % half;
    let at = token * width + first;
    let (mut a, mut b) = (x[at as usize], x[(at + half) as usize]);
    if comptime!(rotated) {
        let (cos, sin) = (cos[(token * half + pair % half) as usize], sin[(token * half + pair % half) as usize]);
        let turned = a * cos - b * sin;
        b = b * cos + a * sin;
        a = turned;
    }
    let to = (position + token) % slots * width + first;
    out[to as usize] = a;
    out[(to + half) as usize] = b;
}

/// [`cached_attention`](crate::cached_attention): `[tokens, heads * head_dim]`.
pub(super) fn attention<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    [q, k, v]: [CubeTensor<R>; 3],
    tables: [CubeTensor<R>; 2],
    sinks: CubeTensor<R>,
    scale: f32,
    cache: &mut LayerCache<CubeBackend<R, F, I, BT>>,
) -> CubeTensor<R> {
    let (tokens, head_dim) = (q.meta.shape()[0], 2 * tables[0].meta.shape()[1]);
    let [heads, kv_heads] = [&q, &k].map(|x| x.meta.shape()[1] / head_dim);
    let out = room(&q, [tokens, heads * head_dim], DType::F32);
    if tokens == 0 {
        return out;
    }
    let position = cache.position();
    let [keys, values] = prepared(cache, &k, tokens);
    let turned = room(&q, [tokens, heads * head_dim], DType::F32);
    place(q, Some(&tables), head_dim, &turned, 0);
    place(k, Some(&tables), head_dim, &keys, position);
    place(v, None, head_dim, &values, position);
    let group = heads / kv_heads;
    let shared = if tokens >= SHARED && group <= MOST_SHARED { group } else { 1 };
    attention_kernel::launch::<R>(
        &out.client.clone(),
        CubeCount::Static(tokens as u32, (heads / shared) as u32, 1),
        CubeDim::new_1d(UNITS),
        turned.into_array_arg(),
        keys.clone().into_array_arg(),
        values.clone().into_array_arg(),
        sinks.into_array_arg(),
        out.clone().into_array_arg(),
        (kv_heads * head_dim) as u32,
        keys.meta.shape()[0] as u32,
        position as u32,
        cache.window().map_or(u32::MAX, |window| window as u32),
        scale,
        group as u32,
        shared as u32,
        head_dim as u32,
    );
    cache.put_ring(Ring { keys: tensor(keys), values: tensor(values) }, tokens);
    out
}

/// A cube computes `shared` query heads of one key head for one token: the softmax runs over [`UNITS`] keys at a time.
#[cube(launch)]
fn attention_kernel(
    q: &Array<f32>,
    keys: &Array<f32>,
    values: &Array<f32>,
    sinks: &Array<f32>,
    out: &mut Array<f32>,
    width: u32,
    slots: u32,
    position: u32,
    window: u32,
    scale: f32,
    #[comptime] group: u32,
    #[comptime] shared: u32,
    #[comptime] head_dim: u32,
) {
    let (token, first_head) = (CUBE_POS_X, CUBE_POS_Y * shared);
    let kv_head = first_head / group;
    let heads = CUBE_COUNT_Y * shared;
    let mut queries = SharedMemory::<f32>::new(comptime!((shared * head_dim) as usize));
    let mut shares = SharedMemory::<f32>::new(comptime!((shared * UNITS) as usize));
    let mut sums = SharedMemory::<f32>::new(comptime!(UNITS as usize));
    // Of each head: the largest score so far, and what all shares add up to.
    let mut tops = Array::<f32>::new(comptime!(shared as usize));
    let mut totals = Array::<f32>::new(comptime!(shared as usize));
    #[unroll]
    for head in 0..shared {
        tops[comptime!(head as usize)] = sinks[(first_head + head) as usize];
        totals[comptime!(head as usize)] = 1.0;
    }
    // Numbers of the result that one unit looks after.
    let own = comptime!((shared * head_dim).div_ceil(UNITS));
    let mut mixed = Array::<f32>::new(comptime!(own as usize));
    #[unroll]
    for n in 0..own {
        mixed[comptime!(n as usize)] = 0.0;
        let number = n * UNITS + UNIT_POS;
        if number < shared * head_dim {
            queries[number as usize] = q[((token * heads + first_head) * head_dim + number) as usize];
        }
    }
    sync_cube();
    let end = position + token + 1;
    let mut start = end - min(end, window);
    while start < end {
        let key = start + UNIT_POS;
        let at = key % slots * width + kv_head * head_dim;
        #[unroll]
        for head in 0..shared {
            let mut score = f32::new(f32::MIN);
            if key < end {
                score = 0.0;
                for i in 0..head_dim {
                    score += queries[(head * head_dim + i) as usize] * keys[(at + i) as usize];
                }
                score *= scale;
            }
            let before = tops[comptime!(head as usize)];
            let top = max(before, joined(score, &mut sums, UNITS, Join::Largest));
            let share = select(key < end, f32::exp(score - top), f32::new(0.0));
            let shrink = f32::exp(before - top);
            let total = totals[comptime!(head as usize)];
            totals[comptime!(head as usize)] = total * shrink + joined(share, &mut sums, UNITS, Join::Sum);
            tops[comptime!(head as usize)] = top;
            shares[(head * UNITS + UNIT_POS) as usize] = share;
            // The same for all numbers of a head, so every unit keeps it in the place of its own.
            #[unroll]
            for n in 0..own {
                if (n * UNITS + UNIT_POS) / head_dim == head {
                    mixed[comptime!(n as usize)] *= shrink;
                }
            }
        }
        sync_cube();
        let count = min(end - start, UNITS);
        #[unroll]
        for n in 0..own {
            let number = n * UNITS + UNIT_POS;
            if number < shared * head_dim {
                let (head, i) = (number / head_dim, number % head_dim);
                let mut sum = mixed[comptime!(n as usize)];
                for key in 0..count {
                    let at = (start + key) % slots * width + kv_head * head_dim;
                    sum += shares[(head * UNITS + key) as usize] * values[(at + i) as usize];
                }
                mixed[comptime!(n as usize)] = sum;
            }
        }
        sync_cube();
        start += UNITS;
    }
    #[unroll]
    for n in 0..own {
        let number = n * UNITS + UNIT_POS;
        if number < shared * head_dim {
            let head = number / head_dim;
            let mut total = f32::new(1.0);
            #[unroll]
            for h in 0..shared {
                if head == h {
                    total = totals[comptime!(h as usize)];
                }
            }
            out[((token * heads + first_head) * head_dim + number) as usize] = mixed[comptime!(n as usize)] / total;
        }
    }
}

/// A ring with room for `tokens` more entries that nobody else holds, and with all that later queries can see.
fn prepared<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    cache: &mut LayerCache<CubeBackend<R, F, I, BT>>,
    like: &CubeTensor<R>,
    tokens: usize,
) -> [CubeTensor<R>; 2] {
    let position = cache.position();
    let kept = cache.window().map_or(position, |window| position.min(window + cache.spare()));
    let needed = cache.window().map_or(position + tokens, |window| window + tokens.max(cache.spare()));
    let (keys, values) = cache.take_ring().map(|ring| (floats(ring.keys), floats(ring.values))).unzip();
    [keys, values].map(|old: Option<CubeTensor<R>>| {
        let slots = old.as_ref().map_or(0, |old| old.meta.shape()[0]);
        match old {
            Some(old) if slots >= needed && old.can_mut() => old,
            old => {
                regrown(old, like, slots.max(needed.next_power_of_two().max(LEAST_SLOTS)), position - kept..position)
            }
        }
    })
}

/// A buffer of `slots` entries with some of those of an old one, in their new slots.
fn regrown<R: CubeRuntime>(
    old: Option<CubeTensor<R>>,
    like: &CubeTensor<R>,
    slots: usize,
    entries: Range<usize>,
) -> CubeTensor<R> {
    let width = like.meta.shape()[1];
    let new = room(like, [slots, width], DType::F32);
    for start in entries.clone().step_by(MOST_CUBES) {
        let Some(old) = old.clone() else { break };
        let old_slots = old.meta.shape()[0] as u32;
        move_kernel::launch::<R>(
            &new.client.clone(),
            CubeCount::Static((width as u32).div_ceil(UNITS), (entries.end - start).min(MOST_CUBES) as u32, 1),
            CubeDim::new_1d(UNITS),
            old.into_array_arg(),
            new.clone().into_array_arg(),
            width as u32,
            start as u32,
            old_slots,
            slots as u32,
        );
    }
    new
}

/// A unit moves one number of an entry.
#[cube(launch)]
fn move_kernel(old: &Array<f32>, new: &mut Array<f32>, width: u32, first: u32, old_slots: u32, slots: u32) {
    let (i, entry) = (CUBE_POS_X * UNITS + UNIT_POS, first + CUBE_POS_Y);
    if i < width {
        new[(entry % slots * width + i) as usize] = old[(entry % old_slots * width + i) as usize];
    }
}
