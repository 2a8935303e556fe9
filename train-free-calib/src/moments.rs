//! Second moments of a linear's inputs: all that calibration needs to know of a text.

use burn::tensor::{Tensor, TensorData, backend::Backend};

use crate::{
    linalg::inverse_factor,
    regression::Whitening,
    solution::{host, sum},
};

/// Damping of the error compensation, in mean diagonal elements (GPTQ's `percdamp`).
const DAMPING: f32 = 0.01;

/// Damping of the regression from the student's inputs to the teacher's outputs.
const TARGET_DAMPING: f32 = 0.05;

/// What reaches a linear of some tokens.
pub(crate) struct Inputs<B: Backend> {
    /// `x~ [n, in]`: the student's, in [`Moments`] as the ternary layer sees them, rotated and rounded to int8.
    pub(crate) student: Tensor<B, 2>,
    /// `x [n, in]`: the teacher's.
    pub(crate) teacher: Tensor<B, 2>,
    /// `e [n, out]`: what the student's residual stream lacks of the teacher's, for a linear whose outputs are added to it.
    pub(crate) lack: Option<Tensor<B, 2>>,
}

/// Sums over tokens, each with a weight, of [`Inputs`].
#[derive(Clone, Debug)]
pub(crate) struct Moments<B: Backend> {
    /// `o [1, in]`: what `x~` is counted from in the sums where they are to be taken about the means: the mean of the first tokens,
    /// so that little is lost in the difference. None stands for zero.
    origin: Option<Tensor<B, 2>>,
    /// `sum w (x~ - o)(x~ - o)^T`: `[in, in]`
    second: Tensor<B, 2>,
    /// `sum w (x - x~)(x~ - o)^T [in, in]`, `sum w (x - x~)^2` and `sum w (x - x~) [1, in]`
    off: [Tensor<B, 2>; 3],
    /// `sum w (x~ - o)`: `[1, in]`
    student: Tensor<B, 2>,
    /// `sum w e (x~ - o)^T [out, in]`, `sum w e^2` and `sum w e [1, out]`, where there is an `e`.
    lack: Option<[Tensor<B, 2>; 3]>,
    /// `sum w`
    weight: f64,
    /// `sum w^2`
    weight_squares: f64,
    /// `sum sqrt w`
    weight_roots: f64,
    /// What the outputs are multiplied by before they are added to the stream: an expert's mean weight, for `w` is its square, or 1.
    part: f64,
    /// Tokens of equal weight that this rests on, those of a prior among them.
    evidence: f64,
    /// What is on the diagonal of `second` that is of no token.
    ridge: f32,
    /// How many tokens there were.
    pub(crate) tokens: usize,
}

impl<B: Backend> Moments<B> {
    /// Of no tokens. `about_means` where a bias follows, which makes up for any mean error: then that is none of a weight's.
    pub(crate) fn new(in_features: usize, about_means: bool, device: &B::Device) -> Self {
        let zeros = |rows| Tensor::zeros([rows, in_features], device);
        Self {
            origin: about_means.then(|| zeros(1)),
            second: zeros(in_features),
            off: [in_features, 1, 1].map(zeros),
            student: zeros(1),
            lack: None,
            weight: 0.0,
            weight_squares: 0.0,
            weight_roots: 0.0,
            part: 1.0,
            evidence: 0.0,
            ridge: 0.0,
            tokens: 0,
        }
    }

    /// Adds tokens, each counting 1, or `weights [n, 1]`.
    pub(crate) fn add(&mut self, inputs: Inputs<B>, weights: Option<Tensor<B, 2>>) {
        let Inputs { student, teacher, lack } = inputs;
        let tokens = student.dims()[0];
        let weighted = |x: &Tensor<B, 2>| match &weights {
            Some(weights) => x.clone() * weights.clone(),
            None => x.clone(),
        };
        let [weight, squares, roots] = match &weights {
            Some(weights) => [weights.clone(), weights.clone().square(), weights.clone().sqrt()].map(sum),
            None => [tokens as f64; 3],
        };
        let off = teacher - student.clone();
        if self.weight <= 0.0 && weight > 0.0 {
            self.origin = self.origin.as_ref().map(|_| weighted(&student).sum_dim(0) / weight as f32);
        }
        let student = match &self.origin {
            Some(origin) => student - origin.clone(),
            None => student,
        };
        // `sum w y x^T`, `sum w y^2` and `sum w y`.
        let sums = |y: Tensor<B, 2>| {
            let weighted = weighted(&y);
            [
                weighted.clone().transpose().matmul(student.clone()),
                (weighted.clone() * y).sum_dim(0),
                weighted.sum_dim(0),
            ]
        };
        let plus = |before: &[Tensor<B, 2>; 3], now: [Tensor<B, 2>; 3]| {
            [0, 1, 2].map(|sum| before[sum].clone() + now[sum].clone())
        };
        if let Some(lack) = lack {
            let now = sums(lack);
            self.lack = Some(match &self.lack {
                Some(before) => plus(before, now),
                None => now,
            });
        }
        self.off = plus(&self.off, sums(off));
        let [second, _, mean] = sums(student.clone());
        self.second = self.second.clone() + second;
        self.student = self.student.clone() + mean;
        self.weight += weight;
        self.weight_squares += squares;
        self.weight_roots += roots;
        // As many tokens of equal weight tell as much (Kish's effective sample size).
        self.evidence = self.weight.powi(2) / self.weight_squares.max(f64::MIN_POSITIVE);
        self.part = self.weight / self.weight_roots.max(f64::MIN_POSITIVE);
        self.tokens += tokens;
    }

    /// The moments about the means, if they are to be. First of all, for what is mixed in later has no means.
    fn centered(&self) -> Self {
        let Some(origin) = self.origin.as_ref().filter(|_| self.weight > 0.0) else {
            return self.clone();
        };
        let part = (1.0 / self.weight) as f32;
        // `sum w y x^T` and `sum w y^2` without what the means contribute, from `sum w y`.
        let products = |all: &Tensor<B, 2>, sum: &Tensor<B, 2>| {
            all.clone() - sum.clone().transpose().matmul(self.student.clone() * part)
        };
        let about = |[cross, squares, sum]: &[Tensor<B, 2>; 3]| {
            [products(cross, sum), squares.clone() - sum.clone().square() * part, sum.clone()]
        };
        Self {
            origin: None,
            second: products(&self.second, &self.student),
            off: about(&self.off),
            student: self.student.clone() + origin.clone() * self.weight as f32,
            lack: self.lack.as_ref().map(about),
            ..self.clone()
        }
    }

    /// The moments with `prior` mixed in as if it were `strength` more tokens (a rare expert leans on its layer's mean).
    pub(crate) fn shrunk_to(&self, prior: &Self, strength: f64) -> Self {
        if prior.weight == 0.0 {
            return self.clone();
        }
        let (this, prior) = (self.centered(), prior.centered());
        // Both as means, weighted by what they rest on.
        let own = this.evidence / (this.evidence + strength);
        let factor = |weight: f64, share: f64| (if weight > 0.0 { share / weight } else { 0.0 }) as f32;
        let scale = |sum: &Tensor<B, 2>, weight: f64, share: f64| sum.clone() * factor(weight, share);
        let mix = |a: &Tensor<B, 2>, b: &Tensor<B, 2>| scale(a, this.weight, own) + scale(b, prior.weight, 1.0 - own);
        let [cross, squares, off] = &this.off;
        let [prior_cross, prior_squares, _] = &prior.off;
        Self {
            second: mix(&this.second, &prior.second),
            off: [mix(cross, prior_cross), mix(squares, prior_squares), scale(off, this.weight, 1.0)],
            student: scale(&this.student, this.weight, 1.0),
            lack: this.lack.as_ref().map(|sums| sums.each_ref().map(|sum| scale(sum, this.weight, own))),
            weight: if this.weight > 0.0 { 1.0 } else { 0.0 },
            evidence: this.evidence + strength.min(prior.evidence),
            ridge: this.ridge * factor(this.weight, own) + prior.ridge * factor(prior.weight, 1.0 - own),
            ..this
        }
    }

    /// The moments with the mean of their diagonal mixed in, as `strength` more tokens without correlations.
    pub(crate) fn shrunk_to_diagonal(&self, strength: f64) -> Self {
        let this = self.centered();
        let n = this.second.dims()[0];
        let mean = diagonal_mean(&this.second);
        let identity = Tensor::<B, 2>::eye(n, &this.second.device());
        let own = this.evidence / (this.evidence + strength);
        let less = |sum: &Tensor<B, 2>| sum.clone() * own as f32;
        let [cross, squares, off] = &this.off;
        let added = (1.0 - own) as f32 * mean;
        Self {
            second: less(&this.second) + identity * added,
            off: [less(cross), less(squares), off.clone()],
            lack: this.lack.as_ref().map(|sums| sums.each_ref().map(less)),
            ridge: this.ridge * own as f32 + added,
            ..this
        }
    }

    /// What the steps work with, or `None` where no token came or every input was zero.
    pub(crate) fn statistics(&self) -> Option<Statistics<B>> {
        let this = self.centered();
        let n = this.second.dims()[0];
        if this.weight <= 0.0 {
            return None;
        }
        let mean = |sum: &Tensor<B, 2>| sum.clone() / this.weight as f32;
        let second = mean(&this.second);
        let diagonal = diagonal_mean(&second);
        if !(diagonal.is_finite() && diagonal > 0.0) {
            return None;
        }
        let device = second.device();
        let damped = |share: f32| second.clone() + Tensor::eye(n, &device) * (share * diagonal);
        let factor = inverse_factor(&host(damped(DAMPING)), n)?;
        let target = inverse_factor(&host(damped(TARGET_DAMPING)), n)?;
        let target = Tensor::from_data(TensorData::new(target, [n, n]), &device);
        let ridge = TARGET_DAMPING * diagonal + this.ridge / this.weight as f32;
        let whitening = Whitening::new(target, ridge, this.evidence);
        let [cross, squares, off] = &this.off;
        // The inputs, and what they tell of how far they are off the teacher's.
        let regression = whitening.regression(mean(cross), mean(squares), 1.0) + Tensor::eye(n, &device);
        let lack = this.lack.as_ref().map(|[cross, squares, sum]| Lack {
            weight: whitening.regression(mean(cross), mean(squares), this.part),
            mean: mean(sum),
        });
        Some(Statistics {
            second,
            factor,
            regression,
            student: mean(&this.student),
            teacher: mean(&(this.student.clone() + off.clone())),
            lack,
            tokens: this.tokens,
        })
    }
}

/// What the student's residual stream lacks of the teacher's.
#[derive(Clone, Debug)]
pub(crate) struct Lack<B: Backend> {
    /// `E[e x~^T] (H + l I)^-1 [out, in]`, so far as that is believed: the weight that gives as much of it as the student's inputs
    /// tell.
    pub(crate) weight: Tensor<B, 2>,
    /// `E[e]`: `[1, out]`
    pub(crate) mean: Tensor<B, 2>,
}

/// What the steps of a method work with.
#[derive(Clone, Debug)]
pub(crate) struct Statistics<B: Backend> {
    /// `H = E[x~ x~^T]`, about the means where a bias follows: `[in, in]`
    pub(crate) second: Tensor<B, 2>,
    /// Upper triangular `U [in, in]` with `inverse(H + damping) = U^T U`, row-major.
    pub(crate) factor: Vec<f32>,
    /// `I + (G - H)(H + l I)^-1`, so far as it is believed: `W` times this is the full-precision weight for the student's inputs.
    pub(crate) regression: Tensor<B, 2>,
    /// `E[x~]`: `[1, in]`
    pub(crate) student: Tensor<B, 2>,
    /// `E[x]`: `[1, in]`
    pub(crate) teacher: Tensor<B, 2>,
    /// Where the linear's outputs are added to the residual stream, and are to make up for what it lacks.
    pub(crate) lack: Option<Lack<B>>,
    /// How many tokens there were.
    pub(crate) tokens: usize,
}

fn diagonal_mean<B: Backend>(matrix: &Tensor<B, 2>) -> f32 {
    let n = matrix.dims()[0];
    let identity = Tensor::<B, 2>::eye(n, &matrix.device());
    sum(matrix.clone() * identity) as f32 / n as f32
}

#[cfg(test)]
mod tests {
    use burn_flex::Flex;
    use proptest::{prelude::*, strategy::ValueTree, test_runner::TestRunner};

    use super::*;

    const TOKENS: usize = 4096;
    const INPUTS: usize = 64;

    fn numbers(count: usize) -> Vec<f32> {
        let numbers = prop::collection::vec(-1f32..1.0, count);
        numbers.new_tree(&mut TestRunner::deterministic()).unwrap().current()
    }

    /// As many tokens as there are numbers for.
    fn tensor(values: &[f32]) -> Tensor<Flex, 2> {
        let data = TensorData::new(values.to_vec(), [values.len() / INPUTS, INPUTS]);
        Tensor::from_data(data, &Default::default())
    }

    /// What the stream lacks is twice the first two inputs, and one more in the second output.
    fn moments(weights: Option<f32>) -> Moments<Flex> {
        let device = Default::default();
        let tensor = |values: Vec<f32>, width| Tensor::from_data(TensorData::new(values, [TOKENS, width]), &device);
        let inputs = numbers(TOKENS * INPUTS);
        let lack = inputs.chunks(INPUTS).flat_map(|x| [2.0 * x[0], 2.0 * x[1] + 1.0]).collect();
        let inputs = tensor(inputs, INPUTS);
        let mut moments = Moments::new(INPUTS, false, &device);
        let inputs = Inputs { student: inputs.clone(), teacher: inputs, lack: Some(tensor(lack, 2)) };
        moments.add(inputs, weights.map(|weight| Tensor::full([TOKENS, 1], weight, &device)));
        moments
    }

    fn lack(moments: &Moments<Flex>) -> (Vec<f32>, Vec<f32>) {
        let lack = moments.statistics().unwrap().lack.unwrap();
        (host(lack.weight), host(lack.mean))
    }

    #[test]
    fn inputs_tell_what_the_stream_lacks() {
        for weights in [None, Some(0.25)] {
            let (weight, mean) = lack(&moments(weights));
            for (i, found) in weight.iter().enumerate() {
                let expected = if [0, INPUTS + 1].contains(&i) { 2.0 } else { 0.0 };
                assert!((found - expected).abs() < 0.2, "{i}: {found}");
            }
            assert!(mean[0].abs() < 0.1 && (mean[1] - 1.0).abs() < 0.1, "{mean:?}");
        }
    }

    #[test]
    fn few_tokens_tell_less() {
        let whole = moments(None);
        let half = whole.shrunk_to_diagonal(TOKENS as f64);
        for (whole, half) in lack(&whole).1.into_iter().zip(lack(&half).1) {
            assert!((half - whole / 2.0).abs() < 1e-6, "{half} {whole}");
        }
        let (before, after) = (lack(&whole).0[0], lack(&half).0[0]);
        assert!(after > 0.3 * before && after < 0.7 * before, "{before} {after}");
    }

    #[test]
    fn centered_moments_do_not_see_means() {
        let device = Default::default();
        let numbers = numbers(4 * TOKENS * INPUTS);
        let parts: Vec<_> = numbers.chunks(TOKENS * INPUTS).map(tensor).collect();
        let weights = parts[3].clone().slice_dim(1, 0..1) + 1.0;
        let moved = |means: [f32; 3]| {
            let [student, teacher, lack] = [0, 1, 2].map(|i| parts[i].clone() + means[i]);
            let mut moments = Moments::new(INPUTS, true, &device);
            moments.add(Inputs { student, teacher, lack: Some(lack) }, Some(weights.clone()));
            let Statistics { second, regression, lack, .. } = moments.statistics().unwrap();
            let Lack { weight, mean } = lack.unwrap();
            ([second, regression, weight].map(host), host(mean))
        };
        let ((still, mean), (moved, moved_mean)) = (moved([0.0; 3]), moved([0.5, -2.0, 3.0]));
        for (still, moved) in still.into_iter().flatten().zip(moved.into_iter().flatten()) {
            assert!((still - moved).abs() < 1e-3, "{still} {moved}");
        }
        // The bias needs those of what is lacking.
        for (still, moved) in mean.into_iter().zip(moved_mean) {
            assert!((still + 3.0 - moved).abs() < 1e-3, "{still} {moved}");
        }
    }

    #[test]
    fn chance_counts_less_where_experts_share_it() {
        let device = Default::default();
        let numbers = numbers(2 * TOKENS * INPUTS);
        let (x, noise) = (tensor(&numbers[..TOKENS * INPUTS]), tensor(&numbers[TOKENS * INPUTS..]));
        // A fortieth of it is real.
        let lack = x.clone() * 0.16 + noise;
        let found = |weight: Option<f32>| {
            let mut moments = Moments::new(INPUTS, false, &device);
            let inputs = Inputs { student: x.clone(), teacher: x.clone(), lack: Some(lack.clone()) };
            moments.add(inputs, weight.map(|p| Tensor::full([TOKENS, 1], p * p, &device)));
            sum(moments.statistics().unwrap().lack.unwrap().weight * Tensor::eye(INPUTS, &device)) / INPUTS as f64
        };
        let (alone, shared) = (found(None), found(Some(0.25)));
        assert!(alone < 0.12 && shared > 1.15 * alone && shared < 0.16, "{alone} {shared}");
    }

    #[test]
    fn large_means_leave_an_inverse() {
        let x = tensor(&numbers(TOKENS * INPUTS));
        for mean in [1e3, 1e6] {
            let x = x.clone() + mean;
            let mut moments = Moments::new(INPUTS, true, &x.device());
            moments.add(Inputs { student: x.clone(), teacher: x, lack: None }, None);
            let statistics = moments.statistics().unwrap();
            assert!(statistics.factor.iter().chain(&host(statistics.regression)).all(|x| x.is_finite()), "{mean}");
        }
    }

    #[test]
    fn tokens_of_little_weight_are_little_evidence() {
        let device = Default::default();
        let evidence = |weights: [f32; 4]| {
            let x = Tensor::<Flex, 2>::ones([4, 2], &device);
            let mut moments = Moments::new(2, false, &device);
            let weights = Tensor::from_data(TensorData::new(weights.to_vec(), [4, 1]), &device);
            moments.add(Inputs { student: x.clone(), teacher: x, lack: None }, Some(weights));
            moments.evidence
        };
        assert_eq!(evidence([0.5; 4]), 4.0);
        assert_eq!(evidence([3.0, 0.0, 3.0, 0.0]), 2.0);
        assert!(evidence([1.0, 1e-3, 1e-3, 1e-3]) < 1.01);
    }

    #[test]
    fn chance_is_not_believed() {
        let (tokens, device) = (2 * INPUTS, Default::default());
        let numbers = numbers(3 * tokens * INPUTS);
        let parts: Vec<_> = numbers.chunks(tokens * INPUTS).map(tensor).collect();
        let student = parts[0].clone();
        let squares = |teacher: &Tensor<Flex, 2>, lack: &Tensor<Flex, 2>, evidence: Option<f64>| {
            let mut moments = Moments::new(INPUTS, false, &device);
            let (teacher, lack) = (teacher.clone(), Some(lack.clone()));
            moments.add(Inputs { student: student.clone(), teacher, lack }, None);
            moments.evidence = evidence.unwrap_or(moments.evidence);
            let Statistics { regression, lack, .. } = moments.statistics().unwrap();
            [regression - Tensor::eye(INPUTS, &device), lack.unwrap().weight].map(|found| sum(found.square()))
        };
        let (noisy, twice) = (student.clone() + parts[1].clone(), student.clone() * 2.0);
        for (teacher, lack, related) in [(&noisy, &parts[2], false), (&twice, &twice, true)] {
            let (found, all) = (squares(teacher, lack, None), squares(teacher, lack, Some(1e9)));
            for (found, all) in found.into_iter().zip(all) {
                assert!(if related { found > 0.9 * all } else { found < 0.1 * all }, "{related}: {found} of {all}");
            }
        }
    }
}
