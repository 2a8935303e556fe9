//! Functions of the device that several kernels call.

use cubecl::prelude::*;

/// The sum of a number of every unit, in all units. Their number must be a power of two, `shared` as long.
#[cube]
pub(super) fn sum_of_cube(value: f32, shared: &mut SharedMemory<f32>) -> f32 {
    shared[UNIT_POS as usize] = value;
    let mut half = CUBE_DIM / 2;
    while half > 0 {
        sync_cube();
        if UNIT_POS < half {
            let other = shared[(UNIT_POS + half) as usize];
            shared[UNIT_POS as usize] += other;
        }
        half /= 2;
    }
    sync_cube();
    let sum = shared[0];
    sync_cube();
    sum
}

/// The largest of the numbers of all units, in all units: as [`sum_of_cube`].
#[cube]
pub(super) fn max_of_cube(value: f32, shared: &mut SharedMemory<f32>) -> f32 {
    shared[UNIT_POS as usize] = value;
    let mut half = CUBE_DIM / 2;
    while half > 0 {
        sync_cube();
        if UNIT_POS < half {
            let other = shared[(UNIT_POS + half) as usize];
            shared[UNIT_POS as usize] = max(shared[UNIT_POS as usize], other);
        }
        half /= 2;
    }
    sync_cube();
    let largest = shared[0];
    sync_cube();
    largest
}

/// By its bits: compilers for GPUs may assume that there are no NaN.
#[cube]
pub(super) fn is_finite(x: f32) -> bool {
    (u32::reinterpret(x) & 0x7f80_0000u32) != 0x7f80_0000u32
}

/// By its bits, as [`is_finite`].
#[cube]
pub(super) fn is_nan(x: f32) -> bool {
    (u32::reinterpret(x) & 0x7fff_ffffu32) > 0x7f80_0000u32
}

/// A NaN that no compiler knows of.
#[cube]
pub(super) fn nan() -> f32 {
    f32::reinterpret(0x7fc0_0000u32 + UNIT_POS)
}

/// To the nearest whole number, halves to even, for numbers below 2^22.
#[cube]
pub(super) fn round(x: f32) -> f32 {
    let low = f32::floor(x);
    let part = x - low;
    let odd = low - 2.0 * f32::floor(low * 0.5);
    low + select(part > 0.5 || (part == 0.5 && odd == 1.0), f32::new(1.0), f32::new(0.0))
}

/// Whether input `i` changes its sign: [`Rotation::signs`](crate::format::Rotation::signs), in halves of its 64 bits.
#[cube]
pub(super) fn is_minus(i: u32, seed_low: u32, seed_high: u32) -> bool {
    // z = (seed + block + 1) * 0x9e3779b97f4a7c15
    let more = i / 64 + 1;
    let low = seed_low + more;
    let high = seed_high + select(low < more, u32::new(1), u32::new(0));
    let (low, high) = multiply(low, high, 0x7f4a_7c15u32, 0x9e37_79b9u32);
    let (low, high) = (low ^ ((low >> 30) | (high << 2)), high ^ (high >> 30));
    let (low, high) = multiply(low, high, 0x1ce4_e5b9u32, 0xbf58_476du32);
    let (low, high) = (low ^ ((low >> 27) | (high << 5)), high ^ (high >> 27));
    let (low, high) = multiply(low, high, 0x1331_11ebu32, 0x94d0_49bbu32);
    let (low, high) = (low ^ ((low >> 31) | (high << 1)), high ^ (high >> 31));
    let bit = i % 64;
    let half = select(bit < 32, low, high);
    (half >> (bit % 32)) & 1 == 1
}

/// The lower 64 bits of a product of 64-bit numbers.
#[cube]
fn multiply(low: u32, high: u32, by_low: u32, by_high: u32) -> (u32, u32) {
    (low * by_low, u32::mul_hi(low, by_low) + low * by_high + high * by_low)
}
