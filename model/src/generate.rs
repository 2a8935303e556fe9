//! Writing text: prompt in, tokens out, one by one.
//!
//! ```
//! use ternoss_model::{Checkpoint, GptOss, LoadOptions, StopRules, sampling::{Sampler, SamplingConfig}};
//! type B = burn_flex::Flex;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let checkpoint = Checkpoint::open("../examples/tiny-gpt-oss".as_ref())?;
//! let model = GptOss::<B>::load(&checkpoint, LoadOptions::default(), &Default::default())?;
//! let (mut cache, mut greedy) = (model.new_cache(), Sampler::new(SamplingConfig::greedy())?);
//! let rules = StopRules { max_tokens: 4, stop_tokens: vec![] };
//! let tokens = model.generate(&[1, 2, 3], &mut cache, &mut greedy, &rules, |_| std::ops::ControlFlow::Continue(()))?;
//! assert_eq!(tokens.len(), 4);
//! # Ok(()) }
//! ```

use std::ops::ControlFlow;

use burn::tensor::{Tensor, backend::Backend};
use ternoss_backends::{TernaryBackend, largest};

use crate::{
    GptOss, KvCache, TokenOutOfRange,
    language_model::LanguageModel,
    layer::Layer,
    sampling::{Choice, Sampler, SamplingError},
};

/// A generation that cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// There is nothing to continue.
    #[error("the prompt is empty: at least one token is needed")]
    EmptyPrompt,
    /// The prompt holds an unknown token.
    #[error(transparent)]
    Token(#[from] TokenOutOfRange),
    /// No token can be chosen.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
}

/// When to stop.
#[derive(Clone, Debug, Default)]
pub struct StopRules {
    /// New tokens at most.
    pub max_tokens: usize,
    /// Tokens that end the text; the ending token is not part of the result.
    pub stop_tokens: Vec<u32>,
}

/// A text that grows.
pub(crate) struct Writing {
    /// Prompt and new tokens.
    pub(crate) history: Vec<u32>,
    /// Where it ends at the latest.
    pub(crate) end: usize,
}

/// How far a guess was right.
pub(crate) struct Accepted {
    /// Guessed tokens that are part of the text and not its last one.
    pub(crate) drafted: usize,
    /// Whether the text ends.
    pub(crate) finished: bool,
}

impl<B: TernaryBackend> GptOss<B> {
    /// Continues `prompt` until a rule stops it; every new token goes to `on_token`, which may break off.
    ///
    /// `cache` may hold what came before the prompt; afterwards it holds all but the last token. Where it lets tokens be taken
    /// back ([`KvCache::with_spare`]) and the model is ternary, up to as many next tokens are guessed from the text so far and
    /// checked in one batch: faster where the text repeats itself or its prompt, and the same text in any case.
    ///
    /// # Errors
    /// [`GenerateError`] for an empty prompt, a token outside the vocabulary, logits that are not numbers.
    pub fn generate(
        &self,
        prompt: &[u32],
        cache: &mut KvCache<B>,
        sampler: &mut Sampler,
        rules: &StopRules,
        on_token: impl FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Vec<u32>, GenerateError> {
        LanguageModel::generate(self, prompt, cache, sampler, rules, on_token)
    }

    /// Chooses the next tokens for as long as `draft` guessed them, and one more; `hidden [1 + drafted, hidden]` is what the
    /// output layer sees of the last token and of each guess.
    pub(crate) fn accept(
        &self,
        draft: &[u32],
        hidden: &Tensor<B, 2>,
        writing: &mut Writing,
        sampler: &mut Sampler,
        rules: &StopRules,
        on_token: &mut impl FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Accepted, GenerateError> {
        let mut drafted = 0;
        loop {
            let hidden = hidden.clone().slice_dim(0, drafted..drafted + 1);
            let token = self.next_token(hidden, sampler, &writing.history)?;
            if rules.stop_tokens.contains(&token) {
                return Ok(Accepted { drafted, finished: true });
            }
            writing.history.push(token);
            if on_token(token).is_break() || writing.history.len() == writing.end {
                return Ok(Accepted { drafted, finished: true });
            }
            if draft.get(drafted) != Some(&token) {
                return Ok(Accepted { drafted, finished: false });
            }
            drafted += 1;
        }
    }

    /// Whether a batch gives every token the bits that it would have alone, so that guesses change nothing.
    pub(crate) fn is_batch_invariant(&self) -> bool {
        B::BATCH_INVARIANT && self.layers.iter().all(Layer::is_packed)
    }

    /// Chooses the token after the one whose state before the output layer is `hidden [1, hidden]`. The output layer is
    /// screened where it may be ([`Table::screened`](crate::table::Table::screened)).
    ///
    /// # Errors
    /// [`SamplingError`]
    pub fn next_token(
        &self,
        hidden: Tensor<B, 2>,
        sampler: &mut Sampler,
        history: &[u32],
    ) -> Result<u32, SamplingError> {
        let chosen = self.next_tokens(hidden, &mut [Choice { sampler, history }])?;
        chosen.first().copied().ok_or(SamplingError::Empty)
    }

    /// [`next_token`](Self::next_token) of several texts: `hidden [texts, hidden]`.
    ///
    /// # Errors
    /// [`SamplingError`]
    pub fn next_tokens(&self, hidden: Tensor<B, 2>, choices: &mut [Choice<'_>]) -> Result<Vec<u32>, SamplingError> {
        let can_screen = choices.iter().all(|choice| choice.sampler.can_screen());
        match if can_screen { self.lm_head.screened(&hidden) } else { None } {
            Some(logits) => {
                let texts = choices.iter_mut().zip(&logits);
                texts.map(|(choice, logits)| choice.sampler.sample_screened(logits, choice.history)).collect()
            }
            None => choose(self.lm_head.logits(hidden), choices),
        }
    }

    /// Runs a prompt in chunks and returns the logits of its last token `[1, vocabulary]`.
    ///
    /// # Errors
    /// [`GenerateError`] for an empty prompt or a token outside the vocabulary.
    pub fn prefill(&self, prompt: &[u32], cache: &mut KvCache<B>) -> Result<Tensor<B, 2>, GenerateError> {
        Ok(self.lm_head.logits(self.prefill_hidden(prompt, cache)?))
    }

    /// Runs a prompt in chunks and returns what the output layer sees of its last token `[1, hidden]`.
    ///
    /// # Errors
    /// [`GenerateError`] for an empty prompt or a token outside the vocabulary.
    pub fn prefill_hidden(&self, prompt: &[u32], cache: &mut KvCache<B>) -> Result<Tensor<B, 2>, GenerateError> {
        LanguageModel::prefill_hidden(self, prompt, cache)
    }
}

/// Chooses from each row of logits `[texts, vocabulary]`, of which as few as possible are read from where they are.
fn choose<B: TernaryBackend>(logits: Tensor<B, 2>, choices: &mut [Choice<'_>]) -> Result<Vec<u32>, SamplingError> {
    let vocabulary = logits.dims()[1];
    let decided_by = |choice: &Choice<'_>| choice.sampler.decided_by().map(|k| k.min(vocabulary)).filter(|k| *k > 0);
    let counts: Option<Vec<usize>> = choices.iter().map(decided_by).collect();
    let most = counts.as_ref().and_then(|counts| counts.iter().max().copied());
    if let (Some(counts), Some((tokens, numbers))) = (counts, most.and_then(|k| largest(logits.clone(), k))) {
        let k = tokens.len() / choices.len();
        let rows = tokens.chunks(k).zip(numbers.chunks(k)).zip(counts);
        return choices
            .iter_mut()
            .zip(rows)
            .map(|(choice, ((tokens, numbers), count))| {
                let falling = tokens.iter().copied().zip(numbers.iter().copied());
                choice.sampler.sample_largest(falling.take(count).collect())
            })
            .collect();
    }
    let logits = host(logits);
    let rows = choices.iter_mut().zip(logits.chunks(vocabulary.max(1)));
    rows.map(|(choice, logits)| choice.sampler.sample(logits, choice.history)).collect()
}

fn host<B: Backend>(logits: Tensor<B, 2>) -> Vec<f32> {
    logits.into_data().iter::<f32>().collect()
}
