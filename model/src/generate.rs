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
use ternoss_backends::TernaryBackend;

use crate::{
    GptOss, KvCache, TokenOutOfRange,
    draft::Drafter,
    layer::Layer,
    sampling::{Sampler, SamplingError},
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

/// Prompt tokens that go through the model at once: bounds the memory of a long prompt.
pub const PREFILL_CHUNK: usize = 512;

/// When to stop.
#[derive(Clone, Debug, Default)]
pub struct StopRules {
    /// New tokens at most.
    pub max_tokens: usize,
    /// Tokens that end the text; the ending token is not part of the result.
    pub stop_tokens: Vec<u32>,
}

/// A text that grows.
struct Writing {
    /// Prompt and new tokens.
    history: Vec<u32>,
    /// Where it ends at the latest.
    end: usize,
}

/// How far a guess was right.
struct Accepted {
    /// Guessed tokens that are part of the text and not its last one.
    drafted: usize,
    /// Whether the text ends.
    finished: bool,
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
        mut on_token: impl FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Vec<u32>, GenerateError> {
        B::session(|| {
            let mut writing = Writing { history: prompt.to_vec(), end: prompt.len() + rules.max_tokens };
            let mut drafter = Drafter::new(if self.is_batch_invariant() { cache.spare() } else { 0 });
            if sampler.can_screen() {
                // Now, while there is room in memory.
                self.lm_head.prepare_screen();
            }
            let mut hidden = self.prefill_hidden(prompt, cache)?;
            let mut draft = Vec::new();
            let mut finished = rules.max_tokens == 0;
            while !finished {
                let accepted = self.accept(&draft, &hidden, &mut writing, sampler, rules, &mut on_token)?;
                drafter.learn(draft.len(), accepted.drafted);
                // What was guessed wrong went through the model in vain.
                cache.truncate(cache.position() + accepted.drafted - draft.len());
                finished = accepted.finished;
                if !finished {
                    let room = writing.end - writing.history.len() - 1;
                    draft = drafter.draft(&writing.history).iter().copied().take(room).collect();
                    let batch: Vec<u32> = writing.history.last().into_iter().chain(&draft).copied().collect();
                    hidden = self.hidden(self.tokens(&batch)?, cache);
                }
            }
            Ok(writing.history.split_off(prompt.len()))
        })
    }

    /// Chooses the next tokens for as long as `draft` guessed them, and one more; `hidden [1 + drafted, hidden]` is what the
    /// output layer sees of the last token and of each guess.
    fn accept(
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
    fn is_batch_invariant(&self) -> bool {
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
        let screened = if sampler.can_screen() { self.lm_head.screened(&hidden) } else { None };
        match screened.as_ref().and_then(|tokens| tokens.first()) {
            Some(logits) => sampler.sample_screened(logits, history),
            None => sampler.sample(&host(self.lm_head.logits(hidden)), history),
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
        // All of it is checked before any of it changes the cache.
        self.tokens(prompt)?;
        B::session(|| {
            let mut last = None;
            for chunk in prompt.chunks(PREFILL_CHUNK) {
                last = Some(self.hidden(self.tokens(chunk)?, cache));
            }
            let hidden = last.ok_or(GenerateError::EmptyPrompt)?;
            let tokens = hidden.dims()[0];
            Ok(hidden.slice_dim(0, tokens - 1..tokens))
        })
    }
}

fn host<B: Backend>(logits: Tensor<B, 2>) -> Vec<f32> {
    logits.into_data().iter::<f32>().collect()
}
