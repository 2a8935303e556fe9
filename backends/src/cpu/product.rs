//! Products of floats with the numbers of a cache, in whatever format it keeps them.
//!
//! Every element is a chain of fused multiply-adds along the rows of `b`, in order, so it has the same bits however the
//! elements are shared among registers, instruction sets and calls.

use half::f16;

/// Columns of a panel.
pub(super) const PANEL: usize = 16;

/// Bytes that a processor fetches at once.
#[cfg(target_arch = "x86_64")]
pub(super) const LINE: usize = 64;

/// Rows of floats, each `stride` after the one before; the last may be shorter than that.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows<'a> {
    pub(super) numbers: &'a [f32],
    pub(super) stride: usize,
}

impl<'a> Rows<'a> {
    /// What is left from a row on.
    fn skip_rows(self, row: usize) -> Self {
        Self { numbers: &self.numbers[row * self.stride..], ..self }
    }

    fn count(&self) -> usize {
        self.numbers.len().div_ceil(self.stride.max(1))
    }
}

/// Numbers as a cache keeps them.
#[derive(Debug, Clone, Copy)]
pub(super) enum Numbers<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Int8(&'a [i8]),
}

/// A matrix in panels of [`PANEL`] columns: row `i` of panel `p` starts at `p * panel + i * stride`. The last panel may have
/// fewer columns.
#[derive(Debug, Clone, Copy)]
pub(super) struct Panels<'a> {
    pub(super) numbers: Numbers<'a>,
    pub(super) columns: usize,
    pub(super) stride: usize,
    pub(super) panel: usize,
}

impl<'a> Panels<'a> {
    /// An ordinary matrix, row by row.
    pub(super) const fn of_rows(numbers: Numbers<'a>, columns: usize) -> Self {
        Self { numbers, columns, stride: columns, panel: PANEL }
    }

    /// Numbers that must be there for `inner` rows.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn least(&self, inner: usize) -> usize {
        let last = self.columns.saturating_sub(1);
        last / PANEL * self.panel + inner.saturating_sub(1) * self.stride + last % PANEL + 1
    }
}

/// Where a product is added to: rows of `stride` numbers, of which the last may be shorter.
pub(super) struct Sums<'a> {
    pub(super) numbers: &'a mut [f32],
    pub(super) stride: usize,
}

impl Sums<'_> {
    /// How many rows of `a` there is a place for.
    ///
    /// # Panics
    /// If a row of `a` has no `inner` numbers, or there is no room for `columns`: what loads without checks rely on.
    pub(super) fn rows(&self, a: Rows<'_>, inner: usize, columns: usize) -> usize {
        let rows = self.numbers.len().div_ceil(self.stride.max(1)).min(a.count());
        let last = rows.saturating_sub(1);
        assert!(rows == 0 || last * a.stride + inner <= a.numbers.len(), "numbers of a row");
        assert!(rows == 0 || last * self.stride + columns <= self.numbers.len(), "room for the columns");
        rows
    }
}

/// A number that widens to a float exactly.
pub(super) trait Number: Copy {
    fn widen(self) -> f32;
}

impl Number for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl Number for i8 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from(self)
    }
}

impl Number for f16 {
    /// Without an instruction for it: the exponent is rebased by a multiplication.
    #[inline(always)]
    fn widen(self) -> f32 {
        /// 2^112, the difference of the two exponents' offsets.
        const REBASE: f32 = f32::from_bits((112 + 127) << 23);
        let bits = u32::from(self.to_bits());
        let magnitude = f32::from_bits((bits & 0x7fff) << 13) * REBASE;
        let infinite = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
        f32::from_bits(magnitude.to_bits() | infinite | (bits & 0x8000) << 16)
    }
}

/// `sums += a * b`: the first `inner` columns of `a` times as many rows of `b`.
#[inline(always)]
pub(super) fn add_product(a: Rows<'_>, b: Panels<'_>, inner: usize, sums: Sums<'_>) {
    match b.numbers {
        Numbers::F32(numbers) => add_panels(a, numbers, b, inner, 0, sums),
        Numbers::F16(numbers) => add_panels(a, numbers, b, inner, 0, sums),
        Numbers::Int8(numbers) => add_panels(a, numbers, b, inner, 0, sums),
    }
}

/// The same for the panels from `first` on, whose numbers are `numbers`.
#[inline(always)]
pub(super) fn add_panels<T: Number>(
    a: Rows<'_>,
    numbers: &[T],
    b: Panels<'_>,
    inner: usize,
    first: usize,
    sums: Sums<'_>,
) {
    let rows = sums.rows(a, inner, b.columns);
    for panel in first..b.columns.div_ceil(PANEL) {
        let (numbers, column) = (&numbers[panel * b.panel..], panel * PANEL);
        let width = PANEL.min(b.columns - column);
        let mut row = 0;
        while row < rows {
            let (a, out) = (a.skip_rows(row), &mut sums.numbers[row * sums.stride + column..]);
            row += match (rows - row >= 4, width) {
                (true, PANEL) => add_rows::<4, T>(a, numbers, b.stride, inner, PANEL, out, sums.stride),
                (true, _) => add_rows::<4, T>(a, numbers, b.stride, inner, width, out, sums.stride),
                (false, PANEL) => add_rows::<1, T>(a, numbers, b.stride, inner, PANEL, out, sums.stride),
                (false, _) => add_rows::<1, T>(a, numbers, b.stride, inner, width, out, sums.stride),
            };
        }
    }
}

/// `R` rows of `a` times one panel of `width` columns; returns `R`.
#[inline(always)]
fn add_rows<const R: usize, T: Number>(
    a: Rows<'_>,
    numbers: &[T],
    stride: usize,
    inner: usize,
    width: usize,
    out: &mut [f32],
    out_stride: usize,
) -> usize {
    let a: [&[f32]; R] = std::array::from_fn(|r| &a.numbers[r * a.stride..][..inner]);
    let mut sums = [[0.0f32; PANEL]; R];
    for (r, sums) in sums.iter_mut().enumerate() {
        sums[..width].copy_from_slice(&out[r * out_stride..][..width]);
    }
    for i in 0..inner {
        let row = &numbers[i * stride..][..width];
        for (sums, a) in sums.iter_mut().zip(&a) {
            sums.iter_mut().zip(row).for_each(|(sum, b)| *sum = a[i].mul_add(b.widen(), *sum));
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        out[r * out_stride..][..width].copy_from_slice(&sums[..width]);
    }
    R
}

/// `add_product` by vectors. The file defines `Vector`, how many `LANES` it has, how many `ROWS` pass `PANELS` together,
/// `splat`, `load`, `store` and `multiply_add` of floats, and [`Number`]s that load as a `Vector` (`trait Load`).
#[cfg(target_arch = "x86_64")]
macro_rules! vector_products {
    ($features:literal) => {
        use crate::cpu::product::{LINE, Numbers, PANEL, Panels, Rows, Sums, add_panels};

        /// Vectors in a panel.
        const VECTORS: usize = PANEL / LANES;

        #[target_feature(enable = $features)]
        pub(in crate::cpu) fn add_product(a: Rows<'_>, b: Panels<'_>, inner: usize, sums: Sums<'_>) {
            match b.numbers {
                Numbers::F32(numbers) => add_typed(a, numbers, b, inner, sums),
                Numbers::F16(numbers) => add_typed(a, numbers, b, inner, sums),
                Numbers::Int8(numbers) => add_typed(a, numbers, b, inner, sums),
            }
        }

        #[target_feature(enable = $features)]
        fn add_typed<T: Load>(a: Rows<'_>, numbers: &[T], b: Panels<'_>, inner: usize, sums: Sums<'_>) {
            let rows = sums.rows(a, inner, b.columns);
            // With what `rows` has checked, all that the unchecked loads of `tile` rely on.
            assert!(numbers.len() >= b.least(inner), "numbers of the panels");
            let whole = b.columns / PANEL;
            let mut panel = 0;
            while panel < whole {
                let from = numbers.as_ptr().wrapping_add(panel * b.panel);
                let together = if whole - panel >= PANELS { PANELS } else { 1 };
                let mut row = 0;
                while row < rows {
                    let factors = a.numbers.as_ptr().wrapping_add(row * a.stride);
                    let out = sums.numbers.as_mut_ptr().wrapping_add(row * sums.stride + panel * PANEL);
                    // The first rows fetch for all of them.
                    let ahead = from.cast::<u8>().wrapping_add(if row == 0 { AHEAD } else { 0 });
                    // SAFETY: these rows of `a`, these panels and their place in the sums are there, as checked above.
                    row += unsafe {
                        let (factors, out) = ((factors, a.stride), (out, sums.stride));
                        match (rows - row >= ROWS, together > 1) {
                            (true, true) => tile::<ROWS, PANELS, T>(factors, from, ahead, b, inner, out),
                            (true, false) => tile::<ROWS, 1, T>(factors, from, ahead, b, inner, out),
                            (false, true) => tile::<1, PANELS, T>(factors, from, ahead, b, inner, out),
                            (false, false) => tile::<1, 1, T>(factors, from, ahead, b, inner, out),
                        }
                    };
                }
                panel += together;
            }
            add_panels(a, numbers, b, inner, whole, sums);
        }

        /// `R` rows times `P` whole panels, the first of which is at `from`; what lies at `ahead` is fetched meanwhile. Returns `R`.
        ///
        /// # Safety
        /// `R` rows of `inner` floats must lie at `a`, `inner` rows of [`PANEL`] numbers in each panel, and `R` of `P` times as many
        /// floats at `out`, each with its stride.
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn tile<const R: usize, const P: usize, T: Load>(
            (a, a_stride): (*const f32, usize),
            from: *const T,
            ahead: *const u8,
            b: Panels<'_>,
            inner: usize,
            (out, out_stride): (*mut f32, usize),
        ) -> usize {
            // SAFETY: every address below is of a row, a panel's row or a place that the caller promises.
            unsafe {
                let mut sums = [[[splat(0.0); VECTORS]; P]; R];
                for r in 0..R {
                    for p in 0..P {
                        for v in 0..VECTORS {
                            sums[r][p][v] = f32::load(out.add(r * out_stride + p * PANEL + v * LANES));
                        }
                    }
                }
                // Each line once: panels whose rows follow each other without a gap are fetched as the one piece that they are.
                let width = P * PANEL * size_of::<T>();
                let step = if b.panel == inner * b.stride { width } else { b.stride * size_of::<T>() };
                for i in 0..inner {
                    let mut row = [[splat(0.0); VECTORS]; P];
                    for p in 0..P {
                        let from = from.add(p * b.panel + i * b.stride);
                        for v in 0..VECTORS {
                            row[p][v] = T::load(from.add(v * LANES));
                        }
                    }
                    for line in (0..width).step_by(LINE) {
                        prefetch(ahead.wrapping_add(i * step + line));
                    }
                    for r in 0..R {
                        let factor = splat(*a.add(r * a_stride + i));
                        for p in 0..P {
                            for v in 0..VECTORS {
                                sums[r][p][v] = multiply_add(factor, row[p][v], sums[r][p][v]);
                            }
                        }
                    }
                }
                for r in 0..R {
                    for p in 0..P {
                        for v in 0..VECTORS {
                            store(out.add(r * out_stride + p * PANEL + v * LANES), sums[r][p][v]);
                        }
                    }
                }
            }
            R
        }
    };
}
#[cfg(target_arch = "x86_64")]
pub(super) use vector_products;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_widens_as_half_does() {
        for half in (0..=u16::MAX).map(f16::from_bits) {
            let (found, expected) = (half.widen(), half.to_f32());
            assert!(found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan(), "{half:?}");
        }
    }
}
