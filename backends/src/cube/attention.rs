//! Attention with sinks over a cache on the device, which new keys and values are written into in place.
#![allow(unsafe_code)]

use std::ops::Range;

use burn::tensor::DType;
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{
    attention_tiles,
    buffer::{floats, lasting_room, room, tensor},
};
use crate::ops::{LayerCache, Ring};

/// Units of a cube.
const UNITS: u32 = 256;
/// Units that share a key's score.
const SHARERS: u32 = 4;
/// Keys that are looked at together.
const KEYS: u32 = UNITS / SHARERS;
/// Values that a unit fetches together.
const AHEAD: u32 = 4;

/// Slots of the smallest ring.
const LEAST_SLOTS: usize = 256;
/// Cubes in one direction of a launch, below what every device allows.
const MOST_CUBES: usize = 1 << 15;

/// Rotates queries and keys, and puts the queries into `turned`, keys and values at the slots of their positions. A unit moves
/// one pair of numbers of a token.
#[cube(launch)]
fn place(
    q: &Array<f32>,
    k: &Array<f32>,
    v: &Array<f32>,
    cos: &Array<f32>,
    sin: &Array<f32>,
    turned: &mut Array<f32>,
    keys: &mut Array<f32>,
    values: &mut Array<f32>,
    q_width: u32,
    width: u32,
    half: u32,
    position: u32,
    slots: u32,
) {
    let (pair, token) = (CUBE_POS_X * UNITS + UNIT_POS, CUBE_POS_Y);
    let slot = (position + token) % slots;
    let (queries, entries) = (q_width / 2, width / 2);
    if pair < queries {
        turn(q, cos, sin, turned, pair, token, q_width, token, half);
    } else if pair < queries + entries {
        turn(k, cos, sin, keys, pair - queries, token, width, slot, half);
    } else if pair < queries + 2 * entries {
        let first = 2 * (pair - queries - entries);
        #[unroll]
        for n in 0..2u32 {
            values[(slot * width + first + n) as usize] = v[(token * width + first + n) as usize];
        }
    }
}

/// Rotates one pair of a token's numbers `[tokens, width]` into row `to` of `out`.
#[cube]
fn turn(
    x: &Array<f32>,
    cos: &Array<f32>,
    sin: &Array<f32>,
    out: &mut Array<f32>,
    pair: u32,
    token: u32,
    width: u32,
    to: u32,
    half: u32,
) {
    let first = pair / half * 2 * half + pair % half;
    let (a, b) = (x[(token * width + first) as usize], x[(token * width + first + half) as usize]);
    let angle = (token * half + pair % half) as usize;
    let (cos, sin) = (cos[angle], sin[angle]);
    out[(to * width + first) as usize] = a * cos - b * sin;
    out[(to * width + first + half) as usize] = b * cos + a * sin;
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
    assert_eq!([&keys, &values].map(|ring| ring.meta.shape()[1]), [kv_heads * head_dim; 2], "a cache of other heads");
    let turned = room(&q, [tokens, heads * head_dim], DType::F32);
    let window = cache.window().map_or(u32::MAX, |window| window as u32);
    let (width, slots) = ((kv_heads * head_dim) as u32, keys.meta.shape()[0] as u32);
    let (position, group, head_dim) = (position as u32, (heads / kv_heads) as u32, head_dim as u32);
    let client = out.client.clone();
    let [cos, sin] = tables;
    let q_width = heads as u32 * head_dim;
    place::launch::<R>(
        &client,
        CubeCount::Static((q_width / 2 + width).div_ceil(UNITS), tokens as u32, 1),
        CubeDim::new_1d(UNITS),
        q.into_array_arg(),
        k.into_array_arg(),
        v.into_array_arg(),
        cos.into_array_arg(),
        sin.into_array_arg(),
        turned.clone().into_array_arg(),
        keys.clone().into_array_arg(),
        values.clone().into_array_arg(),
        q_width,
        width,
        head_dim / 2,
        position,
        slots,
    );
    let arrays = [&turned, &keys, &values, &sinks, &out];
    let [q, k, v, sinks, mixed] = arrays.map(|array| array.clone().into_array_arg());
    // Unchecked on the device: heads and numbers of a head are those of the arrays, whose shapes fit each other (see
    // `cached_attention`), tokens end at the last one, and a slot is what is left of a position by the number of slots.
    if let Some(shared) = attention_tiles::shared_heads(tokens, head_dim as usize, group as usize) {
        // SAFETY: above.
        unsafe {
            attention_tiles::in_tiles::launch_unchecked::<R>(
                &client,
                CubeCount::Static(
                    (tokens as u32).div_ceil(attention_tiles::ROWS / shared as u32),
                    (heads / shared) as u32,
                    1,
                ),
                CubeDim::new_1d(attention_tiles::UNITS),
                q,
                k,
                v,
                sinks,
                mixed,
                tokens as u32,
                width,
                slots,
                position,
                window,
                scale,
                group,
                shared as u32,
                head_dim,
            );
        }
    } else {
        // SAFETY: above.
        unsafe {
            attention_kernel::launch_unchecked::<R>(
                &client,
                CubeCount::Static(tokens as u32, heads as u32, 1),
                CubeDim::new_1d(UNITS),
                q,
                k,
                v,
                sinks,
                mixed,
                width,
                slots,
                position,
                window,
                scale,
                group,
                head_dim,
            );
        }
    }
    cache.put_ring(Ring { keys: tensor(keys), values: tensor(values) }, tokens);
    out
}

/// A cube computes one query head for one token: the softmax runs over [`KEYS`] keys at a time.
#[cube(launch_unchecked)]
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
    #[comptime] head_dim: u32,
) {
    let (token, head) = (CUBE_POS_X, CUBE_POS_Y);
    let at = (token * CUBE_COUNT_Y + head) * head_dim;
    let column = head / group * head_dim;
    let mut query = SharedMemory::<f32>::new(comptime!(head_dim as usize));
    let mut sums = SharedMemory::<f32>::new(comptime!(UNITS as usize));
    let mut scores = SharedMemory::<f32>::new(comptime!(KEYS as usize));
    let mut i = UNIT_POS;
    while i < head_dim {
        query[i as usize] = q[(at + i) as usize];
        i += UNITS;
    }
    // Units mix the values in runs of `head_dim`: each run some of the keys, and a unit more than one number of a wide head.
    let runs = comptime!(if head_dim < UNITS { UNITS / head_dim } else { 1 });
    let own = comptime!(head_dim.div_ceil(UNITS));
    let (run, number) = (UNIT_POS / head_dim, UNIT_POS % head_dim);
    let (mut top, mut total) = (sinks[head as usize], f32::new(0.0));
    let mut mixed = Array::<f32>::new(comptime!(own as usize));
    #[unroll]
    for n in 0..own {
        mixed[comptime!(n as usize)] = 0.0;
    }
    // What the softmax has been divided by since the sink was its largest score.
    let mut sink = f32::new(1.0);
    sync_cube();
    let end = position + token + 1;
    let mut start = end - min(end, window);
    while start < end {
        let (key, part) = (start + UNIT_POS / SHARERS, UNIT_POS % SHARERS);
        let mut sum = f32::new(0.0);
        if key < end {
            let entry = key % slots * width + column;
            #[unroll]
            for n in 0..comptime!(head_dim.div_ceil(SHARERS)) {
                let i = part + n * SHARERS;
                if comptime!(head_dim.is_multiple_of(SHARERS)) || i < head_dim {
                    sum += query[i as usize] * keys[(entry + i) as usize];
                }
            }
        }
        sums[UNIT_POS as usize] = sum;
        sync_cube();
        let count = min(end - start, KEYS);
        let mut score = f32::new(f32::MIN);
        if UNIT_POS < count {
            score = 0.0;
            #[unroll]
            for part in 0..SHARERS {
                score += sums[(UNIT_POS * SHARERS + part) as usize];
            }
            score *= scale;
            scores[UNIT_POS as usize] = score;
        }
        sync_cube();
        let before = top;
        for key in 0..count {
            top = max(top, scores[key as usize]);
        }
        sync_cube();
        if UNIT_POS < count {
            scores[UNIT_POS as usize] = f32::exp(score - top);
        }
        sync_cube();
        let shrink = f32::exp(before - top);
        total *= shrink;
        sink *= shrink;
        #[unroll]
        for n in 0..own {
            mixed[comptime!(n as usize)] *= shrink;
        }
        let mut key = run;
        while key < count && run < runs {
            // Several at a time, so that they are fetched together.
            #[unroll]
            for _ in 0..AHEAD {
                if key < count {
                    let share = scores[key as usize];
                    let entry = (start + key) % slots * width + column + number;
                    total += share;
                    #[unroll]
                    for n in 0..own {
                        if n * UNITS + number < head_dim {
                            mixed[comptime!(n as usize)] += share * values[(entry + n * UNITS) as usize];
                        }
                    }
                }
                key += runs;
            }
        }
        start += KEYS;
    }
    // The runs of a narrow head are added up; a wide one has a single run.
    sync_cube();
    if comptime!(runs > 1) {
        let mixed_here = mixed[0];
        mixed[0] = added(mixed_here, &mut sums, number, head_dim, runs);
        total = added(total, &mut sums, number, head_dim, runs);
    }
    #[unroll]
    for n in 0..own {
        if run == 0 && n * UNITS + number < head_dim {
            out[(at + n * UNITS + number) as usize] = mixed[comptime!(n as usize)] / (total + sink);
        }
    }
}

/// The sum of what the units of each run have at this number.
#[cube]
fn added(
    value: f32,
    sums: &mut SharedMemory<f32>,
    number: u32,
    #[comptime] head_dim: u32,
    #[comptime] runs: u32,
) -> f32 {
    sums[UNIT_POS as usize] = value;
    sync_cube();
    let mut sum = f32::new(0.0);
    for run in 0..runs {
        sum += sums[(run * head_dim + number) as usize];
    }
    sync_cube();
    sum
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
    let new = lasting_room(like, [slots, width], DType::F32);
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
