//! One matrix made ternary: the steps of a method in their order.

use burn::tensor::{Tensor, TensorData, backend::Backend};
use rayon::prelude::*;
use ternoss_backends::{FormatError, Rotation, TernaryLayout};
use ternoss_model::{
    GptOssConfig,
    checkpoint::{ExpertMatrix, LinearName},
};
use ternoss_quant::{PackedTernary, TernaryConfig, TernaryParts, absmean};

use crate::{
    Method, Steps,
    budget::LayerPlanes,
    compensate::compensate,
    moments::Statistics,
    refine::{refit_scales, sweep},
    report::MatrixReport,
    solution::{Geometry, Solution, host, sum},
};

/// Damping of the refinements, in mean diagonal elements of `H`.
const DAMPING: f32 = 1e-4;

/// How matrices become ternary.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Recipe {
    pub(crate) method: Method,
    pub(crate) steps: Steps,
    pub(crate) ternary: TernaryConfig,
    pub(crate) planes: usize,
    /// Planes of embedding and output layer; `None` if they stay as they are.
    pub(crate) table_planes: Option<usize>,
    /// Experts that each layer keeps; `None` for all.
    pub(crate) keep_experts: Option<usize>,
    /// Whether gradients change norms, biases, sinks and routers too.
    pub(crate) tuned: bool,
}

/// A matrix that became ternary.
pub(crate) struct Ternarized<B: Backend> {
    pub(crate) packed: PackedTernary,
    /// What the bias has to gain, `[rows]`, where that was asked for.
    pub(crate) bias_shift: Option<Tensor<B, 1>>,
    /// Squared error of the outputs over their square, on the calibration text; of the weights where there is none.
    pub(crate) relative_error: f64,
    /// Share of trits that are zero.
    pub(crate) zeros: f64,
}

impl<B: Backend> Ternarized<B> {
    /// What there is to say of it.
    pub(crate) fn report(&self, name: String, tokens: usize) -> MatrixReport {
        let planes = self.packed.layout.planes;
        MatrixReport { name, relative_error: self.relative_error, planes, zeros: self.zeros, tokens }
    }
}

impl Recipe {
    /// Bytes that one plane of each ternary tensor of a layer takes.
    pub(crate) fn plane_bytes(&self, config: &GptOssConfig) -> LayerPlanes {
        let bytes = |matrices: usize, [in_features, rows]: [usize; 2]| {
            let TernaryConfig { format, granularity, rotation } = self.ternary;
            let group_size = granularity.group_size();
            TernaryLayout { format, matrices, planes: 1, rows, in_features, group_size, rotation }.bytes()
        };
        let [q, k, v, o] = LinearName::ALL.map(|name| bytes(1, name.shape(config)));
        let [gate_up, down] = ExpertMatrix::ALL
            .map(|matrix| bytes(self.keep_experts.unwrap_or(config.num_local_experts), matrix.shape(config)));
        [q, k, v, o, gate_up, down]
    }

    /// Makes `weight` (`[rows, in_features]`, row-major) ternary. Without statistics every group is fitted on its own.
    pub(crate) fn ternarize<B: Backend>(
        &self,
        mut weight: Vec<f32>,
        [in_features, rows]: [usize; 2],
        statistics: Option<&Statistics<B>>,
        device: &B::Device,
    ) -> Result<Ternarized<B>, FormatError> {
        if let Some(rotation) = self.ternary.rotation {
            rotate_rows(&mut weight, in_features, rotation);
        }
        let weight = Tensor::<B, 2>::from_data(TensorData::new(weight, [rows, in_features]), device);
        let target = match statistics {
            Some(statistics) if self.steps.regression => weight.clone().matmul(statistics.regression.clone()),
            _ => weight.clone(),
        };
        let lack = statistics.and_then(|statistics| statistics.lack.as_ref());
        let target = match lack {
            Some(lack) => target + lack.weight.clone(),
            None => target,
        };
        let parts = self.parts(&target, statistics, device);
        let packed = PackedTernary::pack(&parts, self.ternary.format, self.ternary.rotation)?;
        let dense = parts.iter().map(TernaryParts::to_dense).reduce(|sum, plane| sum + plane);
        let dense = dense.ok_or(FormatError::Empty { what: "planes" })?;
        let bias_shift = statistics.filter(|_| self.steps.bias).map(|statistics| {
            let wanted = weight.matmul(statistics.teacher.clone().transpose());
            let given = dense.clone().matmul(statistics.student.clone().transpose());
            let shift = (wanted - given).squeeze_dim(1);
            match lack {
                Some(lack) => shift + lack.mean.clone().squeeze_dim(0),
                None => shift,
            }
        });
        let unit = power_of_two(&target).recip();
        let power = |x: Tensor<B, 2>| match (x * unit, statistics) {
            (x, Some(statistics)) => sum(x.clone().matmul(statistics.second.clone()) * x),
            (x, None) => sum(x.square()),
        };
        let nonzero: f64 = parts.iter().map(|part| sum(part.trits.clone().square())).sum();
        Ok(Ternarized {
            packed,
            bias_shift,
            relative_error: power(target.clone() - dense) / power(target).max(f64::MIN_POSITIVE),
            zeros: 1.0 - nonzero / (parts.len() * rows * in_features) as f64,
        })
    }

    fn parts<B: Backend>(
        &self,
        target: &Tensor<B, 2>,
        statistics: Option<&Statistics<B>>,
        device: &B::Device,
    ) -> Vec<TernaryParts<B>> {
        if self.method == Method::Absmean {
            return vec![absmean(target.clone(), self.ternary.granularity)];
        }
        let [rows, in_features] = target.dims();
        let group_size = self.ternary.granularity.group_size();
        let geometry = Geometry { rows, in_features, group_size, planes: self.planes };
        let mut solution = match statistics {
            Some(statistics) if self.steps.compensation => compensate(target, &statistics.factor, geometry),
            _ if self.method == Method::PtBitnet => Solution::searched(&host(target.clone()), geometry),
            _ => Solution::fitted(&host(target.clone()), geometry),
        };
        // Below five tokens an input the statistics are too thin to be followed that closely; PT-BitNet has nothing else.
        let enough = |tokens: usize| tokens >= 5 * in_features || self.method == Method::PtBitnet;
        if let Some(statistics) = statistics.filter(|s| self.steps.sweeps > 0 && enough(s.tokens)) {
            let diagonal = statistics.second.clone() * Tensor::eye(in_features, device);
            let damping = sum(diagonal) as f32 / in_features as f32 * DAMPING;
            let second = statistics.second.clone() + Tensor::eye(in_features, device) * damping;
            for _ in 0..self.steps.sweeps {
                refit_scales(&mut solution, target, &second);
                sweep(&mut solution, target, &second);
            }
            refit_scales(&mut solution, target, &second);
            // Once more with the scales that will be stored.
            solution.snap_scales();
            sweep(&mut solution, target, &second);
        }
        solution.parts(device)
    }
}

/// The power of two at or below the largest magnitude: divided by it, exactly, nothing overflows when it is squared.
fn power_of_two<B: Backend>(matrix: &Tensor<B, 2>) -> f32 {
    let largest = host(matrix.clone()).into_iter().fold(f32::MIN_POSITIVE, |largest, x| largest.max(x.abs()));
    largest.log2().floor().exp2()
}

/// Every row of a matrix rotated.
pub(crate) fn rotate_rows(rows: &mut [f32], in_features: usize, rotation: Rotation) {
    rows.par_chunks_mut(in_features).for_each(|row| rotation.rotate(row));
}

#[cfg(test)]
mod tests {
    use burn_flex::Flex;
    use ternoss_backends::{Rotation, TernaryBackend};

    use super::*;
    use crate::moments::{Inputs, Moments};

    /// `rows` rows of pseudo-random weights, multiplied by `unit`.
    fn weights([in_features, rows]: [usize; 2], unit: f32) -> Vec<f32> {
        (0..in_features * rows).map(|i| (((i * 7919 + 13) % 1009) as f32 / 504.5 - 1.0) * unit).collect()
    }

    fn statistics<B: TernaryBackend>(tokens: usize, in_features: usize, dead: &[usize]) -> Option<Statistics<B>> {
        let device = Default::default();
        let mut inputs = weights([in_features, tokens], 1.0);
        for row in inputs.chunks_mut(in_features) {
            dead.iter().for_each(|i| row[*i] = 0.0);
        }
        let inputs = Tensor::<B, 2>::from_data(TensorData::new(inputs, [tokens, in_features]), &device);
        let mut moments = Moments::new(in_features, false, &device);
        moments.add(Inputs { student: inputs.clone(), teacher: inputs, lack: None }, None);
        moments.statistics()
    }

    fn recipes() -> Vec<Recipe> {
        let ternoss = |rotation, planes| Recipe {
            method: Method::Ternoss,
            steps: Method::Ternoss.steps(),
            ternary: TernaryConfig { rotation, ..TernaryConfig::default() },
            planes,
            table_planes: None,
            keep_experts: None,
            tuned: false,
        };
        let pt_bitnet = Recipe { method: Method::PtBitnet, steps: Method::PtBitnet.steps(), ..ternoss(None, 1) };
        vec![ternoss(None, 1), ternoss(Some(Rotation::default()), 1), ternoss(None, 3), pt_bitnet]
    }

    #[test]
    fn dead_inputs_and_few_tokens_leave_everything_finite() {
        let shape @ [in_features, _] = [128, 24];
        let all: Vec<usize> = (0..in_features).collect();
        for (tokens, dead) in [(700, &[0, 63, 64, 100][..]), (700, &all[..127]), (3, &[1]), (1, &[]), (700, &all)] {
            let statistics = statistics::<Flex>(tokens, in_features, dead);
            assert_eq!(statistics.is_none(), dead.len() == in_features, "no input at all: no statistics");
            for recipe in recipes() {
                let what = format!("{recipe:?}, {tokens} tokens, {} dead", dead.len());
                let made =
                    recipe.ternarize::<Flex>(weights(shape, 1.0), shape, statistics.as_ref(), &Default::default());
                let made = made.unwrap();
                assert!(made.packed.row_scales.iter().all(|scale| scale.is_finite()), "{what}");
                assert!(
                    made.relative_error.is_finite() && made.relative_error >= 0.0,
                    "{what}: {}",
                    made.relative_error
                );
                let shift = made.bias_shift.map(|shift| shift.into_data().iter::<f32>().all(f32::is_finite));
                assert_ne!(shift, Some(false), "{what}");
            }
        }
    }

    #[test]
    fn errors_do_not_depend_on_the_unit_of_the_weights() {
        let shape = [64, 8];
        let none = Recipe { method: Method::Absmean, steps: Steps::NONE, ..recipes().remove(0) };
        let error = |unit| {
            let made = none.ternarize::<Flex>(weights(shape, unit), shape, None, &Default::default()).unwrap();
            made.relative_error
        };
        let expected = error(1.0);
        assert!(expected > 0.05 && expected < 0.5, "{expected}");
        for power in [-60, -20, 20, 60, 100] {
            assert!((error(2f32.powi(power)) - expected).abs() < 1e-6, "2^{power}: {}", error(2f32.powi(power)));
        }
    }
}
