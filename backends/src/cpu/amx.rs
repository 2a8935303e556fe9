//! Ternary products of many tokens by the matrix units of Intel's servers (AMX-INT8).
//!
//! Rows become int8 on the way, with their scales in them: `s = 16 h + l` makes two tiles, trits times `h` and trits times
//! `l`, so that nothing has to be scaled between the first input and the last: `total = 16 (w h) x + (w l) x`. Without scales
//! two tiles are 32 rows.
#![allow(unsafe_code)]

use std::{
    arch::{asm, x86_64::*},
    marker::PhantomData,
    ops::Range,
    sync::OnceLock,
};

use super::{
    avx512::quarter,
    linear::T2Rows,
    tiles::{TILE, TILE_BYTES, Target, Tile, TokenTiles},
    tokens::{QUAD, QUAD_BLOCKS},
};

/// Two tiles of weights times one or two tiles of tokens: `[tokens][weights]`.
type Products = [[Sums; 2]; 2];

/// 16 rows times 16 tokens.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Sums([[i32; TILE]; TILE]);

impl Sums {
    const ZERO: Self = Self([[0; TILE]; TILE]);
}

/// Steps of a quad of blocks.
const STEPS_OF_QUAD: usize = QUAD / TILE_BYTES;

/// Steps that are unpacked at a time: a third of the first cache level, which also has to hold what they are multiplied with.
const STEPS: usize = 2 * STEPS_OF_QUAD;

/// Whether processor and system have these units.
pub(super) fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| has_units() && may_use_them())
}

/// CPUID leaf 7: AMX-TILE and AMX-INT8.
fn has_units() -> bool {
    // SAFETY: every processor of this architecture has `cpuid`. (Since Rust 1.94 it is safe to call.)
    #[allow(unused_unsafe)]
    unsafe {
        __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx >> 24 & 3 == 3
    }
}

/// Asks the system for the registers, for all threads of the process.
#[cfg(target_os = "linux")]
fn may_use_them() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
    const XTILEDATA: i64 = 18;
    let result: i64;
    // SAFETY: the call takes two numbers and changes no memory; `syscall` overwrites these two registers.
    unsafe {
        asm!("syscall", inlateout("rax") ARCH_PRCTL => result, in("rdi") ARCH_REQ_XCOMP_PERM, in("rsi") XTILEDATA,
            lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn may_use_them() -> bool {
    false
}

/// All `rows` times all tokens, in floats. A few steps of 16 or 32 rows are unpacked at a time, and stay in the first cache
/// level while the tokens pass.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn multiply(rows: &T2Rows<'_>, tokens: &TokenTiles, target: Target<'_, '_>) {
    assert!(available(), "matrix units");
    // SAFETY: they are there.
    let units = unsafe { Units::open() };
    let Target { out, start, row_scales, is_first } = target;
    let at_once = if rows.scales.is_some() { TILE } else { 2 * TILE };
    let mut weights = [Tile::ZERO; 2 * STEPS];
    let mut products = vec![[[Sums::ZERO; 2]; 2]; tokens.scales.len().div_ceil(2 * TILE)];
    for (n, row_scales) in row_scales.chunks(at_once).enumerate() {
        let (first, count) = (n * at_once, row_scales.len());
        products.fill([[Sums::ZERO; 2]; 2]);
        for step in (0..tokens.steps).step_by(STEPS) {
            let steps = step..tokens.steps.min(step + STEPS);
            let weights = &mut weights[..2 * steps.len()];
            match rows.scales {
                Some(scales) => unpack_scaled(rows, scales, first..first + count, step / STEPS_OF_QUAD, weights),
                None => unpack(rows, first..first + count, step / STEPS_OF_QUAD, weights),
            }
            for (pair, products) in products.iter_mut().enumerate() {
                let second =
                    (tokens.scales.len() > (2 * pair + 1) * TILE).then(|| tokens.of(2 * pair + 1, steps.clone()));
                units.add_products(weights, tokens.of(2 * pair, steps.clone()), second, products);
            }
        }
        let parts = out.chunks_mut(TILE).zip(tokens.scales.chunks(TILE)).zip(products.as_flattened());
        for ((out, scales), [a, b]) in parts {
            let start = start + first;
            if rows.scales.is_some() {
                write(&both(a, b), row_scales, scales, is_first, start, out);
                continue;
            }
            let (of_a, of_b) = row_scales.split_at(count.min(TILE));
            write(&lines(a), of_a, scales, is_first, start, out);
            if !of_b.is_empty() {
                write(&lines(b), of_b, scales, is_first, start + TILE, out);
            }
        }
    }
}

/// The units of this thread, set up for tiles of 16 rows of 64 bytes until this is dropped.
struct Units(PhantomData<*const ()>);

impl Units {
    /// # Safety
    /// There must be units that the system lets this process use.
    unsafe fn open() -> Self {
        #[repr(C, align(64))]
        struct Configuration([u8; 64]);
        let mut configuration = Configuration([0; 64]);
        configuration.0[0] = 1;
        for tile in 0..8 {
            configuration.0[16 + 2 * tile] = TILE_BYTES as u8;
            configuration.0[48 + tile] = TILE as u8;
        }
        // SAFETY: the caller's promise, and the structure is the 64 bytes of palette 1.
        unsafe { asm!("ldtilecfg [{0}]", in(reg) &raw const configuration, options(nostack, readonly)) };
        Self(PhantomData)
    }

    /// Adds two tiles of weights for each step, times one or two tiles of tokens.
    fn add_products(&self, weights: &[Tile], first: &[Tile], second: Option<&[Tile]>, products: &mut Products) {
        let steps = first.len();
        assert!(steps > 0 && weights.len() == 2 * steps && second.is_none_or(|second| second.len() == steps), "tiles");
        match second {
            // SAFETY: the units are set up; every step reads two tiles of weights and one of each of the tokens', and the four
            // tiles of products are read and written.
            Some(second) => unsafe {
                asm!(
                    "tileloadd tmm0, [{products} + {stride}]",
                    "tileloadd tmm1, [{products} + {stride} + 1024]",
                    "tileloadd tmm2, [{products} + {stride} + 2048]",
                    "tileloadd tmm3, [{products} + {stride} + 3072]",
                    "2:",
                    "tileloadd tmm4, [{weights} + {stride}]",
                    "tileloadd tmm5, [{weights} + {stride} + 1024]",
                    "tileloadd tmm6, [{first} + {stride}]",
                    "tileloadd tmm7, [{second} + {stride}]",
                    "tdpbssd tmm0, tmm4, tmm6",
                    "tdpbssd tmm1, tmm5, tmm6",
                    "tdpbssd tmm2, tmm4, tmm7",
                    "tdpbssd tmm3, tmm5, tmm7",
                    "add {weights}, 2048",
                    "add {first}, 1024",
                    "add {second}, 1024",
                    "dec {steps}",
                    "jnz 2b",
                    "tilestored [{products} + {stride}], tmm0",
                    "tilestored [{products} + {stride} + 1024], tmm1",
                    "tilestored [{products} + {stride} + 2048], tmm2",
                    "tilestored [{products} + {stride} + 3072], tmm3",
                    weights = inout(reg) weights.as_ptr() => _, first = inout(reg) first.as_ptr() => _,
                    second = inout(reg) second.as_ptr() => _, steps = inout(reg) steps => _,
                    products = in(reg) products.as_mut_ptr(), stride = in(reg) TILE_BYTES,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _, options(nostack),
                );
            },
            // SAFETY: as above, with one tile of tokens a step and the first two of products.
            None => unsafe {
                asm!(
                    "tileloadd tmm0, [{products} + {stride}]",
                    "tileloadd tmm1, [{products} + {stride} + 1024]",
                    "2:",
                    "tileloadd tmm4, [{weights} + {stride}]",
                    "tileloadd tmm5, [{weights} + {stride} + 1024]",
                    "tileloadd tmm6, [{first} + {stride}]",
                    "tdpbssd tmm0, tmm4, tmm6",
                    "tdpbssd tmm1, tmm5, tmm6",
                    "add {weights}, 2048",
                    "add {first}, 1024",
                    "dec {steps}",
                    "jnz 2b",
                    "tilestored [{products} + {stride}], tmm0",
                    "tilestored [{products} + {stride} + 1024], tmm1",
                    weights = inout(reg) weights.as_ptr() => _, first = inout(reg) first.as_ptr() => _,
                    steps = inout(reg) steps => _,
                    products = in(reg) products.as_mut_ptr(), stride = in(reg) TILE_BYTES,
                    out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm5") _, out("tmm6") _, options(nostack),
                );
            },
        }
    }
}

impl Drop for Units {
    fn drop(&mut self) {
        // SAFETY: the units are there. Registers that are in use cost time at every change of threads.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// Some rows, at most 16, from a quad of blocks on: their trits times the upper and times the lower half of their scales.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn unpack_scaled(rows: &T2Rows<'_>, scales: &[u8], some: Range<usize>, quad: usize, weights: &mut [Tile]) {
    // A scale for every word of its block.
    let spread = _mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    // SAFETY: the table is 16 times 4 bytes.
    let halves = unsafe { _mm512_loadu_si512(HALF_TIMES_TRIT.as_ptr().cast()) };
    for (quad, weights) in (quad..).zip(weights.chunks_exact_mut(2 * STEPS_OF_QUAD)) {
        for (r, row) in some.clone().enumerate() {
            let scales = &scales[row * rows.scale_stride + QUAD_BLOCKS * quad..][..QUAD_BLOCKS];
            let four = _mm_set1_epi32(i32::from_le_bytes(std::array::from_fn(|block| scales[block])));
            let scales = _mm512_cvtepu8_epi32(_mm_shuffle_epi8(four, spread));
            let upper = _mm512_permutexvar_epi32(_mm512_srli_epi32::<4>(scales), halves);
            let lower = _mm512_permutexvar_epi32(_mm512_and_si512(scales, _mm512_set1_epi32(15)), halves);
            let codes = load(rows.row(row), quad, TILE);
            for k in 0..4 {
                let codes = quarter(codes, k);
                store(&mut weights[2 * k].0[r], _mm512_shuffle_epi8(upper, codes));
                store(&mut weights[2 * k + 1].0[r], _mm512_shuffle_epi8(lower, codes));
            }
        }
    }
}

/// Some rows, at most 32, from a quad of blocks on, as trits.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn unpack(rows: &T2Rows<'_>, some: Range<usize>, quad: usize, weights: &mut [Tile]) {
    for (quad, weights) in (quad..).zip(weights.chunks_exact_mut(2 * STEPS_OF_QUAD)) {
        for (r, row) in some.clone().enumerate() {
            let codes = load(rows.row(row), quad, 2 * TILE);
            for k in 0..4 {
                let trits = _mm512_sub_epi8(quarter(codes, k), _mm512_set1_epi8(1));
                store(&mut weights[2 * k + r / TILE].0[r % TILE], trits);
            }
        }
    }
}

/// The halves of a scale times the trits that the codes 0 to 3 stand for.
static HALF_TIMES_TRIT: [[i8; 4]; TILE] = {
    let mut products = [[0; 4]; TILE];
    let mut half = 0;
    while half < TILE {
        products[half] = [-(half as i8), 0, half as i8, 2 * half as i8];
        half += 1;
    }
    products
};

/// The codes of a quad of blocks, and zeros past the last; those of the row so many rows ahead are fetched.
#[inline]
#[target_feature(enable = "avx512f")]
fn load(row: &[u32], quad: usize, ahead: usize) -> __m512i {
    let words = &row[16 * quad..];
    _mm_prefetch::<_MM_HINT_T0>(words.as_ptr().wrapping_add(ahead * row.len()).cast());
    let mask = ((1u32 << words.len().min(16)) - 1) as u16;
    // SAFETY: what the mask leaves out is not read.
    unsafe { _mm512_maskz_loadu_epi32(mask, words.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(to: &mut [u8; TILE_BYTES], bytes: __m512i) {
    // SAFETY: `to` has 64 bytes.
    unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), bytes) }
}

/// The rows of a tile.
#[inline]
#[target_feature(enable = "avx512f")]
fn lines(sums: &Sums) -> [__m512i; TILE] {
    let mut lines = [_mm512_setzero_si512(); TILE];
    for (line, sums) in lines.iter_mut().zip(&sums.0) {
        // SAFETY: a row has 16 numbers, 64 bytes on a boundary of as many.
        *line = unsafe { _mm512_load_si512(sums.as_ptr().cast()) };
    }
    lines
}

/// What two tiles of halves make.
#[inline]
#[target_feature(enable = "avx512f")]
fn both(upper: &Sums, lower: &Sums) -> [__m512i; TILE] {
    let mut both = lines(upper);
    for (sum, lower) in both.iter_mut().zip(lines(lower)) {
        *sum = _mm512_add_epi32(_mm512_slli_epi32::<4>(*sum), lower);
    }
    both
}

/// Writes totals as floats, in the order of [`linear`](super::linear).
#[target_feature(enable = "avx512f")]
fn write(
    totals: &[__m512i; TILE],
    row_scales: &[f32],
    token_scales: &[f32],
    is_first: bool,
    start: usize,
    out: &mut [&mut [f32]],
) {
    let rows = row_scales.len();
    let mask = ((1u32 << rows) - 1) as u16;
    // SAFETY: what the mask leaves out is not read.
    let row_scales = unsafe { _mm512_maskz_loadu_ps(mask, row_scales.as_ptr()) };
    for ((totals, scale), out) in transpose(totals).into_iter().zip(token_scales).zip(out) {
        let to = &mut out[start..start + rows];
        let value = _mm512_mul_ps(_mm512_cvtepi32_ps(totals), _mm512_mul_ps(row_scales, _mm512_set1_ps(*scale)));
        // SAFETY: what the mask leaves out is neither read nor written.
        unsafe {
            let value = if is_first { value } else { _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to.as_ptr()), value) };
            _mm512_mask_storeu_ps(to.as_mut_ptr(), mask, value);
        }
    }
}

/// A row becomes a column.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(x: &[__m512i; TILE]) -> [__m512i; TILE] {
    // Columns of two rows, then of four, in each 128-bit lane; then the lanes.
    let (mut two, mut four, mut eight, mut all) = (*x, *x, *x, *x);
    for i in (0..TILE).step_by(2) {
        two[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        two[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for i in (0..TILE).step_by(2) {
        let at = i / 4 * 4 + i % 4 / 2;
        four[i] = _mm512_unpacklo_epi64(two[at], two[at + 2]);
        four[i + 1] = _mm512_unpackhi_epi64(two[at], two[at + 2]);
    }
    for i in 0..TILE / 2 {
        let at = i / 4 * 8 + i % 4;
        eight[i] = _mm512_shuffle_i32x4::<0x44>(four[at], four[at + 4]);
        eight[TILE / 2 + i] = _mm512_shuffle_i32x4::<0xEE>(four[at], four[at + 4]);
    }
    for i in 0..TILE / 4 {
        for half in [0, TILE / 2] {
            all[half + i] = _mm512_shuffle_i32x4::<0x88>(eight[half + i], eight[half + 4 + i]);
            all[half + 4 + i] = _mm512_shuffle_i32x4::<0xDD>(eight[half + i], eight[half + 4 + i]);
        }
    }
    all
}
