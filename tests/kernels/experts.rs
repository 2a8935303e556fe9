use burn::tensor::{Int, Tensor, TensorData, backend::Backend};
use burn_flex::Flex;
use burn_ndarray::NdArray;
use ternoss::backends::{
    ClampedSwiGlu, CodeFormat, ExpertLayer, FormatError, TernaryBackend, TernaryExperts, TernaryLayout,
    cpu::{self, Kernels},
    expert_layer, reference, rms_norm, route, ternary_experts,
};

use crate::support::{Noise, Weights, all_kernels, assert_close, assert_same, layout, matrix, values};

pub(crate) const EXPERTS: usize = 6;
const HIDDEN: usize = 200;
const INTERMEDIATE: usize = 130;

pub(crate) struct Layer {
    gate_up: Weights,
    gate_up_bias: Vec<f32>,
    down: Weights,
    down_bias: Vec<f32>,
    activation: ClampedSwiGlu,
}

impl Layer {
    pub(crate) fn new(format: CodeFormat, planes: usize, group_size: Option<usize>) -> Self {
        let of = |rows, width| TernaryLayout { matrices: EXPERTS, planes, group_size, ..layout(format, rows, width) };
        let mut noise = Noise::new(1);
        let mut gate_up = Weights::new(of(2 * INTERMEDIATE, HIDDEN), 2);
        let mut down = Weights::new(of(HIDDEN, INTERMEDIATE), 3);
        // Group scales are up to 255: brought back to where the clamps bind for some values and not for others.
        let size = if group_size.is_some() { 0.003 } else { 0.3 };
        gate_up.row_scales.iter_mut().chain(&mut down.row_scales).for_each(|scale| *scale *= size);
        Self {
            gate_up,
            gate_up_bias: noise.floats(EXPERTS * 2 * INTERMEDIATE),
            down,
            down_bias: noise.floats(EXPERTS * HIDDEN),
            activation: ClampedSwiGlu { alpha: 1.702, limit: 2.0 },
        }
    }

    pub(crate) fn tensors<B: Backend>(&self) -> TernaryExperts<B> {
        let gate_up_bias = matrix(&self.gate_up_bias, [EXPERTS, 2 * INTERMEDIATE]);
        let down_bias = matrix(&self.down_bias, [EXPERTS, HIDDEN]);
        let (gate_up, down) = (self.gate_up.tensor(), self.down.tensor());
        TernaryExperts::new(gate_up, gate_up_bias, down, down_bias, self.activation).unwrap()
    }

    /// With a norm and a router before them.
    pub(crate) fn with_router<B: Backend>(&self) -> ExpertLayer<B> {
        let mut noise = Noise::new(5);
        ExpertLayer {
            gamma: matrix(&noise.floats(HIDDEN), [1, HIDDEN]).reshape([HIDDEN]),
            epsilon: 1e-5,
            router: matrix(&noise.floats(HIDDEN * EXPERTS), [HIDDEN, EXPERTS]),
            router_bias: matrix(&noise.floats(EXPERTS), [1, EXPERTS]).reshape([EXPERTS]),
            experts_per_token: 3,
            experts: self.tensors(),
        }
    }

    fn kernels(&self, kernels: Kernels, batch: &Batch) -> Vec<f32> {
        let (gate_up, down) = (self.gate_up.view(), self.down.view());
        let view = cpu::experts::Experts::new(gate_up, &self.gate_up_bias, down, &self.down_bias, self.activation);
        let mut out = vec![0.0; batch.x.len()];
        let Batch { x, chosen, weights, .. } = batch;
        cpu::experts::ternary_experts(kernels, &view.unwrap(), x, chosen, weights, &mut out).unwrap();
        out
    }

    /// Token by token, choice by choice.
    pub(crate) fn naive(&self, batch: &Batch) -> Vec<f32> {
        let mut out = vec![0.0f32; batch.x.len()];
        for (choice, (expert, weight)) in batch.chosen.iter().zip(&batch.weights).enumerate() {
            let token = choice / batch.k * HIDDEN;
            let expert = usize::try_from(*expert).ok().filter(|expert| *expert < EXPERTS);
            let y = match expert {
                Some(expert) => self.expert(expert, &batch.x[token..token + HIDDEN]),
                None => vec![f32::NAN; HIDDEN],
            };
            out[token..].iter_mut().zip(y).for_each(|(out, y)| *out += weight * y);
        }
        out
    }

    fn expert(&self, expert: usize, x: &[f32]) -> Vec<f32> {
        let add = |y: Vec<f32>, bias: &[f32]| -> Vec<f32> {
            let bias = &bias[expert * y.len()..];
            y.iter().zip(bias).map(|(y, bias)| y + bias).collect()
        };
        let gate_up = add(self.gate_up.multiply(expert, x), &self.gate_up_bias);
        let ClampedSwiGlu { alpha, limit } = self.activation;
        let gated = |pair: &[f32]| {
            let (gate, up) = (pair[0].min(limit), pair[1].clamp(-limit, limit));
            (up + 1.0) * gate / (1.0 + (-alpha * gate).exp())
        };
        let hidden: Vec<f32> = gate_up.chunks(2).map(gated).collect();
        add(self.down.multiply(expert, &hidden), &self.down_bias)
    }
}

pub(crate) struct Batch {
    pub(crate) x: Vec<f32>,
    pub(crate) chosen: Vec<i64>,
    weights: Vec<f32>,
    k: usize,
}

impl Batch {
    pub(crate) fn new(tokens: usize, k: usize) -> Self {
        let mut noise = Noise::new(4);
        // Expert 4 is never chosen.
        let choose = |n: u64| [0, 1, 2, 3, 5][(n % 5) as usize];
        let chosen = (0..tokens * k).map(|_| choose(noise.next())).collect();
        Self { x: noise.floats(tokens * HIDDEN), chosen, weights: noise.floats(tokens * k), k }
    }

    /// The tokens after the norm, the router and the experts.
    pub(crate) fn through<B: TernaryBackend>(&self, layer: &ExpertLayer<B>) -> Vec<f32> {
        values(expert_layer(matrix(&self.x, [self.tokens(), HIDDEN]), layer))
    }

    fn token(&self, token: usize) -> Self {
        Self {
            x: self.x[token * HIDDEN..(token + 1) * HIDDEN].to_vec(),
            chosen: self.chosen[token * self.k..(token + 1) * self.k].to_vec(),
            weights: self.weights[token * self.k..(token + 1) * self.k].to_vec(),
            k: self.k,
        }
    }

    fn tokens(&self) -> usize {
        self.x.len() / HIDDEN
    }

    pub(crate) fn run<B: TernaryBackend>(&self, experts: &TernaryExperts<B>, plain: bool) -> Vec<f32> {
        let shape = [self.tokens(), self.k];
        let chosen: Tensor<B, 2, Int> =
            Tensor::from_data(TensorData::new(self.chosen.clone(), shape), &Default::default());
        let (x, weights) = (matrix(&self.x, [self.tokens(), HIDDEN]), matrix(&self.weights, shape));
        let y = if plain {
            reference::ternary_experts(x, chosen, weights, experts)
        } else {
            ternary_experts(x, chosen, weights, experts)
        };
        assert_eq!(y.dims(), [self.tokens(), HIDDEN]);
        values(y)
    }
}

/// Another exp may round a value between the matrices to the neighbouring int8 level: a few of those are allowed for.
pub(crate) const ONE_LEVEL: f32 = 0.01;

#[test]
fn a_layer_of_experts_is_a_norm_a_router_and_the_experts_onto_its_input() {
    let layer = Layer::new(CodeFormat::T2, 1, Some(64)).with_router::<Flex>();
    let batch = Batch::new(17, 3);
    let x: Tensor<Flex, 2> = matrix(&batch.x, [17, HIDDEN]);
    let normed = rms_norm(x.clone(), layer.gamma.clone(), layer.epsilon);
    let (chosen, weights) = route(normed.clone(), layer.router.clone(), layer.router_bias.clone(), 3);
    let expected = values(x + ternary_experts(normed, chosen, weights, &layer.experts));
    assert_same(&batch.through(&layer), &expected, "layer");
}

#[test]
fn every_instruction_set_agrees_with_a_naive_loop_and_with_the_others_bit_for_bit() {
    for (format, planes, group_size) in
        [(CodeFormat::T2, 1, None), (CodeFormat::T2, 2, Some(64)), (CodeFormat::T5, 1, Some(128))]
    {
        let layer = Layer::new(format, planes, group_size);
        for tokens in [1, 2, 17] {
            let batch = Batch::new(tokens, 3);
            let scalar = layer.kernels(all_kernels().next().unwrap(), &batch);
            assert_close(&scalar, &layer.naive(&batch), ONE_LEVEL, "naive");
            for kernels in all_kernels() {
                assert_same(&layer.kernels(kernels, &batch), &scalar, &kernels.isa().to_string());
            }
        }
    }
}

#[test]
fn backends_agree_with_plain_burn() {
    fn check<B: TernaryBackend>() {
        let layer = Layer::new(CodeFormat::T2, 1, Some(64));
        let batch = Batch::new(9, 2);
        let experts = layer.tensors::<B>();
        let y = batch.run(&experts, false);
        assert_same(&y, &layer.kernels(Kernels::detect(), &batch), "kernels");
        assert_close(&y, &batch.run(&experts, true), ONE_LEVEL, "plain Burn");
        let nothing = Batch { x: Vec::new(), chosen: Vec::new(), weights: Vec::new(), k: 2 };
        assert!(nothing.run(&experts, false).is_empty());
        assert!(nothing.run(&experts, true).is_empty());
    }
    check::<Flex>();
    check::<NdArray>();
}

#[test]
fn a_token_does_not_see_its_batch_nor_the_threads() {
    let layer = Layer::new(CodeFormat::T2, 1, None);
    // More choices than are worked on at a time.
    let batch = Batch::new(150, 4);
    let alone: Vec<f32> =
        (0..batch.tokens()).flat_map(|token| layer.kernels(Kernels::detect(), &batch.token(token))).collect();
    for threads in [1, 4] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let together = pool.install(|| layer.kernels(Kernels::detect(), &batch));
        assert_same(&together, &alone, &format!("{threads} threads"));
    }
}

#[test]
fn a_choice_of_no_expert_makes_its_token_nan_and_no_other() {
    let layer = Layer::new(CodeFormat::T2, 1, None);
    for wrong in [-1, EXPERTS as i64, i64::from(i32::MAX)] {
        let mut batch = Batch::new(3, 2);
        batch.chosen[3] = wrong;
        for plain in [false, true] {
            let y = batch.run(&layer.tensors::<Flex>(), plain);
            assert!(y[HIDDEN..2 * HIDDEN].iter().all(|y| y.is_nan()));
            assert!(y[..HIDDEN].iter().chain(&y[2 * HIDDEN..]).all(|y| y.is_finite()));
        }
    }
}

#[test]
fn a_token_that_is_not_finite_is_nan_through_the_gate() {
    let layer = Layer::new(CodeFormat::T2, 1, None);
    let mut batch = Batch::new(2, 2);
    batch.x[7] = f32::INFINITY;
    for kernels in all_kernels() {
        let y = layer.kernels(kernels, &batch);
        assert!(y[..HIDDEN].iter().all(|y| y.is_nan()));
        assert!(y[HIDDEN..].iter().all(|y| y.is_finite()));
    }
}

#[test]
fn parts_that_do_not_fit_are_refused() {
    let good = Layer::new(CodeFormat::T2, 1, None).tensors::<Flex>();
    let TernaryExperts { gate_up, gate_up_bias, down, down_bias, activation } = good;
    let swapped =
        TernaryExperts::new(down.clone(), gate_up_bias.clone(), gate_up.clone(), down_bias.clone(), activation);
    assert!(matches!(swapped.err(), Some(FormatError::Shape { .. })));
    let biases = TernaryExperts::new(gate_up, down_bias, down, gate_up_bias, activation);
    assert!(matches!(biases.err(), Some(FormatError::Shape { tensor: "gate_up_bias", .. })));
}
