//! Several texts side by side: the weights are read once for the next token of all of them.
//!
//! ```
//! use ternoss_model::{Checkpoint, GptOss, LoadOptions, StopRules, batch::Text, sampling::{Sampler, SamplingConfig}};
//! type B = burn_flex::Flex;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let checkpoint = Checkpoint::open("../examples/tiny-gpt-oss".as_ref())?;
//! let model = GptOss::<B>::load(&checkpoint, LoadOptions::default(), &Default::default())?;
//! let text = |prompt: &[u32]| -> Result<_, Box<dyn std::error::Error>> {
//!     let rules = StopRules { max_tokens: 4, stop_tokens: vec![] };
//!     Ok(Text::new(prompt.to_vec(), model.new_cache(), Sampler::new(SamplingConfig::greedy())?, rules))
//! };
//! let texts = model.generate_batch(vec![text(&[1, 2, 3])?, text(&[4, 5])?])?;
//! assert!(texts.iter().all(|text| text.written().len() == 4));
//! # Ok(()) }
//! ```

use burn::tensor::{Tensor, backend::Backend};
use ternoss_backends::TernaryBackend;

use crate::{
    GenerateError, GptOss, KvCache, StopRules,
    sampling::{Choice, Sampler, SamplingError},
};

/// A text that is written beside others: each has its own prompt, random numbers and end.
#[derive(Debug)]
pub struct Text<B: Backend> {
    tokens: Vec<u32>,
    prompt: usize,
    cache: KvCache<B>,
    sampler: Sampler,
    rules: StopRules,
    finished: bool,
}

impl<B: Backend> Text<B> {
    /// A text that begins with `prompt`; `cache` may hold what came before it.
    pub fn new(prompt: Vec<u32>, cache: KvCache<B>, sampler: Sampler, rules: StopRules) -> Self {
        let finished = rules.max_tokens == 0;
        Self { prompt: prompt.len(), tokens: prompt, cache, sampler, rules, finished }
    }

    /// The new tokens.
    pub fn written(&self) -> &[u32] {
        &self.tokens[self.prompt..]
    }

    /// Takes up the next token, unless it ends the text.
    fn push(&mut self, token: u32) {
        self.finished = self.rules.stop_tokens.contains(&token);
        if !self.finished {
            self.tokens.push(token);
            self.finished = self.written().len() == self.rules.max_tokens;
        }
    }
}

impl<B: TernaryBackend> GptOss<B> {
    /// Continues every text until its rules stop it, all of them at the same time. A ternary model writes what it would write
    /// of each text alone ([`generate`](Self::generate)), on backends whose kernels give a token the same bits in any company
    /// ([`TernaryBackend::BATCH_INVARIANT`]).
    ///
    /// # Errors
    /// [`GenerateError`] for an empty prompt, a token outside the vocabulary, logits that are not numbers.
    pub fn generate_batch(&self, mut texts: Vec<Text<B>>) -> Result<Vec<Text<B>>, GenerateError> {
        B::session(|| {
            for text in &mut texts {
                let hidden = self.prefill_hidden(&text.tokens, &mut text.cache)?;
                if !text.finished {
                    self.continue_by_one(hidden, &mut [text])?;
                }
            }
            loop {
                let mut unfinished: Vec<_> = texts.iter_mut().filter(|text| !text.finished).collect();
                if unfinished.is_empty() {
                    break;
                }
                let last: Vec<u32> = unfinished.iter().filter_map(|text| text.tokens.last().copied()).collect();
                let mut caches: Vec<_> = unfinished.iter_mut().map(|text| &mut text.cache).collect();
                let hidden = self.hidden_batch(self.tokens(&last)?, &mut caches);
                self.continue_by_one(hidden, &mut unfinished)?;
            }
            Ok(texts)
        })
    }

    /// Chooses the next token of each text, of which the output layer sees `hidden [texts, hidden]`.
    fn continue_by_one(&self, hidden: Tensor<B, 2>, texts: &mut [&mut Text<B>]) -> Result<(), SamplingError> {
        let choices = texts.iter_mut().map(|text| Choice { sampler: &mut text.sampler, history: &text.tokens });
        let chosen = self.next_tokens(hidden, &mut choices.collect::<Vec<_>>())?;
        texts.iter_mut().zip(chosen).for_each(|(text, token)| text.push(token));
        Ok(())
    }
}
