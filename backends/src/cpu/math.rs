//! The float arithmetic that all instruction sets share. Each of them compiles these functions with its own features on, so
//! that loops become vectors; the operations, and with them the bits, stay the same, for Rust never fuses a multiplication
//! with an addition on its own.

use super::tokens::{QUAD, QUAD_BLOCKS, Quad};
use crate::{
    format::{BLOCK, Rotation, T2_BLOCK_BYTES},
    ops::ClampedSwiGlu,
};

/// Numbers that are added up side by side.
const LANES: usize = 16;

/// 1.5 * 2^23: adding it rounds a small float to an integer, halves to even, that then stands in the low bits.
const ROUND: f32 = 12_582_912.0;
/// Bits of the smallest value that is not finite, sign aside.
const INFINITY_BITS: u32 = 0x7f80_0000;
/// Largest int8 activation.
const QMAX: f32 = 127.0;

/// One token to int8 (see [`tokens`](super::tokens)), rotated first where there is a rotation: fills quads and block sums,
/// returns the scale. `x` holds no meaning afterwards.
#[inline(always)]
pub(super) fn quantize(x: &mut [f32], rotation: Option<Rotation>, quads: &mut [Quad], block_sums: &mut [i16]) -> f32 {
    if let Some(rotation) = rotation {
        rotation.rotate(x);
    }
    // Floats without sign are ordered like their bits, and everything that is not finite comes last.
    let largest = x.iter().fold(0u32, |largest, x| largest.max(x.to_bits() & 0x7fff_ffff));
    let scale = f32::from_bits(largest) / QMAX;
    if largest >= INFINITY_BITS || scale == 0.0 {
        quads.fill(Quad([0; QUAD]));
        block_sums.fill(0);
        return if scale == 0.0 { 0.0 } else { f32::NAN };
    }
    for (b, block) in x.chunks(BLOCK).enumerate() {
        let mut padded = [0.0; BLOCK];
        padded[..block.len()].copy_from_slice(block);
        block_sums[b] = quantize_block(&padded, scale, &mut quads[b / QUAD_BLOCKS].0, b % QUAD_BLOCKS);
    }
    scale
}

/// One block to int8, into its place in a quad; returns the sum of its activations.
#[inline(always)]
fn quantize_block(x: &[f32; BLOCK], scale: f32, quad: &mut [i8; QUAD], place: usize) -> i16 {
    let mut sum = 0i16;
    for k in 0..4 {
        let out = &mut quad[64 * k + 16 * place..][..16];
        for (q, x) in out.iter_mut().zip(&x[16 * k..][..16]) {
            let level = (x / scale).clamp(-QMAX, QMAX) + ROUND;
            *q = level.to_bits() as i8;
            sum += i16::from(*q);
        }
    }
    sum
}

/// The gate over one token: see [`ClampedSwiGlu`].
#[inline(always)]
pub(super) fn swiglu(activation: ClampedSwiGlu, gate_up: &[f32], out: &mut [f32]) {
    let ClampedSwiGlu { alpha, limit } = activation;
    for (out, pair) in out.iter_mut().zip(gate_up.chunks_exact(2)) {
        // Written so that NaN stays NaN, unlike `f32::min`.
        let gate = if pair[0] > limit { limit } else { pair[0] };
        let up = if pair[1] > limit { limit } else { pair[1] };
        let up = if up < -limit { -limit } else { up };
        *out = (up + 1.0) * gate * (1.0 / (1.0 + exp(-(alpha * gate))));
    }
}

/// What the gate's `gradient` says of `gate_up`, gate and up in turn as there: nothing where they are clamped.
#[inline(always)]
pub(super) fn swiglu_gradient(activation: ClampedSwiGlu, gate_up: &[f32], gradient: &[f32], out: &mut [f32]) {
    let ClampedSwiGlu { alpha, limit } = activation;
    for ((out, pair), gradient) in out.chunks_exact_mut(2).zip(gate_up.chunks_exact(2)).zip(gradient) {
        let gate = if pair[0] > limit { limit } else { pair[0] };
        let up = if pair[1] > limit { limit } else { pair[1] };
        let up = if up < -limit { -limit } else { up };
        let share = 1.0 / (1.0 + exp(-(alpha * gate)));
        let of_gate = (up + 1.0) * (share + alpha * gate * (share * (1.0 - share))) * gradient;
        let of_up = gate * share * gradient;
        out[0] = if pair[0] > limit { 0.0 } else { of_gate };
        out[1] = if pair[1] > limit || pair[1] < -limit { 0.0 } else { of_up };
    }
}

/// One token rotated where there is a rotation, rounded to int8 and back to floats.
#[inline(always)]
pub(super) fn round_token(x: &mut [f32], rotation: Option<Rotation>) {
    if let Some(rotation) = rotation {
        rotation.rotate(x);
    }
    let largest = x.iter().fold(0u32, |largest, x| largest.max(x.to_bits() & 0x7fff_ffff));
    let scale = f32::from_bits(largest) / QMAX;
    match largest >= INFINITY_BITS {
        true => x.fill(f32::NAN),
        false if scale == 0.0 => x.fill(0.0),
        false => x.iter_mut().for_each(|x| *x = (((*x / scale).clamp(-QMAX, QMAX) + ROUND) - ROUND) * scale),
    }
}

/// The softmax over one query's scores that are seen, and a sink.
#[inline(always)]
pub(super) fn sink_softmax(scores: &mut [f32], scale: f32, sink: f32) {
    let [top, sum] = exponentials(scores, scale, sink);
    let total = sum + exp(sink - top);
    scores.iter_mut().for_each(|score| *score /= total);
}

/// `e^(score * scale - top)` in the place of the scores, `top` being the largest of them and of `least`; returns `top` and
/// what they add up to.
#[inline(always)]
pub(super) fn exponentials(scores: &mut [f32], scale: f32, least: f32) -> [f32; 2] {
    // One instruction. It may lose a NaN, but the sum does not.
    let largest = |a: f32, b: f32| if a > b { a } else { b };
    // Whole chunks first: their accumulators stay in registers. Four side by side hide how long a comparison takes.
    let mut tops = [least; 4 * LANES];
    let (chunks, rest) = scores.as_chunks_mut::<{ 4 * LANES }>();
    let look = |scores: &mut [f32], tops: &mut [f32; 4 * LANES]| {
        for (score, top) in scores.iter_mut().zip(tops) {
            *score *= scale;
            *top = largest(*score, *top);
        }
    };
    chunks.iter_mut().for_each(|scores| look(scores, &mut tops));
    look(rest, &mut tops);
    let pair = |lane: usize| largest(tops[lane], tops[lane + 2 * LANES]);
    let mut tops: [f32; LANES] = std::array::from_fn(|lane| largest(pair(lane), pair(lane + LANES)));
    for width in [8, 4, 2, 1] {
        for lane in 0..width {
            tops[lane] = largest(tops[lane], tops[lane + width]);
        }
    }
    let top = tops[0];
    let mut sums = [0.0f32; LANES];
    let (chunks, rest) = scores.as_chunks_mut::<LANES>();
    let add = |scores: &mut [f32], sums: &mut [f32; LANES]| {
        for (score, sum) in scores.iter_mut().zip(sums) {
            *score = exp(*score - top);
            *sum += *score;
        }
    };
    chunks.iter_mut().for_each(|scores| add(scores, &mut sums));
    add(rest, &mut sums);
    for width in [8, 4, 2, 1] {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
    }
    [top, sums[0]]
}

/// The gradient of one query's scores, in the place of `gradient`; returns that of the sink.
#[inline(always)]
pub(super) fn sink_softmax_gradient(shares: &[f32], gradient: &mut [f32], scale: f32) -> f32 {
    let (mut sums, mut means) = ([0.0f32; LANES], [0.0f32; LANES]);
    for (shares, gradient) in shares.chunks(LANES).zip(gradient.chunks(LANES)) {
        for (((share, gradient), sum), mean) in shares.iter().zip(gradient).zip(&mut sums).zip(&mut means) {
            *sum += share;
            *mean += share * gradient;
        }
    }
    let (sum, mean) = (sums.iter().sum::<f32>(), means.iter().sum::<f32>());
    for (gradient, share) in gradient.iter_mut().zip(shares) {
        *gradient = (*gradient - mean) * share * scale;
    }
    (sum - 1.0) * mean
}

/// `x / sqrt(mean(x^2) + epsilon) * gamma`.
#[inline(always)]
pub(super) fn rms_norm(x: &[f32], gamma: &[f32], epsilon: f32, out: &mut [f32]) {
    let mut squares = [0.0f32; LANES];
    for x in x.chunks(LANES) {
        squares.iter_mut().zip(x).for_each(|(sum, x)| *sum += x * x);
    }
    let rms = (squares.iter().sum::<f32>() / x.len() as f32 + epsilon).sqrt();
    for ((out, x), gamma) in out.iter_mut().zip(x).zip(gamma) {
        *out = x / rms * gamma;
    }
}

/// e^x within 2 units in the last place, of plain operations only. Below -87 it goes to zero, above 88 to infinity.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // ln 2 in two parts, the first with few bits, so that n * LN2_HIGH is exact (Cody and Waite).
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // NaN fails both comparisons and passes through.
    let clamped = if x > 89.0 { 89.0 } else { x };
    let clamped = if clamped < -88.0 { -88.0 } else { clamped };
    let n = (clamped * std::f32::consts::LOG2_E + ROUND) - ROUND;
    let r = (clamped - n * LN2_HIGH) - n * LN2_LOW;
    // Minimax polynomial of (e^r - 1 - r) / r^2 on |r| <= ln 2 / 2 (Cephes, expf).
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_2e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 5e-1;
    let value = (p * (r * r) + r) + 1.0;
    // 2^n in two halves, for n = 128 is no float's exponent.
    let power = |n: i32| f32::from_bits(((n + 127) as u32) << 23);
    let n = (n + ROUND).to_bits() as i32 - ROUND.to_bits() as i32;
    let half = n >> 1;
    if x < -88.0 { 0.0 } else { value * power(half) * power(n - half) }
}

/// One t5 row rewritten as t2, padding included.
#[inline(always)]
pub(super) fn t5_to_t2(t5: &[u32], in_features: usize, t2: &mut [u32]) {
    let (t5, t2) = (bytemuck::cast_slice::<_, u8>(t5), bytemuck::cast_slice_mut::<_, u8>(t2));
    if t5.len().is_multiple_of(16) {
        t5_blocks_to_t2(t5, t2);
        return;
    }
    t2.fill(0x55);
    for weight in 0..in_features {
        let (k, j) = (weight / t5.len(), weight % t5.len());
        let code = t5[j] / [81, 27, 9, 3, 1][k] % 3;
        let (block, lane) = (weight / BLOCK, weight % BLOCK);
        t2[block * T2_BLOCK_BYTES + lane % 16] ^= (code ^ 1) << (lane / 16 * 2);
    }
}

/// A t5 byte times 270 is its fraction of 243 in 16 bits; times 3^k, modulo 1, the k-th digit leads, and times 3 it stands
/// before the point. The excess, at most 242 * (270 - 65536 / 243), stays below the 1 / 243 that could change a digit.
pub(super) const FRACTION: [u16; 5] = [270, 810, 2_430, 7_290, 21_870];

/// The usual case: 16 neighbouring weights are the same digit of 16 neighbouring bytes.
#[inline(always)]
fn t5_blocks_to_t2(t5: &[u8], t2: &mut [u8]) {
    // 16 digits, one or two thirds of 2^16 being where they turn 1 and 2.
    let digits = |bytes: &[u8; 16], fraction: u16| {
        bytes.map(|byte| {
            let leading = u16::from(byte).wrapping_mul(fraction);
            u8::from(leading > 21_845) + u8::from(leading > 43_690)
        })
    };
    let mut runs = FRACTION.iter().flat_map(|fraction| t5.as_chunks::<16>().0.iter().map(move |run| (run, *fraction)));
    for block in t2.as_chunks_mut::<T2_BLOCK_BYTES>().0 {
        // Past the end of the row lie zeros, code 1.
        let mut next = || runs.next().map_or([1; 16], |(run, fraction)| digits(run, fraction));
        let quarters = [next(), next(), next(), next()];
        for (j, byte) in block.iter_mut().enumerate() {
            *byte = quarters[0][j] | quarters[1][j] << 2 | quarters[2][j] << 4 | quarters[3][j] << 6;
        }
    }
}
