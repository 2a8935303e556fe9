//! The cache on the device: buffers in which sequences have their parts, and the kernels that write into them.

use std::{ops::Range, sync::Arc};

use burn::tensor::{DType, Shape, backend::Backend};
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement, tensor::CubeTensor};
use cubecl::prelude::*;

use super::buffer::{floats, lasting_room, tensor};
use crate::ops::{LayerCache, Ring};

/// Units of a cube.
pub(super) const UNITS: u32 = 256;
/// Slots of the smallest ring.
const LEAST_SLOTS: usize = 256;
/// Cubes in one direction of a launch, below what every device allows.
const MOST_CUBES: usize = 1 << 15;

/// Buffers in which some sequences have their parts.
pub(super) struct Buffers<R: CubeRuntime> {
    pub(super) keys: CubeTensor<R>,
    pub(super) values: CubeTensor<R>,
    company: Arc<()>,
    parts: Vec<Part>,
}

/// A sequence's part of buffers: see [`Ring`].
struct Part {
    first: usize,
    slots: usize,
    own: Arc<()>,
}

impl<R: CubeRuntime> Buffers<R> {
    /// The only sequence's first slot, and how many it has.
    pub(super) fn part(&self) -> [u32; 2] {
        [self.parts[0].first as u32, self.parts[0].slots as u32]
    }

    /// Position, first slot and number of slots of each sequence.
    pub(super) fn sequences<F: FloatElement, I: IntElement, BT: BoolElement>(
        &self,
        caches: &[&mut LayerCache<CubeBackend<R, F, I, BT>>],
    ) -> CubeTensor<R> {
        let parts = caches.iter().zip(&self.parts);
        let numbers = parts.map(|(cache, part)| [cache.position(), part.first, part.slots].map(|number| number as u32));
        let (client, device) = (self.keys.client.clone(), self.keys.device.clone());
        let handle = client.create_from_slice(bytemuck::cast_slice(&numbers.collect::<Vec<_>>()));
        CubeTensor::new_contiguous(client, device, Shape::new([3 * caches.len()]), handle, DType::U32)
    }

    /// Rotates queries into `turned`, and takes in rotated keys, and values, of tokens of one sequence from `position` on.
    pub(super) fn place(
        &self,
        qkv: [CubeTensor<R>; 3],
        tables: [CubeTensor<R>; 2],
        turned: &CubeTensor<R>,
        position: usize,
    ) {
        let [first, slots] = self.part();
        let Places { cubes, q_width, width, half } = Places::of(&qkv, &tables);
        let ([q, k, v], [cos, sin]) = (qkv.map(CubeTensor::into_array_arg), tables.map(CubeTensor::into_array_arg));
        place::launch::<R>(
            &turned.client,
            cubes,
            CubeDim::new_1d(UNITS),
            q,
            k,
            v,
            cos,
            sin,
            turned.clone().into_array_arg(),
            self.keys.clone().into_array_arg(),
            self.values.clone().into_array_arg(),
            q_width,
            width,
            half,
            position as u32,
            first,
            slots,
        );
    }

    /// The same for `tokens` tokens of each of some [`sequences`](Self::sequences).
    pub(super) fn place_batch(
        &self,
        qkv: [CubeTensor<R>; 3],
        tables: [CubeTensor<R>; 2],
        turned: &CubeTensor<R>,
        sequences: &CubeTensor<R>,
        tokens: usize,
    ) {
        let Places { cubes, q_width, width, half } = Places::of(&qkv, &tables);
        let ([q, k, v], [cos, sin]) = (qkv.map(CubeTensor::into_array_arg), tables.map(CubeTensor::into_array_arg));
        place_batch::launch::<R>(
            &turned.client,
            cubes,
            CubeDim::new_1d(UNITS),
            q,
            k,
            v,
            cos,
            sin,
            sequences.clone().into_array_arg(),
            turned.clone().into_array_arg(),
            self.keys.clone().into_array_arg(),
            self.values.clone().into_array_arg(),
            q_width,
            width,
            half,
            tokens as u32,
        );
    }

    /// Each cache gets its part back, with the entries of `tokens` more.
    pub(super) fn give_back<F: FloatElement, I: IntElement, BT: BoolElement>(
        self,
        caches: &mut [&mut LayerCache<CubeBackend<R, F, I, BT>>],
        tokens: usize,
    ) {
        let Self { keys, values, company, parts } = self;
        for (cache, Part { first, slots, own }) in caches.iter_mut().zip(parts) {
            let (keys, values, company) = (tensor(keys.clone()), tensor(values.clone()), company.clone());
            cache.put_ring(Ring { keys, values, first, slots, company, own }, tokens);
        }
    }
}

/// A unit for every pair of numbers of a token, and the widths that it needs.
struct Places {
    cubes: CubeCount,
    q_width: u32,
    width: u32,
    half: u32,
}

impl Places {
    fn of<R: CubeRuntime>([q, k, _]: &[CubeTensor<R>; 3], [cos, _]: &[CubeTensor<R>; 2]) -> Self {
        let [q_width, width, half] = [q, k, cos].map(|x| x.meta.shape()[1] as u32);
        let cubes = CubeCount::Static((q_width / 2 + width).div_ceil(UNITS), q.meta.shape()[0] as u32, 1);
        Self { cubes, q_width, width, half }
    }
}

/// Slots that a cache needs for `tokens` more entries.
fn needed<B: Backend>(cache: &LayerCache<B>, tokens: usize) -> usize {
    cache.window().map_or(cache.position() + tokens, |window| window + tokens.max(cache.spare()))
}

/// Slots that it gets, so that it need not move soon again.
fn roomy<B: Backend>(cache: &LayerCache<B>, tokens: usize) -> usize {
    needed(cache, tokens).next_power_of_two().max(LEAST_SLOTS)
}

/// Whether caches with entries of `width` numbers fit into buffers of so many bytes, for `tokens` more of each sequence.
pub(super) fn fit_together<B: Backend>(caches: &[&mut LayerCache<B>], tokens: usize, width: usize, most: u64) -> bool {
    let slots: usize = caches.iter().map(|cache| roomy(cache, tokens)).sum();
    let numbers = (slots * width) as u64;
    4 * numbers <= most && numbers <= u64::from(u32::MAX)
}

/// Buffers with room for `tokens` more entries of each sequence, and with all that later queries can see: those in which they
/// are already, or new ones.
///
/// # Panics
/// If a cache has entries of another width, or lost them when an operation panicked.
pub(super) fn prepared<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    caches: &mut [&mut LayerCache<CubeBackend<R, F, I, BT>>],
    like: &CubeTensor<R>,
    tokens: usize,
) -> Buffers<R> {
    let width = like.meta.shape()[1];
    for cache in caches.iter() {
        let found = cache.ring().map(|ring| [&ring.keys, &ring.values].map(|kept| kept.dims()[1]));
        assert!(found.is_none_or(|found| found == [width; 2]), "a cache of other heads");
        assert!(found.is_some() || cache.position() == 0, "a cache without its entries");
    }
    let old: Vec<_> = caches.iter_mut().map(|cache| cache.take_ring()).collect();
    let room = caches
        .iter()
        .zip(&old)
        .all(|(cache, ring)| ring.as_ref().is_some_and(|ring| ring.slots >= needed(cache, tokens)));
    if let Some(one) = together(&old).filter(|_| room) {
        let (keys, values, company) = (floats(one.keys.clone()), floats(one.values.clone()), one.company.clone());
        let parts = old.into_iter().flatten().map(|Ring { first, slots, own, .. }| Part { first, slots, own });
        return Buffers { keys, values, company, parts: parts.collect() };
    }
    let slots: Vec<usize> = caches.iter().map(|cache| roomy(cache, tokens)).collect();
    let [keys, values] = [0, 1].map(|_| lasting_room(like, [slots.iter().sum(), width], DType::F32));
    let (mut first, mut parts) = (0, Vec::with_capacity(caches.len()));
    for ((cache, ring), slots) in caches.iter().zip(old).zip(slots) {
        if let Some(ring) = ring {
            let entries = cache.position() - cache.entries()..cache.position();
            let [from, to] = [[ring.first, ring.slots], [first, slots]];
            move_entries(floats(ring.keys), &keys, entries.clone(), from, to);
            move_entries(floats(ring.values), &values, entries, from, to);
        }
        parts.push(Part { first, slots, own: Arc::new(()) });
        first += slots;
    }
    Buffers { keys, values, company: Arc::new(()), parts }
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
    first: u32,
    slots: u32,
) {
    let slot = first + (position + CUBE_POS_Y) % slots;
    place_pair(q, k, v, cos, sin, turned, keys, values, q_width, width, half, slot);
}

/// The same for `tokens` tokens of each of `sequences`: its position, its first slot, and how many it has.
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
) {
    let sequence = (CUBE_POS_Y / tokens * 3) as usize;
    let slot = sequences[sequence + 1] + (sequences[sequence] + CUBE_POS_Y % tokens) % sequences[sequence + 2];
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
