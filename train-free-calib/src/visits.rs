//! Which tokens go to which expert.

use std::ops::Range;

use burn::tensor::{IndexingUpdateOp, Tensor, TensorData, backend::Backend};
use rayon::prelude::*;
use ternoss_backends::TernaryBackend;
use ternoss_model::router::{Router, Routing};

use crate::{
    CalibError,
    activations::Normed,
    rows::{ROWS_AT_ONCE, Rows, indices},
    solution::host,
};

/// Tokens of an expert: where they stand among all tokens, and what it counts for them.
pub(crate) struct Visits<B: Backend> {
    /// In ascending order.
    pub(crate) rows: Vec<usize>,
    /// `[n, 1]`
    pub(crate) weights: Tensor<B, 2>,
    /// How many of them, the first, are calibrated on.
    pub(crate) calibrated: usize,
}

impl<B: Backend> Visits<B> {
    /// Some of the tokens, their weights, and how many of them, the first, are calibrated on.
    fn part(&self, part: Range<usize>) -> Visits<B> {
        let calibrated = self.calibrated.clamp(part.start, part.end) - part.start;
        let weights = self.weights.clone().slice_dim(0, part.clone());
        Visits { rows: self.rows[part].to_vec(), weights, calibrated }
    }

    /// All of them, few enough at a time to compute with.
    pub(crate) fn parts(&self) -> impl Iterator<Item = Visits<B>> {
        let count = self.rows.len();
        (0..count).step_by(ROWS_AT_ONCE).map(move |first| self.part(first..count.min(first + ROWS_AT_ONCE)))
    }
}

/// Where a router sends all tokens.
pub(crate) fn route<B: TernaryBackend>(router: &Router<B>, inputs: &Normed<'_, B>) -> Result<Routing<B>, CalibError> {
    let blocks = (0..inputs.streams.blocks()).into_par_iter().map(|block| Ok(router.forward(inputs.get(block)?)));
    let blocks = blocks.collect::<Result<Vec<_>, CalibError>>()?;
    let (indices, weights) = blocks.into_iter().map(|block| (block.indices, block.weights)).unzip();
    Ok(Routing { indices: Tensor::cat(indices, 0), weights: Tensor::cat(weights, 0) })
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
            rows.push(slot / k);
            shares.push(weights[slot]);
        }
    }
    let visits = tokens.into_iter().map(|(rows, shares)| {
        let count = rows.len();
        let calibrated = rows.partition_point(|row| *row < calibrated);
        let weights = Tensor::from_data(TensorData::new(shares, [count, 1]), device);
        Visits { rows, weights, calibrated }
    });
    visits.collect()
}

/// Adds what experts made of the tokens that visited them to those tokens' rows in `output`, one expert after the other.
pub(crate) fn add_visits<B: TernaryBackend>(
    output: &mut Rows<B>,
    made: &[(&Visits<B>, Rows<B>)],
    device: &B::Device,
) -> Result<(), CalibError> {
    let size = output.shape()[0];
    output.update(|block, mut sum| {
        for (visits, made) in made {
            let [first, last] = [block, block + 1].map(|block| visits.rows.partition_point(|row| row / size < block));
            if first < last {
                let own: Vec<usize> = visits.rows[first..last].iter().map(|row| row % size).collect();
                let part = made.rows(&(first..last).collect::<Vec<_>>())?;
                sum = sum.select_assign(0, indices(&own, device), part, IndexingUpdateOp::Add);
            }
        }
        Ok(sum)
    })
}
