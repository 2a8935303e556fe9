//! Norms, and the choice of experts: first their scores, by many cubes that share a token's inputs, then one cube a token chooses.
#![allow(unsafe_code)]

use burn::tensor::DType;
use burn_cubecl::{CubeRuntime, tensor::CubeTensor};
use cubecl::{client::ComputeClient, prelude::*};

use super::{
    buffer::{begins_even, room},
    device::{Join, is_nan, joined, nan, units_for},
    matrix_units,
    tokens::SHARED_WORDS,
};

/// Numbers that a unit norms.
const NORMED: usize = 4;
/// Units that norm a token at most.
const MOST_UNITS: usize = 1024;
/// Units of a cube that scores experts.
const SCORERS: u32 = 256;
/// Units of a cube that chooses some.
const CHOOSERS: u32 = 64;
/// Neighbouring inputs that a unit looks at.
const OWN: u32 = 4;
/// How many times as many it fetches the weights of together, for one token and for several.
const AHEAD: [u32; 2] = [3, 1];
/// Tokens from which on there are cubes enough without sharing a token's inputs, and how many tokens a cube takes then, so that
/// weights are read less often.
const MANY: usize = 128;
const TOGETHER: u32 = 8;

/// [`rms_norm`](crate::rms_norm) of `x [tokens, hidden]`.
pub(super) fn rms_norm<R: CubeRuntime>(x: CubeTensor<R>, gamma: CubeTensor<R>, epsilon: f32) -> CubeTensor<R> {
    let [tokens, hidden] = [x.meta.shape()[0], x.meta.shape()[1]];
    let out = room(&x, [tokens, hidden], DType::F32);
    if tokens > 0 {
        let units = units_for(&x.client, hidden.div_ceil(NORMED), MOST_UNITS);
        rms_norm_kernel::launch::<R>(
            &x.client.clone(),
            CubeCount::Static(tokens as u32, 1, 1),
            CubeDim::new_1d(units),
            x.into_array_arg(),
            gamma.into_array_arg(),
            out.clone().into_array_arg(),
            hidden as u32,
            units,
            epsilon,
        );
    }
    out
}

/// One cube a token.
#[cube(launch)]
fn rms_norm_kernel(
    x: &Array<f32>,
    gamma: &Array<f32>,
    out: &mut Array<f32>,
    #[comptime] hidden: u32,
    #[comptime] units: u32,
    epsilon: f32,
) {
    let mut sums = SharedMemory::<f32>::new(comptime!(units as usize));
    let at = CUBE_POS_X * hidden;
    let own = comptime!(hidden.div_ceil(units));
    let mut values = Array::<f32>::new(comptime!(own as usize));
    let mut sum = f32::new(0.0);
    #[unroll]
    for n in 0..own {
        let i = n * units + UNIT_POS;
        let mut value = f32::new(0.0);
        if i < hidden {
            value = x[(at + i) as usize];
        }
        values[comptime!(n as usize)] = value;
        sum += value * value;
    }
    let rms = f32::sqrt(joined(sum, &mut sums, units, Join::Sum) / f32::cast_from(hidden) + epsilon);
    #[unroll]
    for n in 0..own {
        let i = n * units + UNIT_POS;
        if i < hidden {
            out[(at + i) as usize] = values[comptime!(n as usize)] / rms * gamma[i as usize];
        }
    }
}

/// Whether a cube of this device has room for the scores of so many experts.
pub(super) fn fits<R: CubeRuntime>(client: &ComputeClient<R>, experts: usize) -> bool {
    4 * (SHARED_WORDS + 3 * experts) <= client.properties().hardware.max_shared_memory_size
}

/// [`route`](crate::route): the numbers of the chosen experts, `I32`, and their weights, `[tokens, k]` each. Not where so many
/// experts do not [fit](fits).
pub(super) fn route<R: CubeRuntime>(
    x: CubeTensor<R>,
    weight: CubeTensor<R>,
    bias: CubeTensor<R>,
    k: usize,
) -> (CubeTensor<R>, CubeTensor<R>) {
    let (tokens, experts) = (x.meta.shape()[0], weight.meta.shape()[1]);
    let (chosen, weights) = (room(&x, [tokens, k], DType::I32), room(&x, [tokens, k], DType::F32));
    if tokens * k > 0 {
        let scores = Scores::of(x, None, weight);
        choose_kernel::launch::<R>(
            &chosen.client.clone(),
            CubeCount::Static(tokens as u32, 1, 1),
            CubeDim::new_1d(CHOOSERS),
            scores.parts.into_array_arg(),
            bias.into_array_arg(),
            chosen.clone().into_array_arg(),
            weights.clone().into_array_arg(),
            Choice { k: k as u32, experts: experts as u32, slices: scores.slices },
        );
    }
    (chosen, weights)
}

/// The scores of experts without their biases, in parts.
pub(super) struct Scores<R: CubeRuntime> {
    /// `[tokens, slices, experts]`
    pub(super) parts: CubeTensor<R>,
    pub(super) slices: u32,
}

impl<R: CubeRuntime> Scores<R> {
    /// Those of `x [tokens, hidden]`, times `gamma` if there is one, with `weight [hidden, experts]`.
    pub(super) fn of(x: CubeTensor<R>, gamma: Option<CubeTensor<R>>, weight: CubeTensor<R>) -> Self {
        let ([tokens, hidden], experts) = ([x.meta.shape()[0], x.meta.shape()[1]], weight.meta.shape()[1]);
        let scaled = gamma.is_some();
        let gamma = gamma.unwrap_or_else(|| x.clone());
        assert!(weight.meta.shape()[0] == hidden && gamma.meta.num_elements() >= hidden, "a router of other inputs");
        // As many inputs as the units fetch together.
        let is_many = tokens >= MANY;
        let share = if is_many { hidden.max(1) as u32 } else { AHEAD[0] * OWN * runs(experts as u32) };
        let together = if is_many { TOGETHER } else { 1 };
        let slices = (hidden as u32).div_ceil(share);
        let parts = room(&x, [tokens, slices as usize, experts], DType::F32);
        let has_quads = matrix_units::are_there(&x.client)
            && hidden.is_multiple_of(4)
            && begins_even(&x)
            && (!scaled || begins_even(&gamma));
        // SAFETY: inputs, experts and tokens end at the last one, and there are parts for every token and slice.
        unsafe {
            score_kernel::launch_unchecked::<R>(
                &x.client.clone(),
                CubeCount::Static(slices, (tokens as u32).div_ceil(together), 1),
                CubeDim::new_1d(SCORERS),
                x.into_array_arg(),
                gamma.into_array_arg(),
                weight.into_array_arg(),
                parts.clone().into_array_arg(),
                share,
                tokens as u32,
                hidden as u32,
                experts as u32,
                together,
                scaled,
                has_quads,
            );
        }
        Self { parts, slices }
    }
}

/// Units side by side in a cube that looks at so many experts, and runs of them, which share the inputs.
const fn width(experts: u32) -> u32 {
    let width = experts.next_power_of_two();
    if width < SCORERS { width } else { SCORERS }
}

const fn runs(experts: u32) -> u32 {
    SCORERS / width(experts)
}

/// A cube looks at `share` inputs of `together` tokens, from its own first one on. Neighbouring units look at neighbouring experts.
#[cube(launch_unchecked)]
fn score_kernel(
    x: &Array<f32>,
    gamma: &Array<f32>,
    weight: &Array<f32>,
    parts: &mut Array<f32>,
    share: u32,
    tokens: u32,
    #[comptime] hidden: u32,
    #[comptime] experts: u32,
    #[comptime] together: u32,
    #[comptime] scaled: bool,
    #[comptime] has_quads: bool,
) {
    let (width, runs) = comptime!((width(experts), runs(experts)));
    let ahead = comptime!(if together > 1 { AHEAD[1] } else { AHEAD[0] });
    let (run, place) = (UNIT_POS / width, UNIT_POS % width);
    let (slice, first) = (CUBE_POS_X, CUBE_POS_Y * together);
    let end = min(slice * share + share, hidden);
    let mut sums = SharedMemory::<f32>::new(comptime!(SCORERS as usize));
    #[unroll]
    for block in 0..comptime!(experts.div_ceil(width)) {
        let expert = block * width + place;
        let known_expert = min(expert, comptime!(experts - 1));
        let mut own = Array::<f32>::new(comptime!(together as usize));
        #[unroll]
        for n in 0..together {
            own[comptime!(n as usize)] = 0.0;
        }
        let mut input = slice * share + run * OWN;
        while input < end {
            // Nothing here depends on a condition, so that all is fetched together.
            #[unroll]
            for step in 0..ahead {
                let first_input = input + step * OWN * runs;
                let mut factors = Array::<f32>::new(comptime!(OWN as usize));
                #[unroll]
                for i in 0..OWN {
                    let known = min(first_input + i, end - 1);
                    let factor = weight[(known * experts + known_expert) as usize];
                    // Past the end it is nothing, whatever number it meets.
                    factors[comptime!(i as usize)] = select(first_input + i < end, factor, f32::new(0.0));
                }
                if comptime!(scaled) {
                    let gammas = neighbours(gamma, 0u32.runtime(), first_input, end, has_quads);
                    #[unroll]
                    for i in 0..comptime!(OWN as usize) {
                        factors[i] *= gammas[i];
                    }
                }
                #[unroll]
                for n in 0..together {
                    let inputs = neighbours(x, min(first + n, tokens - 1) * hidden, first_input, end, has_quads);
                    #[unroll]
                    for i in 0..comptime!(OWN as usize) {
                        own[comptime!(n as usize)] += inputs[i] * factors[i];
                    }
                }
            }
            input += comptime!(ahead * OWN * runs);
        }
        #[unroll]
        for n in 0..together {
            sums[UNIT_POS as usize] = own[comptime!(n as usize)];
            sync_cube();
            if run == 0 && expert < experts && first + n < tokens {
                let mut score = f32::new(0.0);
                #[unroll]
                for run in 0..runs {
                    score += sums[(run * width + place) as usize];
                }
                parts[(((first + n) * CUBE_COUNT_X + slice) * experts + expert) as usize] = score;
            }
            sync_cube();
        }
    }
}

/// [`OWN`] numbers that stand from `first` on, after the first `at` ones; past `end`, numbers before it.
#[cube]
fn neighbours(x: &Array<f32>, at: u32, first: u32, end: u32, #[comptime] has_quads: bool) -> Array<f32> {
    let mut found = Array::<f32>::new(comptime!(OWN as usize));
    if comptime!(has_quads) {
        let quads = x.to_slice().into_vectorized().with_vector_size::<Const<4>>();
        let quad = quads[(at / 4 + min(first, end - OWN) / 4) as usize];
        #[unroll]
        for i in 0..comptime!(OWN as usize) {
            found[i] = quad[i];
        }
    } else {
        #[unroll]
        for i in 0..OWN {
            found[comptime!(i as usize)] = x[(at + min(first + i, end - 1)) as usize];
        }
    }
    found
}

/// What a cube that chooses is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Choice {
    pub(super) k: u32,
    pub(super) experts: u32,
    /// Of [`Scores`].
    pub(super) slices: u32,
}

/// One cube a token.
#[cube(launch)]
fn choose_kernel(
    parts: &Array<f32>,
    bias: &Array<f32>,
    chosen: &mut Array<i32>,
    weights: &mut Array<f32>,
    #[comptime] choice: Choice,
) {
    let scores = scores(parts, CHOOSERS, choice);
    choose(&scores, 1.0, bias, chosen, weights, CHOOSERS, choice);
}

/// The scores of the experts that a unit looks after, of the cube's token.
#[cube]
pub(super) fn scores(parts: &Array<f32>, #[comptime] units: u32, #[comptime] choice: Choice) -> Array<f32> {
    let own = comptime!(choice.experts.div_ceil(units));
    let mut scores = Array::<f32>::new(comptime!(own as usize));
    #[unroll]
    for n in 0..own {
        let expert = min(n * units + UNIT_POS, comptime!(choice.experts - 1));
        let mut score = f32::new(0.0);
        #[unroll]
        for slice in 0..choice.slices {
            score += parts[((CUBE_POS_X * choice.slices + slice) * choice.experts + expert) as usize];
        }
        scores[comptime!(n as usize)] = score;
    }
    scores
}

/// A cube chooses the experts of its token from their [`scores`], which are yet to be multiplied with `factor`. An expert's rank is
/// how many are better, or as good and before it.
#[cube]
pub(super) fn choose(
    own_scores: &Array<f32>,
    factor: f32,
    bias: &Array<f32>,
    chosen: &mut Array<i32>,
    weights: &mut Array<f32>,
    #[comptime] units: u32,
    #[comptime] choice: Choice,
) {
    let (k, experts) = comptime!((choice.k, choice.experts));
    let token = CUBE_POS_X;
    let mut scores = SharedMemory::<f32>::new(comptime!(experts as usize));
    let mut broken = SharedMemory::<u32>::new(comptime!(experts as usize));
    let mut best = SharedMemory::<f32>::new(comptime!(k as usize));
    #[unroll]
    for n in 0..comptime!(experts.div_ceil(units)) {
        let expert = n * units + UNIT_POS;
        if expert < experts {
            let score = own_scores[comptime!(n as usize)] * factor + bias[expert as usize];
            // NaN has no rank, so that it does not leave a place empty.
            let is_broken = is_nan(score);
            broken[expert as usize] = u32::cast_from(is_broken);
            scores[expert as usize] = select(is_broken, f32::new(f32::MIN), score);
        }
    }
    sync_cube();
    let mut expert = UNIT_POS;
    while expert < experts {
        let score = scores[expert as usize];
        let mut rank = u32::new(0);
        for other in 0..experts {
            let rival = scores[other as usize];
            if rival > score || (rival == score && other < expert) {
                rank += 1;
            }
        }
        if rank < k {
            best[rank as usize] = score;
            chosen[(token * k + rank) as usize] = i32::cast_from(expert);
        }
        expert += units;
    }
    sync_cube();
    if UNIT_POS < k {
        let mut total = f32::new(0.0);
        for slot in 0..k {
            total += f32::exp(best[slot as usize] - best[0]);
        }
        let mut is_broken = u32::new(0);
        for expert in 0..experts {
            is_broken = max(is_broken, broken[expert as usize]);
        }
        let weight = f32::exp(best[UNIT_POS as usize] - best[0]) / total;
        weights[(token * k + UNIT_POS) as usize] = select(is_broken == 1, nan(), weight);
    }
}
