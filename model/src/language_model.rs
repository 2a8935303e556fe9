//! What generation and perplexity need of a model, whether it is whole or on two backends.
//!
//! ```
//! use ternoss_model::{Checkpoint, GptOss, LanguageModel, LoadOptions, language_model::SequenceCache};
//!
//! /// How many tokens a model has seen of a text; the same code for every kind of model.
//! fn seen<M: LanguageModel>(model: &M, text: &[u32]) -> Result<usize, Box<dyn std::error::Error>> {
//!     let mut cache = model.new_cache();
//!     model.hidden_of(text, &mut cache)?;
//!     Ok(cache.position())
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let checkpoint = Checkpoint::open("../examples/tiny-gpt-oss".as_ref())?;
//! let model = GptOss::<burn_flex::Flex>::load(&checkpoint, LoadOptions::default(), &Default::default())?;
//! assert_eq!(seen(&model, &[1, 2, 3])?, 3);
//! # Ok(()) }
//! ```

use std::{ops::ControlFlow, time::Instant};

use burn::tensor::{Int, Tensor, TensorData, activation};
use ternoss_backends::TernaryBackend;

use crate::{
    GenerateError, GptOss, KvCache, Perplexity, PerplexityError, StopRules, TokenOutOfRange,
    draft::Drafter,
    generate::Writing,
    perplexity::{Agreement, Comparison, rows_at_once, windows},
    sampling::Sampler,
};

/// Keys and values of a sequence, of all layers wherever they are.
pub trait SequenceCache {
    /// Tokens seen so far.
    fn position(&self) -> usize;

    /// How many tokens can be taken back.
    fn spare(&self) -> usize;

    /// An empty cache from which up to `spare` tokens can be taken back.
    #[must_use]
    fn with_spare(self, spare: usize) -> Self;

    /// Takes tokens back, until `position` of them are left.
    fn truncate(&mut self, position: usize);
}

impl<B: TernaryBackend> SequenceCache for KvCache<B> {
    fn position(&self) -> usize {
        self.position()
    }

    fn spare(&self) -> usize {
        self.spare()
    }

    fn with_spare(self, spare: usize) -> Self {
        self.with_spare(spare)
    }

    fn truncate(&mut self, position: usize) {
        self.truncate(position);
    }
}

/// A model that writes text: [`GptOss`], or a [`SplitModel`](crate::SplitModel).
pub trait LanguageModel {
    /// The backend of the output layer.
    type Output: TernaryBackend;
    /// What it keeps of a sequence.
    type Cache: SequenceCache;

    /// The part that has the output layer, and knows the whole configuration.
    fn last_part(&self) -> &GptOss<Self::Output>;

    /// The same, to be changed.
    fn last_part_mut(&mut self) -> &mut GptOss<Self::Output>;

    /// An empty cache for one sequence.
    fn new_cache(&self) -> Self::Cache;

    /// What the output layer sees of tokens: `[tokens, hidden]`, normed.
    ///
    /// # Errors
    /// [`TokenOutOfRange`] for the first id outside the vocabulary.
    fn hidden_of(&self, ids: &[u32], cache: &mut Self::Cache) -> Result<Tensor<Self::Output, 2>, TokenOutOfRange>;

    /// Whether a batch gives every token the bits that it would have alone, so that guesses change nothing.
    fn is_batch_invariant(&self) -> bool;

    /// See [`GptOss::generate`].
    ///
    /// # Errors
    /// [`GenerateError`]
    fn generate(
        &self,
        prompt: &[u32],
        cache: &mut Self::Cache,
        sampler: &mut Sampler,
        rules: &StopRules,
        mut on_token: impl FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Vec<u32>, GenerateError> {
        let last = self.last_part();
        Self::Output::session(|| {
            let mut writing = Writing { history: prompt.to_vec(), end: prompt.len() + rules.max_tokens };
            let mut drafter = Drafter::new(if self.is_batch_invariant() { cache.spare() } else { 0 });
            if sampler.can_screen() {
                // Now, while there is room in memory.
                last.lm_head.prepare_screen();
            }
            let mut hidden = self.prefill_hidden(prompt, cache)?;
            let (mut draft, mut started) = (Vec::new(), None);
            let mut finished = rules.max_tokens == 0;
            while !finished {
                let accepted = last.accept(&draft, &hidden, &mut writing, sampler, rules, &mut on_token)?;
                // The prompt's own step is none to compare with.
                if let Some(started) = started.replace(Instant::now()) {
                    drafter.learn(draft.len(), accepted.drafted, started.elapsed());
                }
                // What was guessed wrong went through the model in vain.
                cache.truncate(cache.position() + accepted.drafted - draft.len());
                finished = accepted.finished;
                if !finished {
                    let room = writing.end - writing.history.len() - 1;
                    draft = drafter.draft(&writing.history).iter().copied().take(room).collect();
                    let batch: Vec<u32> = writing.history.last().into_iter().chain(&draft).copied().collect();
                    hidden = self.hidden_of(&batch, cache)?;
                }
            }
            Ok(writing.history.split_off(prompt.len()))
        })
    }

    /// See [`GptOss::prefill_hidden`].
    ///
    /// # Errors
    /// [`GenerateError`] for an empty prompt or a token outside the vocabulary.
    fn prefill_hidden(
        &self,
        prompt: &[u32],
        cache: &mut Self::Cache,
    ) -> Result<Tensor<Self::Output, 2>, GenerateError> {
        // All of it is checked before any of it changes the cache.
        self.last_part().tokens(prompt)?;
        Self::Output::session(|| {
            let mut last = None;
            for chunk in prompt.chunks(Self::Output::PROMPT_TOKENS) {
                last = Some(self.hidden_of(chunk, cache)?);
            }
            let hidden = last.ok_or(GenerateError::EmptyPrompt)?;
            let tokens = hidden.dims()[0];
            Ok(hidden.slice_dim(0, tokens - 1..tokens))
        })
    }

    /// Logits of every token: `[tokens, vocabulary]`. At least one token.
    ///
    /// # Errors
    /// [`TokenOutOfRange`]
    fn logits_of(&self, ids: &[u32], cache: &mut Self::Cache) -> Result<Tensor<Self::Output, 2>, TokenOutOfRange> {
        Ok(self.last_part().lm_head.logits(self.hidden_of(ids, cache)?))
    }

    /// See [`GptOss::perplexity`].
    ///
    /// # Errors
    /// [`PerplexityError`]
    fn perplexity(
        &self,
        tokens: &[u32],
        context: usize,
        mut progress: impl FnMut(&Perplexity),
    ) -> Result<Perplexity, PerplexityError> {
        let mut sum = Perplexity { nll: 0.0, tokens: 0, windows: 0 };
        for window in windows(tokens, context)? {
            sum.nll += self.log_likelihoods(window)?.iter().map(|l| -f64::from(*l)).sum::<f64>();
            sum.tokens += context - 1;
            if sum.nll.is_nan() {
                return Err(PerplexityError::NotANumber { window: sum.windows });
            }
            sum.windows += 1;
            progress(&sum);
        }
        Ok(sum)
    }

    /// See [`GptOss::agreement`].
    ///
    /// # Errors
    /// [`PerplexityError`]
    fn agreement(
        &self,
        teacher: &Self,
        tokens: &[u32],
        context: usize,
        mut progress: impl FnMut(),
    ) -> Result<Agreement, PerplexityError> {
        let [(own_head, own), (other_head, other)] = [self, teacher].map(|model| {
            let last = model.last_part();
            (&last.lm_head, last.config().vocab_size)
        });
        if own != other {
            return Err(PerplexityError::Vocabulary { own, other });
        }
        let mut sum = Comparison::default();
        for (number, window) in windows(tokens, context)?.enumerate() {
            let own = self.hidden_of(window, &mut self.new_cache())?;
            let other = teacher.hidden_of(window, &mut teacher.new_cache())?;
            sum.add((own_head, own), (other_head, other), window);
            if sum.is_nan() {
                return Err(PerplexityError::NotANumber { window: number });
            }
            progress();
        }
        Ok(sum.agreement())
    }

    /// See [`GptOss::log_likelihoods`].
    ///
    /// # Errors
    /// [`TokenOutOfRange`]
    fn log_likelihoods(&self, tokens: &[u32]) -> Result<Vec<f32>, TokenOutOfRange> {
        let Some((_, targets)) = tokens.split_first() else {
            return Ok(Vec::new());
        };
        let last = self.last_part();
        let hidden = self.hidden_of(tokens, &mut self.new_cache())?;
        let device = hidden.device();
        let rows = rows_at_once(last.config().vocab_size);
        let mut likelihoods = Vec::with_capacity(targets.len());
        for (chunk, targets) in targets.chunks(rows).enumerate() {
            let first = chunk * rows;
            let logits = last.lm_head.logits(hidden.clone().slice_dim(0, first..first + targets.len()));
            let ids: Vec<i64> = targets.iter().map(|id| i64::from(*id)).collect();
            let ids = Tensor::<Self::Output, 2, Int>::from_data(TensorData::new(ids, [targets.len(), 1]), &device);
            let chosen = activation::log_softmax(logits, 1).gather(1, ids);
            likelihoods.extend(chosen.into_data().iter::<f32>());
        }
        Ok(likelihoods)
    }
}

impl<B: TernaryBackend> LanguageModel for GptOss<B> {
    type Output = B;
    type Cache = KvCache<B>;

    fn last_part(&self) -> &GptOss<B> {
        self
    }

    fn last_part_mut(&mut self) -> &mut GptOss<B> {
        self
    }

    fn new_cache(&self) -> KvCache<B> {
        self.new_cache()
    }

    fn hidden_of(&self, ids: &[u32], cache: &mut KvCache<B>) -> Result<Tensor<B, 2>, TokenOutOfRange> {
        Ok(self.hidden(self.tokens(ids)?, cache))
    }

    fn is_batch_invariant(&self) -> bool {
        self.is_batch_invariant()
    }
}
