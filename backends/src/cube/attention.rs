//! Attention with sinks over a cache on the device, which new keys and values are written into in place.
#![allow(unsafe_code)]

use burn::tensor::{DType, backend::Backend};
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{
    attend::{SHARERS, UNITS, attend},
    attention_parts::{self, shares},
    attention_tiles,
    buffer::{begin, room},
    device::units_for,
    ring::{Buffers, Places, fit_together, prepared},
};
use crate::ops::LayerCache;

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
        seen: seen(caches, new),
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
    /// Keys that a token sees at most.
    seen: usize,
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
        let (width, group, shares) = (self.width(), self.group(), shares(self.seen, self.tokens * self.heads));
        let Self { places, sinks, out, tokens, heads, head_dim, window, scale, seen, .. } = self;
        let client = out.client.clone();
        // Small cubes where they are many: one of a GPU's processors has room for one of the largest, or for three of the smallest.
        let most = if shares > 1 { UNITS[0] } else { UNITS[1] };
        let units = units_for(&client, (SHARERS as usize * seen).max(UNITS[0]), most);
        let parts = match shares {
            1 => out.clone(),
            _ => room(&out, [tokens * heads * shares, head_dim + 2], DType::F32),
        };
        let sequences = places.launch(&sinks);
        let ([q, k, v], [cos, sin]) = (qkv.map(CubeTensor::into_array_arg), tables.map(CubeTensor::into_array_arg));
        // SAFETY: see `Launch`.
        unsafe {
            attend::launch_unchecked::<R>(
                &client,
                CubeCount::Static(tokens as u32, heads as u32, shares as u32),
                CubeDim::new_1d(units),
                q,
                k,
                v,
                cos,
                sin,
                buffers.keys.clone().into_array_arg(),
                buffers.values.clone().into_array_arg(),
                sinks.clone().into_array_arg(),
                sequences,
                parts.clone().into_array_arg(),
                width,
                window,
                scale,
                group,
                head_dim as u32,
                units,
                step,
                shares as u32,
            );
            if shares > 1 {
                attention_parts::join::launch_unchecked::<R>(
                    &client,
                    CubeCount::Static((tokens * heads) as u32, 1, 1),
                    CubeDim::new_1d(attention_parts::UNITS),
                    parts.into_array_arg(),
                    sinks.into_array_arg(),
                    out.into_array_arg(),
                    heads as u32,
                    head_dim as u32,
                    shares as u32,
                );
            }
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
