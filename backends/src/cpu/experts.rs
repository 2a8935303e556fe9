//! The routed feed-forward block: choices are gathered by expert, so that each weight row is read once for all tokens that
//! chose it, and the products of several experts share the threads.
//!
//! ```
//! use ternoss_backends::{
//!     ClampedSwiGlu, CodeFormat, TernaryLayout,
//!     cpu::{Kernels, TernaryMatrices, experts::{Experts, ternary_experts}},
//! };
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // Two experts of one hidden and one intermediate dimension; trits of zero leave the biases.
//! let gate_up = TernaryLayout { format: CodeFormat::T2, matrices: 2, planes: 1, rows: 2, in_features: 1, group_size: None, rotation: None };
//! let down = TernaryLayout { rows: 1, ..gate_up };
//! let zeros = |layout: TernaryLayout| {
//!     let mut codes = vec![0; layout.matrices * layout.rows * layout.words_per_row()];
//!     codes.chunks_mut(layout.words_per_row()).for_each(|row| layout.format.pack_row(&[0], row));
//!     codes
//! };
//! let (upper, lower, scales) = (zeros(gate_up), zeros(down), [1.0; 4]);
//! let experts = Experts::new(
//!     TernaryMatrices::new(gate_up, &upper, &scales, None)?,
//!     &[0.0; 4],
//!     TernaryMatrices::new(down, &lower, &scales[..2], None)?,
//!     &[10.0, 20.0],
//!     ClampedSwiGlu { alpha: 1.702, limit: 7.0 },
//! )?;
//! // A token that goes to both, three quarters to the second.
//! let mut out = [0.0];
//! ternary_experts(Kernels::detect(), &experts, &[1.0], &[0, 1], &[0.25, 0.75], &mut out)?;
//! assert_eq!(out, [17.5]);
//! # Ok(()) }
//! ```

use super::{
    Kernels, TernaryMatrices,
    linear::{self, Product, check},
    tasks,
    tokens::Tokens,
};
use crate::{format::FormatError, ops::ClampedSwiGlu};

/// Choices that are worked on at a time, so that what lies between the two matrices stays small. At least one expert with
/// all its tokens is taken whatever their number.
const WAVE: usize = 256;

/// The experts of one layer in memory: the kernels' view of [`TernaryExperts`](crate::TernaryExperts).
#[derive(Debug, Clone, Copy)]
pub struct Experts<'a> {
    gate_up: TernaryMatrices<'a>,
    gate_up_bias: &'a [f32],
    down: TernaryMatrices<'a>,
    down_bias: &'a [f32],
    activation: ClampedSwiGlu,
}

impl<'a> Experts<'a> {
    /// Checks that the parts fit each other.
    ///
    /// # Errors
    /// [`FormatError::Length`] where they do not.
    pub fn new(
        gate_up: TernaryMatrices<'a>,
        gate_up_bias: &'a [f32],
        down: TernaryMatrices<'a>,
        down_bias: &'a [f32],
        activation: ClampedSwiGlu,
    ) -> Result<Self, FormatError> {
        let (upper, lower) = (gate_up.layout(), down.layout());
        check("experts in down", upper.matrices, lower.matrices)?;
        check("gate_up rows", 2 * lower.in_features, upper.rows)?;
        check("down rows", upper.in_features, lower.rows)?;
        check("gate_up_bias", upper.matrices * upper.rows, gate_up_bias.len())?;
        check("down_bias", lower.matrices * lower.rows, down_bias.len())?;
        Ok(Self { gate_up, gate_up_bias, down, down_bias, activation })
    }

    fn count(&self) -> usize {
        self.gate_up.layout().matrices
    }

    fn hidden(&self) -> usize {
        self.gate_up.layout().in_features
    }
}

/// The tokens of one expert, as choices: choice `c` is slot `c % k` of token `c / k`.
struct Visit {
    expert: usize,
    choices: Vec<usize>,
}

/// `out [tokens, hidden]` of `x [tokens, hidden]`; `chosen` and `weights` are `[tokens, k]`. A choice of no expert makes its
/// token NaN.
///
/// # Errors
/// [`FormatError::Length`] if the slices do not fit each other.
pub fn ternary_experts(
    kernels: Kernels,
    experts: &Experts<'_>,
    x: &[f32],
    chosen: &[i64],
    weights: &[f32],
    out: &mut [f32],
) -> Result<(), FormatError> {
    let hidden = experts.hidden();
    let tokens = x.len() / hidden;
    check("values of the tokens", tokens * hidden, x.len())?;
    check("outputs", x.len(), out.len())?;
    check("weights of the choices", chosen.len(), weights.len())?;
    let k = chosen.len().checked_div(tokens).unwrap_or(0);
    check("choices", tokens * k, chosen.len())?;
    let inputs = Tokens::quantize(kernels, x, hidden, experts.gate_up.layout().rotation);
    let mut outputs = vec![f32::NAN; chosen.len() * hidden];
    for wave in waves(visits(chosen, experts.count())) {
        run_wave(kernels, experts, &inputs, k, &wave, &mut outputs);
    }
    combine(&outputs, weights, k, hidden, out);
    Ok(())
}

/// Who goes where, in order of the experts, those without visitors left out.
fn visits(chosen: &[i64], experts: usize) -> Vec<Visit> {
    let mut visits: Vec<Visit> = (0..experts).map(|expert| Visit { expert, choices: Vec::new() }).collect();
    for (choice, expert) in chosen.iter().enumerate() {
        if let Some(visit) = usize::try_from(*expert).ok().and_then(|expert| visits.get_mut(expert)) {
            visit.choices.push(choice);
        }
    }
    visits.retain(|visit| !visit.choices.is_empty());
    visits
}

/// Cuts the visits so that each wave has at most [`WAVE`] choices, or one expert.
fn waves(visits: Vec<Visit>) -> Vec<Vec<Visit>> {
    let mut waves: Vec<Vec<Visit>> = Vec::new();
    let mut room = 0;
    for visit in visits {
        let size = visit.choices.len();
        match waves.last_mut() {
            Some(wave) if size <= room => {
                room -= size;
                wave.push(visit);
            }
            _ => {
                room = WAVE.saturating_sub(size);
                waves.push(vec![visit]);
            }
        }
    }
    waves
}

/// Outputs of the gate in a piece of work.
const GATES: usize = 1 << 11;

/// Multiply-adds that a gate, or a number that goes in, takes as long as.
const GATE_WORK: usize = 16;

/// The gate of any number of tokens: `gate_up` holds gate and up in turn and is twice as long as `out`.
pub fn swiglu(kernels: Kernels, activation: ClampedSwiGlu, gate_up: &[f32], out: &mut [f32]) {
    let pieces = gate_up.chunks(2 * GATES).zip(out.chunks_mut(GATES));
    let parallel = tasks::is_parallel(gate_up.len() * GATE_WORK);
    tasks::run(pieces.collect(), parallel, |(gate_up, out)| kernels.swiglu(activation, gate_up, out));
}

/// The gradient by `gate_up` from the one by the gate, into `out`: both twice as long as `gradient`.
pub fn swiglu_gradient(
    kernels: Kernels,
    activation: ClampedSwiGlu,
    gate_up: &[f32],
    gradient: &[f32],
    out: &mut [f32],
) {
    let pieces = gate_up.chunks(2 * GATES).zip(gradient.chunks(GATES)).zip(out.chunks_mut(2 * GATES));
    let parallel = tasks::is_parallel(gate_up.len() * GATE_WORK);
    tasks::run(pieces.collect(), parallel, |((gate_up, gradient), out)| {
        kernels.swiglu_gradient(activation, gate_up, gradient, out);
    });
}

/// Some experts with all their tokens: fills `outputs [tokens * k, hidden]` for their choices.
fn run_wave(kernels: Kernels, experts: &Experts<'_>, inputs: &Tokens, k: usize, wave: &[Visit], outputs: &mut [f32]) {
    let (upper, lower) = (experts.gate_up.layout(), experts.down.layout());
    let choices: usize = wave.iter().map(|visit| visit.choices.len()).sum();
    let mut gate_up = vec![0.0; choices * upper.rows];
    let visitors = |visit: &Visit| visit.choices.iter().map(|choice| inputs.token(choice / k)).collect();
    products(kernels, &experts.gate_up, experts.gate_up_bias, wave, visitors, &mut gate_up);

    let hidden = Tokens::gated(kernels, experts.activation, &gate_up, lower.in_features, lower.rotation);
    drop(gate_up);

    let mut down = vec![0.0; choices * lower.rows];
    let mut next = 0..choices;
    let visitors = |visit: &Visit| next.by_ref().take(visit.choices.len()).map(|row| hidden.token(row)).collect();
    products(kernels, &experts.down, experts.down_bias, wave, visitors, &mut down);
    let choices = wave.iter().flat_map(|visit| &visit.choices);
    for (choice, row) in choices.zip(down.chunks_exact(lower.rows)) {
        outputs[choice * lower.rows..(choice + 1) * lower.rows].copy_from_slice(row);
    }
}

/// One matrix of each expert of the wave with its tokens; `out` holds the experts' outputs one after the other.
fn products<'t>(
    kernels: Kernels,
    matrices: &TernaryMatrices<'_>,
    bias: &[f32],
    wave: &[Visit],
    mut tokens: impl FnMut(&Visit) -> Vec<super::tokens::Token<'t>>,
    out: &mut [f32],
) {
    let width = matrices.layout().rows;
    let mut rest = out;
    let mut work = Vec::with_capacity(wave.len());
    for visit in wave {
        let (out, after) = rest.split_at_mut(visit.choices.len() * width);
        rest = after;
        let Some(rows) = matrices.matrix(visit.expert) else {
            continue;
        };
        let bias = Some(&bias[visit.expert * width..(visit.expert + 1) * width]);
        work.push(Product { rows, tokens: tokens(visit), bias, out });
    }
    linear::run(kernels, work);
}

/// Adds up the choices of each token, in order, with their weights.
fn combine(outputs: &[f32], weights: &[f32], k: usize, hidden: usize, out: &mut [f32]) {
    out.fill(0.0);
    if k == 0 {
        return;
    }
    for ((out, outputs), weights) in
        out.chunks_exact_mut(hidden).zip(outputs.chunks_exact(k * hidden)).zip(weights.chunks_exact(k))
    {
        for (output, weight) in outputs.chunks_exact(hidden).zip(weights) {
            out.iter_mut().zip(output).for_each(|(y, x)| *y += weight * x);
        }
    }
}
