//! One layer through calibration: from the activations that reach it to ternary matrices and the activations after it.

use burn::{
    module::Param,
    tensor::{IndexingUpdateOp, Tensor, TensorData},
};
use rayon::prelude::*;
use ternoss_backends::{ClampedSwiGlu, TernaryBackend, reference::clamped_swiglu, round_activations};
use ternoss_model::{
    Checkpoint, ExpertPlacement, LoadOptions,
    cache::LayerCache,
    checkpoint::{ExpertMatrix, LinearName, TernaryPath},
    experts::{Experts, PackedExperts},
    layer::Layer,
    rope::RotaryEmbedding,
};
use ternoss_quant::{BitLinear, Linear, PackedTernary, TernaryTensor};

use crate::{
    CalibError,
    activations::{Activations, add_rows},
    budget::LayerPlanes,
    moments::{Moments, Statistics},
    prune,
    reconstruct::{Block, neighbours},
    report::{LayerReport, MatrixReport},
    solution::host,
    ternarize::{Recipe, rotate_rows},
    visits::{Visits, visits},
};

/// Experts in work at the same time: bounds memory whatever the number of threads.
pub(crate) const EXPERTS_AT_ONCE: usize = 4;

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
    checkpoint: &'a Checkpoint,
    recipe: &'a Recipe,
    device: &'a B::Device,
    progress: &'a (dyn Fn(usize) + Sync),
    number: usize,
    planes: LayerPlanes,
    teacher: Layer<B>,
    student: Layer<B>,
    result: TernaryLayer,
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
        let inputs = activations.student.clone();
        self.attention(activations)?;
        self.experts(activations)?;
        self.reconstruct(&inputs, activations)?;
        Ok(self.result)
    }

    /// Block reconstruction, where it is asked for and there is text to judge it on.
    fn reconstruct(&mut self, inputs: &[Tensor<B, 2>], activations: &mut Activations<B>) -> Result<(), CalibError> {
        let steps = self.recipe.steps.reconstruction;
        if steps == 0 || activations.calibrated == inputs.len() {
            return Ok(());
        }
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
        for (x, input) in activations.student.iter_mut().zip(inputs) {
            *x = hard.layer.forward(input.clone(), block.rope, &mut LayerCache::new(block.window));
        }
        self.student = hard.layer.clone();
        let report = std::mem::take(&mut self.result.report);
        self.result = TernaryLayer { report, ..hard.written(self.number) };
        Ok(())
    }

    /// The numbers that the student's experts have in the checkpoint.
    fn experts_of_student(&self) -> Vec<usize> {
        prune::those_that_stay(&self.result.report.kept, self.checkpoint)
    }

    fn attention(&mut self, activations: &mut Activations<B>) -> Result<(), CalibError> {
        let config = self.checkpoint.config();
        let window = config.window(self.number);
        let rope = RotaryEmbedding::new(&config.rope, config.head_dim);
        let rope = rope.tables(0..activations.context(), self.device);
        let norm = |layer: &Layer<B>, x: &[Tensor<B, 2>]| -> Vec<Tensor<B, 2>> {
            x.par_iter().map(|x| layer.input_layernorm.forward(x.clone())).collect()
        };
        let teacher_in = norm(&self.teacher, &activations.teacher);
        let student_in = norm(&self.student, &activations.student);
        let calibrated = activations.calibrated;
        let statistics = self.moments(&student_in[..calibrated], &teacher_in[..calibrated]).statistics();
        for name in [LinearName::Q, LinearName::K, LinearName::V] {
            let linear = self.linear(name, statistics.as_ref())?;
            match name {
                LinearName::Q => self.student.self_attn.q_proj = linear,
                LinearName::K => self.student.self_attn.k_proj = linear,
                _ => self.student.self_attn.v_proj = linear,
            }
        }
        let mix = |layer: &Layer<B>, x: Vec<Tensor<B, 2>>| -> Vec<Tensor<B, 2>> {
            x.into_par_iter().map(|x| layer.self_attn.mix(x, &rope, &mut LayerCache::new(window))).collect()
        };
        let teacher_mix = mix(&self.teacher, teacher_in);
        let student_mix = mix(&self.student, student_in);
        let statistics = self.moments(&student_mix[..calibrated], &teacher_mix[..calibrated]).statistics();
        self.student.self_attn.o_proj = self.linear(LinearName::O, statistics.as_ref())?;
        let add = |streams: &mut Vec<Tensor<B, 2>>, linear: &Linear<B>, mixed: Vec<Tensor<B, 2>>| {
            streams.par_iter_mut().zip(mixed).for_each(|(x, mixed)| *x = x.clone() + linear.forward(mixed));
        };
        add(&mut activations.teacher, &self.teacher.self_attn.o_proj, teacher_mix);
        add(&mut activations.student, &self.student.self_attn.o_proj, student_mix);
        Ok(())
    }

    /// Moments of a linear's inputs over windows.
    fn moments(&self, student: &[Tensor<B, 2>], teacher: &[Tensor<B, 2>]) -> Moments<B> {
        let (student, teacher) = (Tensor::cat(student.to_vec(), 0), Tensor::cat(teacher.to_vec(), 0));
        let mut moments = Moments::new(student.dims()[1], self.device);
        moments.add(self.seen(student), self.rotated(teacher), None);
        moments
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

    fn experts(&mut self, activations: &mut Activations<B>) -> Result<(), CalibError> {
        let norm = |layer: &Layer<B>, x: &[Tensor<B, 2>]| {
            Tensor::cat(x.iter().map(|x| layer.post_attention_layernorm.forward(x.clone())).collect(), 0)
        };
        let teacher_in = norm(&self.teacher, &activations.teacher);
        let student_in = norm(&self.student, &activations.student);
        let config = self.checkpoint.config();
        let calibrated = activations.calibrated * activations.context();
        // Where experts are dropped, the teacher still has them all; whatever is measured goes by the smaller router.
        let router = &self.teacher.mlp.router;
        let selection = match self.recipe.keep_experts {
            Some(keep) => {
                let of = (self.checkpoint, self.number);
                Some(prune::select(of, router, &teacher_in, calibrated, keep, self.device)?)
            }
            None => None,
        };
        if let Some(selection) = &selection {
            self.student.mlp.router = router.kept(&prune::numbers(&selection.kept));
            self.result.report.kept.clone_from(&selection.kept);
        }
        let numbers = self.experts_of_student();
        let experts = numbers.len();
        let visits = visits(self.student.mlp.router.forward(teacher_in.clone()), experts, calibrated, self.device);
        let (seen, target) = (self.seen(student_in.clone()), self.rotated(teacher_in.clone()));
        let mut whole = Moments::new(config.hidden_size, self.device);
        whole.add(seen.clone().slice_dim(0, 0..calibrated), target.clone().slice_dim(0, 0..calibrated), None);
        let activation = config.activation();
        let inputs = ExpertInputs { teacher_in, student_in, seen, target, whole, activation };
        let mut packed = [Vec::with_capacity(experts), Vec::with_capacity(experts)];
        let mut biases = [Vec::with_capacity(experts), Vec::with_capacity(experts)];
        let mut output = inputs.teacher_in.zeros_like();
        for first in (0..experts).step_by(EXPERTS_AT_ONCE) {
            let batch: Result<Vec<_>, CalibError> = (first..(first + EXPERTS_AT_ONCE).min(experts))
                .into_par_iter()
                .map(|at| self.both_matrices(numbers[at], &visits[at], &inputs))
                .collect();
            for (made, visits) in batch?.into_iter().zip(&visits[first..]) {
                if let Some(part) = made.output {
                    output = output.select_assign(0, visits.rows.clone(), part, IndexingUpdateOp::Add);
                }
                self.result.report.expert_tokens.push(visits.calibrated);
                for (i, made) in made.matrices.into_iter().enumerate() {
                    self.result.report.matrices.push(made.report);
                    packed[i].push(made.packed);
                    biases[i].push(made.bias);
                }
            }
        }
        self.finish_experts(packed, biases, activation)?;
        drop(inputs);
        add_rows(&mut activations.teacher, selection.map_or(output, |selection| selection.output));
        let Layer { post_attention_layernorm, mlp, .. } = &self.student;
        for x in &mut activations.student {
            *x = x.clone() + mlp.forward(post_attention_layernorm.forward(x.clone()));
        }
        Ok(())
    }

    /// One expert made ternary on the tokens that the full-precision router sends it.
    fn both_matrices(
        &self,
        number: usize,
        visits: &Visits<B>,
        inputs: &ExpertInputs<B>,
    ) -> Result<ExpertPair<B>, CalibError> {
        let config = self.checkpoint.config();
        let pick = |x: &Tensor<B, 2>| x.clone().select(0, visits.rows.clone());
        let calibrated = |x: Tensor<B, 2>| x.slice_dim(0, 0..visits.calibrated);
        let importance = visits.weights.clone().square();
        let mut moments = Moments::new(config.hidden_size, self.device);
        let add = |moments: &mut Moments<B>, student, teacher| {
            if visits.calibrated > 0 {
                moments.add(calibrated(student), calibrated(teacher), Some(calibrated(importance.clone())));
            }
        };
        add(&mut moments, pick(&inputs.seen), pick(&inputs.target));
        let moments = moments.shrunk_to(&inputs.whole, 2.0 * config.hidden_size as f64);
        let upper = self.expert(ExpertMatrix::GateUp, number, &moments)?;
        if visits.count == 0 {
            let lower =
                self.expert(ExpertMatrix::Down, number, &Moments::new(config.intermediate_size, self.device))?;
            return Ok(ExpertPair { matrices: [upper, lower], output: None });
        }
        let hidden = |linear: &Linear<B>, x: &Tensor<B, 2>| clamped_swiglu(linear.forward(pick(x)), inputs.activation);
        let teacher_hidden = hidden(&upper.teacher, &inputs.teacher_in);
        let student_hidden = hidden(&upper.student, &inputs.student_in);
        let mut moments = Moments::new(config.intermediate_size, self.device);
        add(&mut moments, self.seen(student_hidden), self.rotated(teacher_hidden.clone()));
        let moments = moments.shrunk_to_diagonal(2.0 * config.intermediate_size as f64);
        let lower = self.expert(ExpertMatrix::Down, number, &moments)?;
        let output = lower.teacher.forward(teacher_hidden) * visits.weights.clone();
        Ok(ExpertPair { matrices: [upper, lower], output: Some(output) })
    }

    /// One matrix of one expert made ternary.
    fn expert(&self, matrix: ExpertMatrix, expert: usize, moments: &Moments<B>) -> Result<MadeExpert<B>, CalibError> {
        let config = self.checkpoint.config();
        let path = matrix.path(self.number);
        let shape @ [in_features, rows] = matrix.shape(config);
        let weight = self.checkpoint.expert_rows(self.number, matrix, expert)?;
        self.checkpoint.expect_finite(&self.checkpoint.expert_tensors(self.number, matrix)[0], &weight)?;
        let bias_name = format!("{path}_bias");
        let biases = [config.num_local_experts, rows];
        let bias = self.checkpoint.float_tensor::<B, 2>(&bias_name, biases, self.device)?;
        let bias = bias.slice_dim(0, expert..expert + 1).squeeze_dim::<1>(0);
        let teacher = dense_linear(&weight, shape, bias.clone(), self.device);
        let statistics = moments.statistics();
        let planes = self.planes[LinearName::ALL.len() + matrix as usize];
        let recipe = Recipe { planes, ..*self.recipe };
        let ternarized = recipe.ternarize(weight, shape, statistics.as_ref(), self.device)?;
        let report = ternarized.report(format!("{path}.{expert}"), moments.tokens);
        let bias = match ternarized.bias_shift {
            Some(shift) => bias + shift,
            None => bias,
        };
        let student = TernaryTensor::from_packed(ternarized.packed.clone(), self.device)?;
        let student = BitLinear::from_packed(student, Some(bias.clone()));
        (self.progress)(in_features * rows);
        Ok(MadeExpert {
            teacher,
            student: Linear::Ternary(student),
            packed: ternarized.packed,
            bias: host(bias),
            report,
        })
    }

    fn finish_experts(
        &mut self,
        packed: [Vec<PackedTernary>; 2],
        biases: [Vec<Vec<f32>>; 2],
        activation: ClampedSwiGlu,
    ) -> Result<(), CalibError> {
        let experts = packed[0].len();
        let mut parts = Vec::new();
        for ((matrix, packed), biases) in ExpertMatrix::ALL.into_iter().zip(packed).zip(biases) {
            let path = matrix.path(self.number);
            let packed = PackedTernary::stack(packed)?;
            let shape = [experts, packed.layout.rows];
            let biases = biases.concat();
            let bias = Tensor::<B, 2>::from_data(TensorData::new(biases.clone(), shape), self.device);
            if self.recipe.steps.bias {
                self.result.floats.push((format!("{path}_bias"), shape.to_vec(), biases));
            }
            parts.push((TernaryTensor::from_packed(packed.clone(), self.device)?, bias));
            self.result.matrices.push((TernaryPath::Experts(path), packed));
        }
        let (down, gate_up) = (parts.pop(), parts.pop());
        if let (Some((gate_up, gate_up_bias)), Some((down, down_bias))) = (gate_up, down) {
            let experts = PackedExperts::new(gate_up, gate_up_bias, down, down_bias, activation);
            self.student.mlp.experts = Experts::Ternary(experts);
        }
        Ok(())
    }

    /// An input as a ternary layer's kernel sees it: rotated, rounded to int8.
    fn seen(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        round_activations(x, self.recipe.ternary.rotation)
    }

    fn rotated(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let Some(rotation) = self.recipe.ternary.rotation else { return x };
        let shape @ [_, in_features] = x.dims();
        let mut values = host(x);
        rotate_rows(&mut values, in_features, rotation);
        Tensor::from_data(TensorData::new(values, shape), self.device)
    }
}

/// What the experts of a layer see.
struct ExpertInputs<B: TernaryBackend> {
    teacher_in: Tensor<B, 2>,
    student_in: Tensor<B, 2>,
    /// The student's inputs as a kernel sees them.
    seen: Tensor<B, 2>,
    /// The teacher's inputs, rotated.
    target: Tensor<B, 2>,
    /// Moments of all tokens, on which rare experts lean.
    whole: Moments<B>,
    activation: ClampedSwiGlu,
}

/// Both matrices of an expert, and what it adds to the teacher's stream.
struct ExpertPair<B: TernaryBackend> {
    matrices: [MadeExpert<B>; 2],
    output: Option<Tensor<B, 2>>,
}

/// One matrix of an expert, before and after.
struct MadeExpert<B: TernaryBackend> {
    teacher: Linear<B>,
    student: Linear<B>,
    packed: PackedTernary,
    bias: Vec<f32>,
    report: MatrixReport,
}

/// A full-precision linear from the rows of its weight.
pub(crate) fn dense_linear<B: TernaryBackend>(
    weight: &[f32],
    [in_features, rows]: [usize; 2],
    bias: Tensor<B, 1>,
    device: &B::Device,
) -> Linear<B> {
    let weight = Tensor::<B, 2>::from_data(TensorData::new(weight.to_vec(), [rows, in_features]), device);
    // Burn's layer wants [in, out].
    Linear::Dense(burn::nn::Linear {
        weight: Param::from_tensor(weight.transpose().detach()),
        bias: Some(Param::from_tensor(bias)),
    })
}
