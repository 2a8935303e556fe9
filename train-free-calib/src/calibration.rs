//! The text that a model is calibrated on.

use ternoss_model::{GptOssConfig, checkpoint::fingerprint};

use crate::CalibError;

/// One window is held out for this many that are calibrated on.
const WINDOWS_PER_HELD_OUT: usize = 16;

/// Tokens of a text, cut into windows that do not overlap: the first are calibrated on, the last only measured on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Calibration {
    windows: Vec<Vec<u32>>,
    calibrated: usize,
}

impl Calibration {
    /// The first whole windows of `context` tokens, at most `max_tokens` tokens in all, and the held-out windows after them:
    /// one for 16. Where the text ends before, the last windows are held out instead, if there is more than one.
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
        let wanted = (max_tokens / context).min(tokens.len() / context);
        let held_out = wanted.div_ceil(WINDOWS_PER_HELD_OUT);
        let windows = tokens.chunks_exact(context).take(wanted + held_out).map(<[u32]>::to_vec);
        let windows: Vec<_> = windows.collect();
        let calibrated = windows.len().saturating_sub(held_out).max(1);
        if wanted == 0 { Err(short) } else { Ok(Self { windows, calibrated }) }
    }

    /// A number that another text would not have.
    pub(crate) fn fingerprint(&self) -> u64 {
        let sizes = [self.context() as u32, self.calibrated as u32];
        let numbers = sizes.into_iter().chain(self.windows.iter().flatten().copied());
        fingerprint(numbers.flat_map(u32::to_le_bytes))
    }

    /// Tokens that are calibrated on.
    pub fn tokens(&self) -> usize {
        self.calibrated * self.context()
    }

    /// Tokens a window.
    pub fn context(&self) -> usize {
        self.windows.first().map_or(0, Vec::len)
    }

    /// All windows, of the same length, those that are calibrated on first.
    pub fn windows(&self) -> &[Vec<u32>] {
        &self.windows
    }

    /// How many of the windows are calibrated on; the others are held out.
    pub fn calibrated(&self) -> usize {
        self.calibrated
    }

    /// The windows that are only measured on; there is none where the text has one window.
    pub fn held_out(&self) -> &[Vec<u32>] {
        &self.windows[self.calibrated..]
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
