//! Block reconstruction: one ternary layer tuned by gradients until its output is the full-precision layer's.
//!
//! BRECQ (Li et al., arXiv 2102.05426) with the soft rounding of AdaRound (Nagel et al., arXiv 2004.10568): every trit may
//! go to one neighbour, starts where error compensation left it, and pays a price for leaving, so that few go.

use std::ops::Range;

use burn::tensor::{Tensor, TensorData};
use burn_autodiff::Autodiff;
use ternoss_backends::{TernaryBackend, TernaryWeight};
use ternoss_model::{
    Checkpoint,
    cache::LayerCache,
    checkpoint::{ExpertMatrix, LinearName},
    experts::Experts,
    layer::Layer,
    rope::RotaryTables,
};
use ternoss_quant::{BitLinear, BitWeight, Linear};

use crate::{
    CalibError, adam::charge, distill::share_of_peak, hard::HardLayer, report::Reconstruction, rows::Rows,
    solution::host, ternarize::rotate_rows, tuned::TunedLayer,
};

/// Share of the steps in which trits are soft; in the rest only what is not a trit is tuned.
const SOFT: f64 = 0.7;

/// How hard soft trits become.
const HARDEST: f64 = 4.0;

/// Highest learning rate, in units of what is tuned.
const RECONSTRUCTION_RATE: f64 = 2e-3;

/// A layer under reconstruction.
pub(crate) struct Block<'a, B: TernaryBackend> {
    /// The ternary layer's inputs, a block a window.
    pub(crate) inputs: &'a Rows<B>,
    /// The full-precision layer's outputs.
    pub(crate) targets: &'a Rows<B>,
    /// How many of the windows are calibrated on; the others decide whether the result is kept.
    pub(crate) calibrated: usize,
    /// Positions of a window.
    pub(crate) rope: &'a RotaryTables<B>,
    /// The same, on the backend of the gradients.
    pub(crate) rope_of_gradients: &'a RotaryTables<Autodiff<B>>,
    /// The layer's attention window.
    pub(crate) window: Option<usize>,
}

impl<B: TernaryBackend> Block<'_, B> {
    /// Takes `steps` steps, one window each. The layer that comes out is kept if its error, with hard trits, is lower on the
    /// windows that were not calibrated on.
    ///
    /// `toward` says where each trit may go, for every plane of every matrix.
    pub(crate) fn reconstruct(
        &self,
        layer: &Layer<B>,
        toward: Vec<Tensor<B, 2>>,
        steps: usize,
    ) -> Result<(Reconstruction, Option<HardLayer<B>>), CalibError> {
        let before = self.error(layer)?;
        let soft_steps = (SOFT * steps as f64) as usize;
        let mut tuned = TunedLayer::new(layer.clone(), toward)?;
        self.tune(&mut tuned, 0..soft_steps, steps, true)?;
        let mut tuned = TunedLayer::new(tuned.harden()?.layer, Vec::new())?;
        self.tune(&mut tuned, soft_steps..steps, steps, false)?;
        let hard = tuned.harden()?;
        let after = self.error(&hard.layer)?;
        let kept = after < before;
        Ok((Reconstruction { before, after, kept }, kept.then_some(hard)))
    }

    fn tune(&self, tuned: &mut TunedLayer<B>, run: Range<usize>, steps: usize, soft: bool) -> Result<(), CalibError> {
        let mut prices = None;
        for step in run.clone() {
            let done = (step - run.start) as f64 / run.len() as f64;
            let layer = tuned.compose(HARDEST.powf(done) as f32, false)?.layer;
            let window = step % self.calibrated;
            let (x, target) = (self.inputs.get(window)?, self.targets.get(window)?);
            let scale = 1.0 / square_sum(&(target.clone() - x.clone())).max(f64::MIN_POSITIVE);
            let x = Tensor::<Autodiff<B>, 2>::from_inner(x);
            let y = layer.forward(x, self.rope_of_gradients, &mut LayerCache::new(self.window));
            let loss = (y - Tensor::from_inner(target)).powi_scalar(2).sum() * scale as f32;
            let mut gradients = tuned.tuned.gradients(&loss.backward());
            if soft {
                let prices = prices.get_or_insert_with(|| tuned.tuned.prices(&gradients));
                gradients = charge(gradients, prices);
            }
            tuned.tuned.step(RECONSTRUCTION_RATE * share_of_peak(step, steps), gradients);
        }
        Ok(())
    }

    /// Squared error of the outputs on the held-out windows, over the square of what the full-precision layer adds.
    fn error(&self, layer: &Layer<B>) -> Result<f64, CalibError> {
        let (mut error, mut power) = (0.0, 0.0);
        for window in self.calibrated..self.inputs.blocks() {
            let (x, target) = (self.inputs.get(window)?, self.targets.get(window)?);
            let y = layer.forward(x.clone(), self.rope, &mut LayerCache::new(self.window));
            error += square_sum(&(y - target.clone()));
            power += square_sum(&(target - x));
        }
        Ok(error / power.max(f64::MIN_POSITIVE))
    }
}

/// Where each trit may go, for every plane of every matrix: from 0 to the sign of what is missing, back to 0 otherwise.
///
/// `numbers` are those that the layer's experts have in the checkpoint, in their order.
pub(crate) fn neighbours<B: TernaryBackend>(
    checkpoint: &Checkpoint,
    number: usize,
    student: &Layer<B>,
    numbers: &[usize],
    device: &B::Device,
) -> Result<Vec<Tensor<B, 2>>, CalibError> {
    let config = checkpoint.config();
    let mut all = Vec::new();
    let mut add = |[in_features, rows]: [usize; 2], mut weight: Vec<f32>, packed: TernaryWeight<B>, matrix: usize| {
        if let Some(rotation) = packed.layout.rotation {
            rotate_rows(&mut weight, in_features, rotation);
        }
        let weight = Tensor::<B, 2>::from_data(TensorData::new(weight, [rows, in_features]), device);
        let missing = (weight - packed.to_dense(matrix)).sign();
        for plane in 0..packed.layout.planes {
            let (trits, _) = packed.parts(matrix, plane);
            let zero = trits.clone().equal_elem(0.0).float();
            all.push(missing.clone() * zero - trits);
        }
    };
    for (name, linear) in LinearName::ALL.into_iter().zip(student.self_attn.projections()) {
        let shape @ [in_features, rows] = name.shape(config);
        let weight = checkpoint.floats(&format!("{}.weight", name.path(number)), &[rows, in_features])?;
        if let Linear::Ternary(BitLinear { weight: BitWeight::Packed(packed), .. }) = linear {
            add(shape, weight, packed.weight(), 0);
        }
    }
    if let Experts::Ternary(packed) = &student.mlp.experts {
        for (at, expert) in numbers.iter().enumerate() {
            for (matrix, tensor) in ExpertMatrix::ALL.into_iter().zip([&packed.gate_up_proj, &packed.down_proj]) {
                let weight = checkpoint.expert_rows(number, matrix, *expert)?;
                add(matrix.shape(config), weight, tensor.weight(), at);
            }
        }
    }
    Ok(all)
}

fn square_sum<B: TernaryBackend>(values: &Tensor<B, 2>) -> f64 {
    host(values.clone()).iter().map(|value| f64::from(*value).powi(2)).sum()
}
