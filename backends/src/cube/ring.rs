//! The cache on the device: buffers in which sequences have their parts, and the kernels that write into them.

use std::{ops::Range, sync::Arc};

use burn::tensor::{DType, Shape, backend::Backend};
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement, tensor::CubeTensor};
use cubecl::prelude::*;

use super::buffer::{floats, lasting_room, tensor};
use crate::ops::{LayerCache, Ring};

/// Units of a cube.
const UNITS: u32 = 256;
/// Slots of the smallest ring.
pub(super) const LEAST_SLOTS: usize = 256;
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

    /// Where `tokens` tokens of each sequence have their entries.
    pub(super) fn places<F: FloatElement, I: IntElement, BT: BoolElement>(
        &self,
        caches: &[&mut LayerCache<CubeBackend<R, F, I, BT>>],
        tokens: usize,
    ) -> Places<R> {
        let parts = caches.iter().zip(&self.parts);
        let mut numbers =
            parts.map(|(cache, part)| [cache.position(), part.first, part.slots].map(|number| number as u32));
        if let [_] = caches {
            let [position, first, slots] = numbers.next().unwrap_or_default();
            return Places { several: None, position, first, slots, tokens: tokens as u32 };
        }
        let (client, device) = (self.keys.client.clone(), self.keys.device.clone());
        let handle = client.create_from_slice(bytemuck::cast_slice(&numbers.collect::<Vec<_>>()));
        let several = CubeTensor::new_contiguous(client, device, Shape::new([3 * caches.len()]), handle, DType::U32);
        Places { several: Some(several), position: 0, first: 0, slots: 1, tokens: tokens as u32 }
    }

    /// Rotates queries into `turned`, and takes in rotated keys, and values.
    pub(super) fn place(
        &self,
        qkv: [CubeTensor<R>; 3],
        tables: [CubeTensor<R>; 2],
        turned: &CubeTensor<R>,
        places: &Places<R>,
    ) {
        let [tokens, q_width] = [qkv[0].meta.shape()[0], qkv[0].meta.shape()[1]];
        let [width, half] = [&qkv[1], &tables[0]].map(|x| x.meta.shape()[1] as u32);
        let sequences = places.launch(&tables[0]);
        let ([q, k, v], [cos, sin]) = (qkv.map(CubeTensor::into_array_arg), tables.map(CubeTensor::into_array_arg));
        place::launch::<R>(
            &turned.client,
            CubeCount::Static((q_width as u32 + width).div_ceil(UNITS), tokens as u32, 1),
            CubeDim::new_1d(UNITS),
            q,
            k,
            v,
            cos,
            sin,
            sequences,
            turned.clone().into_array_arg(),
            self.keys.clone().into_array_arg(),
            self.values.clone().into_array_arg(),
            q_width as u32,
            width,
            half,
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

/// Where tokens have their entries.
pub(super) struct Places<R: CubeRuntime> {
    /// See [`Sequences`]. The numbers of a single one are arguments of the launches: nothing is uploaded for them.
    several: Option<CubeTensor<R>>,
    position: u32,
    first: u32,
    slots: u32,
    tokens: u32,
}

impl<R: CubeRuntime> Places<R> {
    /// The kernels' view of it. `other` is an array that they only read.
    pub(super) fn launch(&self, other: &CubeTensor<R>) -> SequencesLaunch<R> {
        // Not looked at where there is one sequence.
        let numbers = self.several.clone().unwrap_or_else(|| CubeTensor { dtype: DType::U32, ..other.clone() });
        let several = self.several.is_some();
        SequencesLaunch::new(numbers.into_array_arg(), self.position, self.first, self.slots, self.tokens, several)
    }
}

/// Sequences with as many tokens each.
#[derive(CubeLaunch, CubeType)]
pub(super) struct Sequences {
    /// Of several: the position of each one's first token, its first slot, and how many it has.
    numbers: Array<u32>,
    position: u32,
    first: u32,
    slots: u32,
    tokens: u32,
    #[cube(comptime)]
    several: bool,
}

#[cube]
impl Sequences {
    /// A token's position, its sequence's first slot, and how many it has.
    pub(super) fn of(&self, token: u32) -> (u32, u32, u32) {
        let (mut position, mut first, mut slots) = (self.position + token, self.first, self.slots);
        if comptime!(self.several) {
            let sequence = (token / self.tokens * 3) as usize;
            position = self.numbers[sequence] + token % self.tokens;
            first = self.numbers[sequence + 1];
            slots = self.numbers[sequence + 2];
        }
        (position, first, slots)
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
/// one number of a token's query, or of its key and its value.
#[cube(launch)]
fn place(
    q: &Array<f32>,
    k: &Array<f32>,
    v: &Array<f32>,
    cos: &Array<f32>,
    sin: &Array<f32>,
    sequences: &Sequences,
    turned_queries: &mut Array<f32>,
    keys: &mut Array<f32>,
    values: &mut Array<f32>,
    q_width: u32,
    width: u32,
    half: u32,
) {
    let (number, token) = (CUBE_POS_X * UNITS + UNIT_POS, CUBE_POS_Y);
    let angles = token * half;
    if number < q_width {
        let at = token * q_width + number;
        turned_queries[at as usize] = turned(q, cos, sin, at, number % (2 * half), angles, half);
    } else if number < q_width + width {
        let number = number - q_width;
        let from = token * width + number;
        let (position, first, slots) = sequences.of(token);
        let to = ((first + position % slots) * width + number) as usize;
        keys[to] = turned(k, cos, sin, from, number % (2 * half), angles, half);
        values[to] = v[from as usize];
    }
}

/// What stands `at` in `x`, number `number` of a head, rotated by the angles from `angles` on.
#[cube]
pub(super) fn turned(
    x: &Array<f32>,
    cos: &Array<f32>,
    sin: &Array<f32>,
    at: u32,
    number: u32,
    angles: u32,
    half: u32,
) -> f32 {
    let is_first = number < half;
    let angle = (angles + number % half) as usize;
    let (own, other) = (x[at as usize], x[select(is_first, at + half, at - half) as usize]);
    own * cos[angle] + select(is_first, -other, other) * sin[angle]
}
