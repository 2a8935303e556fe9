//! Perplexity of a text.

use burn::tensor::{Int, Tensor, TensorData, activation};
use ternoss_backends::TernaryBackend;

use crate::{GptOss, TokenOutOfRange};

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
    /// The text holds a token the model does not know.
    #[error(transparent)]
    Token(#[from] TokenOutOfRange),
}

/// Rows of logits in memory at once, in floats.
const LOGITS_AT_ONCE: usize = 1 << 25;

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
        mut progress: impl FnMut(&Perplexity),
    ) -> Result<Perplexity, PerplexityError> {
        if context < 2 {
            return Err(PerplexityError::Context { context });
        }
        if tokens.len() < context {
            return Err(PerplexityError::TooShort { tokens: tokens.len(), context });
        }
        let mut sum = Perplexity { nll: 0.0, tokens: 0, windows: 0 };
        for window in tokens.chunks_exact(context) {
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

    /// The natural logarithm of each token's probability, given those before it: one less than `tokens`.
    ///
    /// # Errors
    /// [`TokenOutOfRange`]
    pub fn log_likelihoods(&self, tokens: &[u32]) -> Result<Vec<f32>, TokenOutOfRange> {
        let Some((_, targets)) = tokens.split_first() else {
            return Ok(Vec::new());
        };
        let ids = self.tokens(tokens)?;
        let device = ids.device();
        let hidden = self.hidden(ids, &mut self.new_cache());
        let rows = (LOGITS_AT_ONCE / self.config().vocab_size).max(1);
        let mut likelihoods = Vec::with_capacity(targets.len());
        for (chunk, targets) in targets.chunks(rows).enumerate() {
            let first = chunk * rows;
            let logits = self.lm_head.logits(hidden.clone().slice_dim(0, first..first + targets.len()));
            let ids: Vec<i64> = targets.iter().map(|id| i64::from(*id)).collect();
            let ids = Tensor::<B, 2, Int>::from_data(TensorData::new(ids, [targets.len(), 1]), &device);
            let chosen = activation::log_softmax(logits, 1).gather(1, ids);
            likelihoods.extend(chosen.into_data().iter::<f32>());
        }
        Ok(likelihoods)
    }
}
