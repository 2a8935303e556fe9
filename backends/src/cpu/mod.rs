//! Kernels for processors: slices in, slices out, no Burn types.
//!
//! Every instruction set has a file with the same functions ([`Kernels`] lists and calls them); which one runs is decided
//! at run time. All of them give the same bits: the ternary products are exact integers, and the few float operations
//! are done in one fixed order, with no contraction left to the compiler.
//!
//! - [`tokens`]: activations to int8, in the order the kernels read them;
//! - [`linear`]: ternary products over rows and tokens, on several threads;
//! - [`experts`]: the routed feed-forward block;
//! - [`attention`]: attention over a key-value cache;
//! - [`routing`]: norms and the choice of experts;
//! - [`stored`]: products with matrices kept in their checkpoint's float type;
//! - [`screen`], [`bounds`]: which of their rows cannot have a large product.
//! - [`lookup`]: ternary products by tables of sums, the slower way.
//!
//! # Which kernel is how fast
//!
//! Billions of weights times activations a second on one core, 5760 rows of 2880 in the cache / larger ones from memory: medians
//! of `cargo bench -p ternoss-backends --bench ternary_linear` on a quiet EPYC of the Zen 4 kind (3.7 GHz, 28 GB/s of reading).
//!
//! | kernel | scale a row, 1 token | 16 / 8 tokens | u8 per 64, 1 token | 16 / 8 tokens |
//! |---|---|---|---|---|
//! | AVX-512 VNNI | 124 / 107 | 194 / 188 | 102 / 92 | 149 / 138 |
//! | AVX2 | 107 / 91 | 141 / 120 | 81 / 77 | 118 / 103 |
//! | lookup tables, AVX2 (8 tokens) | 102 / 47 | 104 / 90 | 101 / 46 | 101 / 88 |
//!
//! 64 tokens are as fast as 16, within 3 %. Looking up wins in one place: a single token on AVX2, with weights that have u8 scales
//! and lie in the cache already. A model's weights do not, so multiplying is the default everywhere.
//!
//! Matrix units (AMX) take 9 tokens or more; a batch below that is AVX-512's. Billions of weights times activations a second on one
//! core of an Emerald Rapids server with busy neighbours, the fastest of 150 runs, 5760 rows of 2880 in the last cache level:
//!
//! | kernel | scale a row, 64 tokens | u8 per 64, 16 tokens | 64 tokens |
//! |---|---|---|---|
//! | AVX-512 VNNI | 181 | 152 | 145 |
//! | AMX-INT8 | 546 | 268 | 310 |
//!
//! All of x86-64's are tested bit for bit. NEON, with and without its products of bytes (`sdot`, `smmla`), is tested likewise under
//! qemu; its speed was never measured.
//!
//! ```
//! use ternoss_backends::cpu::{Isa, Kernels};
//!
//! // The fastest that this processor has; every one gives the same bits.
//! assert_eq!(Some(&Kernels::detect().isa()), Isa::available().last());
//! ```

#[cfg(target_arch = "x86_64")]
mod amx;
pub mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_product;
#[cfg(target_arch = "x86_64")]
mod avx512_screen;
#[cfg(target_arch = "x86_64")]
mod avx512_stored;
#[cfg(target_arch = "x86_64")]
mod avx512_t5;
#[cfg(target_arch = "x86_64")]
mod avxvnni;
pub mod bounds;
pub mod experts;
mod kv;
pub mod linear;
pub mod lookup;
mod math;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "aarch64")]
mod neon_dot;
#[cfg(target_arch = "aarch64")]
mod neon_i8mm;
mod product;
pub mod routing;
mod scalar;
pub mod screen;
#[cfg(target_arch = "x86_64")]
mod screen_tile;
mod shared;
pub mod stored;
#[cfg(target_arch = "x86_64")]
mod stored_tile;
mod t5;
mod tasks;
mod team;
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
mod tiles;
pub mod tokens;
pub mod tuned;
mod view;
#[cfg(target_arch = "x86_64")]
mod vnni;

use std::{fmt, sync::OnceLock};

pub use kv::HeadCaches;
pub use linear::unpack;
pub use team::session;
pub use view::{TernaryMatrices, TernaryRows};

use crate::{
    format::Rotation,
    ops::{ClampedSwiGlu, StoredFloat},
};
use bounds::{LastBits, ScreenRows, TokenTerms};
use linear::T2Rows;
use lookup::{LOOKUP_ROWS, Table};
use product::{Panels, Rows, Sums};
use screen::Dither;
use t5::{Straight, T5Rows};
use tiles::{LEAST_TOKENS, Target, TokenTiles};
use tokens::{Quad, Token};

/// An instruction set that has kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Isa {
    /// Plain Rust, on any processor.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// The same with AVX-VNNI.
    AvxVnni,
    /// The same with AVX-512 F, BW, VL and VNNI.
    Avx512,
    /// The same with matrix units for bytes (AMX-INT8).
    Amx,
    /// 64-bit Arm.
    Neon,
    /// The same with the dot product instructions (FEAT_DotProd).
    NeonDot,
    /// The same with the matrix product instructions for bytes (FEAT_I8MM).
    NeonI8mm,
}

impl Isa {
    /// The fastest one this processor has.
    #[must_use]
    pub fn detect() -> Self {
        Self::available().last().copied().unwrap_or(Self::Scalar)
    }

    /// All that this processor has, the fastest last.
    #[must_use]
    pub fn available() -> &'static [Self] {
        static AVAILABLE: OnceLock<Vec<Isa>> = OnceLock::new();
        AVAILABLE.get_or_init(|| {
            #[cfg(target_arch = "x86_64")]
            let found = {
                use std::arch::is_x86_feature_detected as has;
                let avx2 = has!("avx2") && has!("fma") && has!("f16c");
                let avx512 = avx2 && has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512vnni");
                [
                    (avx2, Self::Avx2),
                    (avx2 && has!("avxvnni"), Self::AvxVnni),
                    (avx512, Self::Avx512),
                    (avx512 && amx::available(), Self::Amx),
                ]
            };
            #[cfg(target_arch = "aarch64")]
            let found = {
                use std::arch::is_aarch64_feature_detected as has;
                let dot = has!("neon") && has!("dotprod");
                [(has!("neon"), Self::Neon), (dot, Self::NeonDot), (dot && has!("i8mm"), Self::NeonI8mm)]
            };
            #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
            let found: [(bool, Self); 0] = [];
            let found = found.into_iter().filter(|(found, _)| *found).map(|(_, isa)| isa);
            std::iter::once(Self::Scalar).chain(found).collect()
        })
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avxvnni",
            Self::Avx512 => "avx512",
            Self::Amx => "amx",
            Self::Neon => "neon",
            Self::NeonDot => "neon-dot",
            Self::NeonI8mm => "neon-i8mm",
        })
    }
}

/// The kernels of an instruction set that this processor is known to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kernels {
    isa: Isa,
}

/// Calls the function of that name in the file of the instruction set.
macro_rules! dispatch {
    ($kernels:expr, $function:ident($($argument:expr),* $(,)?)) => {
        match $kernels.isa {
            // SAFETY: `Kernels` only exists for instruction sets that were found on this processor.
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            Isa::Avx2 => unsafe { avx2::$function($($argument),*) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            Isa::AvxVnni => unsafe { avxvnni::$function($($argument),*) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            Isa::Avx512 | Isa::Amx => unsafe { avx512::$function($($argument),*) },
            // SAFETY: as above.
            #[cfg(target_arch = "aarch64")]
            #[allow(unsafe_code)]
            Isa::Neon => unsafe { neon::$function($($argument),*) },
            // SAFETY: as above.
            #[cfg(target_arch = "aarch64")]
            #[allow(unsafe_code)]
            Isa::NeonDot => unsafe { neon_dot::$function($($argument),*) },
            // SAFETY: as above.
            #[cfg(target_arch = "aarch64")]
            #[allow(unsafe_code)]
            Isa::NeonI8mm => unsafe { neon_i8mm::$function($($argument),*) },
            _ => scalar::$function($($argument),*),
        }
    };
}

impl Kernels {
    /// The fastest kernels this processor can run.
    #[must_use]
    pub fn detect() -> Self {
        Self { isa: Isa::detect() }
    }

    /// The kernels of one instruction set, if this processor has it.
    #[must_use]
    pub fn new(isa: Isa) -> Option<Self> {
        Isa::available().contains(&isa).then_some(Self { isa })
    }

    /// Which instruction set these are for.
    #[must_use]
    pub const fn isa(self) -> Isa {
        self.isa
    }

    /// The exact totals of all `rows` with each of at most [`linear::TOKEN_TILE`] tokens, `totals[row * tokens + token]`.
    fn t2_totals(self, rows: &T2Rows<'_>, tokens: &[Token<'_>], totals: &mut [i32]) {
        dispatch!(self, t2_totals(rows, tokens, totals));
    }

    /// The tokens as matrix units take them, where there are such units and tokens enough to be worth it.
    fn token_tiles(self, tokens: &[Token<'_>]) -> Option<TokenTiles> {
        (self.isa == Isa::Amx && tokens.len() >= LEAST_TOKENS).then(|| TokenTiles::new(tokens))
    }

    /// All `rows` with all tokens by matrix units, in floats.
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))]
    fn multiply_tiles(self, rows: &T2Rows<'_>, tokens: &TokenTiles, target: Target<'_, '_>) {
        match self.isa {
            // SAFETY: `Kernels` only exists for instruction sets that were found on this processor.
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            Isa::Amx => unsafe { amx::multiply(rows, tokens, target) },
            isa => unreachable!("{isa} has no matrix units, so there are no tiles for them"),
        }
    }

    /// Whether a few tokens are multiplied with t5 rows as they lie. Where not, these are rewritten as t2 first.
    fn multiply_t5(self) -> bool {
        match self.isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Amx => avx512_t5::available(),
            isa => isa == Isa::Scalar,
        }
    }

    /// The exact totals of all t5 `rows` with one token.
    fn t5_totals(self, rows: &T5Rows<'_>, token: &Straight<'_>, totals: &mut [i32]) {
        match self.isa {
            // SAFETY: `Kernels` only exists for instruction sets that were found on this processor, and the rest is asked for.
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            Isa::Avx512 | Isa::Amx if avx512_t5::available() => unsafe { avx512_t5::t5_totals(rows, token, totals) },
            _ => scalar::t5_totals(rows, token, totals),
        }
    }

    /// The exact totals of one or two tiles of rows by tables: see [`lookup`].
    fn lookup_totals(
        self,
        codes: &[[u8; LOOKUP_ROWS]],
        scales: Option<&[[u8; LOOKUP_ROWS]]>,
        tables: &[Table],
        totals: &mut [i32],
    ) {
        dispatch!(self, lookup_totals(codes, scales, tables, totals));
    }

    /// One t5 row of `in_features` weights rewritten as t2.
    fn t5_to_t2(self, t5: &[u32], in_features: usize, t2: &mut [u32]) {
        dispatch!(self, t5_to_t2(t5, in_features, t2));
    }

    /// One token to int8: see [`tokens`].
    fn quantize(self, x: &mut [f32], rotation: Option<Rotation>, quads: &mut [Quad], block_sums: &mut [i16]) -> f32 {
        dispatch!(self, quantize(x, rotation, quads, block_sums))
    }

    /// The gate over one token: `gate_up` holds gate and up in turn and is twice as long as `out`.
    fn swiglu(self, activation: ClampedSwiGlu, gate_up: &[f32], out: &mut [f32]) {
        dispatch!(self, swiglu(activation, gate_up, out));
    }

    /// The gradient by `gate_up` from the one by the gate: see [`math::swiglu_gradient`].
    fn swiglu_gradient(self, activation: ClampedSwiGlu, gate_up: &[f32], gradient: &[f32], out: &mut [f32]) {
        dispatch!(self, swiglu_gradient(activation, gate_up, gradient, out));
    }

    /// One token as a ternary kernel sees it, in floats.
    fn round_token(self, x: &mut [f32], rotation: Option<Rotation>) {
        dispatch!(self, round_token(x, rotation));
    }

    /// The softmax over one query's scores and a sink: see [`attention`].
    fn sink_softmax(self, scores: &mut [f32], scale: f32, sink: f32) {
        dispatch!(self, sink_softmax(scores, scale, sink));
    }

    /// A softmax's numerators, their largest score and their sum: see [`math::exponentials`].
    fn exponentials(self, scores: &mut [f32], scale: f32, least: f32) -> [f32; 2] {
        dispatch!(self, exponentials(scores, scale, least))
    }

    /// Its gradient in the place of `gradient`; returns that of the sink.
    fn sink_softmax_gradient(self, shares: &[f32], gradient: &mut [f32], scale: f32) -> f32 {
        dispatch!(self, sink_softmax_gradient(shares, gradient, scale))
    }

    /// `sums += a * b`: see [`product`].
    fn add_product(self, a: Rows<'_>, b: Panels<'_>, inner: usize, sums: Sums<'_>) {
        dispatch!(self, add_product(a, b, inner, sums));
    }

    /// The norm of one token: see [`math::rms_norm`].
    fn rms_norm(self, x: &[f32], gamma: &[f32], epsilon: f32, out: &mut [f32]) {
        dispatch!(self, rms_norm(x, gamma, epsilon, out));
    }

    /// `out[row * tokens + token]`: stored rows times tokens that are zero-padded to whole [`stored::LANES`].
    fn stored_dots(self, float: StoredFloat, rows: &[&[u32]], tokens: &[&[f32]], out: &mut [f32]) {
        dispatch!(self, stored_dots(float, rows, tokens, out));
    }

    /// One row of a screen: see [`screen::screen_row`].
    fn screen_row(
        self,
        float: StoredFloat,
        words: &[u32],
        dither: &Dither,
        x: &mut [f32],
        bits: (&mut [u8], &mut [u8]),
    ) -> [f32; 2] {
        dispatch!(self, screen_row(float, words, dither, x, bits))
    }

    /// `totals[token * rows + row]`: codes of a screen times at most [`bounds::TOKEN_TILE`] tokens of padded runs.
    fn screen_totals(self, rows: &ScreenRows<'_>, tokens: &[&[i8]], totals: &mut [i32]) {
        dispatch!(self, screen_totals(rows, tokens, totals));
    }

    /// The bounds of some rows with one token: see [`bounds::screen_bounds`].
    fn screen_bounds(self, token: TokenTerms, totals: &[i32], steps: &[f32], lengths: &[f32], out: &mut [f32]) {
        dispatch!(self, screen_bounds(token, totals, steps, lengths, out));
    }

    /// `totals[n]`: the last bits of `rows[n]` times a token of padded runs, 0 where there is no such row.
    fn last_totals(self, last: &LastBits<'_>, rows: &[u32], levels: &[i8], totals: &mut [i32]) {
        dispatch!(self, last_totals(last, rows, levels, totals));
    }
}
