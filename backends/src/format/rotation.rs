use serde::{Deserialize, Serialize};

use super::BLOCK;

/// A rotation of a linear layer's input that spreads outliers over their neighbours before they are rounded to int8
/// (QuIP#, arXiv 2402.04396, section 3; QuaRot, arXiv 2404.00456): random signs, then a Walsh-Hadamard transform of each
/// run of [`width`](Self::width) inputs,
///
/// ```text
/// y = H (s * x) / sqrt(width),   H orthogonal, symmetric up to that factor
/// ```
///
/// The weights of a rotated layer are stored rotated as well, `W H (s * .)`, so its function stays the same. The signs
/// follow from the seed: sign `i` is bit `i % 64` of the SplitMix64 output for state `seed + i / 64`, set for a minus.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Rotation {
    /// Start of the random signs.
    pub seed: u64,
}

impl Rotation {
    /// Inputs that are mixed with each other: the largest power of two up to 64 that divides `in_features`.
    #[must_use]
    pub const fn width(in_features: usize) -> usize {
        let power = in_features & in_features.wrapping_neg();
        if power == 0 || power > BLOCK { BLOCK } else { power }
    }

    /// Signs of the 64 inputs from `64 * block` on, a bit each (Steele, Lea and Flood 2014, SplitMix64).
    #[must_use]
    pub const fn signs(self, block: usize) -> u64 {
        let z = self.seed.wrapping_add(block as u64).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// What input `i` is multiplied with before the transform: `1 / sqrt(width)` with its sign.
    #[must_use]
    pub fn factor(self, input: usize, width: usize) -> f32 {
        let factor = (width as f32).sqrt().recip();
        if self.signs(input / BLOCK) >> (input % BLOCK) & 1 == 1 { -factor } else { factor }
    }

    /// Rotates one token, or one row of weights, in place. The order of the additions is part of the format: it decides
    /// the bits.
    #[inline(always)]
    pub fn rotate(self, x: &mut [f32]) {
        let width = Self::width(x.len());
        let factor = (width as f32).sqrt().recip();
        for (block, x) in x.chunks_mut(BLOCK).enumerate() {
            let signs = self.signs(block);
            for (i, x) in x.iter_mut().enumerate() {
                *x *= if signs >> i & 1 == 1 { -factor } else { factor };
            }
            match <&mut [f32; BLOCK]>::try_from(&mut *x) {
                // A size that the compiler knows, so that the loops become vectors.
                Ok(x) if width == BLOCK => butterflies(x, BLOCK),
                _ => x.chunks_mut(width).for_each(|x| butterflies(x, width)),
            }
        }
    }

    /// The other way round: what [`rotate`](Self::rotate) made of a token, or of a row of weights, and the gradient of a
    /// rotated token, in place.
    pub fn rotate_back(self, y: &mut [f32]) {
        let width = Self::width(y.len());
        let factor = (width as f32).sqrt().recip();
        for (block, y) in y.chunks_mut(BLOCK).enumerate() {
            // The transform is symmetric.
            match <&mut [f32; BLOCK]>::try_from(&mut *y) {
                Ok(y) if width == BLOCK => butterflies(y, BLOCK),
                _ => y.chunks_mut(width).for_each(|y| butterflies(y, width)),
            }
            let signs = self.signs(block);
            for (i, y) in y.iter_mut().enumerate() {
                *y *= if signs >> i & 1 == 1 { -factor } else { factor };
            }
        }
    }
}

/// The unnormalized Walsh-Hadamard transform of one run.
#[inline(always)]
fn butterflies(x: &mut [f32], width: usize) {
    let mut half = 1;
    while half < width {
        for pair in x.chunks_exact_mut(2 * half) {
            let (low, high) = pair.split_at_mut(half);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rotation_keeps_lengths_and_undoes_itself_with_its_signs() {
        for n in [1usize, 6, 63, 64, 96, 576, 2880] {
            let rotation = Rotation { seed: 3 };
            let x: Vec<f32> = (0..n).map(|i| ((i * 37 % 101) as f32 - 50.0) / 7.0).collect();
            let mut y = x.clone();
            rotation.rotate(&mut y);
            let norm = |x: &[f32]| x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
            assert!((norm(&x) - norm(&y)).abs() < 1e-4 * norm(&x), "{n}");
            rotation.rotate_back(&mut y);
            for (y, x) in y.iter().zip(&x) {
                assert!((y - x).abs() < 1e-4, "{n}");
            }
        }
    }

    #[test]
    fn widths_divide_the_inputs_and_signs_are_balanced() {
        assert_eq!([1, 2, 63, 64, 96, 192, 2880].map(Rotation::width), [1, 2, 1, 64, 32, 64, 64]);
        let ones: u32 = (0..1000).map(|block| Rotation { seed: 0 }.signs(block).count_ones()).sum();
        assert!((31_000..33_000).contains(&ones), "{ones}");
    }
}
