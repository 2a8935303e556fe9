//! What stands between the products of a layer: its norms, and which experts a token goes to.
//!
//! ```
//! use ternoss_backends::cpu::{Kernels, routing::{rms_norm, route}};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let kernels = Kernels::detect();
//! let (x, mut normed) = ([3.0, -3.0], [0.0; 2]);
//! rms_norm(kernels, &x, &[1.0, 2.0], 0.0, &mut normed)?;
//! assert_eq!(normed, [1.0, -2.0]);
//!
//! // Two inputs, three experts, of which the second is much the best.
//! let weight = [0.0, 50.0, 0.0, 0.0, -50.0, 0.0];
//! let (chosen, weights) = route(kernels, &x, &weight, &[0.0, 0.0, 1.0], 2)?;
//! assert_eq!((chosen, weights), (vec![1, 2], vec![1.0, 0.0]));
//! # Ok(()) }
//! ```

use super::{
    Kernels,
    linear::check,
    math,
    product::{Numbers, Panels, Rows, Sums},
    tasks,
};
use crate::format::FormatError;

/// Numbers that a task should have at least.
const TASK: usize = 1 << 14;

/// The norm of tokens, `out` and `x [tokens, hidden]`: `x / sqrt(mean(x^2) + epsilon) * gamma`.
///
/// # Errors
/// [`FormatError::Length`] if the slices do not fit each other.
pub fn rms_norm(kernels: Kernels, x: &[f32], gamma: &[f32], epsilon: f32, out: &mut [f32]) -> Result<(), FormatError> {
    check("outputs", x.len(), out.len())?;
    let hidden = gamma.len().max(1);
    let chunk = hidden * TASK.div_ceil(hidden);
    let work: Vec<_> = x.chunks(chunk).zip(out.chunks_mut(chunk)).collect();
    let parallel = work.len() > 1;
    tasks::run(work, parallel, |(x, out)| {
        for (x, out) in x.chunks(hidden).zip(out.chunks_mut(hidden)) {
            kernels.rms_norm(x, gamma, epsilon, out);
        }
    });
    Ok(())
}

/// The router's scores of tokens: `x [tokens, hidden]` times `weight [hidden, experts]` plus `bias [experts]`, and of each
/// token's the `k` largest: their numbers, best first (of equal ones the first), and the softmax over them, each
/// `[tokens, k]`. A score of NaN is the largest.
///
/// # Errors
/// [`FormatError::Length`] if the slices do not fit each other, or `k` experts are not there.
pub fn route(
    kernels: Kernels,
    x: &[f32],
    weight: &[f32],
    bias: &[f32],
    k: usize,
) -> Result<(Vec<i64>, Vec<f32>), FormatError> {
    let experts = bias.len();
    let hidden = weight.len().checked_div(experts).unwrap_or(0).max(1);
    check("router weights", hidden * experts, weight.len())?;
    check("experts to choose", k.min(experts), k)?;
    let tokens = x.len() / hidden;
    check("values of the tokens", tokens * hidden, x.len())?;
    let mut scores = bias.repeat(tokens);
    let parallel = tasks::is_parallel(scores.len() * hidden);
    let rows = if parallel { 4 } else { tokens.max(1) };
    let work = x.chunks(rows * hidden).zip(scores.chunks_mut(rows * experts)).collect();
    tasks::run(work, parallel, |(x, scores)| {
        let weight = Panels::of_rows(Numbers::F32(weight), experts);
        kernels.add_product(
            Rows { numbers: x, stride: hidden },
            weight,
            hidden,
            Sums { numbers: scores, stride: experts },
        );
    });
    let (mut chosen, mut weights) = (Vec::with_capacity(tokens * k), Vec::with_capacity(tokens * k));
    let mut order: Vec<usize> = Vec::new();
    for scores in scores.chunks_exact(experts.max(1)) {
        order.clear();
        order.extend(0..experts);
        order.sort_by(|a, b| largest_first(scores[*a], scores[*b]));
        let best = &order[..k];
        chosen.extend(best.iter().map(|expert| *expert as i64));
        let top = best.first().map_or(0.0, |expert| scores[*expert]);
        let start = weights.len();
        weights.extend(best.iter().map(|expert| math::exp(scores[*expert] - top)));
        let total: f32 = weights[start..].iter().sum();
        weights[start..].iter_mut().for_each(|weight| *weight /= total);
    }
    Ok((chosen, weights))
}

/// NaN before all numbers.
fn largest_first(a: f32, b: f32) -> std::cmp::Ordering {
    b.is_nan().cmp(&a.is_nan()).then(b.partial_cmp(&a).unwrap_or(std::cmp::Ordering::Equal))
}
