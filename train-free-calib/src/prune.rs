//! Which experts of a layer stay, when only some may.
//!
//! An expert counts for as much as it adds to the residual stream: over the tokens `t` of a text that the full-precision
//! router sends to it,
//!
//! ```text
//! importance(e) = sum over t of  w_e(t) * |E_e(x_t)|
//! ```
//!
//! with the router's weight `w_e` and the norm of the expert's output before that weight, both of the full-precision model
//! on its own activations (router-weighted activation pruning, REAP, arXiv 2510.13999, there as a mean over the tokens: the
//! sum also counts how often an expert is asked). The rest is dropped, and the router chooses among those that stay.

use burn::{
    module::Param,
    nn,
    tensor::{Tensor, TensorData},
};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use ternoss_backends::TernaryBackend;
use ternoss_model::{
    Checkpoint, CheckpointError, ExpertPlacement, LoadOptions,
    cache::LayerCache,
    checkpoint::ExpertMatrix,
    experts::Expert,
    layer::{Layer, apply_norm},
    rope::RotaryEmbedding,
    router::Router,
};
use ternoss_quant::Linear;

use crate::{
    CalibError,
    activations::{Activations, Normed},
    experts::EXPERTS_AT_ONCE,
    rows::{ROWS_AT_ONCE, Rows},
    solution::host,
    visits::{Visits, add_visits, route, visits},
};

/// An expert that stays.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct KeptExpert {
    /// Its number in the full-precision model.
    pub expert: usize,
    /// Its share of the importance of all experts of its layer.
    pub importance: f64,
}

/// What was found about a layer's experts.
pub(crate) struct Selection<B: TernaryBackend> {
    /// Those that stay, in their order.
    pub(crate) kept: Vec<KeptExpert>,
    /// What all experts, dropped ones included, add to the full-precision stream.
    pub(crate) output: Rows<B>,
}

/// The numbers of experts that stay.
pub(crate) fn numbers(kept: &[KeptExpert]) -> Vec<usize> {
    kept.iter().map(|kept| kept.expert).collect()
}

/// The numbers of a layer's experts in `kept`, or of all of them where nothing was chosen.
pub(crate) fn those_that_stay(kept: &[KeptExpert], checkpoint: &Checkpoint) -> Vec<usize> {
    if kept.is_empty() { (0..checkpoint.config().num_local_experts).collect() } else { numbers(kept) }
}

/// Runs all experts of layer `number` in full precision and chooses the `keep` most important ones on the first
/// `calibrated` windows; of two that are equally important the first. Four experts at a time are in memory.
pub(crate) fn select<B: TernaryBackend>(
    (checkpoint, number): (&Checkpoint, usize),
    router: &Router<B>,
    inputs: &Normed<'_, B>,
    calibrated: usize,
    keep: usize,
    device: &B::Device,
) -> Result<Selection<B>, CalibError> {
    let experts = checkpoint.config().num_local_experts;
    let context = inputs.streams.shape()[0];
    let visits = visits(route(router, inputs)?, experts, calibrated * context, device);
    let (importance, output) = run(checkpoint, (number, &(0..experts).collect::<Vec<_>>()), inputs, &visits, device)?;
    Ok(Selection { kept: most_important(&importance, keep), output })
}

/// Runs experts of a layer in full precision on the tokens that visit them, four at a time: the importance of each, and what
/// they add to the stream together.
pub(crate) fn run<B: TernaryBackend>(
    checkpoint: &Checkpoint,
    (layer, numbers): (usize, &[usize]),
    inputs: &Normed<'_, B>,
    visits: &[Visits<B>],
    device: &B::Device,
) -> Result<(Vec<f64>, Rows<B>), CalibError> {
    let mut importance = Vec::with_capacity(numbers.len());
    let mut output = inputs.streams.map(inputs.streams.shape()[1], |_, x| Ok(x.zeros_like()))?;
    for (numbers, visits) in numbers.chunks(EXPERTS_AT_ONCE).zip(visits.chunks(EXPERTS_AT_ONCE)) {
        let batch = numbers.par_iter().zip(visits);
        let batch: Result<Vec<_>, CalibError> =
            batch.map(|(number, visits)| measure(checkpoint, [layer, *number], inputs, visits, device)).collect();
        let mut outputs = Vec::new();
        for (measured, visits) in batch?.into_iter().zip(visits) {
            importance.push(measured.importance);
            outputs.push((visits, measured.output));
        }
        add_visits(&mut output, &outputs, device)?;
    }
    Ok((importance, output))
}

/// The `keep` most important experts, in their order.
fn most_important(importance: &[f64], keep: usize) -> Vec<KeptExpert> {
    let total = importance.iter().sum::<f64>().max(f64::MIN_POSITIVE);
    let mut order: Vec<usize> = (0..importance.len()).collect();
    // Stable: of two equal ones the first comes first.
    order.sort_by(|a, b| importance[*b].total_cmp(&importance[*a]));
    order.truncate(keep);
    order.sort_unstable();
    order.into_iter().map(|expert| KeptExpert { expert, importance: importance[expert] / total }).collect()
}

/// One expert on its tokens.
struct Measured<B: TernaryBackend> {
    importance: f64,
    /// Of every token, times the router's weights.
    output: Rows<B>,
}

fn measure<B: TernaryBackend>(
    checkpoint: &Checkpoint,
    [layer, number]: [usize; 2],
    inputs: &Normed<'_, B>,
    visits: &Visits<B>,
    device: &B::Device,
) -> Result<Measured<B>, CalibError> {
    // Read in any case: a weight that is no number is an error whether the text finds it or not.
    let expert = expert::<B>(checkpoint, layer, number, device)?;
    let mut output = Rows::new(inputs.streams.memory(), [ROWS_AT_ONCE, inputs.streams.shape()[1]], device);
    let mut importance = 0.0;
    for visits in visits.parts() {
        let y = expert.forward(inputs.rows(&visits.rows)?, checkpoint.config().activation());
        let norms = y.clone().square().sum_dim(1).sqrt() * visits.weights.clone();
        importance = host(norms).into_iter().take(visits.calibrated).map(f64::from).fold(importance, |sum, x| sum + x);
        output.push(y * visits.weights)?;
    }
    // Outputs that overflow make no expert important.
    let importance = if importance.is_finite() { importance } else { 0.0 };
    Ok(Measured { importance, output })
}

/// One expert in full precision, its weights known to be finite.
fn expert<B: TernaryBackend>(
    checkpoint: &Checkpoint,
    layer: usize,
    expert: usize,
    device: &B::Device,
) -> Result<Expert<B>, CheckpointError> {
    let linear = |matrix: ExpertMatrix| {
        let [in_features, rows] = matrix.shape(checkpoint.config());
        let weight = checkpoint.expert_rows(layer, matrix, expert)?;
        checkpoint.expect_finite(&checkpoint.expert_tensors(layer, matrix)[0], &weight)?;
        let weight = Tensor::<B, 2>::from_data(TensorData::new(weight, [rows, in_features]), device);
        let biases = [checkpoint.config().num_local_experts, rows];
        let bias = checkpoint.float_tensor::<B, 2>(&format!("{}_bias", matrix.path(layer)), biases, device)?;
        let bias = bias.slice_dim(0, expert..expert + 1).squeeze_dim::<1>(0);
        // Burn's layer wants [in, out].
        let weight = Param::from_tensor(weight.transpose().detach());
        let linear = nn::Linear { weight, bias: Some(Param::from_tensor(bias)) };
        Ok::<_, CheckpointError>(Linear::Dense(linear))
    };
    Ok(Expert { gate_up_proj: linear(ExpertMatrix::GateUp)?, down_proj: linear(ExpertMatrix::Down)? })
}

/// Takes the full-precision stream through layer `number` and chooses the experts that stay: for methods that look at no
/// text otherwise. Only the full-precision stream of `activations` is used.
pub(crate) fn advance<B: TernaryBackend>(
    checkpoint: &Checkpoint,
    number: usize,
    keep: usize,
    activations: &mut Activations<B>,
    device: &B::Device,
) -> Result<Vec<KeptExpert>, CalibError> {
    let config = checkpoint.config();
    let layer = Layer::<B>::load(
        checkpoint,
        number,
        LoadOptions { experts: ExpertPlacement::Streamed, ..LoadOptions::default() },
        device,
    )?;
    let rope = RotaryEmbedding::new(&config.rope, config.head_dim).tables(0..activations.context(), device);
    activations.teacher.update(|_, x| {
        let mut cache = LayerCache::new(config.window(number));
        Ok(x.clone() + layer.self_attn.forward(apply_norm(&layer.input_layernorm, x), &rope, &mut cache))
    })?;
    let inputs = Normed { streams: &activations.teacher, norm: &layer.post_attention_layernorm };
    let of = (checkpoint, number);
    let selection = select(of, &layer.mlp.router, &inputs, activations.calibrated, keep, device)?;
    activations.teacher.update(|block, x| Ok(x + selection.output.get(block)?))?;
    Ok(selection.kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_important_stay_in_their_order_and_of_equals_the_first() {
        let kept = |importance: &[f64], keep| numbers(&most_important(importance, keep));
        assert_eq!(kept(&[1.0, 4.0, 2.0, 3.0], 2), [1, 3]);
        assert_eq!(kept(&[2.0, 2.0, 2.0], 2), [0, 1]);
        assert_eq!(kept(&[0.0; 3], 1), [0]);
        let shares: Vec<f64> = most_important(&[1.0, 3.0, 4.0], 2).iter().map(|kept| kept.importance).collect();
        assert_eq!(shares, [0.375, 0.5]);
    }
}
