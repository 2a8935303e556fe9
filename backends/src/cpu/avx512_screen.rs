//! Products of a screen's codes with int8 activations by AVX-512 VNNI: a vector takes 64 bytes, and so 64 weights of each run.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{
    bounds::{LastBits, padded},
    screen::RUNS,
    screen_tile::screen_kernels,
};

type Vector = __m512i;

/// Bytes of a vector.
const WIDTH: usize = 64;

/// Rows of last bits from the one that is multiplied to the one that is fetched meanwhile: they lie far from each other.
const ROWS_AHEAD: usize = 4;

screen_kernels!("avx512f,avx512bw,avx512vl,avx512vnni");

/// Of even and of odd runs, for a sum waits for the one before it.
#[inline]
#[target_feature(enable = "avx512f")]
fn zero() -> [Vector; 2] {
    [_mm512_setzero_si512(); 2]
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn left<const BITS: u32>(x: Vector) -> Vector {
    _mm512_slli_epi16::<BITS>(x)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn right<const BITS: u32>(x: Vector) -> Vector {
    _mm512_srli_epi16::<BITS>(x)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn codes(low: Vector, high: Vector) -> Vector {
    _mm512_and_si512(_mm512_ternarylogic_epi32::<0xca>(_mm512_set1_epi8(3), low, high), _mm512_set1_epi8(7))
}

#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn add(sums: &mut [Vector; 2], k: usize, codes: Vector, levels: Vector) {
    sums[k % 2] = _mm512_dpbusd_epi32(sums[k % 2], codes, levels);
}

#[inline]
#[target_feature(enable = "avx512f")]
fn end_of_runs(_: &mut [Vector; 2]) {}

#[inline]
#[target_feature(enable = "avx512f")]
fn total([even, odd]: [Vector; 2]) -> i32 {
    _mm512_reduce_add_epi32(_mm512_add_epi32(even, odd))
}

/// `totals[n]`: the last bits of `rows[n]` times a token, 0 where there is no such row.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn last_totals(last: &LastBits<'_>, rows: &[u32], levels: &[i8], totals: &mut [i32]) {
    let stride = padded(last.run);
    // What the unchecked loads below rely on.
    assert!(levels.len() == RUNS * stride, "a token of padded runs");
    for (n, (row, out)) in rows.iter().zip(totals).enumerate() {
        if let Some(row) = rows.get(n + ROWS_AHEAD) {
            for bytes in last.row(*row).chunks(WIDTH) {
                _mm_prefetch::<_MM_HINT_T0>(bytes.as_ptr().cast());
            }
        }
        let mut sums = zero();
        for (n, bytes) in last.row(*row).chunks(WIDTH).enumerate() {
            let bits = load(bytes);
            for k in 0..RUNS {
                let set = _mm512_test_epi8_mask(bits, _mm512_set1_epi8((1 << k) as i8));
                // SAFETY: whole vectors of a padded run.
                let levels = unsafe { _mm512_maskz_loadu_epi8(set, levels.as_ptr().add(k * stride + n * WIDTH)) };
                add(&mut sums, k, _mm512_set1_epi8(1), levels);
            }
        }
        *out = total(sums);
    }
}

/// A vector, or what is left of a run and zeros.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn load(bytes: &[u8]) -> Vector {
    // SAFETY: so many bytes, and what the mask leaves out is not read.
    unsafe {
        match bytes.len() {
            WIDTH.. => _mm512_loadu_si512(bytes.as_ptr().cast()),
            rest => _mm512_maskz_loadu_epi8(!(!0 << rest), bytes.as_ptr().cast()),
        }
    }
}
