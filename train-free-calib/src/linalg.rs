//! The dense linear algebra that Burn has no operation for, on the host in double precision.
//!
//! Results do not depend on the number of threads: every element is computed by one thread in a fixed order.

use rayon::prelude::*;

/// Rows and columns that are worked on together.
const TILE: usize = 64;

/// The upper triangular `U` with `inverse(A) = U^T U`, for a symmetric positive definite `A [n, n]` (row-major).
///
/// This is the Cholesky factor of the inverse that GPTQ walks along (Frantar et al., arXiv 2210.17323, section 3.3),
/// computed without the inverse: with the indices reversed, `A = L L^T`, and `U` is `inverse(L)` reversed.
/// `None` if `A` is not positive definite.
pub(crate) fn inverse_factor(a: &[f32], n: usize) -> Option<Vec<f32>> {
    let reversed: Vec<f64> = a.iter().rev().map(|x| f64::from(*x)).collect();
    let lower = cholesky(reversed, n)?;
    let inverse = invert_lower(&lower, n);
    Some(inverse.into_iter().rev().map(|x| x as f32).collect())
}

/// `L` with `A = L L^T`; what stands above the diagonal is zero.
fn cholesky(mut a: Vec<f64>, n: usize) -> Option<Vec<f64>> {
    for start in (0..n).step_by(TILE) {
        let end = (start + TILE).min(n);
        factor_diagonal(&mut a, n, start..end)?;
        let (above, below) = a.split_at_mut(end * n);
        let diagonal = &above[start * n..];
        below.par_chunks_mut(n).for_each(|row| {
            for j in start..end {
                let known = &diagonal[(j - start) * n..][..n];
                row[j] = (row[j] - dot(&row[start..j], &known[start..j])) / known[j];
            }
        });
        let panel: Vec<f64> = below.chunks(n).flat_map(|row| row[start..end].iter().copied()).collect();
        let width = end - start;
        below.par_chunks_mut(n).enumerate().for_each(|(i, row)| {
            let own = &panel[i * width..(i + 1) * width];
            for (x, other) in row[end..=end + i].iter_mut().zip(panel.chunks(width)) {
                *x -= dot(own, other);
            }
        });
    }
    a.par_chunks_mut(n.max(1)).enumerate().for_each(|(i, row)| row[i + 1..].fill(0.0));
    Some(a)
}

fn factor_diagonal(a: &mut [f64], n: usize, range: std::ops::Range<usize>) -> Option<()> {
    for i in range.clone() {
        for j in range.start..=i {
            let (before, row) = a.split_at_mut(i * n);
            let known = if j == i { None } else { Some(&before[j * n..][..n]) };
            let own = &row[range.start..j];
            let rest = row[j] - known.map_or_else(|| dot(own, own), |known| dot(own, &known[range.start..j]));
            row[j] = match known {
                Some(known) => rest / known[j],
                None if rest > 0.0 && rest.is_finite() => rest.sqrt(),
                None => return None,
            };
        }
    }
    Some(())
}

/// The inverse of a lower triangular matrix.
fn invert_lower(lower: &[f64], n: usize) -> Vec<f64> {
    // Column tiles are independent; within one, row i needs the rows before it.
    let tiles: Vec<(usize, Vec<f64>)> = (0..n)
        .step_by(TILE)
        .collect::<Vec<_>>()
        .into_par_iter()
        .map(|first| {
            let width = TILE.min(n - first);
            let mut tile = vec![0.0; (n - first) * width];
            for i in first..n {
                let (before, row) = tile.split_at_mut((i - first) * width);
                let row = &mut row[..width];
                if i - first < width {
                    row[i - first] = 1.0;
                }
                for (k, known) in before.chunks(width).enumerate() {
                    let factor = lower[i * n + first + k];
                    row.iter_mut().zip(known).for_each(|(x, known)| *x -= factor * known);
                }
                row.iter_mut().for_each(|x| *x /= lower[i * n + i]);
            }
            (first, tile)
        })
        .collect();
    let mut inverse = vec![0.0; n * n];
    for (first, tile) in tiles {
        let width = TILE.min(n - first);
        for (i, row) in tile.chunks(width).enumerate() {
            inverse[(first + i) * n + first..][..width].copy_from_slice(row);
        }
    }
    inverse
}

/// Solves `A x = b` in place for a small symmetric positive definite `A [n, n]`; `false` if it is not.
pub(crate) fn solve_small(a: &mut [f64], b: &mut [f64]) -> bool {
    let n = b.len();
    if factor_diagonal(a, n, 0..n).is_none() {
        return false;
    }
    for i in 0..n {
        b[i] = (b[i] - dot(&a[i * n..i * n + i], &b[..i])) / a[i * n + i];
    }
    for i in (0..n).rev() {
        let rest: f64 = (i + 1..n).map(|k| a[k * n + i] * b[k]).sum();
        b[i] = (b[i] - rest) / a[i * n + i];
    }
    true
}

/// In eight partial sums, which the compiler can keep in vectors.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 8];
    let (a8, a_rest) = a.as_chunks::<8>();
    let (b8, b_rest) = b.as_chunks::<8>();
    for (a, b) in a8.iter().zip(b8) {
        for lane in 0..8 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `B^T B + I` for a pseudo-random `B`.
    fn positive_definite(n: usize) -> Vec<f32> {
        let b: Vec<f32> = (0..n * n).map(|i| ((i * 7919 + i / n * 31) % 1009) as f32 / 1009.0 - 0.5).collect();
        let mut a = vec![0.0; n * n];
        for i in 0..n {
            for j in 0..n {
                let sum: f32 = (0..n).map(|k| b[k * n + i] * b[k * n + j]).sum();
                a[i * n + j] = sum + if i == j { 1.0 } else { 0.0 };
            }
        }
        a
    }

    #[test]
    fn the_factor_gives_the_inverse() {
        for n in [1, 3, 64, 65, 150] {
            let a = positive_definite(n);
            let u = inverse_factor(&a, n).unwrap();
            for i in 0..n {
                assert!(u[i * n..i * n + i].iter().all(|x| *x == 0.0), "upper triangular");
                for j in 0..n {
                    // A * (U^T U) is the identity.
                    let product: f64 = (0..n)
                        .map(|k| {
                            let inverse: f64 = (0..n).map(|m| f64::from(u[m * n + k]) * f64::from(u[m * n + j])).sum();
                            f64::from(a[i * n + k]) * inverse
                        })
                        .sum();
                    let expected = if i == j { 1.0 } else { 0.0 };
                    assert!((product - expected).abs() < 1e-3, "{n}: [{i}, {j}] = {product}");
                }
            }
        }
    }

    #[test]
    fn small_systems_are_solved_and_singular_ones_refused() {
        let n = 9;
        let a: Vec<f64> = positive_definite(n).into_iter().map(f64::from).collect();
        let x: Vec<f64> = (0..n).map(|i| i as f64 - 3.0).collect();
        let mut b: Vec<f64> = (0..n).map(|i| dot(&a[i * n..(i + 1) * n], &x)).collect();
        assert!(solve_small(&mut a.clone(), &mut b));
        assert!(b.iter().zip(&x).all(|(b, x)| (b - x).abs() < 1e-9), "{b:?}");
        assert!(!solve_small(&mut [1.0, 1.0, 1.0, 1.0], &mut [1.0, 1.0]));
        assert!(inverse_factor(&[0.0; 4], 2).is_none());
        assert!(inverse_factor(&[f32::NAN; 4], 2).is_none());
    }
}
