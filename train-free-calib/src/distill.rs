//! End-to-end distillation: scales, norms, biases, sinks and router of a ternary model tuned until it predicts what the
//! full-precision model predicts. Trits stay.
//!
//! Memory holds no more than one layer in floats for each window of a step: the backward pass goes from layer to layer, each
//! run forward again from the inputs that were kept (gradient checkpointing, Chen et al., arXiv 1604.06174).
//!
//! What the full-precision model predicts from is computed once, and kept in a file beside the unfinished output; another
//! one, written anew every few steps, holds how far everything has moved.

use std::{f64::consts::PI, panic::resume_unwind, path::Path, sync::Arc};

use burn::{
    module::{AutodiffModule, Module, Param},
    nn::RmsNorm,
    tensor::{Tensor, activation::log_softmax},
};
use burn_autodiff::Autodiff;
use serde_json::json;
use ternoss_backends::TernaryBackend;
use ternoss_model::{
    Checkpoint, ExpertPlacement, GptOss, LoadOptions,
    cache::LayerCache,
    checkpoint::FINAL_NORM,
    layer::{Layer, apply_norm},
    perplexity::{Comparison, rows_at_once},
    rope::{RotaryEmbedding, RotaryTables},
    table::Table,
};

use crate::{
    CalibError, Calibration,
    activations::{add_rows, embed},
    adam::{SlotGradients, Tuned, add},
    layer::TernaryLayer,
    report::HeldOut,
    rows::{ActivationMemory, Rows},
    snapshot::{SnapshotReader, SnapshotWriter},
    solution::host,
    tuned::TunedLayer,
};

/// Windows whose gradients make a step.
pub const WINDOWS_PER_STEP: usize = 2;

/// Share of the steps in which the learning rate rises.
const WARM_UP: f64 = 0.1;

/// Steps after which the state is written down.
const STEPS_PER_SAVE: usize = 5;

/// Tokens that go through the full-precision model's experts at a time: each expert is decoded once for them.
const TOKENS_AT_ONCE: usize = 8192;

/// What the full-precision model's output layer sees.
const TARGETS_FILE: &str = "distillation-targets.bin";

/// How far distillation has come.
const STATE_FILE: &str = "distillation-state.bin";

/// All files that a distillation leaves in the unfinished output.
pub(crate) const DISTILLATION_FILES: [&str; 2] = [TARGETS_FILE, STATE_FILE];

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
    /// What the full-precision model's output layer sees, a block a window.
    targets: Rows<B>,
}

/// How long, how fast, and where its files are.
pub(crate) struct Course<'a> {
    pub(crate) steps: usize,
    /// Highest learning rate.
    pub(crate) peak: f64,
    /// The unfinished output.
    pub(crate) folder: &'a Path,
    pub(crate) memory: &'a Arc<ActivationMemory>,
    /// Hears of steps that are done, and of the divergence before them.
    pub(crate) progress: &'a dyn Fn(usize, Option<f64>),
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
    /// Runs the full-precision model once, unless an earlier run has, and opens the ternary one.
    pub(crate) fn new(
        teacher: &Checkpoint,
        student: &Checkpoint,
        calibration: &'a Calibration,
        course: &Course<'_>,
        device: &'a B::Device,
    ) -> Result<Self, CalibError> {
        let config = teacher.config();
        let windows = (0..config.num_hidden_layers()).map(|layer| config.window(layer)).collect();
        let options = LoadOptions { experts: ExpertPlacement::Streamed, ..LoadOptions::default() };
        let texts: Vec<_> = calibration.distilled().iter().chain(calibration.held_out()).map(Vec::as_slice).collect();
        let (norm, head) = GptOss::<B>::load_output(teacher, device)?;
        let targets = targets(teacher, &norm, &texts, course, device)?;
        let ternary = GptOss::<B>::load(student, options, device)?;
        let layers = ternary.layers.into_iter().map(|layer| TunedLayer::new(layer, Vec::new()));
        Ok(Self {
            calibration,
            device,
            embedding: ternary.embed_tokens,
            heads: [head, ternary.lm_head],
            layers: layers.collect::<Result<_, _>>()?,
            windows,
            tuned_norm: Tuned::vector(ternary.norm.gamma.val()),
            norm: ternary.norm,
            rope: RotaryEmbedding::new(&config.rope, config.head_dim),
            texts,
            targets,
        })
    }

    /// Takes all steps that no earlier run has taken.
    pub(crate) fn run(mut self, course: &Course<'_>) -> Result<Distilled<B>, CalibError> {
        let &Course { steps, peak, progress, .. } = course;
        let state = course.folder.join(STATE_FILE);
        let (taken, before) = match state.exists() {
            true => self.load(&state)?,
            false => (0, self.held_out()?),
        };
        progress(taken, None);
        for step in taken..steps {
            let first = step * WINDOWS_PER_STEP;
            let batch: Vec<usize> =
                (first..first + WINDOWS_PER_STEP).map(|w| w % self.calibration.distilled().len()).collect();
            progress(1, Some(self.step(&batch, peak * share_of_peak(step, steps))?));
            if (step + 1) % STEPS_PER_SAVE == 0 {
                self.save(&state, step + 1, &before)?;
            }
        }
        let after = self.held_out()?;
        Ok(Distilled { norm: self.tuned_norm.value(0).inner(), layers: self.layers, before, after })
    }

    /// Writes down everything that the steps so far have changed, and how good the model was before them.
    fn save(&self, path: &Path, steps: usize, before: &HeldOut) -> Result<(), CalibError> {
        let mut file = SnapshotWriter::create(path)?;
        let before = json!(before).to_string();
        file.number(steps as u64)?;
        file.number(before.len() as u64)?;
        file.bytes(before.as_bytes())?;
        self.tuned().try_for_each(|tuned| tuned.save(&mut file))?;
        file.finish()
    }

    /// Goes on from what [`save`](Self::save) wrote.
    fn load(&mut self, path: &Path) -> Result<(usize, HeldOut), CalibError> {
        let mut file = SnapshotReader::open(path)?;
        let (steps, length) = (file.number()?, file.number()?);
        let before = serde_json::from_slice(&file.bytes(length)?).map_err(|_| file.damaged())?;
        self.tuned_norm.load(&mut file)?;
        self.layers.iter_mut().try_for_each(|layer| layer.tuned.load(&mut file))?;
        file.end()?;
        Ok((steps as usize, before))
    }

    /// Everything that gradients change, in the order in which it is written.
    fn tuned(&self) -> impl Iterator<Item = &Tuned<B>> {
        std::iter::once(&self.tuned_norm).chain(self.layers.iter().map(|layer| &layer.tuned))
    }

    /// One step on some windows; gives the mean divergence before it.
    fn step(&mut self, batch: &[usize], learning_rate: f64) -> Result<f64, CalibError> {
        let rope = self.rope.tables(0..self.calibration.context(), self.device);
        let mut inputs = vec![self.embed(batch)];
        for number in 0..self.layers.len() {
            let layer = self.layers[number].still().compose(1.0, false)?.layer.valid();
            inputs.push(side_by_side(inputs[number].clone(), |x| self.forward(&layer, number, x, &rope)));
        }
        let last = inputs.pop().unwrap_or_default();
        let (loss, mut upstream) = self.loss(batch, last, learning_rate)?;
        let tables = self.rope.tables::<Autodiff<B>>(0..self.calibration.context(), self.device);
        for (number, inputs) in inputs.into_iter().enumerate().rev() {
            let (layer, window) = (&self.layers[number], self.windows[number]);
            let windows = inputs.into_iter().zip(upstream).collect();
            let gradients = side_by_side(windows, |(x, upstream)| backward(layer, x, upstream, &tables, window));
            let gradients = gradients.into_iter().collect::<Result<Vec<_>, _>>()?;
            let (further, of_layer): (Vec<_>, Vec<_>) = gradients.into_iter().unzip();
            upstream = further.into_iter().flatten().collect();
            if let Some(gradients) = of_layer.into_iter().reduce(add) {
                self.layers[number].tuned.step(learning_rate, gradients);
            }
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
    fn loss(
        &mut self,
        batch: &[usize],
        last: Vec<Tensor<B, 2>>,
        learning_rate: f64,
    ) -> Result<(f64, Vec<Tensor<B, 2>>), CalibError> {
        let tokens: usize = last.iter().map(|x| x.dims()[0]).sum();
        let targets = batch.iter().map(|window| self.targets.get(*window)).collect::<Result<Vec<_>, _>>()?;
        let windows = last.into_iter().zip(targets).collect();
        let (mut divergence, mut of_norm, mut upstream) = (0.0, vec![None], Vec::new());
        let rows = rows_at_once(self.heads[1].rows());
        let of_window = |(x, targets)| loss_of_window(&self.heads, (&self.norm, &self.tuned_norm), x, targets, rows);
        for (loss, gradient, x) in side_by_side(windows, of_window) {
            divergence += loss;
            of_norm = add(of_norm, gradient);
            upstream.push(x);
        }
        self.tuned_norm.step(learning_rate, of_norm);
        Ok((divergence / tokens as f64, upstream))
    }

    /// Measures the model, packed, on the held-out windows.
    fn held_out(&self) -> Result<HeldOut, CalibError> {
        let rope = self.rope.tables(0..self.calibration.context(), self.device);
        let held_out = self.calibration.distilled().len()..self.texts.len();
        let mut streams = self.embed(&held_out.clone().collect::<Vec<_>>());
        for (number, layer) in self.layers.iter().enumerate() {
            let layer = layer.harden()?.layer;
            for some in streams.chunks_mut(WINDOWS_PER_STEP) {
                let after = side_by_side(some.to_vec(), |x| self.forward(&layer, number, x, &rope));
                some.clone_from_slice(&after);
            }
        }
        let gamma = Param::initialized(self.norm.gamma.id, self.tuned_norm.value(0).inner());
        let norm = RmsNorm { gamma, ..self.norm.clone() };
        let mut sum = Comparison::default();
        for (window, x) in held_out.zip(streams) {
            let target = self.targets.get(window)?;
            sum.add((&self.heads[1], apply_norm(&norm, x)), (&self.heads[0], target), self.texts[window]);
        }
        Ok(HeldOut::new(&sum, self.calibration.held_out().len() * self.calibration.context()))
    }
}

/// The sum of the divergence over the tokens of a window, and its gradients by the last norm and by the residual stream
/// `x [tokens, hidden]`; `targets` are what the first of `heads` sees. So many `rows` of logits are in memory at a time.
fn loss_of_window<B: TernaryBackend>(
    heads: &[Table<B>; 2],
    (norm, tuned): (&RmsNorm<B>, &Tuned<B>),
    x: Tensor<B, 2>,
    targets: Tensor<B, 2>,
    rows: usize,
) -> (f64, SlotGradients<B>, Tensor<B, 2>) {
    let head = Table::<Autodiff<B>>::from_inner(heads[1].clone()).no_grad();
    let tuned = tuned.apart();
    let count = x.dims()[0];
    let (mut divergence, mut of_norm, mut parts) = (0.0, vec![None], Vec::new());
    for first in (0..count).step_by(rows) {
        let part = first..(first + rows).min(count);
        // Anew for each part: a backward pass takes what it has gone through out of the graph.
        let norm = RmsNorm::<Autodiff<B>>::from_inner(norm.clone());
        let norm = RmsNorm { gamma: Param::initialized(norm.gamma.id, tuned.value(0)), ..norm };
        let target = log_softmax(heads[0].logits(targets.clone().slice_dim(0, part.clone())), 1);
        let x = Tensor::<Autodiff<B>, 2>::from_inner(x.clone().slice_dim(0, part)).require_grad();
        let logits = head.logits(apply_norm(&norm, x.clone()));
        let own = log_softmax(logits.clone().inner(), 1);
        let share = target.clone().exp();
        // What the logits' gradient of the divergence is, without a graph over the whole vocabulary.
        let upstream = own.clone().exp() - share.clone();
        divergence += host((share * (target - own)).sum_dim(1)).into_iter().map(f64::from).sum::<f64>();
        let gradients = (logits * Tensor::from_inner(upstream)).sum().backward();
        parts.extend(x.grad(&gradients));
        of_norm = add(of_norm, tuned.gradients(&gradients));
    }
    (divergence, of_norm, Tensor::cat(parts, 0))
}

/// Does the same with every window. Each has a thread of its own: one of rayon's would take up other windows in the middle of
/// a backward pass, and Burn's gradients wait for each other there. What these threads share out goes to rayon's global pool.
fn side_by_side<T: Send, U: Send>(windows: Vec<T>, work: impl Fn(T) -> U + Sync) -> Vec<U> {
    std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = windows.into_iter().map(|window| scope.spawn(move || work(window))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    })
}

/// The gradients by a layer's input and by all that is tuned in it, from the one by its output.
fn backward<B: TernaryBackend>(
    layer: &TunedLayer<B>,
    x: Tensor<B, 2>,
    upstream: Tensor<B, 2>,
    rope: &RotaryTables<Autodiff<B>>,
    window: Option<usize>,
) -> Result<(Option<Tensor<B, 2>>, SlotGradients<B>), CalibError> {
    let layer = layer.apart();
    let x = Tensor::from_inner(x).require_grad();
    let y = layer.compose(1.0, false)?.layer.forward(x.clone(), rope, &mut LayerCache::new(window));
    let gradients = (y * Tensor::from_inner(upstream)).sum().backward();
    Ok((x.grad(&gradients), layer.tuned.gradients(&gradients)))
}

/// What the output layer of the full-precision model sees: computed layer by layer, or left of an earlier run.
fn targets<B: TernaryBackend>(
    teacher: &Checkpoint,
    norm: &RmsNorm<B>,
    texts: &[&[u32]],
    course: &Course<'_>,
    device: &B::Device,
) -> Result<Rows<B>, CalibError> {
    let config = teacher.config();
    let context = texts.first().map_or(0, |text| text.len());
    let mut targets = Rows::new(course.memory, [context, config.hidden_size], device);
    let path = course.folder.join(TARGETS_FILE);
    if path.exists() {
        let mut file = SnapshotReader::open(&path)?;
        targets.load(&mut file, texts.len())?;
        file.end()?;
        return Ok(targets);
    }
    let rope = RotaryEmbedding::new(&config.rope, config.head_dim).tables(0..context, device);
    let embedding = Table::<B>::embedding(teacher, device)?;
    texts.iter().try_for_each(|text| targets.push(embed(&embedding, text, device)))?;
    for number in 0..config.num_hidden_layers() {
        let options = LoadOptions { experts: ExpertPlacement::Streamed, ..LoadOptions::default() };
        let layer = Layer::<B>::load(teacher, number, options, device)?;
        targets.update(|_, x| {
            let normed = apply_norm(&layer.input_layernorm, x.clone());
            Ok(x + layer.self_attn.forward(normed, &rope, &mut LayerCache::new(config.window(number))))
        })?;
        let at_once = (TOKENS_AT_ONCE / context.max(1)).max(1);
        for first in (0..texts.len()).step_by(at_once) {
            let windows = first..texts.len().min(first + at_once);
            let mut streams = windows.clone().map(|window| targets.get(window)).collect::<Result<Vec<_>, _>>()?;
            let normed = streams.iter().map(|x| apply_norm(&layer.post_attention_layernorm, x.clone())).collect();
            add_rows(&mut streams, layer.mlp.forward(Tensor::cat(normed, 0)));
            windows.zip(streams).try_for_each(|(window, x)| targets.set(window, x))?;
        }
    }
    targets.update(|_, x| Ok(apply_norm(norm, x)))?;
    let mut file = SnapshotWriter::create(&path)?;
    targets.save(&mut file)?;
    file.finish()?;
    Ok(targets)
}

/// Share of the peak learning rate: rises for the first steps, then falls to zero along a cosine.
pub(crate) fn share_of_peak(step: usize, steps: usize) -> f64 {
    let done = (step as f64 + 0.5) / steps as f64;
    match done < WARM_UP {
        true => done / WARM_UP,
        false => 0.5 * (1.0 + (PI * (done - WARM_UP) / (1.0 - WARM_UP)).cos()),
    }
}

#[cfg(test)]
mod tests {
    use burn_flex::Flex;
    use ternoss_model::{Checkpoint, GptOss};

    use super::*;

    /// `[7, hidden]`, different for each seed.
    fn stream(hidden: usize, seed: f32) -> Tensor<Flex, 2> {
        let values: Vec<f32> = (0..7 * hidden).map(|i| (i as f32 * 0.37 + seed).sin()).collect();
        Tensor::<Flex, 1>::from_floats(values.as_slice(), &Default::default()).reshape([7, hidden])
    }

    #[test]
    fn a_window_in_parts_gives_the_gradients_of_the_whole() {
        let checkpoint = Checkpoint::open("../examples/tiny-gpt-oss".as_ref()).unwrap();
        let (norm, head) = GptOss::<Flex>::load_output(&checkpoint, &Default::default()).unwrap();
        let hidden = checkpoint.config().hidden_size;
        let (heads, tuned) = ([head.clone(), head], Tuned::vector(norm.gamma.val()));
        let loss = |rows| {
            let (x, targets) = (stream(hidden, 1.0), stream(hidden, 2.0));
            let (loss, of_norm, of_x) = loss_of_window(&heads, (&norm, &tuned), x, targets, rows);
            let of_norm = host(of_norm.into_iter().next().flatten().unwrap());
            (loss, of_norm, host(of_x.reshape([7 * hidden])))
        };
        let (whole, of_norm, of_x) = loss(7);
        // Along a direction, the gradient is what a difference says.
        let direction = stream(hidden, 3.0);
        let [after, before] = [0.01, -0.01].map(|far| {
            let x = stream(hidden, 1.0) + direction.clone() * far;
            loss_of_window(&heads, (&norm, &tuned), x, stream(hidden, 2.0), 7).0
        });
        let slope: f64 = of_x.iter().zip(host(direction)).map(|(a, b)| f64::from(a * b)).sum();
        let difference = (after - before) / 0.02;
        assert!((slope / difference - 1.0).abs() < 1e-2, "{slope} {difference}");
        let largest = of_norm.iter().fold(0f32, |most, value| most.max(value.abs()));
        assert!(whole > 1.0 && largest > 1e-2, "{whole} {largest}");
        for rows in [1, 2, 3, 100] {
            let parts = loss(rows);
            assert!((parts.0 / whole - 1.0).abs() < 1e-5, "{} in parts of {rows}, {whole}", parts.0);
            for (parts, whole) in [(parts.1, &of_norm), (parts.2, &of_x)] {
                assert_eq!(parts.len(), whole.len());
                let apart = parts.iter().zip(whole).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(apart < 1e-5 * largest.max(1.0), "{apart} in parts of {rows}");
            }
        }
    }
}
