//! Which tokens go to which expert.

use burn::tensor::{Int, Tensor, TensorData, backend::Backend};
use ternoss_model::router::Routing;

use crate::solution::host;

/// Tokens of an expert: where they stand among all tokens, and what it counts for them.
pub(crate) struct Visits<B: Backend> {
    /// `[n]`
    pub(crate) rows: Tensor<B, 1, Int>,
    /// `[n, 1]`
    pub(crate) weights: Tensor<B, 2>,
    pub(crate) count: usize,
    /// How many of them, the first, are calibrated on.
    pub(crate) calibrated: usize,
}

/// The visits of every expert, in the tokens' order; the first `calibrated` tokens are calibrated on.
pub(crate) fn visits<B: Backend>(
    routing: Routing<B>,
    experts: usize,
    calibrated: usize,
    device: &B::Device,
) -> Vec<Visits<B>> {
    let k = routing.indices.dims()[1];
    let chosen: Vec<i64> = routing.indices.into_data().iter::<i64>().collect();
    let weights = host(routing.weights);
    let mut tokens = vec![(Vec::new(), Vec::new()); experts];
    for (slot, expert) in chosen.into_iter().enumerate() {
        if let Some((rows, shares)) = usize::try_from(expert).ok().and_then(|expert| tokens.get_mut(expert)) {
            rows.push((slot / k) as i64);
            shares.push(weights[slot]);
        }
    }
    let visits = tokens.into_iter().map(|(rows, shares)| {
        let count = rows.len();
        let calibrated = rows.partition_point(|row| (*row as usize) < calibrated);
        Visits {
            rows: Tensor::from_data(TensorData::new(rows, [count]), device),
            weights: Tensor::from_data(TensorData::new(shares, [count, 1]), device),
            count,
            calibrated,
        }
    });
    visits.collect()
}
