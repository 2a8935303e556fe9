//! Linear regressions from second moments, believed so far as they are no chance.

use burn::tensor::{Tensor, backend::Backend};

use crate::solution::sum;

/// Inputs turned into independent ones of variance 1: `U x`, with `inverse(H + ridge) = U^T U`.
pub(crate) struct Whitening<B: Backend> {
    /// `U [in, in]`
    factor: Tensor<B, 2>,
    /// How much of each direction's variance the tokens make up, the ridge being the rest: `[1, in]`.
    share: Tensor<B, 2>,
    /// Tokens of equal weight that the moments rest on.
    evidence: f64,
}

impl<B: Backend> Whitening<B> {
    /// `ridge` is all that was added to the diagonal of the tokens' moments.
    pub(crate) fn new(factor: Tensor<B, 2>, ridge: f32, evidence: f64) -> Self {
        let share = (factor.clone().square().sum_dim(1) * -ridge + 1.0).clamp_min(0.0).transpose();
        Self { factor, share, evidence }
    }

    /// The weight `[out, in]` that tells `y` from the inputs, by `E[y x^T] [out, in]` and `E[y^2] [1, out]`.
    ///
    /// For independent inputs each number of a weight, squared, is what is real of it and chance together. Chance is the same for
    /// all of an output's, but for a direction's share: what the regression leaves unexplained over the tokens left to it, those
    /// there are less the ridge regression's degrees of freedom. What is real is taken to be large where its row and its column
    /// have more than chance, and each number counts by the real share of its square (a Wiener filter whose variances are
    /// estimated, as by empirical Bayes). Inputs that vary much tell more, so this keeps what one factor a row (James and Stein)
    /// loses.
    ///
    /// With `part < 1` this is one of several regressions of the same outputs that are added up, each times `part`: what is real adds
    /// up, chance cancels.
    pub(crate) fn regression(&self, cross: Tensor<B, 2>, squares: Tensor<B, 2>, part: f64) -> Tensor<B, 2> {
        let rest = self.evidence - sum(self.share.clone());
        if rest < 1.0 {
            return cross.zeros_like();
        }
        let weight = cross.matmul(self.factor.clone().transpose());
        let found = weight.clone().square();
        let unexplained = (squares.transpose() - found.clone().sum_dim(1)).clamp_min(0.0);
        let chance = (unexplained * (1.0 / rest) as f32).matmul(self.share.clone());
        let above = found - chance.clone();
        let rows = above.clone().sum_dim(1).clamp_min(0.0);
        let columns = above.sum_dim(0).clamp_min(0.0);
        let all = rows.clone().sum_dim(0).clamp_min(f32::MIN_POSITIVE);
        let real = rows * (columns / all);
        let believed = real.clone() / (real + chance * part as f32).clamp_min(f32::MIN_POSITIVE);
        (weight * believed).matmul(self.factor.clone())
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::TensorData;
    use burn_flex::Flex;
    use proptest::{prelude::*, strategy::ValueTree, test_runner::TestRunner};

    use super::*;
    use crate::{linalg::inverse_factor, solution::host};

    const TOKENS: usize = 160;
    const INPUTS: usize = 64;

    type Matrix = Tensor<Flex, 2>;

    /// Two matrices `[TOKENS, INPUTS]` of independent numbers.
    fn numbers() -> [Matrix; 2] {
        let numbers = prop::collection::vec(-1f32..1.0, 2 * TOKENS * INPUTS);
        let numbers = numbers.new_tree(&mut TestRunner::deterministic()).unwrap().current();
        let all = Matrix::from_data(TensorData::new(numbers, [2 * TOKENS, INPUTS]), &Default::default());
        [all.clone().slice_dim(0, 0..TOKENS), all.slice_dim(0, TOKENS..2 * TOKENS)]
    }

    /// The regression of `y` on `x`, all of it, and so far as it is believed with tokens worth `evidence`.
    fn regressions(x: Matrix, y: Matrix, ridge: f32, evidence: f64) -> [Matrix; 2] {
        let device = x.device();
        let mean = |sum: Matrix| sum / TOKENS as f32;
        let second = mean(x.clone().transpose().matmul(x.clone()));
        let factor = inverse_factor(&host(second + Matrix::eye(INPUTS, &device) * ridge), INPUTS).unwrap();
        let factor = Matrix::from_data(TensorData::new(factor, [INPUTS; 2]), &device);
        let (cross, squares) = (mean(y.clone().transpose().matmul(x)), mean(y.square().sum_dim(0)));
        [1e12, evidence].map(|evidence| {
            Whitening::new(factor.clone(), ridge, evidence).regression(cross.clone(), squares.clone(), 1.0)
        })
    }

    #[test]
    fn an_input_that_tells_something_stands_out() {
        let [x, noise] = numbers();
        // The last is a direction of its own: `U` is upper triangular.
        let last = INPUTS - 1;
        let y = x.clone().slice_dim(1, last..INPUTS).expand([TOKENS, INPUTS]) + noise;
        let [plain, believed] = regressions(x, y, 1e-3, TOKENS as f64);
        let column = |w: &Matrix, i: usize| sum(w.clone().slice_dim(1, i..i + 1).square()) / INPUTS as f64;
        assert!(column(&believed, last) > 0.8, "{}", column(&believed, last));
        let others = |w: &Matrix| (0..last).map(|i| column(w, i)).sum::<f64>();
        assert!(others(&believed) < 0.1 * others(&plain), "{} {}", others(&believed), others(&plain));
    }

    #[test]
    fn a_ridge_is_not_taken_for_chance() {
        let [x, noise] = numbers();
        for ridge in [1e-3, 1.0] {
            let y = x.clone() + noise.clone();
            let [plain, believed] = regressions(x.clone(), y, ridge, TOKENS as f64)
                .map(|w| sum(w.clone() * Matrix::eye(INPUTS, &w.device())));
            assert!(believed > 0.5 * plain, "{ridge}: {believed} of {plain}");
        }
    }

    #[test]
    fn fewer_tokens_than_inputs_tell_nothing() {
        let [x, _] = numbers();
        let [_, believed] = regressions(x.clone(), x, 1e-3, INPUTS as f64 - 8.0);
        assert_eq!(sum(believed.square()), 0.0);
    }
}
