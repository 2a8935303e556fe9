//! Products of a screen's codes with int8 activations by AVX-512 VNNI: a vector takes 64 bytes, and so 64 weights of each run.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{
    bounds::{LastBits, ScreenRows, padded},
    screen::RUNS,
};

type Vector = __m512i;

/// Bytes of a vector.
const WIDTH: usize = 64;

/// Bytes from the codes that are multiplied to those that are fetched meanwhile. Rows follow each other, one at a time: the
/// processor's own prefetching follows a single stream best.
const AHEAD: usize = 4096;

/// The same in rows, where they lie far from each other.
const ROWS_AHEAD: usize = 4;

/// Tokens that share the codes of a row.
const TOKENS: usize = 4;

/// `totals[token * rows + row]`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn screen_totals(rows: &ScreenRows<'_>, tokens: &[&[i8]], totals: &mut [i32]) {
    let count = totals.len() / tokens.len().max(1);
    for (tokens, totals) in tokens.chunks(TOKENS).zip(totals.chunks_mut((TOKENS * count).max(1))) {
        for row in 0..count {
            let mut write = |sums: &[i32]| (0..sums.len()).for_each(|t| totals[t * count + row] = sums[t]);
            match *tokens {
                [a, b, c, d] => write(&dots(rows, row, [a, b, c, d])),
                [a, b, c] => write(&dots(rows, row, [a, b, c])),
                [a, b] => write(&dots(rows, row, [a, b])),
                [a] => write(&dots(rows, row, [a])),
                _ => {}
            }
        }
    }
}

/// One row times `T` tokens.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn dots<const T: usize>(rows: &ScreenRows<'_>, row: usize, tokens: [&[i8]; T]) -> [i32; T] {
    let (pairs, thirds) = rows.row(row);
    let stride = padded(rows.run);
    // What the unchecked loads below rely on, beside the lengths that `row` gives.
    assert!(tokens.iter().all(|token| token.len() == RUNS * stride), "tokens of padded runs");
    // Two of each, for a sum waits for the one before it.
    let mut sums = [[_mm512_setzero_si512(); 2]; T];
    let (two, all) = (_mm512_set1_epi8(3), _mm512_set1_epi8(7));
    for at in (0..rows.run).step_by(WIDTH) {
        let (even, odd, thirds) = (load(&pairs[0][at..]), load(&pairs[1][at..]), load(&thirds[at..]));
        for part in 0..3 {
            _mm_prefetch::<_MM_HINT_T0>(pairs[0].as_ptr().wrapping_add(AHEAD + 3 * at + part * WIDTH).cast());
        }
        let lows = [
            even,
            odd,
            _mm512_srli_epi16::<2>(even),
            _mm512_srli_epi16::<2>(odd),
            _mm512_srli_epi16::<4>(even),
            _mm512_srli_epi16::<4>(odd),
            _mm512_srli_epi16::<6>(even),
            _mm512_srli_epi16::<6>(odd),
        ];
        let highs = [
            _mm512_slli_epi16::<2>(thirds),
            _mm512_slli_epi16::<1>(thirds),
            thirds,
            _mm512_srli_epi16::<1>(thirds),
            _mm512_srli_epi16::<2>(thirds),
            _mm512_srli_epi16::<3>(thirds),
            _mm512_srli_epi16::<4>(thirds),
            _mm512_srli_epi16::<5>(thirds),
        ];
        for k in 0..RUNS {
            // Two bits of one, the third of the other.
            let codes = _mm512_and_si512(_mm512_ternarylogic_epi32::<0xca>(two, lows[k], highs[k]), all);
            for t in 0..T {
                // SAFETY: whole vectors of a padded run.
                let levels = unsafe { _mm512_loadu_si512(tokens[t].as_ptr().add(k * stride + at).cast()) };
                sums[t][k % 2] = _mm512_dpbusd_epi32(sums[t][k % 2], codes, levels);
            }
        }
    }
    let mut totals = [0; T];
    for t in 0..T {
        totals[t] = _mm512_reduce_add_epi32(_mm512_add_epi32(sums[t][0], sums[t][1]));
    }
    totals
}

/// `totals[n]`: the last bits of `rows[n]` times a token, 0 where there is no such row.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn last_totals(last: &LastBits<'_>, rows: &[u32], levels: &[i8], totals: &mut [i32]) {
    let stride = padded(last.run);
    // What the unchecked loads below rely on.
    assert!(levels.len() == RUNS * stride, "a token of padded runs");
    for (n, (row, total)) in rows.iter().zip(totals).enumerate() {
        if let Some(row) = rows.get(n + ROWS_AHEAD) {
            for bytes in last.row(*row).chunks(WIDTH) {
                _mm_prefetch::<_MM_HINT_T0>(bytes.as_ptr().cast());
            }
        }
        let mut sums = [_mm512_setzero_si512(); 2];
        for (n, bytes) in last.row(*row).chunks(WIDTH).enumerate() {
            let bits = load(bytes);
            for k in 0..RUNS {
                let set = _mm512_test_epi8_mask(bits, _mm512_set1_epi8((1 << k) as i8));
                // SAFETY: whole vectors of a padded run.
                let levels = unsafe { _mm512_maskz_loadu_epi8(set, levels.as_ptr().add(k * stride + n * WIDTH)) };
                sums[k % 2] = _mm512_dpbusd_epi32(sums[k % 2], _mm512_set1_epi8(1), levels);
            }
        }
        *total = _mm512_reduce_add_epi32(_mm512_add_epi32(sums[0], sums[1]));
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
