//! The largest numbers of a row, so that the others need not leave the device.

use burn::tensor::DType;
use burn_cubecl::{CubeRuntime, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{buffer::room, device::is_nan};

/// Units of a cube.
const UNITS: u32 = 256;
/// Numbers that a cube chooses among.
const CHUNK: u32 = 2048;
/// How many can be chosen.
pub(super) const MOST: usize = 64;

/// The `k` largest numbers of each row of `x [rows, n]`, in falling order, of equal ones the first: where they are, `I32`,
/// and the numbers, `[rows, k]` each. NaN counts as larger than everything. `k` is at most `n` and [`MOST`].
pub(super) fn largest<R: CubeRuntime>(x: CubeTensor<R>, k: usize) -> (CubeTensor<R>, CubeTensor<R>) {
    let (mut places, mut numbers, mut first) = (x.clone(), x, true);
    loop {
        let [rows, n] = [numbers.meta.shape()[0], numbers.meta.shape()[1]];
        let chunks = n.div_ceil(CHUNK as usize);
        let (next_places, next) =
            (room(&numbers, [rows, chunks * k], DType::I32), room(&numbers, [rows, chunks * k], DType::F32));
        largest_kernel::launch::<R>(
            &numbers.client.clone(),
            CubeCount::Static(chunks as u32, rows as u32, 1),
            CubeDim::new_1d(UNITS),
            numbers.into_array_arg(),
            // Not looked at in the first round.
            CubeTensor { dtype: DType::I32, ..places }.into_array_arg(),
            next.clone().into_array_arg(),
            next_places.clone().into_array_arg(),
            n as u32,
            k as u32,
            first,
        );
        if chunks == 1 {
            return (next_places, next);
        }
        (places, numbers, first) = (next_places, next, false);
    }
}

/// A cube finds the `k` largest of a chunk of a row, one after the other. What is missing in a short chunk is less than every
/// number, and has the place -1.
#[cube(launch)]
fn largest_kernel(
    numbers: &Array<f32>,
    places: &Array<i32>,
    out: &mut Array<f32>,
    out_places: &mut Array<i32>,
    n: u32,
    k: u32,
    #[comptime] first: bool,
) {
    let (start, row) = (CUBE_POS_X * CHUNK, CUBE_POS_Y * n);
    // Ordered like the numbers, zero for what is taken or missing.
    let mut keys = SharedMemory::<u32>::new(comptime!(CHUNK as usize));
    let mut best = SharedMemory::<u32>::new(comptime!(UNITS as usize));
    let mut i = UNIT_POS;
    while i < CHUNK {
        let mut key = u32::new(0);
        if start + i < n {
            key = key_of(numbers[(row + start + i) as usize]);
        }
        keys[i as usize] = key;
        i += UNITS;
    }
    sync_cube();
    for rank in 0..k {
        let mut own = UNIT_POS;
        i = UNIT_POS + UNITS;
        while i < CHUNK {
            if keys[i as usize] > keys[own as usize] {
                own = i;
            }
            i += UNITS;
        }
        best[UNIT_POS as usize] = own;
        let mut half = comptime!(UNITS / 2).runtime();
        while half > 0 {
            sync_cube();
            if UNIT_POS < half {
                let (a, b) = (best[UNIT_POS as usize], best[(UNIT_POS + half) as usize]);
                let (x, y) = (keys[a as usize], keys[b as usize]);
                best[UNIT_POS as usize] = select(y > x || (y == x && b < a), b, a);
            }
            half /= 2;
        }
        sync_cube();
        if UNIT_POS == 0 {
            let at = best[0];
            let to = ((CUBE_POS_Y * CUBE_COUNT_X + CUBE_POS_X) * k + rank) as usize;
            let known = keys[at as usize] > 0;
            let from = row + min(start + at, n - 1);
            out[to] = select(known, numbers[from as usize], f32::new(f32::MIN));
            let mut place = i32::cast_from(start + at);
            if comptime!(!first) {
                place = places[from as usize];
            }
            out_places[to] = select(known, place, i32::new(-1));
            keys[at as usize] = 0;
        }
        sync_cube();
    }
}

/// A number whose order is that of floats; NaN is the largest, and none is zero.
#[cube]
fn key_of(x: f32) -> u32 {
    let bits = u32::reinterpret(x);
    let ordered = select(bits >> 31 == 1, !bits, bits | 0x8000_0000u32);
    select(is_nan(x), 0xffff_ffffu32.runtime(), max(ordered, u32::new(1)))
}
