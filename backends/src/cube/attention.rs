//! Attention with sinks over a cache on the device, which new keys and values are written into in place.
#![allow(unsafe_code)]

use std::{ops::Range, sync::Arc};

use burn::tensor::{DType, Shape, backend::Backend};
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
/// one pair of numbers of a token. `first` is the sequence's first slot.
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
    first: u32,
) {
    let slot = first + (position + CUBE_POS_Y) % slots;
    place_pair(q, k, v, cos, sin, turned, keys, values, q_width, width, half, slot);
}

/// The same for `tokens` tokens of each of `sequences`: its position, and its first slot.
#[cube(launch)]
fn place_batch(
    q: &Array<f32>,
    k: &Array<f32>,
    v: &Array<f32>,
    cos: &Array<f32>,
    sin: &Array<f32>,
    sequences: &Array<u32>,
    turned: &mut Array<f32>,
    keys: &mut Array<f32>,
    values: &mut Array<f32>,
    q_width: u32,
    width: u32,
    half: u32,
    tokens: u32,
    slots: u32,
) {
    let sequence = (CUBE_POS_Y / tokens * 2) as usize;
    let slot = sequences[sequence + 1] + (sequences[sequence] + CUBE_POS_Y % tokens) % slots;
    place_pair(q, k, v, cos, sin, turned, keys, values, q_width, width, half, slot);
}

#[cube]
fn place_pair(
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
    slot: u32,
) {
    let (pair, token) = (CUBE_POS_X * UNITS + UNIT_POS, CUBE_POS_Y);
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

/// Whether so many tokens of so many sequences are computed in one launch: tiles are of one sequence.
pub(super) fn takes_together(tokens: usize, sequences: usize) -> bool {
    sequences == 1 || tokens / sequences < attention_tiles::LEAST_TOKENS
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
    let buffers = prepared(caches, &k, new);
    let widths = [&buffers.keys, &buffers.values].map(|ring| ring.meta.shape()[1]);
    assert_eq!(widths, [kv_heads * head_dim; 2], "a cache of other heads");
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
        attention.place([q, k, v], tables, &buffers, cache.position());
        attention.of_one(&buffers, cache.position());
    } else {
        let sequences = caches.iter().zip(&buffers.parts).map(|(cache, part)| {
            // Its position, and its first slot.
            [cache.position() as u32, (part.sequence * buffers.slots) as u32]
        });
        let handle = out.client.create_from_slice(bytemuck::cast_slice(&sequences.collect::<Vec<_>>()));
        let (client, device, shape) = (out.client.clone(), out.device.clone(), Shape::new([2 * caches.len()]));
        let sequences = CubeTensor::new_contiguous(client, device, shape, handle, DType::U32);
        attention.place_batch([q, k, v], tables, &buffers, &sequences, new);
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

    fn q_width(&self) -> u32 {
        (self.heads * self.head_dim) as u32
    }

    fn group(&self) -> u32 {
        (self.heads / self.kv_heads) as u32
    }

    /// A unit for every pair of numbers.
    fn cubes_to_place(&self) -> CubeCount {
        CubeCount::Static((self.q_width() / 2 + self.width()).div_ceil(UNITS), self.tokens as u32, 1)
    }

    fn place(&self, qkv: [CubeTensor<R>; 3], tables: [CubeTensor<R>; 2], buffers: &Buffers<R>, position: usize) {
        let ([q, k, v], [cos, sin]) = (qkv.map(CubeTensor::into_array_arg), tables.map(CubeTensor::into_array_arg));
        place::launch::<R>(
            &self.out.client,
            self.cubes_to_place(),
            CubeDim::new_1d(UNITS),
            q,
            k,
            v,
            cos,
            sin,
            self.turned.clone().into_array_arg(),
            buffers.keys.clone().into_array_arg(),
            buffers.values.clone().into_array_arg(),
            self.q_width(),
            self.width(),
            self.head_dim as u32 / 2,
            position as u32,
            buffers.slots as u32,
            buffers.first(),
        );
    }

    fn place_batch(
        &self,
        qkv: [CubeTensor<R>; 3],
        tables: [CubeTensor<R>; 2],
        buffers: &Buffers<R>,
        sequences: &CubeTensor<R>,
        tokens: usize,
    ) {
        let ([q, k, v], [cos, sin]) = (qkv.map(CubeTensor::into_array_arg), tables.map(CubeTensor::into_array_arg));
        place_batch::launch::<R>(
            &self.out.client,
            self.cubes_to_place(),
            CubeDim::new_1d(UNITS),
            q,
            k,
            v,
            cos,
            sin,
            sequences.clone().into_array_arg(),
            self.turned.clone().into_array_arg(),
            buffers.keys.clone().into_array_arg(),
            buffers.values.clone().into_array_arg(),
            self.q_width(),
            self.width(),
            self.head_dim as u32 / 2,
            tokens as u32,
            buffers.slots as u32,
        );
    }

    fn of_one(self, buffers: &Buffers<R>, position: usize) {
        let (width, group) = (self.width(), self.group());
        let (slots, first, position) = (buffers.slots as u32, buffers.first(), position as u32);
        let Self { turned, sinks, out, tokens, heads, head_dim, window, scale, .. } = self;
        let client = out.client.clone();
        let arrays = [turned, buffers.keys.clone(), buffers.values.clone(), sinks, out];
        let [q, k, v, sinks, mixed] = arrays.map(CubeTensor::into_array_arg);
        // Unchecked on the device: heads and numbers of a head are those of the arrays, whose shapes fit each other (see
        // `cached_attention`), tokens end at the last one, and a slot is what is left of a position by the number of slots.
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
        // SAFETY: as for one sequence; each has its slots, and its position.
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
                buffers.slots as u32,
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

/// The same for `tokens` tokens of each of `sequences`: its position, and its first slot.
#[cube(launch_unchecked)]
fn attention_batch(
    q: &Array<f32>,
    keys: &Array<f32>,
    values: &Array<f32>,
    sinks: &Array<f32>,
    sequences: &Array<u32>,
    out: &mut Array<f32>,
    width: u32,
    slots: u32,
    tokens: u32,
    window: u32,
    scale: f32,
    #[comptime] group: u32,
    #[comptime] head_dim: u32,
) {
    let sequence = (CUBE_POS_X / tokens * 2) as usize;
    let (end, first) = (sequences[sequence] + CUBE_POS_X % tokens + 1, sequences[sequence + 1]);
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

/// Buffers in which some sequences have their parts.
struct Buffers<R: CubeRuntime> {
    keys: CubeTensor<R>,
    values: CubeTensor<R>,
    /// Of each sequence.
    slots: usize,
    company: Arc<()>,
    parts: Vec<Part>,
}

/// A sequence's part of buffers: see [`Ring`].
struct Part {
    sequence: usize,
    own: Arc<()>,
}

impl<R: CubeRuntime> Buffers<R> {
    /// First slot of the first sequence.
    fn first(&self) -> u32 {
        self.parts.first().map_or(0, |part| part.sequence * self.slots) as u32
    }

    /// Each cache gets its part back, with the entries of `tokens` more.
    fn give_back<F: FloatElement, I: IntElement, BT: BoolElement>(
        self,
        caches: &mut [&mut LayerCache<CubeBackend<R, F, I, BT>>],
        tokens: usize,
    ) {
        let Self { keys, values, slots, company, parts } = self;
        for (cache, Part { sequence, own }) in caches.iter_mut().zip(parts) {
            let (keys, values, company) = (tensor(keys.clone()), tensor(values.clone()), company.clone());
            cache.put_ring(Ring { keys, values, slots, sequence, company, own }, tokens);
        }
    }
}

/// Buffers with room for `tokens` more entries of each sequence, and with all that later queries can see: those in which they
/// are already, or new ones.
fn prepared<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    caches: &mut [&mut LayerCache<CubeBackend<R, F, I, BT>>],
    like: &CubeTensor<R>,
    tokens: usize,
) -> Buffers<R> {
    let needed = |cache: &LayerCache<_>| {
        cache.window().map_or(cache.position() + tokens, |window| window + tokens.max(cache.spare()))
    };
    let needed = caches.iter().map(|cache| needed(cache)).max().unwrap_or(0);
    let old: Vec<_> = caches.iter_mut().map(|cache| cache.take_ring()).collect();
    if let Some(first) = together(&old).filter(|ring| ring.slots >= needed) {
        let (keys, values) = (floats(first.keys.clone()), floats(first.values.clone()));
        let (slots, company) = (first.slots, first.company.clone());
        let parts = old.into_iter().flatten().map(|Ring { sequence, own, .. }| Part { sequence, own });
        return Buffers { keys, values, slots, company, parts: parts.collect() };
    }
    let had = old.iter().flatten().map(|ring| ring.slots).max().unwrap_or(0);
    let slots = had.max(needed.next_power_of_two().max(LEAST_SLOTS));
    let [keys, values] = [0, 1].map(|_| lasting_room(like, [caches.len() * slots, like.meta.shape()[1]], DType::F32));
    for (sequence, (cache, ring)) in caches.iter().zip(old).enumerate() {
        let Some(ring) = ring else { continue };
        let kept = cache.window().map_or(cache.position(), |window| cache.position().min(window + cache.spare()));
        let entries = cache.position() - kept..cache.position();
        let [from, to] = [[ring.sequence * ring.slots, ring.slots], [sequence * slots, slots]];
        move_entries(floats(ring.keys), &keys, entries.clone(), from, to);
        move_entries(floats(ring.values), &values, entries, from, to);
    }
    let parts = (0..caches.len()).map(|sequence| Part { sequence, own: Arc::new(()) });
    Buffers { keys, values, slots, company: Arc::new(()), parts: parts.collect() }
}

/// The first of these rings, if all are in the same buffers, and nobody has a copy of one.
fn together<B: Backend>(rings: &[Option<Ring<B>>]) -> Option<&Ring<B>> {
    let first = rings.first()?.as_ref()?;
    let joins = |ring: &Ring<B>| Arc::ptr_eq(&ring.company, &first.company) && Arc::strong_count(&ring.own) == 1;
    rings.iter().all(|ring| ring.as_ref().is_some_and(joins)).then_some(first)
}

/// Moves some entries from a sequence's slots in one buffer to its slots in another: the first one, and how many there are.
fn move_entries<R: CubeRuntime>(
    old: CubeTensor<R>,
    new: &CubeTensor<R>,
    entries: Range<usize>,
    from: [usize; 2],
    to: [usize; 2],
) {
    let width = new.meta.shape()[1] as u32;
    for start in entries.clone().step_by(MOST_CUBES) {
        move_kernel::launch::<R>(
            &new.client,
            CubeCount::Static(width.div_ceil(UNITS), (entries.end - start).min(MOST_CUBES) as u32, 1),
            CubeDim::new_1d(UNITS),
            old.clone().into_array_arg(),
            new.clone().into_array_arg(),
            width,
            start as u32,
            from[0] as u32,
            from[1] as u32,
            to[0] as u32,
            to[1] as u32,
        );
    }
}

/// A unit moves one number of an entry. A sequence's slots begin at `old_first`, and at `new_first`.
#[cube(launch)]
fn move_kernel(
    old: &Array<f32>,
    new: &mut Array<f32>,
    width: u32,
    start: u32,
    old_first: u32,
    old_slots: u32,
    new_first: u32,
    new_slots: u32,
) {
    let (i, entry) = (CUBE_POS_X * UNITS + UNIT_POS, start + CUBE_POS_Y);
    if i < width {
        let (from, to) = (old_first + entry % old_slots, new_first + entry % new_slots);
        new[(to * width + i) as usize] = old[(from * width + i) as usize];
    }
}
