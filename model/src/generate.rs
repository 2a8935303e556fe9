//! Writing text: prompt in, tokens out, one by one.

use std::ops::ControlFlow;

use burn::tensor::{Tensor, backend::Backend};
use ternoss_backends::TernaryBackend;

use crate::{
    GptOss, KvCache, TokenOutOfRange,
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

impl<B: TernaryBackend> GptOss<B> {
    /// Continues `prompt` until a rule stops it; every new token goes to `on_token`, which may break off.
    ///
    /// `cache` may hold what came before the prompt; afterwards it holds all but the last token.
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
        let mut hidden = self.prefill_hidden(prompt, cache)?;
        let mut history = prompt.to_vec();
        while history.len() - prompt.len() < rules.max_tokens {
            let token = self.next_token(hidden, sampler, &history)?;
            if rules.stop_tokens.contains(&token) {
                break;
            }
            history.push(token);
            let enough = history.len() - prompt.len() == rules.max_tokens;
            if on_token(token).is_break() || enough {
                break;
            }
            hidden = self.hidden(self.tokens(&[token])?, cache);
        }
        Ok(history.split_off(prompt.len()))
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
        let mut last = None;
        for chunk in prompt.chunks(PREFILL_CHUNK) {
            last = Some(self.hidden(self.tokens(chunk)?, cache));
        }
        let hidden = last.ok_or(GenerateError::EmptyPrompt)?;
        let tokens = hidden.dims()[0];
        Ok(hidden.slice_dim(0, tokens - 1..tokens))
    }
}

fn host<B: Backend>(logits: Tensor<B, 2>) -> Vec<f32> {
    logits.into_data().iter::<f32>().collect()
}
