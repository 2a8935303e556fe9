//! Activations as int8, in the order the ternary kernels read them.
//!
//! A token is cut into quads of blocks of 64, zero-padded. Within a quad the bytes are in the order in which four t2 blocks,
//! side by side in a register, give up their weights (`k` is the shift, see [`format`](crate::format)):
//!
//! ```text
//! byte 64k + 16b + j    (j < 16)   activation 16k + j of block b
//! ```
//!
//! So a register of one, two or four blocks finds the activations of a quarter of its weights in one place.
//!
//! ```
//! use ternoss_backends::cpu::{Kernels, tokens::{Tokens, round_tokens}};
//!
//! let (kernels, mut x) = (Kernels::detect(), [1.0, -0.013, 0.3, 254.0, 3.0, -127.0]);
//! let tokens = Tokens::quantize(kernels, &x, 3, None);
//! assert_eq!((tokens.len(), tokens.in_features()), (2, 3));
//! // What the ternary kernels see of them: multiples of 1/127 and of 2, halves to even.
//! round_tokens(kernels, &mut x, 3, None);
//! assert_eq!(x[3..], [254.0, 4.0, -128.0]);
//! assert!((x[1] + 2.0 / 127.0).abs() < 1e-6);
//! ```

use rayon::prelude::*;

use super::{Kernels, tasks};
use crate::{
    format::{BLOCK, Rotation},
    ops::ClampedSwiGlu,
};

/// Blocks in a quad.
pub(super) const QUAD_BLOCKS: usize = 4;

/// Activations in a quad of blocks.
pub(super) const QUAD: usize = QUAD_BLOCKS * BLOCK;

/// Block sums are padded to a multiple of this many, so that they can be loaded whole.
pub(super) const SUM_LANES: usize = 16;

/// Numbers that a task should have at least.
const TASK_ELEMENTS: usize = 1 << 14;

/// The same where each comes out of a gate, which takes several times as long as rounding it.
const TASK_GATES: usize = 1 << 11;

/// The int8 activations of four blocks, on a cache line boundary.
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub(super) struct Quad(pub(super) [i8; QUAD]);

/// Tokens rounded to int8 with one scale each: `s = max|x| / 127`, `q = clamp(round_half_even(x / s), -127, 127)`.
///
/// A token whose scale is zero (all zeros, or so small that `max|x| / 127` is) is all zeros. A token with a NaN or an
/// infinity is all zeros with a scale of NaN, which makes every product with it NaN.
#[derive(Debug, Clone)]
pub struct Tokens {
    in_features: usize,
    quads: Vec<Quad>,
    block_sums: Vec<i16>,
    scales: Vec<f32>,
}

/// One of them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Token<'a> {
    /// The activations.
    pub(super) quads: &'a [Quad],
    /// Sum of each block's activations, padded with zeros to a multiple of [`SUM_LANES`].
    pub(super) block_sums: &'a [i16],
    /// What an activation of 1 stands for.
    pub(super) scale: f32,
}

/// One token to be quantized, and where it goes.
struct Work<'a> {
    x: &'a [f32],
    quads: &'a mut [Quad],
    sums: &'a mut [i16],
    scale: &'a mut f32,
}

impl Tokens {
    /// Rounds tokens of `in_features` values each, given one after the other. A rest that is no whole token is left out.
    #[must_use]
    pub fn quantize(kernels: Kernels, x: &[f32], in_features: usize, rotation: Option<Rotation>) -> Self {
        let copy = |x: &[f32], to: &mut [f32]| to.copy_from_slice(x);
        Self::quantize_by(kernels, x, [in_features; 2], rotation, TASK_ELEMENTS, copy)
    }

    /// The same after the norm of each token, as wide as `gamma`: see [`rms_norm`](super::routing::rms_norm).
    #[must_use]
    pub fn normed(kernels: Kernels, x: &[f32], gamma: &[f32], epsilon: f32, rotation: Option<Rotation>) -> Self {
        let norm = |x: &[f32], to: &mut [f32]| kernels.rms_norm(x, gamma, epsilon, to);
        Self::quantize_by(kernels, x, [gamma.len(); 2], rotation, TASK_ELEMENTS, norm)
    }

    /// The same after the gate of each token: `gate_up` holds gate and up in turn, twice `in_features` a token.
    #[must_use]
    pub fn gated(
        kernels: Kernels,
        activation: ClampedSwiGlu,
        gate_up: &[f32],
        in_features: usize,
        rotation: Option<Rotation>,
    ) -> Self {
        let gate = |gate_up: &[f32], to: &mut [f32]| kernels.swiglu(activation, gate_up, to);
        Self::quantize_by(kernels, gate_up, [2 * in_features, in_features], rotation, TASK_GATES, gate)
    }

    /// The same of the `in_features` numbers that `fill` makes of `width`, on several threads from two times
    /// `task_elements` on.
    fn quantize_by(
        kernels: Kernels,
        x: &[f32],
        [width, in_features]: [usize; 2],
        rotation: Option<Rotation>,
        task_elements: usize,
        fill: impl Fn(&[f32], &mut [f32]) + Sync,
    ) -> Self {
        let tokens = x.len().checked_div(width).unwrap_or(0);
        let mut this = Self {
            in_features,
            quads: vec![Quad([0; QUAD]); tokens * quads(in_features)],
            block_sums: vec![0; tokens * sums(in_features)],
            scales: vec![0.0; tokens],
        };
        if tokens == 0 {
            return this;
        }
        let scales = this.scales.iter_mut();
        let parts =
            this.quads.chunks_exact_mut(quads(in_features)).zip(this.block_sums.chunks_exact_mut(sums(in_features)));
        let work = x.chunks_exact(width).zip(parts).zip(scales);
        let mut work: Vec<Work<'_>> = work.map(|((x, (quads, sums)), scale)| Work { x, quads, sums, scale }).collect();
        let quantize = |scratch: &mut [f32], work: &mut Work<'_>| {
            fill(work.x, scratch);
            *work.scale = kernels.quantize(scratch, rotation, work.quads, work.sums);
        };
        let chunk = task_elements.div_ceil(in_features);
        let parallel = work.len() > 2 * chunk;
        tasks::run(work.chunks_mut(chunk).collect(), parallel, |work: &mut [Work<'_>]| {
            let mut scratch = vec![0.0; in_features];
            work.iter_mut().for_each(|work| quantize(&mut scratch, work));
        });
        this
    }

    /// How many tokens there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.scales.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.scales.is_empty()
    }

    /// Values in a token.
    #[must_use]
    pub const fn in_features(&self) -> usize {
        self.in_features
    }

    pub(super) fn token(&self, token: usize) -> Token<'_> {
        let (quads, sums) = (quads(self.in_features), sums(self.in_features));
        Token {
            quads: &self.quads[token * quads..(token + 1) * quads],
            block_sums: &self.block_sums[token * sums..(token + 1) * sums],
            scale: self.scales[token],
        }
    }
}

/// Quads of blocks in a row.
pub(super) const fn quads(in_features: usize) -> usize {
    in_features.div_ceil(QUAD)
}

/// Block sums, or block scales, of a row with their padding.
pub(super) const fn sums(in_features: usize) -> usize {
    in_features.div_ceil(BLOCK).next_multiple_of(SUM_LANES)
}

/// Tokens of `in_features` each as a ternary kernel sees them, in floats, in their place.
pub fn round_tokens(kernels: Kernels, x: &mut [f32], in_features: usize, rotation: Option<Rotation>) {
    let tokens = x.par_chunks_exact_mut(in_features.max(1)).with_min_len(TASK_ELEMENTS.div_ceil(in_features.max(1)));
    tokens.for_each(|x| kernels.round_token(x, rotation));
}
