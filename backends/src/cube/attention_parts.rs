//! What one query head sees of many keys, computed by several cubes, each of which looks at a share of the keys.

use cubecl::prelude::*;

/// Units of a cube that puts the parts together.
pub(super) const UNITS: u32 = 64;
/// Keys that are worth a cube of their own.
const WORTH: usize = 128;
/// Shares of the keys at most.
const MOST: usize = 16;
/// Cubes that keep a GPU busy.
const CUBES: usize = 1024;

/// Into how many shares the keys are cut that a head sees at most, if so many heads are computed: a power of two.
pub(super) fn shares(seen: usize, heads: usize) -> usize {
    let most = (CUBES / heads.max(1)).min(MOST).min(seen / WORTH);
    if most > 1 { 1 << most.ilog2() } else { 1 }
}

/// A cube puts together what `shares` cubes found for one query head: of each share the sum of the values, not divided yet, the
/// sum of what they were multiplied with, and the largest score, which both are relative to.
#[cube(launch_unchecked)]
pub(super) fn join(
    parts: &Array<f32>,
    sinks: &Array<f32>,
    out: &mut Array<f32>,
    heads: u32,
    #[comptime] head_dim: u32,
    #[comptime] shares: u32,
) {
    let stride = comptime!(head_dim + 2);
    let first = CUBE_POS_X * shares * stride;
    let sink = sinks[(CUBE_POS_X % heads) as usize];
    let mut top = sink;
    #[unroll]
    for share in 0..shares {
        top = max(top, parts[(first + share * stride + head_dim + 1) as usize]);
    }
    let mut i = UNIT_POS;
    while i < head_dim {
        let (mut sum, mut total) = (f32::new(0.0), f32::exp(sink - top));
        #[unroll]
        for share in 0..shares {
            let at = first + share * stride;
            let factor = f32::exp(parts[(at + head_dim + 1) as usize] - top);
            sum += parts[(at + i) as usize] * factor;
            total += parts[(at + head_dim) as usize] * factor;
        }
        out[(CUBE_POS_X * head_dim + i) as usize] = sum / total;
        i += UNITS;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_keys_are_shared_where_a_gpu_would_idle() {
        assert_eq!(shares(128, 64), 1);
        assert_eq!(shares(255, 64), 1);
        assert_eq!(shares(512, 64), 4);
        assert_eq!(shares(4096, 64), 16);
        assert_eq!(shares(100_000, 64), 16);
        assert_eq!(shares(4096, 32 * 64), 1);
        assert_eq!(shares(4096, 4 * 64), 4);
    }
}
