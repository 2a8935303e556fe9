//! One layer through calibration: from the activations that reach it to ternary matrices and the activations after it.

use burn::tensor::{Tensor, TensorData};
use rayon::prelude::*;
use ternoss_backends::{TernaryBackend, round_activations};
use ternoss_model::{
    Checkpoint, ExpertPlacement, LoadOptions,
    cache::LayerCache,
    checkpoint::{LinearName, TernaryPath},
    layer::{Layer, apply_norm},
    rope::RotaryEmbedding,
};
use ternoss_quant::{BitLinear, Linear, PackedTernary, TernaryTensor};

use crate::{
    CalibError,
    activations::{Activations, Normed},
    budget::LayerPlanes,
    moments::{Inputs, Moments, Statistics},
    prune,
    reconstruct::{Block, neighbours},
    report::LayerReport,
    rows::{ROWS_AT_ONCE, Rows},
    solution::host,
    ternarize::{Recipe, rotate_rows},
};

/// A float tensor that calibration changed: name, shape, values.
pub(crate) type ChangedFloats = (String, Vec<usize>, Vec<f32>);

/// What a layer became.
#[derive(Default)]
pub(crate) struct TernaryLayer {
    pub(crate) matrices: Vec<(TernaryPath, PackedTernary)>,
    pub(crate) floats: Vec<ChangedFloats>,
    pub(crate) report: LayerReport,
}

/// One layer under calibration.
pub(crate) struct LayerCalibration<'a, B: TernaryBackend> {
    pub(crate) checkpoint: &'a Checkpoint,
    pub(crate) recipe: &'a Recipe,
    pub(crate) device: &'a B::Device,
    pub(crate) progress: &'a (dyn Fn(usize) + Sync),
    pub(crate) number: usize,
    pub(crate) planes: LayerPlanes,
    pub(crate) teacher: Layer<B>,
    pub(crate) student: Layer<B>,
    pub(crate) result: TernaryLayer,
}

impl<'a, B: TernaryBackend> LayerCalibration<'a, B> {
    pub(crate) fn new(
        checkpoint: &'a Checkpoint,
        number: usize,
        recipe: &'a Recipe,
        planes: LayerPlanes,
        device: &'a B::Device,
        progress: &'a (dyn Fn(usize) + Sync),
    ) -> Result<Self, CalibError> {
        let options = LoadOptions { experts: ExpertPlacement::Streamed, ..LoadOptions::default() };
        let teacher = Layer::<B>::load(checkpoint, number, options, device)?;
        let student = teacher.clone();
        Ok(Self {
            checkpoint,
            recipe,
            device,
            progress,
            number,
            planes,
            teacher,
            student,
            result: TernaryLayer::default(),
        })
    }

    /// Calibrates the layer; `activations` are those before it and become those after it.
    pub(crate) fn run(mut self, activations: &mut Activations<B>) -> Result<TernaryLayer, CalibError> {
        // Block reconstruction, where it is asked for and there is text to judge it on.
        let judged = activations.calibrated < activations.student.blocks();
        let steps = self.recipe.steps.reconstruction;
        let inputs = match steps > 0 && judged {
            true => Some(activations.student.map(self.checkpoint.config().hidden_size, |_, x| Ok(x))?),
            false => None,
        };
        self.attention(activations)?;
        self.experts(activations)?;
        if let Some(inputs) = inputs {
            self.reconstruct(steps, &inputs, activations)?;
        }
        Ok(self.result)
    }

    fn reconstruct(
        &mut self,
        steps: usize,
        inputs: &Rows<B>,
        activations: &mut Activations<B>,
    ) -> Result<(), CalibError> {
        let config = self.checkpoint.config();
        let rope = RotaryEmbedding::new(&config.rope, config.head_dim);
        let block = Block {
            inputs,
            targets: &activations.teacher,
            calibrated: activations.calibrated,
            rope: &rope.tables(0..activations.context(), self.device),
            rope_of_gradients: &rope.tables(0..activations.context(), self.device),
            window: config.window(self.number),
        };
        let numbers = self.experts_of_student();
        let toward = neighbours(self.checkpoint, self.number, &self.student, &numbers, self.device)?;
        let (report, result) = block.reconstruct(&self.student, toward, steps)?;
        self.result.report.reconstruction = Some(report);
        let Some(hard) = result else { return Ok(()) };
        for number in 0..inputs.blocks() {
            let x = hard.layer.forward(inputs.get(number)?, block.rope, &mut LayerCache::new(block.window));
            activations.student.set(number, x)?;
        }
        self.student = hard.layer.clone();
        let report = std::mem::take(&mut self.result.report);
        self.result = TernaryLayer { report, ..hard.written(self.number) };
        Ok(())
    }

    /// The numbers that the student's experts have in the checkpoint.
    pub(crate) fn experts_of_student(&self) -> Vec<usize> {
        prune::those_that_stay(&self.result.report.kept, self.checkpoint)
    }

    fn attention(&mut self, activations: &mut Activations<B>) -> Result<(), CalibError> {
        let config = self.checkpoint.config();
        let window = config.window(self.number);
        let context = activations.context();
        let rope = RotaryEmbedding::new(&config.rope, config.head_dim).tables(0..context, self.device);
        let norm = self.teacher.input_layernorm.clone();
        let Activations { teacher, student, calibrated } = activations;
        let normed = |streams| Normed { streams, norm: &norm };
        let (teacher_in, student_in) = (normed(teacher), normed(student));
        let inputs = |at| Ok(Inputs { student: student_in.get(at)?, teacher: teacher_in.get(at)?, lack: None });
        let moments = self.moments(context, *calibrated, inputs);
        let statistics = moments?.statistics();
        for name in [LinearName::Q, LinearName::K, LinearName::V] {
            let linear = self.linear(name, statistics.as_ref())?;
            match name {
                LinearName::Q => self.student.self_attn.q_proj = linear,
                LinearName::K => self.student.self_attn.k_proj = linear,
                _ => self.student.self_attn.v_proj = linear,
            }
        }
        let mixed = |layer: &Layer<B>, streams: &Rows<B>| {
            streams.map(config.num_attention_heads * config.head_dim, |_, x| {
                Ok(layer.self_attn.mix(apply_norm(&norm, x), &rope, &mut LayerCache::new(window)))
            })
        };
        let (teacher_mix, student_mix) = (mixed(&self.teacher, teacher)?, mixed(&self.student, student)?);
        let inputs = |at| {
            let lack = match self.recipe.steps.residual {
                true => Some(teacher.get(at)? - student.get(at)?),
                false => None,
            };
            Ok(Inputs { student: student_mix.get(at)?, teacher: teacher_mix.get(at)?, lack })
        };
        let moments = self.moments(context, *calibrated, inputs);
        let statistics = moments?.statistics();
        self.student.self_attn.o_proj = self.linear(LinearName::O, statistics.as_ref())?;
        let add = |streams: &mut Rows<B>, linear: &Linear<B>, mixed: Rows<B>| {
            streams.update(|block, x| Ok(x + linear.forward(mixed.get(block)?)))
        };
        add(teacher, &self.teacher.self_attn.o_proj, teacher_mix)?;
        add(student, &self.student.self_attn.o_proj, student_mix)
    }

    /// Moments of a linear's inputs over the first `calibrated` windows of `context` tokens: `inputs` gives those of a window.
    pub(crate) fn moments(
        &self,
        context: usize,
        calibrated: usize,
        inputs: impl Fn(usize) -> Result<Inputs<B>, CalibError> + Sync,
    ) -> Result<Moments<B>, CalibError> {
        let at_once = (ROWS_AT_ONCE / context.max(1)).max(1);
        let new = |in_features| Moments::new(in_features, self.recipe.steps.bias, self.device);
        let mut moments = None;
        for first in (0..calibrated).step_by(at_once) {
            let windows = (first..calibrated.min(first + at_once)).into_par_iter();
            let inputs = self.together(windows.map(&inputs).collect::<Result<Vec<_>, _>>()?);
            moments.get_or_insert_with(|| new(inputs.student.dims()[1])).add(inputs, None);
        }
        Ok(moments.unwrap_or_else(|| new(self.checkpoint.config().hidden_size)))
    }

    /// The inputs of some windows, one after the other, as the ternary layer sees them.
    fn together(&self, windows: Vec<Inputs<B>>) -> Inputs<B> {
        let (mut student, mut teacher, mut lack) = (Vec::new(), Vec::new(), Vec::new());
        for window in windows {
            student.push(window.student);
            teacher.push(window.teacher);
            lack.extend(window.lack);
        }
        Inputs {
            student: self.seen(Tensor::cat(student, 0)),
            teacher: self.rotated(Tensor::cat(teacher, 0)),
            lack: (!lack.is_empty()).then(|| Tensor::cat(lack, 0)),
        }
    }

    /// One linear of the attention made ternary.
    fn linear(&mut self, name: LinearName, statistics: Option<&Statistics<B>>) -> Result<Linear<B>, CalibError> {
        let config = self.checkpoint.config();
        let path = name.path(self.number);
        let shape @ [in_features, rows] = name.shape(config);
        let tensor = format!("{path}.weight");
        let weight = self.checkpoint.floats(&tensor, &[rows, in_features])?;
        self.checkpoint.expect_finite(&tensor, &weight)?;
        let recipe = Recipe { planes: self.planes[name as usize], ..*self.recipe };
        let ternarized = recipe.ternarize(weight, shape, statistics, self.device)?;
        self.result.report.matrices.push(ternarized.report(path.clone(), statistics.map_or(0, |s| s.tokens)));
        let mut bias = None;
        if config.attention_bias {
            let name = format!("{path}.bias");
            let mut values = self.checkpoint.float_tensor::<B, 1>(&name, [rows], self.device)?;
            if let Some(shift) = ternarized.bias_shift {
                values = values + shift;
                self.result.floats.push((name, vec![rows], host(values.clone())));
            }
            bias = Some(values);
        }
        let weight = TernaryTensor::from_packed(ternarized.packed.clone(), self.device)?;
        self.result.matrices.push((TernaryPath::Linear(path), ternarized.packed));
        (self.progress)(in_features * rows);
        Ok(Linear::Ternary(BitLinear::from_packed(weight, bias)))
    }

    /// An input as a ternary layer's kernel sees it: rotated, rounded to int8.
    pub(crate) fn seen(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        round_activations(x, self.recipe.ternary.rotation)
    }

    pub(crate) fn rotated(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let Some(rotation) = self.recipe.ternary.rotation else { return x };
        let shape @ [_, in_features] = x.dims();
        let mut values = host(x);
        rotate_rows(&mut values, in_features, rotation);
        Tensor::from_data(TensorData::new(values, shape), self.device)
    }
}
