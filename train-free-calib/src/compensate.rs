//! Ternary GPTQ: rounding column by column, each error passed on to the columns still to come.

use burn::tensor::{Tensor, TensorData, backend::Backend};
use rayon::prelude::*;

use crate::{
    levels::{Levels, fit_scales},
    solution::{Geometry, Row, Solution, host},
};

/// Sequential error compensation (GPTQ, Frantar et al., arXiv 2210.17323) with levels of trits: group by group the scales
/// are fitted to what compensation has made of the weights, each weight with the importance `1 / U_ii^2` that its error
/// will have, and each column goes to its nearest level.
///
/// `weight` is `[rows, in_features]`, `factor` the upper triangular `U` with `inverse(H) = U^T U`.
pub(crate) fn compensate<B: Backend>(weight: &Tensor<B, 2>, factor: &[f32], geometry: Geometry) -> Solution {
    let Geometry { rows: row_count, in_features: n, .. } = geometry;
    let device = weight.device();
    let u = Tensor::<B, 2>::from_data(TensorData::new(factor.to_vec(), [n, n]), &device);
    let mut rows = vec![Row::empty(&geometry); row_count];
    let mut errors: Option<Tensor<B, 2>> = None;
    for (index, start) in (0..n).step_by(geometry.group()).enumerate() {
        let end = (start + geometry.group()).min(n);
        let width = end - start;
        // What the errors so far leave of this group.
        let mut group = weight.clone().slice([0..row_count, start..end]);
        if let Some(errors) = &errors {
            group = group - errors.clone().matmul(u.clone().slice([0..start, start..end]));
        }
        let mut group = host(group);
        let diagonal: Vec<f32> = (start..end).map(|i| factor[i * n + i]).collect();
        let importance = relative_importance(&diagonal);
        group.par_chunks_mut(width).zip(&mut rows).for_each(|(w, row)| {
            let scales = fit_scales(w, &importance, geometry.planes);
            row.set_scales(&geometry, index, &scales);
            let levels = Levels::new(&scales[..geometry.planes]);
            for i in 0..width {
                let (value, trits) = levels.nearest(w[i]);
                row.set_trits(&geometry, start + i, trits);
                let error = (w[i] - value) / diagonal[i];
                // The group's place is taken by its errors.
                w[i] = error;
                let passed_on = &factor[(start + i) * n + start + i + 1..(start + i) * n + end];
                w[i + 1..].iter_mut().zip(passed_on).for_each(|(w, u)| *w -= error * u);
            }
        });
        let group = Tensor::from_data(TensorData::new(group, [row_count, width]), &device);
        errors = Some(match errors {
            Some(before) => Tensor::cat(vec![before, group], 1),
            None => group,
        });
    }
    Solution { geometry, rows }
}

/// `1 / U_ii^2`, of mean 1.
fn relative_importance(diagonal: &[f32]) -> Vec<f32> {
    let importance: Vec<f32> = diagonal.iter().map(|u| 1.0 / (u * u)).collect();
    let mean = importance.iter().sum::<f32>() / importance.len() as f32;
    importance.into_iter().map(|h| h / mean).collect()
}
