//! Finding the logits that decide the next token, without computing the others.
//!
//! Every logit has an upper bound that is cheap. The logits with the highest bounds are computed first, in batches that
//! double; what was found gives a threshold below which no logit can matter. Those that may matter after the first batch get
//! closer bounds, and the search ends when all bounds that are left are below the threshold. What is found is exact, so the
//! choice is that of the full computation, unless a bound is wrong.
//!
//! ```
//! use ternoss_model::{sampling::{Sampler, SamplingConfig}, screening::LazyLogits};
//!
//! /// Logits whose bounds are one too high.
//! struct Known { logits: Vec<f32>, bounds: Vec<f32> }
//!
//! impl LazyLogits for Known {
//!     fn bounds(&self) -> &[f32] {
//!         &self.bounds
//!     }
//!
//!     fn exact(&self, tokens: &[u32]) -> Vec<f32> {
//!         tokens.iter().map(|token| self.logits[*token as usize]).collect()
//!     }
//!
//!     fn all(&self) -> Vec<f32> {
//!         self.logits.clone()
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let logits: Vec<f32> = (0..100).map(|i| -((i - 42) as f32).abs()).collect();
//! let known = Known { bounds: logits.iter().map(|logit| logit + 1.0).collect(), logits };
//! let mut sampler = Sampler::new(SamplingConfig::greedy())?;
//! assert_eq!(sampler.sample_screened(&known, &[])?, 42);
//! // Sixteen of the hundred were looked at.
//! assert_eq!(sampler.computed().mean(), Some(16.0));
//! # Ok(()) }
//! ```

use std::collections::BTreeSet;

/// Logits that are computed where they are looked at.
pub trait LazyLogits {
    /// What each logit is at most; infinite where nothing is known, never NaN.
    fn bounds(&self) -> &[f32];

    /// Closer bounds of these tokens' logits, where there are any, at a cost far below that of the logits.
    fn closer_bounds(&self, tokens: &[u32]) -> Vec<f32> {
        tokens.iter().map(|token| self.bounds()[*token as usize]).collect()
    }

    /// The logits of these tokens, with the bits that they have in [`all`](Self::all).
    fn exact(&self, tokens: &[u32]) -> Vec<f32>;

    /// All logits.
    fn all(&self) -> Vec<f32>;
}

/// A token and its logit, or the bound of it.
pub(crate) type Candidate = (u32, f32);

/// Which logits a choice needs to know.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Need {
    /// The `k` largest.
    Largest(usize),
    /// All that are at most this far below the largest.
    Within(f64),
    /// The largest that together reach a share of the probability at a temperature.
    Nucleus { share: f64, temperature: f64 },
    /// All.
    All,
}

/// Logits of the first batch.
const FIRST: usize = 16;

/// Room for rounding in double precision, as a share.
const ROUNDING: f64 = 1e-9;

/// One part of so many: when the logits that are computed one by one are that many, all are computed in one go.
const TOO_MANY: usize = 4;

/// The candidates in order of their tokens, with everything that `need` asks for among them; `None` when all logits must be
/// computed, which may only turn out on the way, or when one is NaN or positive infinity. Tokens in `known` are always
/// candidates; `change` is what is done to a token's logit before the choice, and does nothing to the others.
pub(crate) fn candidates(
    logits: &impl LazyLogits,
    need: Need,
    known: &BTreeSet<u32>,
    change: impl Fn(Candidate) -> f32,
) -> Option<Vec<Candidate>> {
    let bounds = logits.bounds();
    let vocabulary = bounds.len();
    let mut batch: Vec<u32> = known.iter().copied().filter(|token| (*token as usize) < vocabulary).collect();
    let first = match need {
        Need::All => return None,
        Need::Largest(k) => k.saturating_mul(2).max(FIRST),
        Need::Within(_) | Need::Nucleus { .. } => FIRST,
    };
    batch.extend(highest(bounds, first).into_iter().filter(|token| !known.contains(token)));
    let mut found: Vec<Candidate> = Vec::new();
    // Tokens that were not found yet and may matter, with the bounds of their logits.
    let mut rest: Option<Vec<Candidate>> = None;
    loop {
        if (found.len() + batch.len()) * TOO_MANY > vocabulary {
            return None;
        }
        // Rows of a table are read in their order.
        batch.sort_unstable();
        let exact = batch.iter().copied().zip(logits.exact(&batch));
        found.extend(exact.map(|candidate| (candidate.0, change(candidate))));
        if found.iter().any(|(_, logit)| logit.is_nan() || *logit == f32::INFINITY) {
            return None;
        }
        found.sort_unstable_by(descending);
        let threshold = threshold(need, &found);
        let is_known = |left: &mut Vec<Candidate>| {
            left.retain(|(_, bound)| *bound >= threshold);
            left.is_empty() || nucleus_is_known(need, &found, left)
        };
        let is_first = rest.is_none();
        let left = rest.get_or_insert_with(|| unseen(bounds, &found, threshold));
        if is_known(left) || is_first && is_known(take_closer(logits, left)) {
            found.sort_unstable_by_key(|(token, _)| *token);
            return Some(found);
        }
        let next = found.len().min(left.len());
        if next < left.len() {
            left.select_nth_unstable_by(next, |a, b| b.1.total_cmp(&a.1));
        }
        batch = left.drain(..next).map(|(token, _)| token).collect();
    }
}

/// In order of falling logit, then of rising token.
pub(crate) fn descending(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// The tokens of the `count` highest bounds, in no order.
fn highest(bounds: &[f32], count: usize) -> Vec<u32> {
    let mut best: Vec<(f32, u32)> = Vec::with_capacity(2 * count);
    let mut lowest = f32::NEG_INFINITY;
    for (token, bound) in (0u32..).zip(bounds) {
        if best.len() < count || *bound > lowest {
            best.push((*bound, token));
        }
        // Every now and then all but the best are thrown away.
        if best.len() == 2 * count {
            best.select_nth_unstable_by(count - 1, |a, b| b.0.total_cmp(&a.0));
            lowest = best[count - 1].0;
            best.truncate(count);
        }
    }
    best.sort_unstable_by(|a, b| b.0.total_cmp(&a.0));
    best.truncate(count);
    best.into_iter().map(|(_, token)| token).collect()
}

/// Below it no logit matters, with `found` in order of falling logit.
fn threshold(need: Need, found: &[Candidate]) -> f32 {
    let lowest = f32::NEG_INFINITY;
    match need {
        Need::Largest(k) => k.checked_sub(1).and_then(|k| found.get(k)).map_or(lowest, |(_, logit)| *logit),
        // Rounded down by two steps.
        Need::Within(distance) => found.first().map_or(lowest, |(_, best)| {
            ((f64::from(*best) - distance * (1.0 + ROUNDING) - ROUNDING) as f32).next_down().next_down()
        }),
        Need::Nucleus { .. } | Need::All => lowest,
    }
}

/// Tokens that were not found yet and whose bound reaches the threshold, with it.
fn unseen(bounds: &[f32], found: &[Candidate], threshold: f32) -> Vec<Candidate> {
    let mut seen = vec![false; bounds.len()];
    found.iter().for_each(|(token, _)| seen[*token as usize] = true);
    let tokens = (0u32..).zip(bounds.iter().copied()).zip(seen);
    tokens.filter(|((_, bound), seen)| *bound >= threshold && !seen).map(|(candidate, _)| candidate).collect()
}

/// Closer bounds in the place of those that are there.
fn take_closer<'a>(logits: &impl LazyLogits, left: &'a mut Vec<Candidate>) -> &'a mut Vec<Candidate> {
    let tokens: Vec<u32> = left.iter().map(|(token, _)| *token).collect();
    left.iter_mut().zip(logits.closer_bounds(&tokens)).for_each(|((_, bound), closer)| *bound = closer);
    left
}

/// Whether the nucleus is known to be the first few of `found`, in order of falling logit: where its share is reached does
/// not depend on what is left, whose logits are below their bounds and whose sum is above zero.
fn nucleus_is_known(need: Need, found: &[Candidate], left: &[Candidate]) -> bool {
    let (Need::Nucleus { share, temperature }, Some((_, best))) = (need, found.first()) else {
        return false;
    };
    let weight = |logit: f32| ((f64::from(logit) - f64::from(*best)) / temperature).exp();
    let weights = || found.iter().map(|(_, logit)| weight(*logit));
    let (mut highest, mut rest) = (f32::NEG_INFINITY, 0.0);
    for (_, bound) in left {
        (highest, rest) = (highest.max(*bound), rest + weight(*bound));
    }
    let known: f64 = weights().sum();
    let (least, most) = (share * known * (1.0 - ROUNDING), share * (known + rest) * (1.0 + ROUNDING));
    let mut sum = 0.0;
    for (weight, (_, logit)) in weights().zip(found) {
        // Another one may belong before it.
        if *logit <= highest {
            return false;
        }
        sum += weight;
        if sum >= least {
            return sum >= most;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::sampling::{Sampler, SamplingConfig};

    struct Known {
        logits: Vec<f32>,
        bounds: Vec<f32>,
        closer: Vec<f32>,
    }

    impl LazyLogits for Known {
        fn bounds(&self) -> &[f32] {
            &self.bounds
        }

        fn closer_bounds(&self, tokens: &[u32]) -> Vec<f32> {
            tokens.iter().map(|token| self.closer[*token as usize]).collect()
        }

        fn exact(&self, tokens: &[u32]) -> Vec<f32> {
            tokens.iter().map(|token| self.logits[*token as usize]).collect()
        }

        fn all(&self) -> Vec<f32> {
            self.logits.clone()
        }
    }

    /// Logits of a few heights, so that many are equal, some of them out of the ordinary.
    fn any_logit() -> impl Strategy<Value = f32> {
        let unusual = prop::sample::select(vec![0.0, -0.0, f32::NEG_INFINITY, 30.0, 30.000_002, f32::MAX, f32::MIN]);
        prop_oneof![20 => (-40i32..40).prop_map(|height| height as f32 / 4.0), 20 => -20f32..10.0, 1 => unusual]
    }

    fn any_config() -> impl Strategy<Value = SamplingConfig> {
        let temperature = prop_oneof![Just(0.0f32), 0.05f32..2.0];
        let top_k = prop::option::of(1usize..30);
        let (top_p, min_p) = (prop::option::of(0.01f32..=1.0), prop::option::of(0f32..=1.0));
        let penalty = prop_oneof![Just(1.0f32), 0.5f32..2.0];
        (temperature, top_k, top_p, min_p, penalty, any::<u64>()).prop_map(
            |(temperature, top_k, top_p, min_p, repetition_penalty, seed)| SamplingConfig {
                temperature,
                top_k,
                top_p,
                min_p,
                repetition_penalty,
                seed,
            },
        )
    }

    fn draws(config: SamplingConfig, known: &Known, history: &[u32]) -> [Vec<String>; 2] {
        let (mut full, mut screened) = (Sampler::new(config).unwrap(), Sampler::new(config).unwrap());
        let draw = |choice: &mut dyn FnMut() -> String| (0..5).map(|_| choice()).collect::<Vec<String>>();
        // As text, for an error's NaN is not equal to itself.
        [
            draw(&mut || format!("{:?}", full.sample(&known.logits, history))),
            draw(&mut || format!("{:?}", screened.sample_screened(known, history))),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn a_screened_choice_is_the_choice_from_all_logits(
            logits in prop::collection::vec((any_logit(), 0f32..4.0, 0f32..4.0), 1..600),
            broken in prop::option::weighted(0.1, (any::<prop::sample::Index>(), prop::sample::select(vec![f32::NAN, f32::INFINITY]))),
            loose in prop::collection::vec(any::<prop::sample::Index>(), 0..4),
            history in prop::collection::vec(0u32..700, 0..40),
            config in any_config(),
        ) {
            let mut bounds: Vec<f32> = logits.iter().map(|(logit, room, _)| logit + room).collect();
            let mut closer: Vec<f32> = logits.iter().map(|(logit, _, room)| logit + room).collect();
            let mut logits: Vec<f32> = logits.into_iter().map(|(logit, ..)| logit).collect();
            loose.iter().for_each(|at| *at.get_mut(&mut bounds) = f32::INFINITY);
            if let Some((at, value)) = broken {
                (*at.get_mut(&mut logits), *at.get_mut(&mut bounds)) = (value, f32::INFINITY);
                *at.get_mut(&mut closer) = f32::INFINITY;
            }
            let [full, screened] = draws(config, &Known { logits, bounds, closer }, &history);
            prop_assert_eq!(full, screened);
        }
    }

    #[test]
    fn few_logits_are_computed_where_bounds_are_tight() {
        let logits: Vec<f32> =
            (0..10_000u32).map(|token| (token.wrapping_mul(2_654_435_761) >> 16) as f32 / 4e3).collect();
        let above = |room: f32| logits.iter().map(|logit| logit + room).collect::<Vec<f32>>();
        let known = Known { bounds: above(1.0), closer: above(0.1), logits };
        for (config, most) in [
            (SamplingConfig::greedy(), 150),
            (SamplingConfig { top_k: Some(20), ..Default::default() }, 200),
            (SamplingConfig { min_p: Some(0.5), ..Default::default() }, 1000),
            (SamplingConfig { top_p: Some(0.2), temperature: 0.2, ..Default::default() }, 2500),
        ] {
            let mut sampler = Sampler::new(config).unwrap();
            sampler.sample_screened(&known, &[]).unwrap();
            assert!(sampler.computed().logits <= most, "{config:?}: {:?}", sampler.computed());
        }
        assert!(!Sampler::new(SamplingConfig::default()).unwrap().can_screen(), "the whole vocabulary is sampled from");
    }
}
