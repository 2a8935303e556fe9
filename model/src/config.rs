//! `config.json`: the one place that parses it.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use ternoss_backends::{CodeFormat, Rotation};

/// Sharpness of the gate's sigmoid in gpt-oss's SwiGLU; a constant of the architecture, not in `config.json`.
pub const SWIGLU_ALPHA: f32 = 1.702;

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
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(default)]
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
    /// What transformers takes for gpt-oss when `rope_scaling` is null or missing.
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
    /// Trit planes a weight is the sum of.
    pub planes: usize,
    /// Rotation of every ternary layer's input; null for none.
    #[serde(default)]
    pub rotation: Option<Rotation>,
    /// Bits of an activation at a ternary layer's input.
    pub activation_bits: u32,
    /// All bytes of codes and scales over the number of ternary weights.
    pub bits_per_weight: f64,
}

/// `quant_method` of the folders this project writes.
pub const TERNOSS: &str = "ternoss";

/// Layout version this code reads and writes.
pub const FORMAT_VERSION: u32 = 1;

impl GptOssConfig {
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
        let raw: RawConfig = serde_json::from_value(json).map_err(parse)?;
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
            eos_token_id: Option<TokenIds>,
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

/// The file as it is; defaults are those of transformers' `GptOssConfig`.
#[derive(Deserialize)]
struct RawConfig {
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    #[serde(default = "defaults::head_dim")]
    head_dim: usize,
    num_local_experts: usize,
    #[serde(default)]
    num_experts_per_tok: Option<usize>,
    #[serde(default)]
    experts_per_token: Option<usize>,
    vocab_size: usize,
    #[serde(default = "defaults::rms_norm_eps")]
    rms_norm_eps: f64,
    #[serde(default)]
    rope_theta: Option<f64>,
    #[serde(default)]
    rope_scaling: Option<serde_json::Value>,
    #[serde(default)]
    rope_parameters: Option<serde_json::Value>,
    #[serde(default)]
    sliding_window: Option<usize>,
    #[serde(default)]
    layer_types: Option<Vec<LayerType>>,
    #[serde(default = "defaults::swiglu_limit")]
    swiglu_limit: f32,
    #[serde(default = "defaults::attention_bias")]
    attention_bias: bool,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default = "defaults::max_position_embeddings")]
    max_position_embeddings: usize,
    #[serde(default)]
    eos_token_id: Option<TokenIds>,
    #[serde(default)]
    quantization_config: Option<serde_json::Value>,
}

mod defaults {
    pub(super) fn head_dim() -> usize {
        64
    }
    pub(super) fn rms_norm_eps() -> f64 {
        1e-5
    }
    pub(super) fn swiglu_limit() -> f32 {
        7.0
    }
    pub(super) fn attention_bias() -> bool {
        true
    }
    pub(super) fn max_position_embeddings() -> usize {
        131_072
    }
    pub(super) const ROPE_THETA: f64 = 150_000.0;
    pub(super) const SLIDING_WINDOW: usize = 128;
    pub(super) const EXPERTS_PER_TOKEN: usize = 4;
}

/// One token id or several.
#[derive(Clone, Deserialize)]
#[serde(untagged)]
pub(crate) enum TokenIds {
    One(u32),
    Many(Vec<u32>),
}

impl From<TokenIds> for Vec<u32> {
    fn from(ids: TokenIds) -> Self {
        match ids {
            TokenIds::One(id) => vec![id],
            TokenIds::Many(ids) => ids,
        }
    }
}

impl RawConfig {
    fn resolve(self, path: &Path) -> Result<GptOssConfig, ConfigError> {
        let layers = self.num_hidden_layers;
        expect("num_hidden_layers", layers, (1..=1 << 16).contains(&layers), "1 to 65536")?;
        let layer_types = self.layer_types.clone().unwrap_or_else(|| alternating(layers));
        let expected = format!("one entry for each of the {layers} layers");
        expect("layer_types", format!("{} entries", layer_types.len()), layer_types.len() == layers, &expected)?;
        Ok(GptOssConfig {
            rope: self.rope(path)?,
            quantization: self.quantization(path)?,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_attention_heads: self.num_attention_heads,
            num_key_value_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
            num_local_experts: self.num_local_experts,
            experts_per_token: self
                .num_experts_per_tok
                .or(self.experts_per_token)
                .unwrap_or(defaults::EXPERTS_PER_TOKEN),
            vocab_size: self.vocab_size,
            rms_norm_eps: self.rms_norm_eps,
            sliding_window: self.sliding_window.unwrap_or(defaults::SLIDING_WINDOW),
            layer_types,
            swiglu_limit: self.swiglu_limit,
            attention_bias: self.attention_bias,
            tie_word_embeddings: self.tie_word_embeddings,
            max_position_embeddings: self.max_position_embeddings,
            eos_token_id: self.eos_token_id.map(Into::into).unwrap_or_default(),
        })
    }

    /// `rope_scaling` beside `rope_theta`, or both inside `rope_parameters` as transformers 5 writes them.
    fn rope(&self, path: &Path) -> Result<RopeConfig, ConfigError> {
        #[derive(Deserialize)]
        struct Kind {
            #[serde(alias = "type")]
            rope_type: Option<String>,
            rope_theta: Option<f64>,
        }
        let parse = |source| ConfigError::Parse { path: path.into(), source };
        let Some(value) = self.rope_parameters.as_ref().or(self.rope_scaling.as_ref()) else {
            let theta = self.rope_theta.unwrap_or(defaults::ROPE_THETA);
            return Ok(RopeConfig { theta, yarn: Some(Yarn::default()) });
        };
        let kind: Kind = serde_json::from_value(value.clone()).map_err(parse)?;
        let theta = self.rope_theta.or(kind.rope_theta).unwrap_or(defaults::ROPE_THETA);
        let yarn = match kind.rope_type.as_deref() {
            None | Some("default") => None,
            Some("yarn") => Some(serde_json::from_value(value.clone()).map_err(parse)?),
            Some(other) => {
                let expected = "\"yarn\" or \"default\"".into();
                return Err(ConfigError::Value { key: "rope_type", found: format!("{other:?}"), expected });
            }
        };
        Ok(RopeConfig { theta, yarn })
    }

    fn quantization(&self, path: &Path) -> Result<Quantization, ConfigError> {
        let Some(value) = &self.quantization_config else {
            return Ok(Quantization::None);
        };
        let method = value.get("quant_method").and_then(|method| method.as_str()).unwrap_or("missing");
        match method {
            "mxfp4" => Ok(Quantization::Mxfp4),
            TERNOSS => {
                let ternary: TernaryQuantization = serde_json::from_value(value.clone())
                    .map_err(|source| ConfigError::Parse { path: path.into(), source })?;
                let version = ternary.version;
                expect("quantization_config.version", version, version == FORMAT_VERSION, "1")?;
                let bits = ternary.activation_bits;
                expect("quantization_config.activation_bits", bits, bits == 8, "8")?;
                Ok(Quantization::Ternary(ternary))
            }
            other => Err(ConfigError::Value {
                key: "quantization_config.quant_method",
                found: format!("{other:?}"),
                expected: format!("\"mxfp4\" or \"{TERNOSS}\""),
            }),
        }
    }
}

/// Every second layer slides, the first one first.
fn alternating(layers: usize) -> Vec<LayerType> {
    let pair = [LayerType::SlidingAttention, LayerType::FullAttention];
    pair.into_iter().cycle().take(layers).collect()
}
