//! The experts of a layer through calibration, four at a time.

use burn::{
    module::Param,
    tensor::{Tensor, TensorData},
};
use rayon::prelude::*;
use ternoss_backends::{TernaryBackend, reference::clamped_swiglu};
use ternoss_model::{
    checkpoint::{ExpertMatrix, LinearName, TernaryPath},
    experts::{Experts, PackedExperts},
    layer::apply_norm,
};
use ternoss_quant::{BitLinear, Linear, PackedTernary, TernaryTensor};

use crate::{
    CalibError,
    activations::{Activations, Normed},
    layer::LayerCalibration,
    moments::{Inputs, Moments},
    prune,
    report::MatrixReport,
    rows::{ROWS_AT_ONCE, Rows},
    solution::host,
    ternarize::Recipe,
    visits::{Visits, add_visits, route, visits},
};

/// Experts in work at the same time: bounds memory whatever the number of threads.
pub(crate) const EXPERTS_AT_ONCE: usize = 4;

impl<B: TernaryBackend> LayerCalibration<'_, B> {
    /// Calibrates the experts; `activations` are those before them and become those after them.
    pub(crate) fn experts(&mut self, activations: &mut Activations<B>) -> Result<(), CalibError> {
        let Activations { teacher, student, calibrated } = activations;
        let norm = self.teacher.post_attention_layernorm.clone();
        let (teacher_in, student_in) =
            (Normed { streams: teacher, norm: &norm }, Normed { streams: student, norm: &norm });
        // Where experts are dropped, the teacher still has them all; whatever is measured goes by the smaller router.
        let selection = match self.recipe.keep_experts {
            Some(keep) => {
                let of = (self.checkpoint, self.number);
                let router = &self.teacher.mlp.router;
                Some(prune::select(of, router, &teacher_in, *calibrated, keep, self.device)?)
            }
            None => None,
        };
        if let Some(selection) = &selection {
            self.student.mlp.router = self.teacher.mlp.router.kept(&prune::numbers(&selection.kept));
            self.result.report.kept.clone_from(&selection.kept);
        }
        let numbers = self.experts_of_student();
        let context = teacher.shape()[0];
        let routing = route(&self.student.mlp.router, &teacher_in)?;
        let visits = visits(routing, numbers.len(), *calibrated * context, self.device);
        // What dropped experts would have added, the others are to make up for.
        let missing = match &selection {
            Some(selection) if self.recipe.steps.residual => {
                let kept = (self.number, numbers.as_slice());
                let (_, output) = prune::run(self.checkpoint, kept, &teacher_in, &visits, self.device)?;
                Some(selection.output.map(teacher.shape()[1], |block, all| Ok(all - output.get(block)?))?)
            }
            _ => None,
        };
        let of_window = |at| Ok(Inputs { student: student_in.get(at)?, teacher: teacher_in.get(at)?, lack: None });
        let whole = self.moments(context, *calibrated, of_window)?;
        let inputs = ExpertInputs { teacher: teacher_in, student: student_in, whole, missing };
        let output = self.all_experts(&numbers, &visits, &inputs)?;
        let output = selection.map_or(output, |selection| selection.output);
        teacher.update(|block, x| Ok(x + output.get(block)?))?;
        drop(output);
        let mlp = &self.student.mlp;
        student.update(|_, x| Ok(x.clone() + mlp.forward(apply_norm(&norm, x))))
    }

    /// Makes all experts ternary; gives what they add to the teacher's stream.
    fn all_experts(
        &mut self,
        numbers: &[usize],
        visits: &[Visits<B>],
        inputs: &ExpertInputs<'_, B>,
    ) -> Result<Rows<B>, CalibError> {
        let experts = numbers.len();
        let mut packed = [Vec::with_capacity(experts), Vec::with_capacity(experts)];
        let mut biases = [Vec::with_capacity(experts), Vec::with_capacity(experts)];
        let streams = inputs.teacher.streams;
        let mut output = streams.map(streams.shape()[1], |_, x| Ok(x.zeros_like()))?;
        for first in (0..experts).step_by(EXPERTS_AT_ONCE) {
            let batch: Result<Vec<_>, CalibError> = (first..(first + EXPERTS_AT_ONCE).min(experts))
                .into_par_iter()
                .map(|at| self.both_matrices(numbers[at], &visits[at], inputs))
                .collect();
            let mut outputs = Vec::new();
            for (made, visits) in batch?.into_iter().zip(&visits[first..]) {
                outputs.push((visits, made.output));
                self.result.report.expert_tokens.push(visits.calibrated);
                for (i, made) in made.matrices.into_iter().enumerate() {
                    self.result.report.matrices.push(made.report);
                    packed[i].push(made.packed);
                    biases[i].push(made.bias);
                }
            }
            add_visits(&mut output, &outputs, self.device)?;
        }
        self.finish_experts(packed, biases)?;
        Ok(output)
    }

    /// One expert made ternary on the tokens that the full-precision router sends it.
    fn both_matrices(
        &self,
        number: usize,
        visits: &Visits<B>,
        inputs: &ExpertInputs<'_, B>,
    ) -> Result<ExpertPair<B>, CalibError> {
        let config = self.checkpoint.config();
        let upper = self.expert(ExpertMatrix::GateUp, number)?;
        let mut moments = Moments::new(config.hidden_size, self.recipe.steps.bias, self.device);
        for visits in visits.parts() {
            let (student, teacher) = (inputs.student.rows(&visits.rows)?, inputs.teacher.rows(&visits.rows)?);
            self.add_calibrated(&mut moments, &visits, Inputs { student, teacher, lack: None });
        }
        let moments = moments.shrunk_to(&inputs.whole, 2.0 * config.hidden_size as f64);
        let teacher = upper.teacher(self.device);
        let upper = self.made(ExpertMatrix::GateUp, number, upper, &moments)?;
        let lower = self.expert(ExpertMatrix::Down, number)?;
        let of_lower = lower.teacher(self.device);
        let hidden = |linear: &Linear<B>, x| clamped_swiglu(linear.forward(x), config.activation());
        let mut moments = Moments::new(config.intermediate_size, self.recipe.steps.bias, self.device);
        let streams = inputs.teacher.streams;
        let mut output = Rows::new(streams.memory(), [ROWS_AT_ONCE, config.hidden_size], self.device);
        for visits in visits.parts() {
            let teacher_hidden = hidden(&teacher, inputs.teacher.rows(&visits.rows)?);
            let student_hidden = hidden(&upper.student, inputs.student.rows(&visits.rows)?);
            // An expert's output counts by its weight, and the weights of a token's experts sum to one: so each of them is
            // to give all that is lacking.
            let lack = match self.recipe.steps.residual {
                true => Some(inputs.lack(&visits.rows)?),
                false => None,
            };
            let of_down = Inputs { student: student_hidden, teacher: teacher_hidden.clone(), lack };
            self.add_calibrated(&mut moments, &visits, of_down);
            output.push(of_lower.forward(teacher_hidden) * visits.weights)?;
        }
        drop((teacher, of_lower));
        if !visits.rows.is_empty() {
            moments = moments.shrunk_to_diagonal(2.0 * config.intermediate_size as f64);
        }
        let lower = self.made(ExpertMatrix::Down, number, lower, &moments)?;
        Ok(ExpertPair { matrices: [upper, lower], output })
    }

    /// Adds the inputs of a linear on tokens of an expert, as many as are calibrated on, each with the square of its weight.
    fn add_calibrated(&self, moments: &mut Moments<B>, visits: &Visits<B>, inputs: Inputs<B>) {
        if visits.calibrated > 0 {
            let calibrated = |x: Tensor<B, 2>| x.slice_dim(0, 0..visits.calibrated);
            let importance = calibrated(visits.weights.clone().square());
            let Inputs { student, teacher, lack } = inputs;
            let student = calibrated(self.seen(student));
            let teacher = calibrated(self.rotated(teacher));
            moments.add(Inputs { student, teacher, lack: lack.map(calibrated) }, Some(importance));
        }
    }

    /// One matrix of one expert, from the checkpoint.
    fn expert(&self, matrix: ExpertMatrix, expert: usize) -> Result<FullExpert<B>, CalibError> {
        let config = self.checkpoint.config();
        let shape @ [_, rows] = matrix.shape(config);
        let weight = self.checkpoint.expert_rows(self.number, matrix, expert)?;
        self.checkpoint.expect_finite(&self.checkpoint.expert_tensors(self.number, matrix)[0], &weight)?;
        let name = format!("{}_bias", matrix.path(self.number));
        let biases = [config.num_local_experts, rows];
        let bias = self.checkpoint.float_tensor::<B, 2>(&name, biases, self.device)?;
        Ok(FullExpert { weight, shape, bias: bias.slice_dim(0, expert..expert + 1).squeeze_dim::<1>(0) })
    }

    /// One matrix of one expert made ternary.
    fn made(
        &self,
        matrix: ExpertMatrix,
        expert: usize,
        full: FullExpert<B>,
        moments: &Moments<B>,
    ) -> Result<MadeExpert<B>, CalibError> {
        let FullExpert { weight, shape, bias } = full;
        let statistics = moments.statistics();
        let planes = self.planes[LinearName::ALL.len() + matrix as usize];
        let recipe = Recipe { planes, ..*self.recipe };
        let ternarized = recipe.ternarize(weight, shape, statistics.as_ref(), self.device)?;
        let report = ternarized.report(format!("{}.{expert}", matrix.path(self.number)), moments.tokens);
        let bias = match ternarized.bias_shift {
            Some(shift) => bias + shift,
            None => bias,
        };
        let student = TernaryTensor::from_packed(ternarized.packed.clone(), self.device)?;
        let student = Linear::Ternary(BitLinear::from_packed(student, Some(bias.clone())));
        (self.progress)(shape[0] * shape[1]);
        Ok(MadeExpert { student, packed: ternarized.packed, bias: host(bias), report })
    }

    fn finish_experts(
        &mut self,
        packed: [Vec<PackedTernary>; 2],
        biases: [Vec<Vec<f32>>; 2],
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
            let activation = self.checkpoint.config().activation();
            let experts = PackedExperts::new(gate_up, gate_up_bias, down, down_bias, activation);
            self.student.mlp.experts = Experts::Ternary(experts);
        }
        Ok(())
    }
}

/// What the experts of a layer see.
struct ExpertInputs<'a, B: TernaryBackend> {
    teacher: Normed<'a, B>,
    student: Normed<'a, B>,
    /// Moments of all tokens, on which rare experts lean.
    whole: Moments<B>,
    /// What all full-precision experts add to the stream beyond those that stay, where some are dropped.
    missing: Option<Rows<B>>,
}

impl<B: TernaryBackend> ExpertInputs<'_, B> {
    /// What the student's stream lacks of the teacher's, with what nobody in this layer adds.
    fn lack(&self, rows: &[usize]) -> Result<Tensor<B, 2>, CalibError> {
        let lack = self.teacher.streams.rows(rows)? - self.student.streams.rows(rows)?;
        Ok(match &self.missing {
            Some(missing) => lack + missing.rows(rows)?,
            None => lack,
        })
    }
}

/// Both matrices of an expert, and what it adds to the teacher's stream for each of its tokens.
struct ExpertPair<B: TernaryBackend> {
    matrices: [MadeExpert<B>; 2],
    output: Rows<B>,
}

/// One matrix of an expert in full precision.
struct FullExpert<B: TernaryBackend> {
    weight: Vec<f32>,
    /// `[in, out]`
    shape: [usize; 2],
    bias: Tensor<B, 1>,
}

impl<B: TernaryBackend> FullExpert<B> {
    fn teacher(&self, device: &B::Device) -> Linear<B> {
        dense_linear(&self.weight, self.shape, self.bias.clone(), device)
    }
}

/// One matrix of an expert, ternary.
struct MadeExpert<B: TernaryBackend> {
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
