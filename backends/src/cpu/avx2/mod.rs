//! x86-64 with AVX2, FMA and F16C.
#![allow(unsafe_code)]

mod lookup;
mod screen;
mod stored;
mod t5;
mod ternary;

pub(super) use lookup::lookup_totals;
pub(super) use screen::screen_totals;
pub(super) use stored::stored_dots;
pub(super) use t5::t5_to_t2;
pub(super) use ternary::t2_totals;

use half::f16;

use super::{
    bounds::{self, TokenTerms},
    math::{self, Matrix},
    screen::{self as rows, Dither},
    tokens::Quad,
};
use crate::{
    format::Rotation,
    ops::{ClampedSwiGlu, StoredFloat},
};

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn quantize(x: &mut [f32], rotation: Option<Rotation>, quads: &mut [Quad], block_sums: &mut [i16]) -> f32 {
    math::quantize(x, rotation, quads, block_sums)
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn swiglu(activation: ClampedSwiGlu, gate_up: &[f32], out: &mut [f32]) {
    math::swiglu(activation, gate_up, out);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn round_token(x: &mut [f32], rotation: Option<Rotation>) {
    math::round_token(x, rotation);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn sink_softmax(scores: &mut [f32], scale: f32, sink: f32) {
    math::sink_softmax(scores, scale, sink);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn sink_softmax_gradient(shares: &[f32], gradient: &mut [f32], scale: f32) -> f32 {
    math::sink_softmax_gradient(shares, gradient, scale)
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn add_product(a: Matrix<'_>, b: Matrix<'_>, out: &mut [f32], stride: usize, inner: usize) {
    math::add_product(a, b, out, stride, inner);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn rms_norm(x: &[f32], gamma: &[f32], epsilon: f32, out: &mut [f32]) {
    math::rms_norm(x, gamma, epsilon, out);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn widen_halves(halves: &[f16], out: &mut [f32]) {
    math::widen_halves(halves, out);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn widen_bytes(bytes: &[i8], out: &mut [f32]) {
    math::widen_bytes(bytes, out);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn screen_row(
    float: StoredFloat,
    words: &[u32],
    dither: &Dither,
    x: &mut [f32],
    codes: &mut [u8],
) -> [f32; 2] {
    rows::screen_row(float, words, dither, x, codes)
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn screen_bounds(token: TokenTerms, totals: &[i32], steps: &[f32], lengths: &[f32], out: &mut [f32]) {
    bounds::screen_bounds(token, totals, steps, lengths, out);
}
