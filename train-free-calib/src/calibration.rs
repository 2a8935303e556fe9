//! The text that a model is calibrated on.

use ternoss_model::{GptOssConfig, checkpoint::fingerprint};

use crate::CalibError;

/// Tokens of a text, cut into windows that do not overlap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Calibration {
    windows: Vec<Vec<u32>>,
}

impl Calibration {
    /// The first whole windows of `context` tokens, at most `max_tokens` tokens in all.
    ///
    /// # Errors
    /// [`CalibError::ShortText`] when the text does not fill one window, [`CalibError::Token`] for a token outside the
    /// vocabulary.
    pub fn new(tokens: &[u32], context: usize, max_tokens: usize, config: &GptOssConfig) -> Result<Self, CalibError> {
        let short = CalibError::ShortText { tokens: tokens.len().min(max_tokens), context };
        if context < 2 {
            return Err(short);
        }
        let vocab_size = config.vocab_size;
        if let Some(token) = tokens.iter().copied().find(|token| *token as usize >= vocab_size) {
            return Err(CalibError::Token { token, vocab_size });
        }
        let windows = tokens.chunks_exact(context).take(max_tokens / context).map(<[u32]>::to_vec);
        let windows: Vec<_> = windows.collect();
        if windows.is_empty() { Err(short) } else { Ok(Self { windows }) }
    }

    /// A number that another text would not have.
    pub(crate) fn fingerprint(&self) -> u64 {
        let numbers = std::iter::once(self.context() as u32).chain(self.windows.iter().flatten().copied());
        fingerprint(numbers.flat_map(u32::to_le_bytes))
    }

    /// Tokens in all windows.
    pub fn tokens(&self) -> usize {
        self.windows.iter().map(Vec::len).sum()
    }

    /// Tokens a window.
    pub fn context(&self) -> usize {
        self.windows.first().map_or(0, Vec::len)
    }

    /// The windows, all of the same length.
    pub fn windows(&self) -> &[Vec<u32>] {
        &self.windows
    }

    /// Tokens below which the statistics of a layer's inputs are too thin: five for each input, and for the experts as
    /// many as reach each of them if the router is fair.
    pub fn tokens_wanted(config: &GptOssConfig) -> usize {
        let share = config.num_local_experts as f64 / config.experts_per_token as f64;
        let experts = 5.0 * config.hidden_size.max(config.intermediate_size) as f64 * share;
        let attention = 5 * config.hidden_size.max(config.num_attention_heads * config.head_dim);
        attention.max(experts.ceil() as usize)
    }
}
