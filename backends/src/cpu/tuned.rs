//! Matrices whose trits stay packed while their scales are tuned: see [`tuned_linear`](crate::tuned_linear).

use rayon::prelude::*;

use super::{TernaryRows, linear::check};
use crate::format::{FormatError, TernaryLayout};

/// The trits of a matrix with other scales, `[planes, rows, groups]`, one group where a row has one scale: the sum over the
/// planes, into `out [rows, in_features]`.
///
/// # Errors
/// [`FormatError::Length`] if the scales are not as many.
pub fn scaled_trits(rows: &TernaryRows<'_>, scales: &[f32], out: &mut [f32]) -> Result<(), FormatError> {
    let layout = *rows.layout();
    let (groups, size) = groups(&layout);
    check("scales", layout.planes * layout.rows * groups, scales.len())?;
    let out = out.par_chunks_exact_mut(layout.in_features).enumerate();
    out.for_each_init(
        || vec![0; layout.in_features],
        |trits, (row, out)| {
            out.fill(0.0);
            for plane in 0..layout.planes {
                rows.trits(plane, row, trits);
                let scales = &scales[(plane * layout.rows + row) * groups..][..groups];
                for ((out, trits), scale) in out.chunks_mut(size).zip(trits.chunks(size)).zip(scales) {
                    out.iter_mut().zip(trits).for_each(|(out, trit)| *out += f32::from(*trit) * scale);
                }
            }
        },
    );
    Ok(())
}

/// The gradient by these scales from the one by the matrix, `of_matrix [rows, in_features]`: of each group, the sum of
/// `of_matrix * trits`.
///
/// # Errors
/// [`FormatError::Length`] if the matrix is of another size.
pub fn scale_gradient(rows: &TernaryRows<'_>, of_matrix: &[f32]) -> Result<Vec<f32>, FormatError> {
    let layout = *rows.layout();
    let (groups, size) = groups(&layout);
    check("gradients of a matrix", layout.rows * layout.in_features, of_matrix.len())?;
    let mut out = vec![0.0; layout.planes * layout.rows * groups];
    out.par_chunks_exact_mut(groups).enumerate().for_each_init(
        || vec![0; layout.in_features],
        |trits, (at, sums)| {
            let (plane, row) = (at / layout.rows, at % layout.rows);
            rows.trits(plane, row, trits);
            let of_row = of_matrix[row * layout.in_features..][..layout.in_features].chunks(size);
            for (sum, (gradient, trits)) in sums.iter_mut().zip(of_row.zip(trits.chunks(size))) {
                *sum = gradient.iter().zip(trits).map(|(gradient, trit)| gradient * f32::from(*trit)).sum();
            }
        },
    );
    Ok(out)
}

/// Scales of a row, and inputs that share one.
fn groups(layout: &TernaryLayout) -> (usize, usize) {
    (layout.groups().max(1), layout.group_size.unwrap_or(layout.in_features))
}
