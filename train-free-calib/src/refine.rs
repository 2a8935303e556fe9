//! Improving a ternary matrix on the error of its output: closed-form scales, and greedy changes of single trits.

use burn::tensor::{Tensor, TensorData, backend::Backend};
use rayon::prelude::*;

use crate::{
    linalg::solve_small,
    solution::{Geometry, Solution, host},
};

/// Pull of a refitted scale toward its old value, in mean diagonal elements of its system.
const RIDGE: f64 = 1e-3;

/// Refits all scales of each row at once by least squares on the output error, trits unchanged:
/// `a <- (B H B^T + r I)^-1 (B H w + r a)`, `B` holding the row's trits, one line for each group of each plane.
///
/// `weight` is the target `[rows, in_features]`, `second` is `H [in, in]`.
pub(crate) fn refit_scales<B: Backend>(solution: &mut Solution, weight: &Tensor<B, 2>, second: &Tensor<B, 2>) {
    let geometry = solution.geometry;
    let Geometry { rows, in_features: n, planes, .. } = geometry;
    let (group, groups) = (geometry.group(), geometry.groups());
    let lines = planes * groups;
    let mut gram = vec![0.0f32; rows * lines * lines];
    for line in 0..lines {
        let (plane, start) = (line / groups, line % groups * group);
        let end = (start + group).min(n);
        let trits: Vec<f32> = solution
            .rows
            .iter()
            .flat_map(|row| row.trits[plane * n + start..plane * n + end].iter().map(|trit| f32::from(*trit)))
            .collect();
        let trits = Tensor::<B, 2>::from_data(TensorData::new(trits, [rows, end - start]), &weight.device());
        let image = host(trits.matmul(second.clone().slice([start..end, 0..n])));
        gram.par_chunks_mut(lines * lines).zip(&solution.rows).zip(image.par_chunks(n)).for_each(
            |((gram, row), image)| {
                for (other, sum) in gram[line * lines..(line + 1) * lines].iter_mut().enumerate() {
                    let (plane, start) = (other / groups, other % groups * group);
                    let end = (start + group).min(n);
                    *sum = signed_sum(&row.trits[plane * n + start..plane * n + end], &image[start..end]);
                }
            },
        );
    }
    let pull = host(weight.clone().matmul(second.clone()));
    solution.rows.par_iter_mut().zip(gram.par_chunks(lines * lines)).zip(pull.par_chunks(n)).for_each(
        |((row, gram), pull)| {
            let mut matrix: Vec<f64> = gram.iter().map(|x| f64::from(*x)).collect();
            let mean = (0..lines).map(|i| matrix[i * lines + i]).sum::<f64>() / lines as f64;
            let ridge = RIDGE * mean + f64::MIN_POSITIVE;
            let mut scales = vec![0.0; lines];
            for line in 0..lines {
                matrix[line * lines + line] += ridge;
                let (plane, start) = (line / groups, line % groups * group);
                let end = (start + group).min(n);
                let target = signed_sum(&row.trits[plane * n + start..plane * n + end], &pull[start..end]);
                scales[line] = f64::from(target) + ridge * f64::from(row.scales[line]);
            }
            if solve_small(&mut matrix, &mut scales) {
                for (old, new) in row.scales.iter_mut().zip(scales) {
                    // A negative scale would be a group whose trits all have the wrong sign.
                    *old = (new as f32).max(0.0);
                }
            }
        },
    );
}

fn signed_sum(trits: &[i8], values: &[f32]) -> f32 {
    let mut sums = [0.0f32; 8];
    let (t8, t_rest) = trits.as_chunks::<8>();
    let (v8, v_rest) = values.as_chunks::<8>();
    for (t, v) in t8.iter().zip(v8) {
        for lane in 0..8 {
            sums[lane] += f32::from(t[lane]) * v[lane];
        }
    }
    let rest: f32 = t_rest.iter().zip(v_rest).map(|(t, v)| f32::from(*t) * v).sum();
    sums.iter().sum::<f32>() + rest
}

/// PT-BitNet's stage 2 as described (Guo et al. 2025): one pass over the inputs, each weight moved to the level that
/// lowers the output error most while all others stay, all rows in parallel. With `P = (W - Q) C`,
/// `q <- nearest level to Q_j + P_j / C_jj`, and `P` follows.
///
/// `weight` is the target `[rows, in_features]`, `second` is `C [in, in]`. Returns how many weights changed.
pub(crate) fn sweep<B: Backend>(solution: &mut Solution, weight: &Tensor<B, 2>, second: &Tensor<B, 2>) -> usize {
    let geometry = solution.geometry;
    let n = geometry.in_features;
    let dense = solution.dense::<B>(&weight.device());
    let mut slope = host((weight.clone() - dense).matmul(second.clone()));
    let second = host(second.clone());
    let changed = solution.rows.par_iter_mut().zip(slope.par_chunks_mut(n)).map(|(row, slope)| {
        let mut dense = vec![0.0; n];
        row.dense(&geometry, &mut dense);
        let mut changed = 0;
        for group in 0..geometry.groups() {
            let levels = row.levels(&geometry, group);
            let start = group * geometry.group();
            for j in start..(start + geometry.group()).min(n) {
                let curvature = second[j * n + j];
                if curvature <= 0.0 {
                    continue;
                }
                let (value, trits) = levels.nearest(dense[j] + slope[j] / curvature);
                let step = value - dense[j];
                if step != 0.0 {
                    let line = &second[j * n..(j + 1) * n];
                    slope.iter_mut().zip(line).for_each(|(slope, c)| *slope -= step * c);
                    dense[j] = value;
                    row.set_trits(&geometry, j, trits);
                    changed += 1;
                }
            }
        }
        changed
    });
    changed.sum()
}
