//! Perplexity of a text.
//!
//! ```
//! use ternoss_model::{Checkpoint, GptOss, LoadOptions};
//! type B = burn_flex::Flex;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let checkpoint = Checkpoint::open("../examples/tiny-gpt-oss".as_ref())?;
//! let model = GptOss::<B>::load(&checkpoint, LoadOptions::default(), &Default::default())?;
//! let tokens: Vec<u32> = (0..64).collect();
//! let found = model.perplexity(&tokens, 32, |_| ())?;
//! assert_eq!((found.windows, found.tokens), (2, 62));
//! # Ok(()) }
//! ```

use burn::tensor::{Int, Tensor, TensorData, activation};
use ternoss_backends::TernaryBackend;

use crate::{GptOss, TokenOutOfRange, language_model::LanguageModel, table::Table};

/// What a measurement found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Perplexity {
    /// Sum of the negative log-likelihoods, in nats.
    pub nll: f64,
    /// Predicted tokens: one less than its length for every window.
    pub tokens: usize,
    /// Windows measured.
    pub windows: usize,
}

impl Perplexity {
    /// `exp` of the mean negative log-likelihood.
    pub fn value(&self) -> f64 {
        (self.nll / self.tokens as f64).exp()
    }
}

/// How close a model's predictions come to another one's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Agreement {
    /// Mean Kullback-Leibler divergence of its distribution from the other's, in nats.
    pub kl_divergence: f64,
    /// Share of positions at which both find the same token likeliest.
    pub top_1: f64,
}

/// A text that cannot be measured.
#[derive(Debug, thiserror::Error)]
pub enum PerplexityError {
    /// A window predicts nothing.
    #[error("the context must be at least 2 tokens, found {context}")]
    Context {
        /// Tokens per window.
        context: usize,
    },
    /// There is no whole window.
    #[error("the text has {tokens} tokens, at least one window of {context} is needed")]
    TooShort {
        /// Tokens of the text.
        tokens: usize,
        /// Tokens per window.
        context: usize,
    },
    /// The model gives no probabilities.
    #[error("the likelihood of the tokens in window {window} is not a number: the model's weights are broken")]
    NotANumber {
        /// Number of the window, from 0.
        window: usize,
    },
    /// Two models cannot be compared.
    #[error("a model with {own} tokens in its vocabulary cannot be compared with one of {other}")]
    Vocabulary {
        /// Tokens this model has.
        own: usize,
        /// Tokens the other one has.
        other: usize,
    },
    /// The text holds a token the model does not know.
    #[error(transparent)]
    Token(#[from] TokenOutOfRange),
}

/// Rows of logits in memory at once, in floats.
const LOGITS_AT_ONCE: usize = 1 << 25;

/// Whole windows of `context` tokens, the tail dropped.
pub(crate) fn windows(tokens: &[u32], context: usize) -> Result<std::slice::ChunksExact<'_, u32>, PerplexityError> {
    if context < 2 {
        return Err(PerplexityError::Context { context });
    }
    if tokens.len() < context {
        return Err(PerplexityError::TooShort { tokens: tokens.len(), context });
    }
    Ok(tokens.chunks_exact(context))
}

/// Rows of logits to hold in memory at once.
pub fn rows_at_once(vocab_size: usize) -> usize {
    (LOGITS_AT_ONCE / vocab_size).max(1)
}

/// What two models predict on the same text, summed over its tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Comparison {
    divergence: f64,
    same: usize,
    positions: usize,
    own: f64,
    other: f64,
    predicted: usize,
}

impl Comparison {
    /// Adds a window of tokens: of each model the output layer and its inputs, normed, `[tokens, hidden]`.
    pub fn add<B: TernaryBackend>(
        &mut self,
        own: (&Table<B>, Tensor<B, 2>),
        other: (&Table<B>, Tensor<B, 2>),
        window: &[u32],
    ) {
        let rows = rows_at_once(own.0.rows());
        for first in (0..window.len()).step_by(rows) {
            let rows = first..(first + rows).min(window.len());
            let next = &window[(first + 1).min(window.len())..(rows.end + 1).min(window.len())];
            let likelihoods = |(head, hidden): &(&Table<B>, Tensor<B, 2>)| {
                activation::log_softmax(head.logits(hidden.clone().slice_dim(0, rows.clone())), 1)
            };
            let (own, other) = (likelihoods(&own), likelihoods(&other));
            let best = |likelihoods: &Tensor<B, 2>| -> Vec<i64> {
                likelihoods.clone().argmax(1).into_data().iter::<i64>().collect()
            };
            self.same += best(&own).iter().zip(best(&other)).filter(|(own, other)| **own == *other).count();
            self.own += surprise(&own, next);
            self.other += surprise(&other, next);
            let kl = (other.clone().exp() * (other - own)).sum_dim(1);
            self.divergence += kl.into_data().iter::<f32>().map(f64::from).sum::<f64>();
            self.positions += rows.len();
            self.predicted += next.len();
        }
    }

    /// Whether some prediction was not a number.
    pub(crate) fn is_nan(&self) -> bool {
        self.divergence.is_nan()
    }

    /// How close both are.
    pub fn agreement(&self) -> Agreement {
        let positions = self.positions as f64;
        Agreement { kl_divergence: self.divergence / positions, top_1: self.same as f64 / positions }
    }

    /// Perplexity of the one and of the other.
    pub fn perplexities(&self) -> [f64; 2] {
        [self.own, self.other].map(|nll| (nll / self.predicted as f64).exp())
    }
}

/// Sum of the negative logarithms of the probabilities that the first rows `[tokens, vocabulary]` give to `next`.
fn surprise<B: TernaryBackend>(likelihoods: &Tensor<B, 2>, next: &[u32]) -> f64 {
    if next.is_empty() {
        return 0.0;
    }
    let ids: Vec<i64> = next.iter().map(|id| i64::from(*id)).collect();
    let ids = Tensor::<B, 2, Int>::from_data(TensorData::new(ids, [next.len(), 1]), &likelihoods.device());
    let chosen = likelihoods.clone().slice_dim(0, 0..next.len()).gather(1, ids);
    -chosen.into_data().iter::<f32>().map(f64::from).sum::<f64>()
}

impl<B: TernaryBackend> GptOss<B> {
    /// Mean cross-entropy over non-overlapping windows of `context` tokens, the tail dropped; `progress` hears of
    /// every window that is done and the figures so far.
    ///
    /// # Errors
    /// [`PerplexityError`]
    pub fn perplexity(
        &self,
        tokens: &[u32],
        context: usize,
        progress: impl FnMut(&Perplexity),
    ) -> Result<Perplexity, PerplexityError> {
        LanguageModel::perplexity(self, tokens, context, progress)
    }

    /// How close this model's predictions come to another one's, over the same windows as [`perplexity`](Self::perplexity):
    /// the model it was made from, of the same vocabulary. `progress` hears of every window that is done.
    ///
    /// # Errors
    /// [`PerplexityError`]
    pub fn agreement(
        &self,
        teacher: &Self,
        tokens: &[u32],
        context: usize,
        progress: impl FnMut(),
    ) -> Result<Agreement, PerplexityError> {
        LanguageModel::agreement(self, teacher, tokens, context, progress)
    }

    /// The natural logarithm of each token's probability, given those before it: one less than `tokens`.
    ///
    /// # Errors
    /// [`TokenOutOfRange`]
    pub fn log_likelihoods(&self, tokens: &[u32]) -> Result<Vec<f32>, TokenOutOfRange> {
        LanguageModel::log_likelihoods(self, tokens)
    }
}
