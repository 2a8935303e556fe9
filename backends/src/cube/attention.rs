//! Attention with sinks over a cache on the device, which new keys and values are written into in place.
#![allow(unsafe_code)]

use burn::tensor::{DType, backend::Backend};
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{
    attention_tiles,
    buffer::room,
    ring::{Buffers, UNITS, fit_together, prepared},
};
use crate::ops::LayerCache;

/// Units that share a key's score.
const SHARERS: u32 = 4;
/// Keys that are looked at together.
const KEYS: u32 = UNITS / SHARERS;
/// Values that a unit fetches together.
const AHEAD: u32 = 4;

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
        turned: room(&q, [tokens, heads * head_dim], DType::F32),
        sinks,
        out: out.clone(),
        tokens,
        heads,
        kv_heads,
        head_dim,
        window: caches[0].window().map_or(u32::MAX, |window| window as u32),
        scale,
    };
    if let [cache] = caches {
        // Its numbers are arguments of the launches: nothing is uploaded for them.
        buffers.place([q, k, v], tables, &attention.turned, cache.position());
        attention.of_one(&buffers, cache.position());
    } else {
        let sequences = buffers.sequences(caches);
        buffers.place_batch([q, k, v], tables, &attention.turned, &sequences, new);
        attention.of_batch(&buffers, sequences, new);
    }
    buffers.give_back(caches, new);
    out
}

/// What the launches of an attention share.
struct Launch<R: CubeRuntime> {
    /// The queries, rotated.
    turned: CubeTensor<R>,
    sinks: CubeTensor<R>,
    out: CubeTensor<R>,
    tokens: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    window: u32,
    scale: f32,
}

impl<R: CubeRuntime> Launch<R> {
    fn width(&self) -> u32 {
        (self.kv_heads * self.head_dim) as u32
    }

    fn group(&self) -> u32 {
        (self.heads / self.kv_heads) as u32
    }

    fn of_one(self, buffers: &Buffers<R>, position: usize) {
        let (width, group) = (self.width(), self.group());
        let ([first, slots], position) = (buffers.part(), position as u32);
        let Self { turned, sinks, out, tokens, heads, head_dim, window, scale, .. } = self;
        let client = out.client.clone();
        let arrays = [turned, buffers.keys.clone(), buffers.values.clone(), sinks, out];
        let [q, k, v, sinks, mixed] = arrays.map(CubeTensor::into_array_arg);
        // Unchecked on the device: heads and numbers of a head are those of the arrays, whose shapes fit each other (see
        // `cached_attention`), tokens end at the last one, and a slot is what is left of a position by the number of slots, counted
        // from the first one: all lie in the buffers, as `prepared` has made them.
        if let Some(shared) = attention_tiles::shared_heads(tokens, head_dim, group as usize) {
            let tiles = (tokens as u32).div_ceil(attention_tiles::ROWS / shared as u32);
            // SAFETY: above.
            unsafe {
                attention_tiles::in_tiles::launch_unchecked::<R>(
                    &client,
                    CubeCount::Static(tiles, (heads / shared) as u32, 1),
                    CubeDim::new_1d(attention_tiles::UNITS),
                    q,
                    k,
                    v,
                    sinks,
                    mixed,
                    tokens as u32,
                    width,
                    slots,
                    first,
                    position,
                    window,
                    scale,
                    group,
                    shared as u32,
                    head_dim as u32,
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
                    first,
                    position,
                    window,
                    scale,
                    group,
                    head_dim as u32,
                );
            }
        }
    }

    fn of_batch(self, buffers: &Buffers<R>, sequences: CubeTensor<R>, new: usize) {
        let (width, group) = (self.width(), self.group());
        let Self { turned, sinks, out, tokens, heads, head_dim, window, scale, .. } = self;
        let client = out.client.clone();
        let arrays = [turned, buffers.keys.clone(), buffers.values.clone(), sinks, sequences, out];
        let [q, k, v, sinks, sequences, mixed] = arrays.map(CubeTensor::into_array_arg);
        // SAFETY: as for one sequence; each has its numbers in `sequences`, as there are as many tokens of each.
        unsafe {
            attention_batch::launch_unchecked::<R>(
                &client,
                CubeCount::Static(tokens as u32, heads as u32, 1),
                CubeDim::new_1d(UNITS),
                q,
                k,
                v,
                sinks,
                sequences,
                mixed,
                width,
                new as u32,
                window,
                scale,
                group,
                head_dim as u32,
            );
        }
    }
}

/// A cube computes one query head for one token.
#[cube(launch_unchecked)]
fn attention_kernel(
    q: &Array<f32>,
    keys: &Array<f32>,
    values: &Array<f32>,
    sinks: &Array<f32>,
    out: &mut Array<f32>,
    width: u32,
    slots: u32,
    first: u32,
    position: u32,
    window: u32,
    scale: f32,
    #[comptime] group: u32,
    #[comptime] head_dim: u32,
) {
    let end = position + CUBE_POS_X + 1;
    attend(q, keys, values, sinks, out, width, slots, first, end, window, scale, group, head_dim);
}

/// The same for `tokens` tokens of each of `sequences`: its position, its first slot, and how many it has.
#[cube(launch_unchecked)]
fn attention_batch(
    q: &Array<f32>,
    keys: &Array<f32>,
    values: &Array<f32>,
    sinks: &Array<f32>,
    sequences: &Array<u32>,
    out: &mut Array<f32>,
    width: u32,
    tokens: u32,
    window: u32,
    scale: f32,
    #[comptime] group: u32,
    #[comptime] head_dim: u32,
) {
    let sequence = (CUBE_POS_X / tokens * 3) as usize;
    let end = sequences[sequence] + CUBE_POS_X % tokens + 1;
    let (first, slots) = (sequences[sequence + 1], sequences[sequence + 2]);
    attend(q, keys, values, sinks, out, width, slots, first, end, window, scale, group, head_dim);
}

/// One query head for one token, which sees what comes before position `end`: the softmax runs over [`KEYS`] keys at a time.
#[cube]
fn attend(
    q: &Array<f32>,
    keys: &Array<f32>,
    values: &Array<f32>,
    sinks: &Array<f32>,
    out: &mut Array<f32>,
    width: u32,
    slots: u32,
    first: u32,
    end: u32,
    window: u32,
    scale: f32,
    #[comptime] group: u32,
    #[comptime] head_dim: u32,
) {
    let (token, head) = (CUBE_POS_X, CUBE_POS_Y);
    let at = (token * CUBE_COUNT_Y + head) * head_dim;
    let column = first * width + head / group * head_dim;
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
