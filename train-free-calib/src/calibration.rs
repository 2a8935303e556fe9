//! The text that a model is calibrated on.

use std::{fmt, fs, path::Path};

use ternoss_model::{GptOssConfig, checkpoint::fingerprint};

use crate::CalibError;

/// One window is held out for this many that are calibrated on.
const WINDOWS_PER_HELD_OUT: usize = 16;

/// Tokens of a text, cut into windows that do not overlap: the first are calibrated on, the last only measured on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Calibration {
    windows: Vec<Vec<u32>>,
    calibrated: usize,
    fresh: Vec<Vec<u32>>,
}

impl Calibration {
    /// Reads a text to calibrate on.
    ///
    /// # Errors
    /// [`CalibError::ReadText`], [`CalibError::NotUtf8`], and [`CalibError::EmptyText`] when it is nothing but white
    /// space.
    pub fn read_text(path: &Path) -> Result<String, CalibError> {
        let name = || path.display().to_string();
        let bytes = fs::read(path).map_err(|source| CalibError::ReadText { path: name(), source })?;
        let not_utf8 = |position| CalibError::NotUtf8 { path: name(), position };
        let text = String::from_utf8(bytes).map_err(|error| not_utf8(error.utf8_error().valid_up_to()))?;
        if text.trim().is_empty() { Err(CalibError::EmptyText { path: name() }) } else { Ok(text) }
    }

    /// The first whole windows of `context` tokens, at most `max_tokens` tokens in all, and the held-out windows after them:
    /// one for 16. Where the text ends before, the last windows are held out instead, if there is more than one.
    ///
    /// One window is the least: the statistics are damped, so any number of tokens gives a result, but with less than a
    /// window the model never sees as much context as it was told to. See [`shortage`](Self::shortage) for more.
    ///
    /// # Errors
    /// [`CalibError::ShortText`] when the text does not fill one window, [`CalibError::Token`] for a token outside the
    /// vocabulary.
    pub fn new(tokens: &[u32], context: usize, max_tokens: usize, config: &GptOssConfig) -> Result<Self, CalibError> {
        let wanted = Self::tokens_wanted(config);
        let short = CalibError::ShortText { tokens: tokens.len().min(max_tokens), context, wanted };
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
        if wanted == 0 { Err(short) } else { Ok(Self { windows, calibrated, fresh: Vec::new() }) }
    }

    /// With up to `count` more windows of the same text, `tokens`, for distillation: what was calibrated on is known too
    /// well to learn from.
    #[must_use]
    pub fn with_fresh(mut self, tokens: &[u32], count: usize) -> Self {
        let fresh = tokens.chunks_exact(self.context()).skip(self.windows.len()).take(count);
        self.fresh = fresh.map(<[u32]>::to_vec).collect();
        self
    }

    /// A number that another text would not have.
    pub(crate) fn fingerprint(&self) -> u64 {
        let sizes = [self.context() as u32, self.calibrated as u32];
        let numbers = sizes.into_iter().chain(self.windows.iter().flatten().copied());
        fingerprint(numbers.flat_map(u32::to_le_bytes))
    }

    /// The same for the windows that distillation learns from.
    pub(crate) fn fingerprint_of_distilled(&self) -> u64 {
        fingerprint(self.distilled().iter().flatten().flat_map(|token| token.to_le_bytes()))
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

    /// The windows that distillation learns from: fresh ones, or where the text has no more, those calibrated on.
    pub fn distilled(&self) -> &[Vec<u32>] {
        if self.fresh.is_empty() { &self.windows[..self.calibrated] } else { &self.fresh }
    }

    /// The windows that are only measured on; there is none where the text has one window.
    pub fn held_out(&self) -> &[Vec<u32>] {
        &self.windows[self.calibrated..]
    }

    /// Tokens below which the statistics of a layer's inputs are too thin: five for each input, and for the experts as
    /// many as reach each of them if the router is fair.
    pub fn tokens_wanted(config: &GptOssConfig) -> usize {
        let share = config.num_local_experts as f64 / config.experts_per_token as f64;
        let experts = Self::expert_tokens_wanted(config) as f64 * share;
        let attention = 5 * config.hidden_size.max(config.num_attention_heads * config.head_dim);
        attention.max(experts.ceil() as usize)
    }

    /// Tokens below which an expert has seen too few: five for each input of its larger matrix. Below that,
    /// [`Method::Ternoss`](crate::Method::Ternoss) makes no greedy changes of that matrix.
    pub fn expert_tokens_wanted(config: &GptOssConfig) -> usize {
        5 * config.hidden_size.max(config.intermediate_size)
    }

    /// What is missing to as many tokens as the model should have, if something is.
    pub fn shortage(&self, config: &GptOssConfig) -> Option<Shortage> {
        let (found, wanted) = (self.tokens(), Self::tokens_wanted(config));
        (found < wanted).then_some(Shortage { found, wanted })
    }
}

/// A warning: the calibration goes on, but its statistics are thin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shortage {
    /// Tokens there are.
    pub found: usize,
    /// Tokens there should be.
    pub wanted: usize,
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { found, wanted } = self;
        write!(f, "{found} calibration tokens are few for this model: {wanted} or more give a better result")
    }
}
