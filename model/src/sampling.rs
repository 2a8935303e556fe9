//! Choosing the next token from logits.
//!
//! The steps and their order are those of Hugging Face transformers' logits processors: repetition penalty, temperature,
//! top-k, top-p, min-p. Sums run in double precision in order of falling probability, so the same seed gives the same
//! tokens on every machine.
//!
//! [`Sampler::sample`] takes all logits, [`Sampler::sample_screened`] computes those that can matter, and chooses the same
//! token: greedy, with top-k, with min-p, and with top-p where few tokens hold most of the probability. Sampling from the
//! whole vocabulary needs every logit.
//!
//! ```
//! use ternoss_model::sampling::{Sampler, SamplingConfig};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut sampler = Sampler::new(SamplingConfig { top_k: Some(2), seed: 1, ..Default::default() })?;
//! assert!([1, 2].contains(&sampler.sample(&[0.0, 3.0, 2.5, 1.0], &[])?));
//! # Ok(()) }
//! ```

use std::collections::BTreeSet;

use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};
use serde::{Deserialize, Serialize};

use crate::screening::{Candidate, LazyLogits, Need, candidates, descending};

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SamplingConfig {
    /// Divides the logits; 0 always takes the likeliest token.
    pub temperature: f32,
    /// Only this many of the likeliest tokens.
    pub top_k: Option<usize>,
    /// Only the likeliest tokens that together reach this probability.
    pub top_p: Option<f32>,
    /// Only tokens at least this many times as likely as the likeliest.
    pub min_p: Option<f32>,
    /// Positive logits of tokens seen before are divided by it, negative ones multiplied; 1 is off.
    pub repetition_penalty: f32,
    /// Start of the random numbers.
    pub seed: u64,
}

impl Default for SamplingConfig {
    /// The model's own distribution.
    fn default() -> Self {
        Self { temperature: 1.0, top_k: None, top_p: None, min_p: None, repetition_penalty: 1.0, seed: 0 }
    }
}

/// A choice that cannot be made.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SamplingError {
    /// A setting is out of its range.
    #[error("{parameter} must be {expected}, found {found}")]
    Parameter {
        /// Its name.
        parameter: &'static str,
        /// What it may be.
        expected: &'static str,
        /// What it is.
        found: f64,
    },
    /// There are no logits.
    #[error("there are no logits to choose from")]
    Empty,
    /// A logit is no number.
    #[error("the logit of token {token} is {value}: the model's weights or its input are broken")]
    NotANumber {
        /// The token.
        token: usize,
        /// Its logit: NaN or positive infinity.
        value: f32,
    },
    /// Every token is ruled out.
    #[error("every token's logit is minus infinity")]
    NothingLeft,
}

impl SamplingConfig {
    /// Always the likeliest token.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Checks every setting's range.
    ///
    /// # Errors
    /// [`SamplingError::Parameter`] for the first that is out of it.
    pub fn validate(&self) -> Result<(), SamplingError> {
        let check = |parameter, expected, found: f32, holds: bool| match holds {
            true => Ok(()),
            false => Err(SamplingError::Parameter { parameter, expected, found: found.into() }),
        };
        let finite = self.temperature.is_finite() && self.temperature >= 0.0;
        check("temperature", "0 or above", self.temperature, finite)?;
        check("top_k", "at least 1", 0.0, self.top_k != Some(0))?;
        let top_p = self.top_p.unwrap_or(1.0);
        check("top_p", "above 0 and at most 1", top_p, top_p > 0.0 && top_p <= 1.0)?;
        let min_p = self.min_p.unwrap_or(0.0);
        check("min_p", "between 0 and 1", min_p, (0.0..=1.0).contains(&min_p))?;
        let penalty = self.repetition_penalty;
        check("repetition_penalty", "above 0", penalty, penalty.is_finite() && penalty > 0.0)
    }
}

/// Chooses tokens by a configuration, with random numbers of its own.
#[derive(Debug)]
pub struct Sampler {
    config: SamplingConfig,
    random: ChaCha8Rng,
    computed: Computed,
}

/// A token to be chosen.
#[derive(Debug)]
pub struct Choice<'a> {
    /// Chooses.
    pub sampler: &'a mut Sampler,
    /// The tokens so far.
    pub history: &'a [u32],
}

/// How many logits were computed for tokens that were looked for by [`Sampler::sample_screened`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Computed {
    /// Tokens chosen.
    pub tokens: usize,
    /// Logits computed for them, all together.
    pub logits: usize,
}

impl Computed {
    /// Logits computed for a token, on average; `None` if there was no token.
    #[must_use]
    pub fn mean(&self) -> Option<f64> {
        (self.tokens > 0).then(|| self.logits as f64 / self.tokens as f64)
    }
}

impl Sampler {
    /// A sampler at the start of its random numbers.
    ///
    /// # Errors
    /// [`SamplingError::Parameter`]
    pub fn new(config: SamplingConfig) -> Result<Self, SamplingError> {
        config.validate()?;
        Ok(Self { config, random: ChaCha8Rng::seed_from_u64(config.seed), computed: Computed::default() })
    }

    /// What [`sample_screened`](Self::sample_screened) computed so far.
    pub fn computed(&self) -> Computed {
        self.computed
    }

    /// The next token, given the logits of all tokens `[vocabulary]` and the tokens so far. Between equal logits the
    /// lower token wins.
    ///
    /// # Errors
    /// [`SamplingError`] when the logits are empty, not numbers, or rule out every token.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> Result<u32, SamplingError> {
        let mut candidates: Vec<Candidate> = (0u32..).zip(logits.iter().copied()).collect();
        for token in self.penalized_tokens(history) {
            if let Some((_, logit)) = candidates.get_mut(token as usize) {
                *logit = self.penalized(*logit);
            }
        }
        self.choose(candidates)
    }

    /// The token that [`sample`](Self::sample) would choose, of logits that are computed where they matter. It differs only
    /// where a bound is wrong.
    ///
    /// # Errors
    /// Those of [`sample`](Self::sample).
    pub fn sample_screened(&mut self, logits: &impl LazyLogits, history: &[u32]) -> Result<u32, SamplingError> {
        let seen = self.penalized_tokens(history);
        let change = |(token, logit): Candidate| if seen.contains(&token) { self.penalized(logit) } else { logit };
        let found = candidates(logits, self.need(), &seen, change);
        self.computed.tokens += 1;
        self.computed.logits += found.as_ref().map_or(logits.bounds().len(), Vec::len);
        match found {
            Some(candidates) => self.choose(candidates),
            None => self.sample(&logits.all(), history),
        }
    }

    /// How many of the largest logits decide a choice, if they do.
    pub(crate) fn decided_by(&self) -> Option<usize> {
        match self.need() {
            Need::Largest(k) if self.config.repetition_penalty == 1.0 => Some(k),
            _ => None,
        }
    }

    /// The token that [`sample`](Self::sample) would choose, given the [largest](Self::decided_by) logits and their tokens.
    ///
    /// # Errors
    /// Those of [`sample`](Self::sample).
    pub(crate) fn sample_largest(&mut self, mut largest: Vec<(u32, f32)>) -> Result<u32, SamplingError> {
        largest.sort_unstable_by_key(|(token, _)| *token);
        self.choose(largest)
    }

    /// Whether a choice can do without most logits.
    pub(crate) fn can_screen(&self) -> bool {
        self.need() != Need::All
    }

    /// Which logits a choice depends on.
    fn need(&self) -> Need {
        let SamplingConfig { temperature, top_k, top_p, min_p, .. } = self.config;
        let temperature = f64::from(temperature);
        match (top_k, top_p, min_p) {
            _ if temperature == 0.0 => Need::Largest(1),
            (Some(k), ..) => Need::Largest(k),
            (None, Some(top_p), _) if top_p < 1.0 => Need::Nucleus { share: f64::from(top_p), temperature },
            (None, None, Some(min_p)) if min_p > 0.0 => Need::Within(-f64::from(min_p).ln() * temperature),
            _ => Need::All,
        }
    }

    /// Chooses among candidates in order of their tokens, penalties included.
    fn choose(&mut self, mut candidates: Vec<Candidate>) -> Result<u32, SamplingError> {
        let broken = |logit: f32| logit.is_nan() || logit == f32::INFINITY;
        if let Some((token, value)) = candidates.iter().find(|(_, logit)| broken(*logit)) {
            return Err(SamplingError::NotANumber { token: *token as usize, value: *value });
        }
        let (best, largest) = first_largest(&candidates).ok_or(SamplingError::Empty)?;
        if largest == f32::NEG_INFINITY {
            return Err(SamplingError::NothingLeft);
        }
        if self.config.temperature == 0.0 || self.config.top_k == Some(1) {
            return Ok(best);
        }
        self.cut_top_k(&mut candidates);
        let mut weights = self.weights(&candidates);
        self.cut_top_p(&mut weights);
        self.cut_min_p(&mut weights);
        let total: f64 = weights.iter().sum();
        let mut left = self.random.random::<f64>() * total;
        for ((token, _), weight) in candidates.iter().zip(&weights) {
            left -= weight;
            if left < 0.0 {
                return Ok(*token);
            }
        }
        // Rounding may leave a sliver past the last candidate: it belongs to it.
        Ok(candidates[weights.len() - 1].0)
    }

    /// The tokens whose logits are penalized.
    fn penalized_tokens(&self, history: &[u32]) -> BTreeSet<u32> {
        match self.config.repetition_penalty == 1.0 {
            true => BTreeSet::new(),
            false => history.iter().copied().collect(),
        }
    }

    fn penalized(&self, logit: f32) -> f32 {
        let penalty = self.config.repetition_penalty;
        if logit > 0.0 { logit / penalty } else { logit * penalty }
    }

    /// Keeps the k best, or all that top-p and min-p may need, in order of falling logit.
    fn cut_top_k(&self, candidates: &mut Vec<Candidate>) {
        candidates.retain(|(_, logit)| *logit > f32::NEG_INFINITY);
        if let Some(k) = self.config.top_k.filter(|k| *k < candidates.len()) {
            candidates.select_nth_unstable_by(k - 1, descending);
            candidates.truncate(k);
        }
        candidates.sort_unstable_by(descending);
    }

    /// Unnormalized probabilities, the first being 1.
    fn weights(&self, candidates: &[Candidate]) -> Vec<f64> {
        let best = candidates.first().map_or(0.0, |(_, logit)| f64::from(*logit));
        let temperature = f64::from(self.config.temperature);
        candidates.iter().map(|(_, logit)| ((f64::from(*logit) - best) / temperature).exp()).collect()
    }

    /// Keeps the smallest number of tokens whose probability reaches `top_p`.
    fn cut_top_p(&self, weights: &mut Vec<f64>) {
        let Some(top_p) = self.config.top_p else {
            return;
        };
        let enough = f64::from(top_p) * weights.iter().sum::<f64>();
        let mut sum = 0.0;
        let reached = weights.iter().position(|weight| {
            sum += weight;
            sum >= enough
        });
        weights.truncate(reached.map_or(weights.len(), |last| last + 1));
    }

    /// Drops tokens less than `min_p` times as likely as the first.
    fn cut_min_p(&self, weights: &mut Vec<f64>) {
        let least = f64::from(self.config.min_p.unwrap_or(0.0));
        let kept = weights.iter().take_while(|weight| **weight >= least).count();
        weights.truncate(kept.max(1));
    }
}

/// The candidate with the largest logit, the first of equal ones.
fn first_largest(candidates: &[Candidate]) -> Option<Candidate> {
    candidates.iter().copied().reduce(|best, next| if next.1 > best.1 { next } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sampler(config: SamplingConfig) -> Sampler {
        Sampler::new(config).unwrap()
    }

    fn allowed(config: SamplingConfig, logits: &[f32]) -> BTreeSet<u32> {
        let mut sampler = sampler(config);
        (0..2000).map(|_| sampler.sample(logits, &[]).unwrap()).collect()
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        assert_eq!(sampler(SamplingConfig::greedy()).sample(&[1.0, 3.0, 3.0, -1.0], &[]), Ok(1));
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let logits = [0.0f32, 1.0, 2.0];
        let mut sampler = sampler(SamplingConfig { seed: 7, ..Default::default() });
        let mut counts = [0f64; 3];
        for _ in 0..30_000 {
            counts[sampler.sample(&logits, &[]).unwrap() as usize] += 1.0;
        }
        let total: f64 = logits.iter().map(|logit| f64::from(logit.exp())).sum();
        for (count, logit) in counts.iter().zip(logits) {
            assert!((count / 30_000.0 - f64::from(logit.exp()) / total).abs() < 0.01, "{counts:?}");
        }
    }

    #[test]
    fn cuts_keep_what_they_say() {
        let probabilities = [0.1f32, 0.5, 0.15, 0.25];
        let logits = probabilities.map(f32::ln);
        let base = SamplingConfig::default();
        assert_eq!(allowed(SamplingConfig { top_k: Some(2), ..base }, &logits), [1, 3].into());
        assert_eq!(allowed(SamplingConfig { top_p: Some(0.7), ..base }, &logits), [1, 3].into());
        assert_eq!(allowed(SamplingConfig { top_p: Some(0.01), ..base }, &logits), [1].into());
        assert_eq!(allowed(SamplingConfig { min_p: Some(0.4), ..base }, &logits), [1, 3].into());
        assert_eq!(allowed(SamplingConfig { top_p: Some(1.0), ..base }, &logits), [0, 1, 2, 3].into());
        assert_eq!(allowed(SamplingConfig { temperature: 0.01, ..base }, &logits), [1].into());
    }

    #[test]
    fn the_penalty_works_on_both_signs() {
        let mut penalized = sampler(SamplingConfig { repetition_penalty: 2.0, ..SamplingConfig::greedy() });
        assert_eq!(penalized.sample(&[4.0, 3.0, -1.0], &[0, 0]), Ok(1), "4 / 2 is below 3");
        assert_eq!(penalized.sample(&[-4.0, -3.0, -5.0], &[1, 99]), Ok(0), "-3 * 2 is below -4");
    }

    #[test]
    fn bad_settings_and_logits_are_refused_by_name() {
        let base = SamplingConfig::default();
        for (config, message) in [
            (SamplingConfig { temperature: -1.0, ..base }, "temperature must be 0 or above, found -1"),
            (SamplingConfig { top_k: Some(0), ..base }, "top_k must be at least 1, found 0"),
            (SamplingConfig { top_p: Some(1.5), ..base }, "top_p must be above 0 and at most 1, found 1.5"),
            (SamplingConfig { min_p: Some(-0.5), ..base }, "min_p must be between 0 and 1, found -0.5"),
            (SamplingConfig { repetition_penalty: 0.0, ..base }, "repetition_penalty must be above 0, found 0"),
        ] {
            assert_eq!(Sampler::new(config).unwrap_err().to_string(), message);
        }
        let mut sampler = sampler(base);
        assert_eq!(sampler.sample(&[], &[]), Err(SamplingError::Empty));
        assert!(matches!(sampler.sample(&[0.0, f32::NAN], &[]), Err(SamplingError::NotANumber { token: 1, .. })));
        assert_eq!(sampler.sample(&[f32::NEG_INFINITY; 2], &[]), Err(SamplingError::NothingLeft));
    }

    proptest! {
        #[test]
        fn a_sample_is_a_token_and_repeats_with_its_seed(
            logits in prop::collection::vec(-50f32..50.0, 1..200),
            temperature in 0.1f32..3.0,
            top_k in prop::option::of(1usize..50),
            top_p in prop::option::of(0.01f32..1.0),
            min_p in prop::option::of(0f32..1.0),
            seed: u64,
        ) {
            let config = SamplingConfig { temperature, top_k, top_p, min_p, repetition_penalty: 1.0, seed };
            let draw = || {
                let mut sampler = sampler(config);
                (0..5).map(|_| sampler.sample(&logits, &[]).unwrap()).collect::<Vec<_>>()
            };
            let tokens = draw();
            prop_assert_eq!(&tokens, &draw());
            for token in tokens {
                let better = logits.iter().filter(|logit| **logit > logits[token as usize]).count();
                prop_assert!(better < top_k.unwrap_or(logits.len()));
            }
        }
    }
}
