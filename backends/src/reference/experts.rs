use burn::tensor::{Int, Tensor, TensorData, activation::sigmoid, backend::Backend};

use super::magnitude;
use crate::ops::{ClampedSwiGlu, TernaryBackend, TernaryExperts};

/// [`ternary_experts`](crate::ternary_experts) as a loop over the chosen experts, each with the backend's own
/// [`ternary_linear`](TernaryBackend::ternary_linear).
#[must_use]
pub fn ternary_experts<B: TernaryBackend>(
    x: Tensor<B, 2>,
    chosen: Tensor<B, 2, Int>,
    weights: Tensor<B, 2>,
    experts: &TernaryExperts<B>,
) -> Tensor<B, 2> {
    let [tokens, k] = chosen.dims();
    let device = x.device();
    let chosen: Vec<i64> = chosen.into_data().iter::<i64>().collect();
    let gathered = Gathered::new(&chosen, k.max(1), experts.experts());
    let mut outputs = Vec::new();
    for (expert, tokens) in &gathered.experts {
        outputs.push(one_expert(x.clone().select(0, indices(tokens, &device)), experts, *expert));
    }
    // The row that choices of no expert point at.
    outputs.push(Tensor::full([1, experts.hidden()], f32::NAN, &device));
    let outputs = Tensor::cat(outputs, 0);
    let mut sum = Tensor::zeros([tokens, experts.hidden()], &device);
    for slot in 0..k {
        let rows: Vec<usize> = gathered.rows.iter().skip(slot).step_by(k).copied().collect();
        let weight = weights.clone().slice([0..tokens, slot..slot + 1]);
        sum = sum + outputs.clone().select(0, indices(&rows, &device)) * weight;
    }
    sum
}

/// One expert over its own tokens: `[n, hidden]` to `[n, hidden]`.
fn one_expert<B: TernaryBackend>(x: Tensor<B, 2>, experts: &TernaryExperts<B>, expert: usize) -> Tensor<B, 2> {
    let bias = |bias: &Tensor<B, 2>| bias.clone().slice_dim(0, expert..expert + 1);
    let gate_up = B::ternary_linear(x, &experts.gate_up, expert) + bias(&experts.gate_up_bias);
    let hidden = B::clamped_swiglu(gate_up, experts.activation);
    B::ternary_linear(hidden, &experts.down, expert) + bias(&experts.down_bias)
}

/// [`clamped_swiglu`](crate::clamped_swiglu) with Burn's operations.
#[must_use]
pub fn clamped_swiglu<B: Backend>(gate_up: Tensor<B, 2>, activation: ClampedSwiGlu) -> Tensor<B, 2> {
    let [gate, up] = gate_and_up(gate_up);
    let gate = gate.clamp_max(activation.limit);
    let up = up.clamp(-activation.limit, activation.limit);
    (up + 1.0) * gate.clone() * sigmoid(gate * activation.alpha)
}

/// What [`clamped_swiglu`] says of its argument, from the gradient of its result: `[n, 2 * intermediate]`, zero where gate or
/// up are clamped. With `s = sigmoid(alpha * gate)`: `(up + 1) * (s + alpha * gate * s * (1 - s))` for the gate, `gate * s`
/// for up, times the gradient.
#[must_use]
pub fn clamped_swiglu_gradient<B: Backend>(
    gate_up: Tensor<B, 2>,
    gradient: Tensor<B, 2>,
    activation: ClampedSwiGlu,
) -> Tensor<B, 2> {
    let ClampedSwiGlu { alpha, limit } = activation;
    let shape @ [n, width] = gate_up.dims();
    let [gate, up] = gate_and_up(gate_up);
    let clamped = [gate.clone().greater_elem(limit), magnitude(up.clone()).greater_elem(limit)];
    let (gate, up) = (gate.clamp_max(limit), up.clamp(-limit, limit));
    let share = sigmoid(gate.clone() * alpha);
    let slope = share.clone() + gate.clone() * alpha * (share.clone() * (-share.clone() + 1.0));
    let gradients = [(up + 1.0) * slope * gradient.clone(), gate * share * gradient];
    let masked = gradients.into_iter().zip(clamped).map(|(gradient, clamped)| {
        let gradient = gradient.mask_fill(clamped, 0.0);
        gradient.reshape([n, width / 2, 1])
    });
    Tensor::cat(masked.collect(), 2).reshape(shape)
}

/// Both halves of `[n, 2 * intermediate]`, which alternate.
fn gate_and_up<B: Backend>(gate_up: Tensor<B, 2>) -> [Tensor<B, 2>; 2] {
    let [n, width] = gate_up.dims();
    let pairs = gate_up.reshape([n, width / 2, 2]);
    [0, 1].map(|half| pairs.clone().slice([0..n, 0..width / 2, half..half + 1]).reshape([n, width / 2]))
}

/// Which tokens go to which expert, and where each choice's output row lies once the experts' outputs are stacked.
struct Gathered {
    /// Expert and its tokens, in order of the expert, only those that are chosen.
    experts: Vec<(usize, Vec<usize>)>,
    /// Row of the stacked outputs for each choice `[tokens * k]`.
    rows: Vec<usize>,
}

impl Gathered {
    fn new(chosen: &[i64], k: usize, experts: usize) -> Self {
        let mut choices: Vec<Vec<usize>> = vec![Vec::new(); experts];
        for (choice, &expert) in chosen.iter().enumerate() {
            if let Some(choices) = usize::try_from(expert).ok().and_then(|expert| choices.get_mut(expert)) {
                choices.push(choice);
            }
        }
        let valid: usize = choices.iter().map(Vec::len).sum();
        let mut rows = vec![valid; chosen.len()];
        for (row, &choice) in choices.iter().flatten().enumerate() {
            rows[choice] = row;
        }
        let tokens = |choices: Vec<usize>| choices.into_iter().map(|choice| choice / k).collect();
        let experts = choices.into_iter().enumerate().filter(|(_, choices)| !choices.is_empty());
        Self { experts: experts.map(|(expert, choices)| (expert, tokens(choices))).collect(), rows }
    }
}

fn indices<B: Backend>(rows: &[usize], device: &B::Device) -> Tensor<B, 1, Int> {
    let rows: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
    let n = rows.len();
    Tensor::from_data(TensorData::new(rows, [n]), device)
}
