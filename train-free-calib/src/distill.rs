//! End-to-end distillation: scales, norms, biases, sinks and router of a ternary model tuned until it predicts what the
//! full-precision model predicts. Trits stay.
//!
//! Memory holds no more than one layer in floats: the backward pass goes from layer to layer, each run forward again from
//! the inputs that were kept (gradient checkpointing, Chen et al., arXiv 1604.06174).

use std::f64::consts::PI;

use burn::{
    module::{AutodiffModule, Module, Param},
    nn::RmsNorm,
    optim::GradientsParams,
    tensor::{Tensor, TensorData, activation::log_softmax},
};
use burn_autodiff::Autodiff;
use rayon::prelude::*;
use ternoss_backends::TernaryBackend;
use ternoss_model::{
    Checkpoint, ExpertPlacement, GptOss, LoadOptions,
    cache::LayerCache,
    checkpoint::FINAL_NORM,
    layer::Layer,
    perplexity::{Comparison, rows_at_once},
    rope::{RotaryEmbedding, RotaryTables},
    table::Table,
};

use crate::{
    CalibError, Calibration,
    activations::add_rows,
    layer::TernaryLayer,
    report::HeldOut,
    solution::host,
    tuned::{Tuned, TunedLayer},
};

/// Windows whose gradients make a step.
pub const WINDOWS_PER_STEP: usize = 2;

/// Share of the steps in which the learning rate rises.
const WARM_UP: f64 = 0.1;

/// A model under distillation.
pub(crate) struct Distillation<'a, B: TernaryBackend> {
    calibration: &'a Calibration,
    device: &'a B::Device,
    embedding: Table<B>,
    /// The output layer of the full-precision model, and of the ternary one.
    heads: [Table<B>; 2],
    layers: Vec<TunedLayer<B>>,
    windows: Vec<Option<usize>>,
    norm: RmsNorm<B>,
    tuned_norm: Tuned<B>,
    rope: RotaryEmbedding,
    /// The windows that are learned from, then those that are held out.
    texts: Vec<&'a [u32]>,
    /// What the full-precision model's output layer sees, one tensor a window.
    targets: Vec<Tensor<B, 2>>,
}

/// What distillation made of a model.
pub(crate) struct Distilled<B: TernaryBackend> {
    pub(crate) layers: Vec<TunedLayer<B>>,
    /// Weight of the norm before the output layer.
    pub(crate) norm: Tensor<B, 1>,
    pub(crate) before: HeldOut,
    pub(crate) after: HeldOut,
}

impl<B: TernaryBackend> Distilled<B> {
    /// What changed outside the layers.
    pub(crate) fn outside(&self) -> TernaryLayer {
        let norm = host(self.norm.clone());
        TernaryLayer { floats: vec![(FINAL_NORM.into(), vec![norm.len()], norm)], ..TernaryLayer::default() }
    }
}

impl<'a, B: TernaryBackend> Distillation<'a, B> {
    /// Runs the full-precision model once, layer by layer, and opens the ternary one.
    pub(crate) fn new(
        teacher: &Checkpoint,
        student: &Checkpoint,
        calibration: &'a Calibration,
        device: &'a B::Device,
    ) -> Result<Self, CalibError> {
        let config = teacher.config();
        let rope = RotaryEmbedding::new(&config.rope, config.head_dim);
        let tables = rope.tables(0..calibration.context(), device);
        let windows = (0..config.num_hidden_layers()).map(|layer| config.window(layer)).collect::<Vec<_>>();
        let options = LoadOptions { experts: ExpertPlacement::Streamed, ..LoadOptions::default() };
        let texts: Vec<_> = calibration.distilled().iter().chain(calibration.held_out()).map(Vec::as_slice).collect();
        let embedding = Table::<B>::embedding(teacher, device)?;
        let mut targets: Vec<_> = texts.iter().map(|text| embed(&embedding, text, device)).collect();
        for (number, window) in windows.iter().enumerate() {
            let layer = Layer::<B>::load(teacher, number, options, device)?;
            targets.par_iter_mut().for_each(|x| {
                let normed = layer.input_layernorm.forward(x.clone());
                *x = x.clone() + layer.self_attn.forward(normed, &tables, &mut LayerCache::new(*window));
            });
            // All windows at once, so that every expert is decoded once.
            let normed = targets.iter().map(|x| layer.post_attention_layernorm.forward(x.clone())).collect();
            add_rows(&mut targets, layer.mlp.forward(Tensor::cat(normed, 0)));
        }
        let [full, ternary] = [teacher, student].map(|checkpoint| GptOss::<B>::load(checkpoint, options, device));
        let (full, ternary) = (full?, ternary?);
        let targets = targets.into_iter().map(|x| full.norm.forward(x)).collect();
        let layers = ternary.layers.into_iter().map(|layer| TunedLayer::new(layer, Vec::new()));
        Ok(Self {
            calibration,
            device,
            embedding: ternary.embed_tokens,
            heads: [full.lm_head, ternary.lm_head],
            layers: layers.collect::<Result<_, _>>()?,
            windows,
            tuned_norm: Tuned::vector(ternary.norm.gamma.val()),
            norm: ternary.norm,
            rope,
            texts,
            targets,
        })
    }

    /// Takes `steps` steps with learning rates up to `peak`; `progress` hears of each and its loss.
    pub(crate) fn run(mut self, steps: usize, peak: f64, progress: &dyn Fn(f64)) -> Result<Distilled<B>, CalibError> {
        let before = self.held_out()?;
        for step in 0..steps {
            let first = step * WINDOWS_PER_STEP;
            let batch: Vec<usize> =
                (first..first + WINDOWS_PER_STEP).map(|w| w % self.calibration.distilled().len()).collect();
            progress(self.step(&batch, peak * learning_rate(step, steps))?);
        }
        let after = self.held_out()?;
        Ok(Distilled { norm: self.tuned_norm.value(0).inner(), layers: self.layers, before, after })
    }

    /// One step on some windows; gives the mean divergence before it.
    fn step(&mut self, batch: &[usize], learning_rate: f64) -> Result<f64, CalibError> {
        let rope = self.rope.tables(0..self.calibration.context(), self.device);
        let mut inputs = vec![self.embed(batch)];
        for number in 0..self.layers.len() {
            let layer = self.layers[number].compose(1.0, false)?.layer.valid();
            let x = inputs[number].iter().map(|x| self.forward(&layer, number, x.clone(), &rope));
            inputs.push(x.collect());
        }
        let last = inputs.pop().unwrap_or_default();
        let (loss, mut upstream) = self.loss(batch, last, learning_rate);
        let tables = self.rope.tables::<Autodiff<B>>(0..self.calibration.context(), self.device);
        for (number, inputs) in inputs.into_iter().enumerate().rev() {
            let layer = self.layers[number].compose(1.0, false)?.layer;
            let inputs: Vec<_> = inputs.into_iter().map(|x| Tensor::from_inner(x).require_grad()).collect();
            let outputs = inputs.iter().zip(&upstream).map(|(x, upstream)| {
                let y = layer.forward(x.clone(), &tables, &mut LayerCache::new(self.windows[number]));
                (y * Tensor::from_inner(upstream.clone())).sum()
            });
            let Some(total) = outputs.reduce(|sum, loss| sum + loss) else { break };
            let mut gradients = total.backward();
            upstream = inputs.iter().filter_map(|x| x.grad(&gradients)).collect();
            let tuned = &mut self.layers[number].tuned;
            let gradients = tuned.gradients(&mut gradients);
            tuned.step(learning_rate, gradients);
        }
        Ok(loss)
    }

    fn embed(&self, batch: &[usize]) -> Vec<Tensor<B, 2>> {
        batch.iter().map(|window| embed(&self.embedding, self.texts[*window], self.device)).collect()
    }

    fn forward(&self, layer: &Layer<B>, number: usize, x: Tensor<B, 2>, rope: &RotaryTables<B>) -> Tensor<B, 2> {
        layer.forward(x, rope, &mut LayerCache::new(self.windows[number]))
    }

    /// The mean divergence from the full-precision model's predictions, and its gradient by the residual streams after the
    /// last layer; tunes the last norm on the way.
    fn loss(&mut self, batch: &[usize], last: Vec<Tensor<B, 2>>, learning_rate: f64) -> (f64, Vec<Tensor<B, 2>>) {
        let head = Table::<Autodiff<B>>::from_inner(self.heads[1].clone()).no_grad();
        let norm = RmsNorm::<Autodiff<B>>::from_inner(self.norm.clone());
        let norm = RmsNorm { gamma: Param::initialized(norm.gamma.id, self.tuned_norm.value(0)), ..norm };
        let (mut divergence, mut tokens) = (0.0, 0);
        let mut of_norm = GradientsParams::new();
        let mut upstream = Vec::new();
        for (window, x) in batch.iter().zip(last) {
            let count = x.dims()[0];
            let mut parts = Vec::new();
            for first in (0..count).step_by(rows_at_once(head.rows())) {
                let rows = first..(first + rows_at_once(head.rows())).min(count);
                let target = self.targets[*window].clone().slice_dim(0, rows.clone());
                let target = log_softmax(self.heads[0].logits(target), 1);
                let x = Tensor::<Autodiff<B>, 2>::from_inner(x.clone().slice_dim(0, rows)).require_grad();
                let own = log_softmax(head.logits(norm.forward(x.clone())), 1);
                let loss = (Tensor::from_inner(target.clone().exp()) * (Tensor::from_inner(target) - own)).sum();
                divergence += loss.clone().into_data().iter::<f32>().map(f64::from).sum::<f64>();
                let mut gradients = loss.backward();
                parts.extend(x.grad(&gradients));
                let gradients = self.tuned_norm.gradients(&mut gradients);
                of_norm = self.tuned_norm.add(of_norm, gradients);
            }
            upstream.push(Tensor::cat(parts, 0));
            tokens += count;
        }
        self.tuned_norm.step(learning_rate, of_norm);
        (divergence / tokens as f64, upstream)
    }

    /// Measures the model, packed, on the held-out windows.
    fn held_out(&self) -> Result<HeldOut, CalibError> {
        let rope = self.rope.tables(0..self.calibration.context(), self.device);
        let held_out = self.calibration.distilled().len()..self.texts.len();
        let mut streams = self.embed(&held_out.clone().collect::<Vec<_>>());
        for (number, layer) in self.layers.iter().enumerate() {
            let layer = layer.harden()?.layer;
            for x in &mut streams {
                *x = self.forward(&layer, number, x.clone(), &rope);
            }
        }
        let gamma = Param::initialized(self.norm.gamma.id, self.tuned_norm.value(0).inner());
        let norm = RmsNorm { gamma, ..self.norm.clone() };
        let mut sum = Comparison::default();
        for (window, x) in held_out.zip(streams) {
            let target = self.targets[window].clone();
            sum.add((&self.heads[1], norm.forward(x)), (&self.heads[0], target), self.texts[window]);
        }
        Ok(HeldOut::new(&sum, self.calibration.held_out().len() * self.calibration.context()))
    }
}

/// The residual stream of a window before the first layer.
pub(crate) fn embed<B: TernaryBackend>(table: &Table<B>, window: &[u32], device: &B::Device) -> Tensor<B, 2> {
    let ids: Vec<i64> = window.iter().map(|id| i64::from(*id)).collect();
    let shape = [ids.len()];
    table.embed(Tensor::from_data(TensorData::new(ids, shape), device))
}

/// Share of the peak learning rate: rises for the first steps, then falls to zero along a cosine.
pub(crate) fn learning_rate(step: usize, steps: usize) -> f64 {
    let done = (step as f64 + 0.5) / steps as f64;
    match done < WARM_UP {
        true => done / WARM_UP,
        false => 0.5 * (1.0 + (PI * (done - WARM_UP) / (1.0 - WARM_UP)).cos()),
    }
}
