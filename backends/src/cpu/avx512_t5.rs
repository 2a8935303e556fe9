//! Products of t5 rows with one token, 64 bytes and so 320 weights at a time: see [`t5`](super::t5).
#![allow(unsafe_code)]

use std::arch::{asm, x86_64::*};

use super::{
    t5::{DIGITS, STEP, Straight, T5Rows},
    tokens::SUM_LANES,
};
use crate::format::{BLOCK, MAX_IN_FEATURES};

type Vector = __m512i;

/// How far ahead codes are fetched.
const AHEAD: usize = 4 * 1024;

/// Scales of the longest row, and room for a whole step past its end.
const SCALES: usize = MAX_IN_FEATURES / BLOCK + 2 * SUM_LANES;

/// The tables that a byte's digits are looked up in.
struct Tables {
    /// First to third digit by `byte / 9`.
    upper: [Vector; 3],
    /// Fourth and fifth digit by `byte % 9`.
    lower: [Vector; 2],
}

/// The digit of that power of 3 of every number.
const fn table(power: u8) -> [u8; 64] {
    let mut table = [0; 64];
    let mut i = 0;
    while i < 64 {
        table[i as usize] = i / power % 3;
        i += 1;
    }
    table
}

impl Tables {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn new() -> Self {
        static DIGITS: [[u8; 64]; 3] = [table(9), table(3), table(1)];
        let mut upper = [_mm512_setzero_si512(); 3];
        for (table, digits) in upper.iter_mut().zip(&DIGITS) {
            // SAFETY: the array has 64 bytes.
            *table = unsafe { _mm512_loadu_si512(digits.as_ptr().cast()) };
        }
        // Below 16, the first lane's bytes are enough, in every lane.
        let [_, second, third] = upper;
        let first_lane = [_mm512_castsi512_si128(second), _mm512_castsi512_si128(third)];
        let lower = [_mm512_broadcast_i32x4(first_lane[0]), _mm512_broadcast_i32x4(first_lane[1])];
        Self { upper, lower }
    }

    /// The codes that 64 bytes stand for, digit by digit.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    fn digits(&self, bytes: Vector) -> [Vector; DIGITS] {
        // Divided by 9, exactly: the even ones are (57 * byte) >> 9, the odd ones the upper byte of 16 bits divided by 9.
        let even = _mm512_srli_epi16::<9>(_mm512_maddubs_epi16(bytes, _mm512_set1_epi16(57)));
        let odd = _mm512_mulhi_epu16(bytes, _mm512_set1_epi16(7_282));
        // even | odd & 0xff00
        let upper = _mm512_ternarylogic_epi32::<0xf8>(even, odd, _mm512_set1_epi16(0xff00_u16 as i16));
        let lower = _mm512_sub_epi8(_mm512_sub_epi8(bytes, _mm512_slli_epi16::<3>(upper)), upper);
        let [first, second, third] = self.upper;
        let [fourth, fifth] = self.lower;
        [
            _mm512_permutexvar_epi8(upper, first),
            _mm512_permutexvar_epi8(upper, second),
            _mm512_permutexvar_epi8(upper, third),
            _mm512_shuffle_epi8(fourth, lower),
            _mm512_shuffle_epi8(fifth, lower),
        ]
    }
}

/// Whether this processor has what these kernels need beyond AVX-512 VNNI.
pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx512vbmi")
}

/// `totals[row]` of all rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
pub(super) fn t5_totals(rows: &T5Rows<'_>, token: &Straight<'_>, totals: &mut [i32]) {
    // This and the length of a row are what the unchecked loads of `row` rely on.
    rows.check(totals.len(), token);
    let tables = Tables::new();
    let codes = rows.codes.as_ptr().cast::<u8>();
    let bytes = rows.words * 4;
    assert!(DIGITS * bytes / BLOCK + 2 <= SCALES, "a row no longer than the longest");
    let surplus: i32 = token.block_sums.iter().map(|sum| i32::from(*sum)).sum();
    let mut scales = [0; SCALES];
    for (r, total) in totals.iter_mut().enumerate() {
        let codes = codes.wrapping_add(r * bytes);
        // SAFETY: checked above; `widen` has filled the scales of a row.
        *total = unsafe {
            match rows.scales {
                None => row::<false, true>(&tables, codes, bytes, token, &scales, _mm512_setzero_si512()) - surplus,
                Some(all) => {
                    let start = widen(&all[r * rows.scale_stride..], token.block_sums, &mut scales);
                    match bytes.is_multiple_of(BLOCK) {
                        true => row::<true, true>(&tables, codes, bytes, token, &scales, start),
                        false => row::<true, false>(&tables, codes, bytes, token, &scales, start),
                    }
                }
            }
        };
    }
}

/// A row's scales, each twice in 32 bits; returns minus the surplus that codes, being trit + 1, will have.
#[inline]
#[target_feature(enable = "avx512f")]
fn widen(from: &[u8], block_sums: &[i16], scales: &mut [i32; SCALES]) -> Vector {
    let mut minus = _mm512_setzero_si512();
    let parts = from.as_chunks::<SUM_LANES>().0.iter().zip(block_sums.as_chunks::<SUM_LANES>().0);
    for ((from, sums), to) in parts.zip(scales.as_chunks_mut::<SUM_LANES>().0) {
        // SAFETY: 16 bytes, 16 numbers of 16 bits, and room for 16 of 32.
        unsafe {
            let scales = _mm512_cvtepu8_epi32(_mm_loadu_si128(from.as_ptr().cast()));
            let sums = _mm512_cvtepi16_epi32(_mm256_loadu_si256(sums.as_ptr().cast()));
            let twice = _mm512_or_si512(scales, _mm512_slli_epi32::<16>(scales));
            _mm512_storeu_si512(to.as_mut_ptr().cast(), twice);
            minus = _mm512_sub_epi32(minus, _mm512_mullo_epi32(scales, sums));
        }
    }
    minus
}

/// Adds products of pairs times one scale. In assembly, as the compiler would make two instructions of some.
///
/// # Safety
/// A number must lie there.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn add_scaled(mut sum: Vector, dots: Vector, scale: *const i32) -> Vector {
    // SAFETY: the caller's promise; nothing but the register is written.
    unsafe {
        asm!("vpdpwssd {sum}, {dots}, dword ptr [{scale}]{{1to16}}", sum = inout(zmm_reg) sum, dots = in(zmm_reg) dots,
            scale = in(reg) scale, options(pure, readonly, nostack, preserves_flags));
    }
    sum
}

/// The codes of a row (not trits) times a token, scaled or not, plus `start`. `ALIGNED` says that the bytes of a row are a
/// multiple of [`BLOCK`], so that each digit of a step has one scale; otherwise it has two.
///
/// # Safety
/// `bytes` bytes must lie at `codes`, and the token and the scales must reach a whole [`STEP`] past the end of each digit.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
unsafe fn row<const SCALED: bool, const ALIGNED: bool>(
    tables: &Tables,
    codes: *const u8,
    bytes: usize,
    token: &Straight<'_>,
    scales: &[i32; SCALES],
    start: Vector,
) -> i32 {
    let activations: [*const i8; DIGITS] =
        std::array::from_fn(|k| token.activations().as_ptr().wrapping_add(k * bytes));
    let scales: [*const i32; DIGITS] = std::array::from_fn(|k| scales.as_ptr().wrapping_add(k * bytes / BLOCK));
    // Lanes (of four inputs) of a step that lie in its second block.
    let second: [u16; DIGITS] = std::array::from_fn(|k| (0xffff_u32 << ((BLOCK - k * bytes % BLOCK) / 4)) as u16);
    // Each digit has its own sum, so that none waits for another.
    let mut sums = [_mm512_setzero_si512(); DIGITS];
    sums[0] = start;
    let (whole, rest) = (bytes / STEP, bytes % STEP);
    for step in 0..whole + usize::from(rest > 0) {
        let at = step * STEP;
        // SAFETY: the caller's promises; what the mask leaves out is not read, and is digit 0 then.
        unsafe {
            let bytes = match step < whole {
                true => _mm512_loadu_si512(codes.add(at).cast()),
                false => _mm512_maskz_loadu_epi8(!(!0 << rest), codes.add(at).cast()),
            };
            _mm_prefetch::<_MM_HINT_T0>(codes.wrapping_add(at + AHEAD).cast());
            let digits = tables.digits(bytes);
            for k in 0..DIGITS {
                let activations = _mm512_loadu_si512(activations[k].add(at).cast());
                if SCALED {
                    // At most 2 * 2 * 127 in magnitude.
                    let dots = _mm512_maddubs_epi16(digits[k], activations);
                    if ALIGNED {
                        sums[k] = add_scaled(sums[k], dots, scales[k].add(step));
                    } else {
                        let scale = _mm512_set1_epi32(*scales[k].add(step));
                        let scale = _mm512_mask_set1_epi32(scale, second[k], *scales[k].add(step + 1));
                        sums[k] = _mm512_dpwssd_epi32(sums[k], dots, scale);
                    }
                } else {
                    sums[k] = _mm512_dpbusd_epi32(sums[k], digits[k], activations);
                }
            }
        }
    }
    let [a, b, c, d, e] = sums;
    let sums = _mm512_add_epi32(_mm512_add_epi32(_mm512_add_epi32(a, b), _mm512_add_epi32(c, d)), e);
    _mm512_reduce_add_epi32(sums)
}
