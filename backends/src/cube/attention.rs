//! Attention with sinks over a cache on the device, which new keys and values are written into in place.
#![allow(unsafe_code)]

use burn::tensor::{DType, backend::Backend};
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{
    attention_tiles,
    buffer::{begin, room},
    device::units_for,
    ring::{Buffers, LEAST_SLOTS, Places, Sequences, fit_together, prepared, turned},
};
use crate::ops::LayerCache;

/// Units that share a key's score.
const SHARERS: u32 = 4;
/// Units of a cube at least, and at most: as many as [`SHARERS`] for each key that is seen, and the device allows.
const UNITS: [usize; 2] = [256, 1024];
/// So the slots of keys that are looked at together go round a ring once at most, the one after them included: see [`fetch`].
const _: () = assert!(UNITS[1] / SHARERS as usize <= LEAST_SLOTS);
/// Scores that a unit compares before all units compare what was found.
const COMPARED: u32 = 16;
/// Values that a unit fetches together.
const AHEAD: u32 = 16;

/// Whether `tokens` tokens of each sequence are computed in one launch, with keys of `width` numbers and buffers of at most so
/// many bytes: tiles are of one sequence.
pub(super) fn takes_together<B: Backend>(
    caches: &[&mut LayerCache<B>],
    tokens: usize,
    width: usize,
    most: u64,
) -> bool {
    caches.len() == 1 || tokens < attention_tiles::LEAST_TOKENS && fit_together(caches, tokens, width, most)
}

/// [`cached_attention`](crate::cached_attention): `[tokens, heads * head_dim]`.
pub(super) fn attention<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    [q, k, v]: [CubeTensor<R>; 3],
    tables: [CubeTensor<R>; 2],
    sinks: CubeTensor<R>,
    scale: f32,
    caches: &mut [&mut LayerCache<CubeBackend<R, F, I, BT>>],
) -> CubeTensor<R> {
    let (tokens, head_dim) = (q.meta.shape()[0], 2 * tables[0].meta.shape()[1]);
    let [heads, kv_heads] = [&q, &k].map(|x| x.meta.shape()[1] / head_dim);
    let out = room(&q, [tokens, heads * head_dim], DType::F32);
    if tokens == 0 {
        return out;
    }
    let new = tokens / caches.len();
    assert_eq!(new * caches.len(), tokens, "as many tokens of each sequence");
    let buffers = prepared(caches, &k, new);
    let attention = Launch {
        places: buffers.places(caches, new),
        sinks,
        out: out.clone(),
        tokens,
        heads,
        kv_heads,
        head_dim,
        window: caches[0].window().map_or(u32::MAX, |window| window as u32),
        scale,
        units: units_for(&q.client, (SHARERS as usize * seen(caches, new)).max(UNITS[0]), UNITS[1]),
    };
    if new == 1 {
        attention.attend([q, k, v], tables, &buffers, true);
    } else {
        let turned = room(&q, [tokens, heads * head_dim], DType::F32);
        buffers.place([q, k, v], tables, &turned, &attention.places);
        match (attention_tiles::shared_heads(new, head_dim, heads / kv_heads), &*caches) {
            (Some(shared), [cache]) => attention.in_tiles(turned, &buffers, cache.position(), shared),
            _ => attention.of_few(turned, &buffers),
        }
    }
    buffers.give_back(caches, new);
    begin(&out);
    out
}

/// Keys that a token sees at most, `tokens` more of each sequence included.
fn seen<B: Backend>(caches: &[&mut LayerCache<B>], tokens: usize) -> usize {
    let seen = |cache: &&mut LayerCache<B>| (cache.position() + tokens).min(cache.window().unwrap_or(usize::MAX));
    caches.iter().map(seen).max().unwrap_or(0)
}

/// What the launches of an attention share.
///
/// They are unchecked on the device: heads and numbers of a head are those of the arrays, whose shapes fit each other (see
/// `cached_attention`), tokens end at the last one, and a slot is what is left of a position by the number of slots, counted
/// from a sequence's first one: all lie in the buffers, as `prepared` has made them.
struct Launch<R: CubeRuntime> {
    places: Places<R>,
    sinks: CubeTensor<R>,
    out: CubeTensor<R>,
    tokens: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    window: u32,
    scale: f32,
    /// Of a cube.
    units: u32,
}

impl<R: CubeRuntime> Launch<R> {
    fn width(&self) -> u32 {
        (self.kv_heads * self.head_dim) as u32
    }

    fn group(&self) -> u32 {
        (self.heads / self.kv_heads) as u32
    }

    /// A few tokens of each sequence, whose keys and values are in their places already.
    fn of_few(self, turned: CubeTensor<R>, buffers: &Buffers<R>) {
        // What is in its place is not looked at again.
        let other = || self.sinks.clone();
        let (qkv, tables) = ([turned, other(), other()], [other(), other()]);
        self.attend(qkv, tables, buffers, false);
    }

    /// A few tokens of each sequence, or in a `step` one more of each, whose key and value the same launch takes in.
    fn attend(self, qkv: [CubeTensor<R>; 3], tables: [CubeTensor<R>; 2], buffers: &Buffers<R>, step: bool) {
        let (width, group) = (self.width(), self.group());
        let Self { places, sinks, out, tokens, heads, head_dim, window, scale, units, .. } = self;
        let sequences = places.launch(&sinks);
        let ([q, k, v], [cos, sin]) = (qkv.map(CubeTensor::into_array_arg), tables.map(CubeTensor::into_array_arg));
        // SAFETY: see `Launch`.
        unsafe {
            attend::launch_unchecked::<R>(
                &out.client.clone(),
                CubeCount::Static(tokens as u32, heads as u32, 1),
                CubeDim::new_1d(units),
                q,
                k,
                v,
                cos,
                sin,
                buffers.keys.clone().into_array_arg(),
                buffers.values.clone().into_array_arg(),
                sinks.into_array_arg(),
                sequences,
                out.into_array_arg(),
                width,
                window,
                scale,
                group,
                head_dim as u32,
                units,
                step,
            );
        }
    }

    /// Many tokens of one sequence, in tiles that some heads share.
    fn in_tiles(self, turned: CubeTensor<R>, buffers: &Buffers<R>, position: usize, shared: usize) {
        let (width, group, [first, slots]) = (self.width(), self.group(), buffers.part());
        let Self { sinks, out, tokens, heads, head_dim, window, scale, .. } = self;
        let tiles = (tokens as u32).div_ceil(attention_tiles::ROWS / shared as u32);
        // SAFETY: see `Launch`.
        unsafe {
            attention_tiles::in_tiles::launch_unchecked::<R>(
                &out.client.clone(),
                CubeCount::Static(tiles, (heads / shared) as u32, 1),
                CubeDim::new_1d(attention_tiles::UNITS),
                turned.into_array_arg(),
                buffers.keys.clone().into_array_arg(),
                buffers.values.clone().into_array_arg(),
                sinks.into_array_arg(),
                out.into_array_arg(),
                tokens as u32,
                width,
                slots,
                first,
                position as u32,
                window,
                scale,
                group,
                shared as u32,
                head_dim as u32,
            );
        }
    }
}

/// A cube computes one query head for one token: the softmax runs over as many keys at a time as there are units for. In a
/// `step`, the query and the token's own key are yet to be rotated, and one cube of each key head puts key and value where the
/// next tokens find them.
#[cube(launch_unchecked)]
fn attend(
    q: &Array<f32>,
    k: &Array<f32>,
    v: &Array<f32>,
    cos: &Array<f32>,
    sin: &Array<f32>,
    keys: &mut Array<f32>,
    values: &mut Array<f32>,
    sinks: &Array<f32>,
    sequences: &Sequences,
    out: &mut Array<f32>,
    width: u32,
    window: u32,
    scale: f32,
    #[comptime] group: u32,
    #[comptime] head_dim: u32,
    #[comptime] units: u32,
    #[comptime] step: bool,
) {
    let (token, head) = (CUBE_POS_X, CUBE_POS_Y);
    let (position, first, slots) = sequences.of(token);
    let end = position + 1;
    let together = comptime!(units / SHARERS);
    let at = (token * CUBE_COUNT_Y + head) * head_dim;
    let column = first * width + head / group * head_dim;
    // Where the token's own key and value are in their arrays, and which keys are not in their places yet.
    let new = token * width + head / group * head_dim;
    let mut placed = end;
    if comptime!(step) {
        placed = position;
    }
    let mut query = SharedMemory::<f32>::new(comptime!(head_dim as usize));
    let mut newest = SharedMemory::<f32>::new(comptime!(head_dim as usize));
    let mut sums = SharedMemory::<f32>::new(comptime!(units as usize));
    let mut scores = SharedMemory::<f32>::new(comptime!(together as usize));
    let mut highs = SharedMemory::<f32>::new(comptime!((together / COMPARED) as usize));
    let mut i = UNIT_POS;
    while i < head_dim {
        if comptime!(step) {
            let half = comptime!(head_dim / 2);
            query[i as usize] = turned(q, cos, sin, at + i, i, token * half, half);
            let key = turned(k, cos, sin, new + i, i, token * half, half);
            newest[i as usize] = key;
            if head % group == 0 {
                let to = (position % slots * width + column + i) as usize;
                keys[to] = key;
                values[to] = v[(new + i) as usize];
            }
        } else {
            query[i as usize] = q[(at + i) as usize];
        }
        i += units;
    }
    // Units mix the values in runs of `head_dim`: each run some of the keys, and a unit more than one number of a wide head.
    let runs = comptime!(if head_dim < units { units / head_dim } else { 1 });
    let own = comptime!(head_dim.div_ceil(units));
    let (run, number) = (UNIT_POS / head_dim, UNIT_POS % head_dim);
    let (mut top, mut total) = (sinks[head as usize], f32::new(0.0));
    let mut mixed = Array::<f32>::new(comptime!(own as usize));
    let mut own_value = Array::<f32>::new(comptime!(own as usize));
    #[unroll]
    for n in 0..own {
        mixed[comptime!(n as usize)] = 0.0;
        own_value[comptime!(n as usize)] = 0.0;
        if comptime!(step) {
            let number = min(n * units + number, comptime!(head_dim - 1));
            own_value[comptime!(n as usize)] = v[(new + number) as usize];
        }
    }
    let mut fetched = Array::<f32>::new(comptime!((own * AHEAD) as usize));
    // What the softmax has been divided by since the sink was its largest score.
    let mut sink = f32::new(1.0);
    sync_cube();
    let mut start = end - min(end, window);
    while start < end {
        let count = min(end - start, together);
        let (key, part) = (start + UNIT_POS / SHARERS, UNIT_POS % SHARERS);
        let mut sum = f32::new(0.0);
        if key < placed {
            let entry = key % slots * width + column;
            #[unroll]
            for n in 0..comptime!(head_dim.div_ceil(SHARERS)) {
                let i = part + n * SHARERS;
                if comptime!(head_dim.is_multiple_of(SHARERS)) || i < head_dim {
                    sum += query[i as usize] * keys[(entry + i) as usize];
                }
            }
        }
        if comptime!(step) && key == placed {
            #[unroll]
            for n in 0..comptime!(head_dim.div_ceil(SHARERS)) {
                let i = part + n * SHARERS;
                if comptime!(head_dim.is_multiple_of(SHARERS)) || i < head_dim {
                    sum += query[i as usize] * newest[i as usize];
                }
            }
        }
        // The first values are on their way while the scores are looked at.
        let values_at = Fetch { start: start % slots, count, placed: placed - start, slots, width, column, number };
        fetch(values, &values_at, &own_value, run, &mut fetched, head_dim, units, step);
        sums[UNIT_POS as usize] = sum;
        sync_cube();
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
        if UNIT_POS < comptime!(together / COMPARED) {
            let mut highest = f32::new(f32::MIN);
            #[unroll]
            for n in 0..COMPARED {
                let key = UNIT_POS * COMPARED + n;
                if key < count {
                    highest = max(highest, scores[key as usize]);
                }
            }
            highs[UNIT_POS as usize] = highest;
        }
        sync_cube();
        let before = top;
        #[unroll]
        for n in 0..comptime!(together / COMPARED) {
            top = max(top, highs[n as usize]);
        }
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
        #[unroll]
        for pass in 0..comptime!(together.div_ceil(AHEAD * runs)) {
            let first = run + pass * AHEAD * runs;
            if comptime!(pass > 0) {
                fetch(values, &values_at, &own_value, first, &mut fetched, head_dim, units, step);
            }
            #[unroll]
            for n in 0..AHEAD {
                let key = first + n * runs;
                let share = select(key < count && run < runs, scores[min(key, count - 1) as usize], f32::new(0.0));
                total += share;
                #[unroll]
                for m in 0..own {
                    mixed[comptime!(m as usize)] += share * fetched[comptime!((n * own + m) as usize)];
                }
            }
        }
        start += together;
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
        if run == 0 && n * units + number < head_dim {
            out[(at + n * units + number) as usize] = mixed[comptime!(n as usize)] / (total + sink);
        }
    }
}

/// Where the values of some keys are: the slot of the first one, how many keys there are, how many of them are in their
/// places, and which number of a head.
#[derive(CubeType)]
struct Fetch {
    start: u32,
    count: u32,
    placed: u32,
    slots: u32,
    width: u32,
    column: u32,
    number: u32,
}

/// Brings the values of [`AHEAD`] keys of a run, from key `first` on. Nothing here depends on a condition, so that all are
/// fetched together.
#[cube]
fn fetch(
    values: &Array<f32>,
    at: &Fetch,
    own_value: &Array<f32>,
    first: u32,
    fetched: &mut Array<f32>,
    #[comptime] head_dim: u32,
    #[comptime] units: u32,
    #[comptime] step: bool,
) {
    let runs = comptime!(if head_dim < units { units / head_dim } else { 1 });
    let own = comptime!(head_dim.div_ceil(units));
    #[unroll]
    for n in 0..AHEAD {
        let key = min(first + n * runs, at.count - 1);
        let is_own = comptime!(step) && key == at.placed;
        // Another cube may be writing into the token's own slot: the next one is looked at instead.
        let slot = at.start + select(is_own, key + 1, key);
        let slot = select(slot < at.slots, slot, slot - at.slots);
        #[unroll]
        for m in 0..own {
            let number = min(m * units + at.number, comptime!(head_dim - 1));
            let value = values[(slot * at.width + at.column + number) as usize];
            fetched[comptime!((n * own + m) as usize)] = select(is_own, own_value[comptime!(m as usize)], value);
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
