//! Planes by need: which matrices get a second and a third plane when the bits are limited.
//!
//! The sensitivity of a matrix is measured: what making it alone ternary, with one, two and three planes, does to the
//! residual stream of the full-precision model. The planes then go where they lower the sum of these errors most for
//! their bytes.

use burn::tensor::{IndexingUpdateOp, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::json;
use ternoss_backends::{TernaryBackend, reference::clamped_swiglu};
use ternoss_model::{
    Checkpoint, ExpertPlacement, LoadOptions,
    attention::Attention,
    cache::LayerCache,
    checkpoint::{ExpertMatrix, FolderWriter, LinearName},
    layer::{Layer, apply_norm},
    rope::{RotaryEmbedding, RotaryTables},
    table::Table,
};
use ternoss_quant::{BitLinear, Linear, TernaryTensor};

use crate::{
    CalibError, Calibration, Progress, Steps,
    activations::{add_rows, embed},
    experts::dense_linear,
    levels::MAX_PLANES,
    rows::indices,
    size::layer_weights,
    solution::host,
    step::Job,
    ternarize::Recipe,
    visits::visits,
};

/// Ternary tensors of a layer: q, k, v, o, then all gate_up and all down matrices of the experts.
pub(crate) const TENSORS: usize = 6;

/// Planes of every matrix, for a run that goes on.
pub(crate) const PLAN_FILE: &str = "plan.json";

/// Windows that sensitivity is measured on.
const WINDOWS: usize = 4;

/// Planes of each ternary tensor of a layer.
pub(crate) type LayerPlanes = [usize; TENSORS];

/// For each tensor of a layer, the error with one, two and three planes: the mean over tokens of the squared change of the
/// residual stream over its square.
pub(crate) type LayerSensitivity = [[f64; MAX_PLANES]; TENSORS];

/// Planes of all layers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Plan(pub(crate) Vec<LayerPlanes>);

impl Plan {
    /// The planes that lower the errors most within `budget` bytes, `bytes` being what one plane of each tensor takes.
    ///
    /// Starts from one plane everywhere and takes the steps with the best gain for their bytes while they fit; for gains
    /// that shrink from plane to plane and bytes that divide the budget that is the optimum.
    pub(crate) fn within(budget: f64, sensitivity: &[LayerSensitivity], bytes: LayerPlanes) -> Self {
        let mut planes = vec![[1; TENSORS]; sensitivity.len()];
        let mut left = budget - bytes.iter().sum::<usize>() as f64 * sensitivity.len() as f64;
        loop {
            let steps = planes.iter().enumerate().flat_map(|(layer, planes)| {
                planes
                    .iter()
                    .enumerate()
                    .flat_map(move |(tensor, now)| (now + 1..=MAX_PLANES).map(move |more| (layer, tensor, *now, more)))
            });
            let rated = steps.filter_map(|(layer, tensor, now, more)| {
                let cost = ((more - now) * bytes[tensor]) as f64;
                let errors = sensitivity[layer][tensor];
                (cost <= left).then(|| ((errors[now - 1] - errors[more - 1]) / cost, layer, tensor, more, cost))
            });
            // Of equals the first, so that the result is always the same.
            let best = rated.fold(None, |best: Option<(f64, usize, usize, usize, f64)>, step| match best {
                Some(best) if best.0 >= step.0 => Some(best),
                _ => Some(step),
            });
            let Some((_, layer, tensor, more, cost)) = best.filter(|(rate, ..)| *rate > 0.0) else {
                return Self(planes);
            };
            planes[layer][tensor] = more;
            left -= cost;
        }
    }

    /// The most planes any tensor has.
    pub(crate) fn most(&self) -> usize {
        self.0.iter().flatten().copied().max().unwrap_or(1)
    }
}

/// The planes of every matrix within so many bits a weight: measured, or taken over from an interrupted run.
pub(crate) fn plan<B: TernaryBackend>(
    job: &Job<'_, B>,
    bits_per_weight: f64,
    calibration: &Calibration,
    writer: &FolderWriter,
    progress: &dyn Fn(Progress),
) -> Result<Plan, CalibError> {
    let checkpoint = job.checkpoint;
    let layers = checkpoint.config().num_hidden_layers();
    let known = writer.read(PLAN_FILE).ok().and_then(|text| serde_json::from_slice::<Plan>(&text).ok());
    if let Some(plan) = known.filter(|plan| plan.0.len() == layers) {
        return Ok(plan);
    }
    let (budget, bytes) = plane_budget(checkpoint, &job.recipe, bits_per_weight)?;
    let measured = || progress(Progress::Measured);
    let most = (bytes.iter().sum::<usize>() * layers * MAX_PLANES) as f64;
    let plan = match most <= budget {
        true => Plan(vec![[MAX_PLANES; TENSORS]; layers]),
        false => {
            Plan::within(budget, &sensitivity::<B>(checkpoint, &job.recipe, calibration, job.device, &measured)?, bytes)
        }
    };
    writer.file(PLAN_FILE, json!(plan).to_string().as_bytes())?;
    Ok(plan)
}

/// The bytes that all matrices may take, and those of one plane of each tensor of a layer.
pub(crate) fn plane_budget(
    checkpoint: &Checkpoint,
    recipe: &Recipe,
    bits_per_weight: f64,
) -> Result<(f64, LayerPlanes), CalibError> {
    let layers = checkpoint.config().num_hidden_layers();
    let bytes = recipe.plane_bytes(checkpoint.config());
    let weights = (layers * layer_weights(checkpoint, recipe.keep_experts)) as f64;
    let least = 8.0 * (bytes.iter().sum::<usize>() * layers) as f64 / weights;
    // Whatever is no number is too few as well.
    match bits_per_weight >= least {
        true => Ok((bits_per_weight / 8.0 * weights, bytes)),
        false => Err(CalibError::Budget { bits_per_weight, least }),
    }
}

/// Measures the sensitivity of all layers on the first windows of the text.
fn sensitivity<B: TernaryBackend>(
    checkpoint: &Checkpoint,
    recipe: &Recipe,
    calibration: &Calibration,
    device: &B::Device,
    progress: &dyn Fn(),
) -> Result<Vec<LayerSensitivity>, CalibError> {
    let config = checkpoint.config();
    let rope = RotaryEmbedding::new(&config.rope, config.head_dim).tables(0..calibration.context(), device);
    let table = Table::<B>::embedding(checkpoint, device)?;
    let windows = calibration.windows().iter().take(WINDOWS.min(calibration.calibrated()));
    let mut streams: Vec<_> = windows.map(|window| embed(&table, window, device)).collect();
    let recipe = Recipe { steps: Steps { rotation: recipe.steps.rotation, ..Steps::NONE }, ..*recipe };
    let layers = 0..config.num_hidden_layers();
    let probe = |number| {
        let errors = Probe { checkpoint, recipe, number, device }.layer(&mut streams, &rope)?;
        progress();
        Ok(errors)
    };
    layers.map(probe).collect()
}

/// One layer whose matrices are tried.
struct Probe<'a, B: TernaryBackend> {
    checkpoint: &'a Checkpoint,
    recipe: Recipe,
    number: usize,
    device: &'a B::Device,
}

impl<B: TernaryBackend> Probe<'_, B> {
    /// Takes the streams through the layer and tries every tensor with every number of planes.
    fn layer(&self, streams: &mut [Tensor<B, 2>], rope: &RotaryTables<B>) -> Result<LayerSensitivity, CalibError> {
        let options = LoadOptions { experts: ExpertPlacement::Streamed, ..LoadOptions::default() };
        let layer = Layer::<B>::load(self.checkpoint, self.number, options, self.device)?;
        let mut errors = LayerSensitivity::default();
        let normed: Vec<_> = streams.iter().map(|x| apply_norm(&layer.input_layernorm, x.clone())).collect();
        let window = self.checkpoint.config().window(self.number);
        let attend = |attention: &Attention<B>| {
            let attend = |x: &Tensor<B, 2>| attention.forward(x.clone(), rope, &mut LayerCache::new(window));
            Tensor::cat(normed.par_iter().map(attend).collect(), 0)
        };
        let output = attend(&layer.self_attn);
        add_rows(streams, output.clone());
        let power = squares(Tensor::cat(streams.to_vec(), 0));
        for (tensor, name) in LinearName::ALL.into_iter().enumerate() {
            let shape @ [in_features, rows] = name.shape(self.checkpoint.config());
            let weight = self.checkpoint.floats(&format!("{}.weight", name.path(self.number)), &[rows, in_features])?;
            for planes in 1..=MAX_PLANES {
                let mut attention = layer.self_attn.clone();
                let linear = match name {
                    LinearName::Q => &mut attention.q_proj,
                    LinearName::K => &mut attention.k_proj,
                    LinearName::V => &mut attention.v_proj,
                    LinearName::O => &mut attention.o_proj,
                };
                *linear = self.ternary(weight.clone(), shape, linear.bias(), planes)?;
                errors[tensor][planes - 1] = relative(&squares(attend(&attention) - output.clone()), &power);
            }
        }
        self.experts(&layer, streams, &mut errors)?;
        Ok(errors)
    }

    fn experts(
        &self,
        layer: &Layer<B>,
        streams: &mut [Tensor<B, 2>],
        errors: &mut LayerSensitivity,
    ) -> Result<(), CalibError> {
        let config = self.checkpoint.config();
        let x =
            Tensor::cat(streams.iter().map(|x| apply_norm(&layer.post_attention_layernorm, x.clone())).collect(), 0);
        let tokens = x.dims()[0];
        let visits = visits(layer.mlp.router.forward(x.clone()), config.num_local_experts, tokens, self.device);
        let mut output = x.zeros_like();
        // Squared change of each token's stream, for gate_up and down and every number of planes.
        let mut changes = vec![0.0f64; 2 * MAX_PLANES * tokens];
        for (expert, visits) in visits.iter().enumerate().filter(|(_, visits)| !visits.rows.is_empty()) {
            let numbers = indices(&visits.rows, self.device);
            let x = x.clone().select(0, numbers.clone());
            let both = ExpertMatrix::ALL.map(|matrix| {
                let shape @ [_, rows] = matrix.shape(config);
                let name = format!("{}_bias", matrix.path(self.number));
                let biases = [config.num_local_experts, rows];
                let bias = self.checkpoint.float_tensor::<B, 2>(&name, biases, self.device)?;
                let bias = bias.slice_dim(0, expert..expert + 1).squeeze_dim::<1>(0);
                let weight = self.checkpoint.expert_rows(self.number, matrix, expert)?;
                Ok::<_, CalibError>((weight, shape, bias))
            });
            let [gate_up, down] = both;
            let ((gate_up, shape, bias), (down, down_shape, down_bias)) = (gate_up?, down?);
            let dense = dense_linear(&gate_up, shape, bias.clone(), self.device);
            let dense_down = dense_linear(&down, down_shape, down_bias.clone(), self.device);
            let act = |x: Tensor<B, 2>| clamped_swiglu(x, config.activation());
            let hidden = act(dense.forward(x.clone()));
            let result = dense_down.forward(hidden.clone());
            let mut note = |slot: usize, other: Tensor<B, 2>| {
                let change = squares((other - result.clone()) * visits.weights.clone());
                visits.rows.iter().zip(change).for_each(|(row, change)| changes[slot * tokens + row] += change);
            };
            for planes in 1..=MAX_PLANES {
                let tried = self.ternary(gate_up.clone(), shape, Some(bias.clone()), planes)?;
                note(planes - 1, dense_down.forward(act(tried.forward(x.clone()))));
                let tried = self.ternary(down.clone(), down_shape, Some(down_bias.clone()), planes)?;
                note(MAX_PLANES + planes - 1, tried.forward(hidden.clone()));
            }
            let part = result * visits.weights.clone();
            output = output.select_assign(0, numbers, part, IndexingUpdateOp::Add);
        }
        add_rows(streams, output);
        let power = squares(Tensor::cat(streams.to_vec(), 0));
        for (slot, changes) in changes.chunks_exact(tokens).enumerate() {
            errors[LinearName::ALL.len() + slot / MAX_PLANES][slot % MAX_PLANES] = relative(changes, &power);
        }
        Ok(())
    }

    /// A linear made ternary on its own, without a look at the text.
    fn ternary(
        &self,
        weight: Vec<f32>,
        shape: [usize; 2],
        bias: Option<Tensor<B, 1>>,
        planes: usize,
    ) -> Result<Linear<B>, CalibError> {
        let made = Recipe { planes, ..self.recipe }.ternarize::<B>(weight, shape, None, self.device)?;
        let weight = TernaryTensor::from_packed(made.packed, self.device)?;
        Ok(Linear::Ternary(BitLinear::from_packed(weight, bias)))
    }
}

/// Squared length of each row.
fn squares<B: TernaryBackend>(rows: Tensor<B, 2>) -> Vec<f64> {
    let width = rows.dims()[1];
    host(rows).par_chunks(width).map(|row| row.iter().map(|x| f64::from(*x).powi(2)).sum()).collect()
}

/// The mean of the ratios.
fn relative(changes: &[f64], power: &[f64]) -> f64 {
    let ratios = changes.iter().zip(power).map(|(change, power)| change / power.max(f64::MIN_POSITIVE));
    ratios.sum::<f64>() / changes.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn error(plan: &Plan, sensitivity: &[LayerSensitivity]) -> f64 {
        let pairs = plan.0.iter().flatten().zip(sensitivity.iter().flatten());
        pairs.map(|(planes, errors)| errors[planes - 1]).sum()
    }

    /// The best of all plans of one layer.
    fn best(budget: f64, sensitivity: &LayerSensitivity, bytes: LayerPlanes) -> f64 {
        let mut best = f64::INFINITY;
        for code in 0..MAX_PLANES.pow(TENSORS as u32) {
            let planes: LayerPlanes = std::array::from_fn(|i| code / MAX_PLANES.pow(i as u32) % MAX_PLANES + 1);
            if planes.iter().zip(bytes).map(|(p, b)| p * b).sum::<usize>() as f64 <= budget {
                best = best.min(error(&Plan(vec![planes]), &[*sensitivity]));
            }
        }
        best
    }

    proptest! {
        #[test]
        fn with_shrinking_gains_and_equal_sizes_no_plan_is_better(
            gains in prop::array::uniform6((0.1f64..1.0, 0.0f64..1.0)),
            extra in 0usize..=12,
        ) {
            let sensitivity = gains.map(|(first, share)| [2.0, 2.0 - first, 2.0 - first - first * share]);
            let budget = (6 + extra) as f64 * 10.0;
            let plan = Plan::within(budget, &[sensitivity], [10; TENSORS]);
            let bytes = plan.0[0].iter().sum::<usize>() * 10;
            prop_assert!(bytes as f64 <= budget);
            prop_assert!(error(&plan, &[sensitivity]) <= best(budget, &sensitivity, [10; TENSORS]) + 1e-9);
        }
    }

    #[test]
    fn planes_go_where_they_help_and_never_over_the_budget() {
        let mut sensitivity = [[[0.1, 0.09, 0.08]; TENSORS]; 2];
        sensitivity[1][3] = [9.0, 1.0, 0.5];
        let bytes = [8, 2, 2, 8, 64, 32];
        let one_plane = 2.0 * 116.0;
        let plan = Plan::within(one_plane + 8.0, &sensitivity, bytes);
        assert_eq!(plan.0, [[1; 6], [1, 1, 1, 2, 1, 1]]);
        assert_eq!(Plan::within(one_plane, &sensitivity, bytes).most(), 1);
        assert_eq!(Plan::within(3.0 * one_plane, &sensitivity, bytes).0, [[3; 6]; 2]);
    }
}
