//! `config.json`: the one place that parses it.
//!
//! ```
//! use ternoss_model::GptOssConfig;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let config = GptOssConfig::from_file("../examples/tiny-gpt-oss/config.json".as_ref())?;
//! assert_eq!((config.num_hidden_layers(), config.num_local_experts), (4, 8));
//! # Ok(()) }
//! ```

mod parse;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use ternoss_backends::{ClampedSwiGlu, CodeFormat, Rotation};

/// A config that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not JSON of the expected form.
    #[error("{}: {source}", path.display())]
    Parse {
        /// Which file.
        path: PathBuf,
        /// Why, and where in the file.
        source: serde_json::Error,
    },
    /// The model is of another kind.
    #[error("model_type is {found:?}, only \"gpt_oss\" is supported")]
    Architecture {
        /// `model_type` in the file.
        found: String,
    },
    /// A value no model can have.
    #[error("config.json: {key} is {found}, expected {expected}")]
    Value {
        /// Key in `config.json`.
        key: &'static str,
        /// What stands there.
        found: String,
        /// What could stand there.
        expected: String,
    },
}

/// Sizes and switches of a gpt-oss model, named as in `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct GptOssConfig {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Neurons of one expert.
    pub intermediate_size: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides the query heads.
    pub num_key_value_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Experts per layer.
    pub num_local_experts: usize,
    /// Experts a token is routed to.
    pub experts_per_token: usize,
    /// Rows of the embedding and of the output layer.
    pub vocab_size: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f64,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// Keys a token of a sliding layer sees, itself included.
    pub sliding_window: usize,
    /// One entry a layer: whether its attention slides.
    pub layer_types: Vec<LayerType>,
    /// Sharpness of the gate's sigmoid in the experts.
    pub swiglu_alpha: f32,
    /// Clamp of gate and up in the experts.
    pub swiglu_limit: f32,
    /// Whether q, k, v and o have biases.
    pub attention_bias: bool,
    /// Whether the output layer is the embedding.
    pub tie_word_embeddings: bool,
    /// Longest sequence the model is meant for, in tokens.
    pub max_position_embeddings: usize,
    /// Tokens that end a generation.
    pub eos_token_id: Vec<u32>,
    /// How the weights are stored, when not as plain floats.
    pub quantization: Quantization,
}

/// Reach of a layer's attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LayerType {
    /// The last `sliding_window` tokens.
    SlidingAttention,
    /// All tokens so far.
    FullAttention,
}

/// Rotary position embedding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// Extension to longer contexts.
    pub yarn: Option<Yarn>,
}

/// YaRN (arXiv 2309.00071), with the parameter names of transformers' `rope_scaling`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Yarn {
    /// How many times longer the context becomes.
    pub factor: f64,
    /// Rotations above which a dimension keeps its frequency.
    pub beta_fast: f64,
    /// Rotations below which a dimension is fully interpolated.
    pub beta_slow: f64,
    /// Context length before the extension.
    pub original_max_position_embeddings: f64,
    /// Whether the bounds of the ramp are rounded to whole dimensions; gpt-oss does not.
    pub truncate: bool,
    /// Factor on cos and sin; `0.1 ln(factor) + 1` when absent.
    pub attention_factor: Option<f64>,
}

impl Default for Yarn {
    /// What transformers takes for gpt-oss when there are no parameters at all.
    fn default() -> Self {
        Self {
            factor: 32.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            original_max_position_embeddings: 4096.0,
            truncate: false,
            attention_factor: None,
        }
    }
}

/// `quantization_config`.
#[derive(Clone, Debug, PartialEq)]
pub enum Quantization {
    /// Plain floats.
    None,
    /// Experts in MXFP4, as OpenAI publishes them.
    Mxfp4,
    /// Made by ternoss.
    Ternary(TernaryQuantization),
}

/// `quantization_config` of a ternary model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TernaryQuantization {
    /// Always `"ternoss"`.
    pub quant_method: String,
    /// Layout version of the folder.
    pub version: u32,
    /// Quantization method, for example `"absmean"`.
    pub method: String,
    /// Packing of the trits.
    pub format: CodeFormat,
    /// Inputs per scale; null for one scale a row.
    pub group_size: Option<usize>,
    /// Trit planes a weight of attention and experts is the sum of.
    pub planes: usize,
    /// Rotation of every ternary layer's input; null for none.
    #[serde(default)]
    pub rotation: Option<Rotation>,
    /// Bits of an activation at a ternary layer's input.
    pub activation_bits: u32,
    /// All bytes of codes and scales over the number of weights, of attention and experts.
    pub bits_per_weight: f64,
}

/// `quant_method` of the folders this project writes.
pub const TERNOSS: &str = "ternoss";

/// Layout version this code reads and writes.
pub const FORMAT_VERSION: u32 = 1;

impl GptOssConfig {
    /// The gate of the experts.
    pub fn activation(&self) -> ClampedSwiGlu {
        ClampedSwiGlu { alpha: self.swiglu_alpha, limit: self.swiglu_limit }
    }

    /// Reads and checks a `config.json`.
    ///
    /// # Errors
    /// [`ConfigError`], naming the file or the key.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.into(), source })?;
        let json = serde_json::from_str(&text).map_err(|source| ConfigError::Parse { path: path.into(), source })?;
        Self::from_json(json, path)
    }

    /// Checks a parsed `config.json`; `path` only serves the error message.
    ///
    /// # Errors
    /// [`ConfigError`], naming the key.
    pub fn from_json(json: serde_json::Value, path: &Path) -> Result<Self, ConfigError> {
        let parse = |source| ConfigError::Parse { path: path.into(), source };
        let found = json.get("model_type").and_then(|kind| kind.as_str()).unwrap_or("missing");
        if found != "gpt_oss" {
            return Err(ConfigError::Architecture { found: found.into() });
        }
        let raw: parse::RawConfig = serde_json::from_value(json).map_err(parse)?;
        let config = raw.resolve(path)?;
        config.validate()?;
        Ok(config)
    }

    /// Layers.
    pub fn num_hidden_layers(&self) -> usize {
        self.layer_types.len()
    }

    /// Keys a token of `layer` sees: `None` when it sees all.
    pub fn window(&self, layer: usize) -> Option<usize> {
        match self.layer_types.get(layer) {
            Some(LayerType::SlidingAttention) => Some(self.sliding_window),
            _ => None,
        }
    }

    /// Weights of all matrices.
    fn weights(&self) -> u128 {
        let size = |factors: &[usize]| factors.iter().map(|factor| *factor as u128).product::<u128>();
        let heads = 2 * (self.num_attention_heads + self.num_key_value_heads);
        let attention = size(&[heads, self.head_dim, self.hidden_size]);
        let experts = size(&[3, self.num_local_experts, self.intermediate_size, self.hidden_size]);
        let tables = size(&[2, self.vocab_size, self.hidden_size]);
        self.num_hidden_layers() as u128 * (attention + experts) + tables
    }

    fn validate(&self) -> Result<(), ConfigError> {
        for (key, value) in [
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers()),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("num_local_experts", self.num_local_experts),
            ("num_experts_per_tok", self.experts_per_token),
            ("vocab_size", self.vocab_size),
        ] {
            // The upper bound keeps every product of two sizes far from overflow.
            expect(key, value, (1..=1 << 24).contains(&value), "1 to 16777216")?;
        }
        // Counting all weights, or their bytes, must not overflow either.
        let weights = self.weights();
        expect("the number of weights", weights, weights <= 1 << 48, "at most 281474976710656")?;
        let slides = self.layer_types.contains(&LayerType::SlidingAttention);
        let window = self.sliding_window;
        expect("sliding_window", window, (1..=1 << 30).contains(&window) || !slides, "1 to 1073741824")?;
        let kv = self.num_key_value_heads;
        let divides = format!("a divisor of num_attention_heads ({})", self.num_attention_heads);
        expect("num_key_value_heads", kv, self.num_attention_heads.is_multiple_of(kv), &divides)?;
        let chosen = self.experts_per_token;
        let at_most = format!("at most num_local_experts ({})", self.num_local_experts);
        expect("num_experts_per_tok", chosen, chosen <= self.num_local_experts, &at_most)?;
        expect("head_dim", self.head_dim, self.head_dim.is_multiple_of(2), "an even number")?;
        let positive = |x: f64| x.is_finite() && x > 0.0;
        expect("rms_norm_eps", self.rms_norm_eps, positive(self.rms_norm_eps), "above 0")?;
        expect("swiglu_alpha", self.swiglu_alpha, self.swiglu_alpha.is_finite(), "a finite number")?;
        let limit = self.swiglu_limit;
        expect("swiglu_limit", limit, positive(limit.into()), "above 0")?;
        let theta = self.rope.theta;
        expect("rope_theta", theta, theta.is_finite() && theta > 1.0, "above 1")?;
        let Some(yarn) = &self.rope.yarn else {
            return Ok(());
        };
        for (key, value) in [
            ("rope_scaling.factor", yarn.factor),
            ("rope_scaling.beta_fast", yarn.beta_fast),
            ("rope_scaling.beta_slow", yarn.beta_slow),
            ("rope_scaling.original_max_position_embeddings", yarn.original_max_position_embeddings),
            ("rope_scaling.attention_factor", yarn.attention_factor.unwrap_or(1.0)),
        ] {
            expect(key, value, positive(value), "above 0")?;
        }
        Ok(())
    }
}

fn expect(key: &'static str, found: impl std::fmt::Display, holds: bool, expected: &str) -> Result<(), ConfigError> {
    match holds {
        true => Ok(()),
        false => Err(ConfigError::Value { key, found: found.to_string(), expected: expected.into() }),
    }
}

/// `generation_config.json`: how the model's makers mean it to be sampled.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// Tokens that end a text; empty when the file names none or is missing.
    pub eos_token_id: Vec<u32>,
}

impl GenerationConfig {
    /// Reads the file of a model folder; a folder without one has the default.
    ///
    /// # Errors
    /// [`ConfigError`] when the file is there but not readable as JSON of the expected form.
    pub fn from_folder(folder: &Path) -> Result<Self, ConfigError> {
        #[derive(Deserialize)]
        struct Raw {
            #[serde(default)]
            eos_token_id: Option<parse::TokenIds>,
        }
        let path = folder.join("generation_config.json");
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self::default());
            }
            Err(source) => return Err(ConfigError::Read { path, source }),
        };
        let raw: Raw = serde_json::from_str(&text).map_err(|source| ConfigError::Parse { path, source })?;
        Ok(Self { eos_token_id: raw.eos_token_id.map(Into::into).unwrap_or_default() })
    }
}
