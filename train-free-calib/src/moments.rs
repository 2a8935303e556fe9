//! Second moments of a linear's inputs: all that calibration needs to know of a text.

use burn::tensor::{Tensor, backend::Backend};

use crate::{
    linalg::inverse_factor,
    solution::{host, sum},
};

/// Damping of the error compensation, in mean diagonal elements (GPTQ's `percdamp`).
const DAMPING: f32 = 0.01;

/// Damping of the regression from the student's inputs to the teacher's outputs.
const TARGET_DAMPING: f32 = 0.05;

/// Sums over tokens, each with a weight: of the student's inputs `x~` (what the ternary layer will see, rounded to int8)
/// and the teacher's `x` (what the full-precision layer sees).
#[derive(Clone, Debug)]
pub(crate) struct Moments<B: Backend> {
    /// `sum w x~ x~^T`: `[in, in]`
    second: Tensor<B, 2>,
    /// `sum w x x~^T`: `[in, in]`
    cross: Tensor<B, 2>,
    /// `sum w x~`: `[1, in]`
    student: Tensor<B, 2>,
    /// `sum w x`: `[1, in]`
    teacher: Tensor<B, 2>,
    /// `sum w`
    weight: f64,
    /// How many tokens there were.
    pub(crate) tokens: usize,
}

impl<B: Backend> Moments<B> {
    pub(crate) fn new(in_features: usize, device: &B::Device) -> Self {
        Self {
            second: Tensor::zeros([in_features, in_features], device),
            cross: Tensor::zeros([in_features, in_features], device),
            student: Tensor::zeros([1, in_features], device),
            teacher: Tensor::zeros([1, in_features], device),
            weight: 0.0,
            tokens: 0,
        }
    }

    /// Adds tokens `[n, in]`, each counting 1, or `weights [n, 1]`.
    pub(crate) fn add(&mut self, student: Tensor<B, 2>, teacher: Tensor<B, 2>, weights: Option<Tensor<B, 2>>) {
        let tokens = student.dims()[0];
        let (left, right, total) = match weights {
            Some(weights) => {
                let total = sum(weights.clone());
                (student.clone() * weights.clone(), teacher.clone() * weights, total)
            }
            None => (student.clone(), teacher.clone(), tokens as f64),
        };
        self.second = self.second.clone() + left.clone().transpose().matmul(student);
        self.cross = self.cross.clone() + teacher.transpose().matmul(left.clone());
        self.student = self.student.clone() + left.sum_dim(0);
        self.teacher = self.teacher.clone() + right.sum_dim(0);
        self.weight += total;
        self.tokens += tokens;
    }

    /// The moments with `prior` mixed in as if it were `strength` more tokens (a rare expert leans on its layer's mean).
    pub(crate) fn shrunk_to(&self, prior: &Self, strength: f64) -> Self {
        if prior.weight == 0.0 {
            return self.clone();
        }
        // Both as means, weighted by numbers of tokens.
        let own = self.tokens as f64 / (self.tokens as f64 + strength);
        let scale = |sum: &Tensor<B, 2>, weight: f64, share: f64| {
            sum.clone() * (if weight > 0.0 { share / weight } else { 0.0 }) as f32
        };
        let mix = |a: &Tensor<B, 2>, b: &Tensor<B, 2>| scale(a, self.weight, own) + scale(b, prior.weight, 1.0 - own);
        Self {
            second: mix(&self.second, &prior.second),
            cross: mix(&self.cross, &prior.cross),
            student: scale(&self.student, self.weight, 1.0),
            teacher: scale(&self.teacher, self.weight, 1.0),
            weight: if self.weight > 0.0 { 1.0 } else { 0.0 },
            tokens: self.tokens,
        }
    }

    /// The moments with the mean of their diagonal mixed in, as `strength` more tokens without correlations.
    pub(crate) fn shrunk_to_diagonal(&self, strength: f64) -> Self {
        let n = self.second.dims()[0];
        let mean = diagonal_mean(&self.second);
        let identity = Tensor::<B, 2>::eye(n, &self.second.device());
        let own = self.tokens as f64 / (self.tokens as f64 + strength);
        let mix = |x: &Tensor<B, 2>| x.clone() * own as f32 + identity.clone() * ((1.0 - own) as f32 * mean);
        Self { second: mix(&self.second), cross: mix(&self.cross), ..self.clone() }
    }

    /// What the steps work with, or `None` where no token came or every input was zero.
    pub(crate) fn statistics(&self) -> Option<Statistics<B>> {
        let n = self.second.dims()[0];
        if self.weight <= 0.0 {
            return None;
        }
        let mean = |sum: &Tensor<B, 2>| sum.clone() / self.weight as f32;
        let (second, cross) = (mean(&self.second), mean(&self.cross));
        let diagonal = diagonal_mean(&second);
        if !(diagonal.is_finite() && diagonal > 0.0) {
            return None;
        }
        let device = second.device();
        let damped = |share: f32| second.clone() + Tensor::eye(n, &device) * (share * diagonal);
        let factor = inverse_factor(&host(damped(DAMPING)), n)?;
        let target = inverse_factor(&host(damped(TARGET_DAMPING)), n)?;
        let target = Tensor::from_data(burn::tensor::TensorData::new(target, [n, n]), &device);
        let cross = cross + Tensor::eye(n, &device) * (TARGET_DAMPING * diagonal);
        // (G + l I) (H + l I)^-1, the inverse being U^T U.
        let regression = cross.matmul(target.clone().transpose()).matmul(target);
        Some(Statistics {
            second,
            factor,
            regression,
            student: mean(&self.student),
            teacher: mean(&self.teacher),
            tokens: self.tokens,
        })
    }
}

/// What the steps of a method work with.
#[derive(Clone, Debug)]
pub(crate) struct Statistics<B: Backend> {
    /// `H = E[x~ x~^T]`: `[in, in]`
    pub(crate) second: Tensor<B, 2>,
    /// Upper triangular `U [in, in]` with `inverse(H + damping) = U^T U`, row-major.
    pub(crate) factor: Vec<f32>,
    /// `(G + l I)(H + l I)^-1`: `W` times this is the full-precision weight for the student's inputs.
    pub(crate) regression: Tensor<B, 2>,
    /// `E[x~]`: `[1, in]`
    pub(crate) student: Tensor<B, 2>,
    /// `E[x]`: `[1, in]`
    pub(crate) teacher: Tensor<B, 2>,
    /// How many tokens there were.
    pub(crate) tokens: usize,
}

fn diagonal_mean<B: Backend>(matrix: &Tensor<B, 2>) -> f32 {
    let n = matrix.dims()[0];
    let identity = Tensor::<B, 2>::eye(n, &matrix.device());
    sum(matrix.clone() * identity) as f32 / n as f32
}
