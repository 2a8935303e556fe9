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
    /// Of each sequence.
    pub(super) slots: usize,
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
    pub(super) fn first(&self) -> u32 {
        self.parts.first().map_or(0, |part| part.sequence * self.slots) as u32
    }

    /// Position and first slot of each sequence.
    pub(super) fn sequences<F: FloatElement, I: IntElement, BT: BoolElement>(
        &self,
        caches: &[&mut LayerCache<CubeBackend<R, F, I, BT>>],
    ) -> CubeTensor<R> {
        let parts = caches.iter().zip(&self.parts);
        let pairs = parts.map(|(cache, part)| [cache.position() as u32, (part.sequence * self.slots) as u32]);
        let (client, device) = (self.keys.client.clone(), self.keys.device.clone());
        let handle = client.create_from_slice(bytemuck::cast_slice(&pairs.collect::<Vec<_>>()));
        CubeTensor::new_contiguous(client, device, Shape::new([2 * caches.len()]), handle, DType::U32)
    }

    /// Rotates queries into `turned`, and takes in rotated keys, and values, of tokens of one sequence from `position` on.
    pub(super) fn place(
        &self,
        qkv: [CubeTensor<R>; 3],
        tables: [CubeTensor<R>; 2],
        turned: &CubeTensor<R>,
        position: usize,
    ) {
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
            self.slots as u32,
            self.first(),
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
            self.slots as u32,
        );
    }

    /// Each cache gets its part back, with the entries of `tokens` more.
    pub(super) fn give_back<F: FloatElement, I: IntElement, BT: BoolElement>(
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

/// Buffers with room for `tokens` more entries of each sequence, and with all that later queries can see: those in which they
/// are already, or new ones.
pub(super) fn prepared<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
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
