//! Tensors that gradients move, by Adam (Kingma and Ba, arXiv 1412.6980).
//!
//! ```text
//! m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2        delta -= rate * m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + e)
//! ```
//!
//! with `t` the steps in which the tensor had a gradient. Everything it knows can be written to a file, so that a run which
//! was killed goes on with the same bits.

use burn::tensor::{
    Tensor, TensorData,
    backend::{AutodiffBackend, Backend},
};
use burn_autodiff::Autodiff;
use ternoss_backends::TernaryBackend;

use crate::{
    CalibError,
    snapshot::{SnapshotReader, SnapshotWriter},
    solution::host,
};

/// Share of the mean gradient that outlives a step.
const BETA_1: f32 = 0.9;

/// Share of the mean square that outlives a step.
const BETA_2: f32 = 0.95;

const EPSILON: f32 = 1e-12;

/// What a tensor of zeros moves by, as in Adafactor's relative steps (Shazeer and Stern, arXiv 1804.04235).
const LEAST_UNIT: f32 = 1e-3;

/// Share of the trits that a price keeps where they are, in the first step.
const STAYING: f64 = 0.95;

/// A tensor that gradients move: its value is `start + unit * delta`, so that one learning rate suits all.
#[derive(Clone, Debug)]
pub(crate) struct Slot<B: Backend> {
    pub(crate) start: Tensor<B, 1>,
    pub(crate) unit: f32,
    /// Whether it says how far trits have gone.
    pub(crate) soft: bool,
}

/// How far a tensor has moved, and how it will go on.
#[derive(Clone, Debug)]
pub(crate) struct Delta<B: TernaryBackend> {
    /// Gradients reach it.
    pub(crate) value: Tensor<Autodiff<B>, 1>,
    /// Steps in which there was a gradient.
    steps: u64,
    /// Means of gradients and of their squares, from the first of these steps on.
    moments: Option<[Tensor<B, 1>; 2]>,
}

/// Tensors under the gradients of one loss.
#[derive(Clone)]
pub(crate) struct Tuned<B: TernaryBackend> {
    pub(crate) slots: Vec<Slot<B>>,
    pub(crate) deltas: Vec<Delta<B>>,
}

/// The gradients of a loss.
pub(crate) type Gradients<B> = <Autodiff<B> as AutodiffBackend>::Gradients;

/// What a loss says of each slot; nothing where it does not depend on it.
pub(crate) type SlotGradients<B> = Vec<Option<Tensor<B, 1>>>;

impl<B: TernaryBackend> Tuned<B> {
    pub(crate) fn new(slots: Vec<Slot<B>>) -> Self {
        let deltas = slots.iter().map(|slot| Delta::of(slot.start.zeros_like(), 0, None));
        Self { deltas: deltas.collect(), slots }
    }

    /// One tensor alone.
    pub(crate) fn vector(start: Tensor<B, 1>) -> Self {
        let unit = rms(&start);
        Self::new(vec![Slot { start, unit, soft: false }])
    }

    /// The same tensors in a graph of their own: gradients of two losses can be computed at the same time.
    pub(crate) fn apart(&self) -> Self {
        self.with(|value| Tensor::from_inner(value).require_grad())
    }

    /// The same tensors in no graph: what is made of them keeps nothing for a backward pass.
    pub(crate) fn still(&self) -> Self {
        self.with(Tensor::from_inner)
    }

    fn with(&self, value: impl Fn(Tensor<B, 1>) -> Tensor<Autodiff<B>, 1>) -> Self {
        let delta = |delta: &Delta<B>| Delta { value: value(delta.value.clone().inner()), ..delta.clone() };
        Self { slots: self.slots.clone(), deltas: self.deltas.iter().map(delta).collect() }
    }

    /// The present value of a slot, which gradients reach.
    pub(crate) fn value(&self, slot: usize) -> Tensor<Autodiff<B>, 1> {
        let Slot { start, unit, .. } = &self.slots[slot];
        Tensor::from_inner(start.clone()) + self.deltas[slot].value.clone() * *unit
    }

    /// What a loss says of every slot.
    pub(crate) fn gradients(&self, of: &Gradients<B>) -> SlotGradients<B> {
        self.deltas.iter().map(|delta| delta.value.grad(of)).collect()
    }

    /// What each slot of trits pays for leaving: as much as most of them would gain by it, so that few go.
    pub(crate) fn prices(&self, gradients: &SlotGradients<B>) -> Vec<f32> {
        let price = |(slot, gradient): (&Slot<B>, &Option<Tensor<B, 1>>)| {
            let gradient = gradient.clone().filter(|_| slot.soft)?;
            let mut gains: Vec<f32> = host(gradient).into_iter().map(|slope| -slope).collect();
            gains.sort_unstable_by(f32::total_cmp);
            gains.get((gains.len() as f64 * STAYING) as usize).map(|gain| gain.max(0.0))
        };
        self.slots.iter().zip(gradients).map(|pair| price(pair).unwrap_or(0.0)).collect()
    }

    /// One step against the gradients; a slot without one stays.
    pub(crate) fn step(&mut self, learning_rate: f64, gradients: SlotGradients<B>) {
        for (delta, gradient) in self.deltas.iter_mut().zip(gradients) {
            if let Some(gradient) = gradient {
                delta.step(learning_rate, gradient);
            }
        }
    }

    /// Writes how far all tensors have moved.
    pub(crate) fn save(&self, file: &mut SnapshotWriter) -> Result<(), CalibError> {
        for delta in &self.deltas {
            file.number(delta.steps)?;
            if let Some(moments) = &delta.moments {
                file.floats(&host(delta.value.clone().inner()))?;
                moments.iter().try_for_each(|moment| file.floats(&host(moment.clone())))?;
            }
        }
        Ok(())
    }

    /// Takes over what [`save`](Self::save) wrote of tensors like these.
    pub(crate) fn load(&mut self, file: &mut SnapshotReader) -> Result<(), CalibError> {
        for (slot, delta) in self.slots.iter().zip(&mut self.deltas) {
            let steps = file.number()?;
            if steps > 0 {
                let (count, device) = (slot.start.dims()[0], slot.start.device());
                let mut next =
                    || Ok::<_, CalibError>(Tensor::from_floats(TensorData::new(file.floats(count)?, [count]), &device));
                let (value, moments) = (next()?, [next()?, next()?]);
                *delta = Delta::of(value, steps, Some(moments));
            }
        }
        Ok(())
    }
}

impl<B: TernaryBackend> Delta<B> {
    fn of(value: Tensor<B, 1>, steps: u64, moments: Option<[Tensor<B, 1>; 2]>) -> Self {
        Self { value: Tensor::from_inner(value).require_grad(), steps, moments }
    }

    fn step(&mut self, learning_rate: f64, gradient: Tensor<B, 1>) {
        let now = [gradient.clone() * (1.0 - BETA_1), gradient.square() * (1.0 - BETA_2)];
        let [first, second] = match self.moments.take() {
            Some([first, second]) => {
                let [gradient, square] = now;
                [first * BETA_1 + gradient, second * BETA_2 + square]
            }
            None => now,
        };
        let steps = self.steps + 1;
        let power = |beta: f32| 1.0 - beta.powi(steps.min(i32::MAX as u64) as i32);
        // Both corrections in one factor.
        let root = power(BETA_2).sqrt();
        let direction = first.clone() * (root / power(BETA_1)) / (second.clone().sqrt() + EPSILON * root);
        let value = self.value.clone().inner() - direction * learning_rate;
        *self = Self::of(value, steps, Some([first, second]));
    }
}

/// The sum of two.
pub(crate) fn add<B: TernaryBackend>(a: SlotGradients<B>, b: SlotGradients<B>) -> SlotGradients<B> {
    let sum = |(a, b)| match (a, b) {
        (Some(a), Some(b)) => Some(a + b),
        (a, b) => a.or(b),
    };
    a.into_iter().zip(b).map(sum).collect()
}

/// Adds the prices to the gradients.
pub(crate) fn charge<B: TernaryBackend>(gradients: SlotGradients<B>, prices: &[f32]) -> SlotGradients<B> {
    let charge = |(gradient, price): (Option<Tensor<B, 1>>, &f32)| {
        gradient.map(|gradient| if *price > 0.0 { gradient + *price } else { gradient })
    };
    gradients.into_iter().zip(prices).map(charge).collect()
}

/// Root of the mean square, at least [`LEAST_UNIT`].
pub(crate) fn rms<B: Backend>(values: &Tensor<B, 1>) -> f32 {
    let squares: f64 = host(values.clone()).iter().map(|value| f64::from(*value).powi(2)).sum();
    LEAST_UNIT.max((squares / values.dims()[0].max(1) as f64).sqrt() as f32)
}

#[cfg(test)]
mod tests {
    use burn::{
        module::{Module, Param},
        optim::{AdamConfig, GradientsParams, Optimizer},
    };
    use burn_flex::Flex;

    use super::*;

    #[test]
    fn a_step_goes_against_the_gradient_by_a_share_of_the_value() {
        let device = Default::default();
        let start = Tensor::<Flex, 1>::from_data(TensorData::new(vec![2.0f32, -2.0], [2]), &device);
        let mut tuned = Tuned::vector(start);
        let loss = tuned.value(0).sum();
        let gradients = tuned.gradients(&loss.backward());
        tuned.step(0.01, gradients);
        let found = host(tuned.value(0).inner());
        // The first step of Adam has the learning rate's size, here in units of 2.
        assert!((found[0] - 1.98).abs() < 1e-4 && (found[1] + 2.02).abs() < 1e-4, "{found:?}");
    }

    /// A vector to tune, and gradients for it.
    fn example() -> (Tuned<Flex>, impl Fn(usize) -> Tensor<Flex, 1>) {
        let vector = |values: [f32; 3]| Tensor::<Flex, 1>::from_floats(values, &Default::default());
        let gradient = move |step: usize| vector([0.3, -1e-3, 7.0].map(|x: f32| x * (step as f32 * 1.7).sin()));
        (Tuned::vector(vector([1.0, -2.0, 0.5])), gradient)
    }

    #[test]
    fn steps_are_those_of_burns_adam_bit_for_bit() {
        let (mut tuned, gradient) = example();
        let mut module = Vector { values: Param::from_tensor(tuned.deltas[0].value.clone().detach()) };
        let config = AdamConfig::new().with_beta_1(BETA_1).with_beta_2(BETA_2).with_epsilon(EPSILON);
        let mut optimizer = config.init::<Autodiff<Flex>, Vector<Autodiff<Flex>>>();
        for step in 0..20 {
            let rate = 1e-3 / (step + 1) as f64;
            tuned.step(rate, vec![Some(gradient(step))]);
            let mut gradients = GradientsParams::new();
            gradients.register::<Flex, 1>(module.values.id, gradient(step));
            module = optimizer.step(rate, module, gradients);
            let expected = module.values.val().inner();
            assert_eq!(host(tuned.deltas[0].value.clone().inner()), host(expected), "step {step}");
        }
    }

    #[derive(Module, Debug)]
    struct Vector<B: Backend> {
        values: Param<Tensor<B, 1>>,
    }

    #[test]
    fn saved_tensors_go_on_with_the_same_bits() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.bin");
        let (mut whole, gradient) = example();
        let (mut resumed, _) = example();
        for step in 0..10 {
            // No gradient for the first one: it has no moments then.
            let gradient = (step > 0).then(|| gradient(step));
            let mut file = SnapshotWriter::create(&path).unwrap();
            resumed.save(&mut file).unwrap();
            file.finish().unwrap();
            resumed = example().0;
            let mut file = SnapshotReader::open(&path).unwrap();
            resumed.load(&mut file).unwrap();
            file.end().unwrap();
            for tuned in [&mut whole, &mut resumed] {
                tuned.step(0.01, vec![gradient.clone()]);
            }
            assert_eq!(host(resumed.value(0).inner()), host(whole.value(0).inner()), "step {step}");
        }
    }
}
