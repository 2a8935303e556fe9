//! What several kernels need of a device.

use burn_cubecl::CubeRuntime;
use cubecl::{
    client::ComputeClient,
    ir::{ElemType, StorageType, features::Plane},
    prelude::*,
};

/// Units of a cube for so much work, a power of two: at most `most`, another one, and what the device allows.
pub(super) fn units_for<R: CubeRuntime>(client: &ComputeClient<R>, work: usize, most: usize) -> u32 {
    let allowed = client.properties().hardware.max_units_per_cube as usize;
    let allowed = if allowed.is_power_of_two() { allowed } else { allowed.next_power_of_two() / 2 };
    work.next_power_of_two().clamp(64, most).min(allowed) as u32
}

/// Whether matrix units multiply matrices of this shape: rows, columns and depth. Of numbers of the first kind they make sums of
/// the second one.
pub(super) fn multiplies<R: CubeRuntime>(client: &ComputeClient<R>, shape: [u32; 3], [of, to]: [ElemType; 2]) -> bool {
    let (of, to) = (StorageType::from(of), StorageType::from(to));
    let mut configs = client.properties().features.matmul.mma.iter();
    configs.any(|mma| [mma.m, mma.n, mma.k] == shape && [mma.a_type, mma.b_type, mma.cd_type] == [of, of, to])
}

/// Units of a plane that can hand each other numbers, where a device's planes all have as many; 1 elsewhere.
pub(super) fn plane_of<R: CubeRuntime>(client: &ComputeClient<R>) -> u32 {
    let properties = client.properties();
    let (least, most) = (properties.hardware.plane_size_min, properties.hardware.plane_size_max);
    if properties.features.plane.contains(Plane::Ops) && least == most { least } else { 1 }
}

/// How numbers of several units become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Join {
    Sum,
    Largest,
}

/// One number from those of all `units` of a cube, in all of them: planes of a size that [`plane_of`] gives do most of it. `shared`
/// has a place for every unit, and may be used again afterwards.
#[cube]
pub(super) fn joined_by_planes<N: Numeric>(
    value: N,
    shared: &mut SharedMemory<N>,
    #[comptime] units: u32,
    #[comptime] plane: u32,
    #[comptime] join: Join,
) -> N {
    let planes = comptime!(units / plane);
    if comptime!(plane == 1 || planes > plane || planes * plane != units) {
        joined(value, shared, units, join)
    } else {
        let (value, lane) = (of_plane::<N>(value, join), UNIT_POS % plane);
        if lane == 0 {
            shared[(UNIT_POS / plane) as usize] = value;
        }
        sync_cube();
        // Nothing is a number that changes neither a sum nor the largest of those that are not negative.
        let other = select(lane < planes, shared[(UNIT_POS % planes) as usize], N::from_int(0));
        let one = of_plane::<N>(other, join);
        sync_cube();
        one
    }
}

#[cube]
fn of_plane<N: Numeric>(value: N, #[comptime] join: Join) -> N {
    match comptime!(join) {
        Join::Sum => plane_sum(value),
        Join::Largest => plane_max(value),
    }
}

/// One number from those of each run of `units` neighbouring units, a power of two, in all of them. `shared` has a place for
/// every unit of the cube, and may be used again afterwards.
#[cube]
pub(super) fn joined<N: Numeric>(
    value: N,
    shared: &mut SharedMemory<N>,
    #[comptime] units: u32,
    #[comptime] join: Join,
) -> N {
    let lane = UNIT_POS % units;
    shared[UNIT_POS as usize] = value;
    let mut half = comptime!(units / 2).runtime();
    while half > 0 {
        sync_cube();
        if lane < half {
            let (own, other) = (shared[UNIT_POS as usize], shared[(UNIT_POS + half) as usize]);
            shared[UNIT_POS as usize] = match comptime!(join) {
                Join::Sum => own + other,
                Join::Largest => max(own, other),
            };
        }
        half /= 2;
    }
    sync_cube();
    let one = shared[(UNIT_POS - lane) as usize];
    sync_cube();
    one
}

/// The unnormalized Walsh-Hadamard transform of the numbers of each run of `width` neighbouring units; `run` has a place for
/// every unit of the cube.
#[cube]
pub(super) fn butterflies(value: f32, run: &mut SharedMemory<f32>, #[comptime] width: u32) -> f32 {
    run[UNIT_POS as usize] = value;
    #[unroll]
    for stage in 0..comptime!(width.trailing_zeros()) {
        sync_cube();
        let half = comptime!(1u32 << stage);
        let (own, other) = (run[UNIT_POS as usize], run[(UNIT_POS ^ half) as usize]);
        sync_cube();
        run[UNIT_POS as usize] = select(UNIT_POS & half == 0, own + other, other - own);
    }
    run[UNIT_POS as usize]
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

/// What input `i` is multiplied with before the transform: [`Rotation::factor`](crate::format::Rotation::factor).
#[cube]
pub(super) fn factor(i: u32, seed_low: u32, seed_high: u32, #[comptime] width: u32) -> f32 {
    factor_of(signs(i / 64, seed_low, seed_high), i % 64, width)
}

/// The factor of input `bit` of a block with these [`signs`].
#[cube]
pub(super) fn factor_of(signs: (u32, u32), bit: u32, #[comptime] width: u32) -> f32 {
    let half = select(bit < 32, signs.0, signs.1);
    let scale = comptime!(1.0 / (width as f32).sqrt());
    select((half >> (bit % 32)) & 1 == 1, -scale, scale)
}

/// The signs of a block's 64 inputs, a bit each, in halves.
#[cube]
pub(super) fn signs(block: u32, seed_low: u32, seed_high: u32) -> (u32, u32) {
    // z = (seed + block + 1) * 0x9e3779b97f4a7c15
    let more = block + 1;
    let low = seed_low + more;
    let high = seed_high + select(low < more, u32::new(1), u32::new(0));
    let (low, high) = multiply(low, high, 0x7f4a_7c15u32, 0x9e37_79b9u32);
    let (low, high) = (low ^ ((low >> 30) | (high << 2)), high ^ (high >> 30));
    let (low, high) = multiply(low, high, 0x1ce4_e5b9u32, 0xbf58_476du32);
    let (low, high) = (low ^ ((low >> 27) | (high << 5)), high ^ (high >> 27));
    let (low, high) = multiply(low, high, 0x1331_11ebu32, 0x94d0_49bbu32);
    (low ^ ((low >> 31) | (high << 1)), high ^ (high >> 31))
}

/// The lower 64 bits of a product of 64-bit numbers.
#[cube]
fn multiply(low: u32, high: u32, by_low: u32, by_high: u32) -> (u32, u32) {
    (low * by_low, u32::mul_hi(low, by_low) + low * by_high + high * by_low)
}
