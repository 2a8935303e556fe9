//! The text of `config.json`: defaults and old spellings, as transformers reads them.

use std::path::Path;

use serde::Deserialize;

use super::{
    ConfigError, FORMAT_VERSION, GptOssConfig, LayerType, Quantization, RopeConfig, TERNOSS, TernaryQuantization, Yarn,
    expect,
};

/// The file as it is; defaults are those of transformers' `GptOssConfig`.
#[derive(Deserialize)]
pub(super) struct RawConfig {
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
    #[serde(default = "defaults::swiglu_alpha")]
    swiglu_alpha: f32,
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
    pub(super) fn swiglu_alpha() -> f32 {
        1.702
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
pub(super) enum TokenIds {
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
    pub(super) fn resolve(self, path: &Path) -> Result<GptOssConfig, ConfigError> {
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
            swiglu_alpha: self.swiglu_alpha,
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
        let given = |value: &&serde_json::Value| value.as_object().is_none_or(|object| !object.is_empty());
        let scaling = self.rope_scaling.as_ref().filter(given);
        let Some(value) = scaling.or(self.rope_parameters.as_ref()) else {
            let theta = self.rope_theta.unwrap_or(defaults::ROPE_THETA);
            return Ok(RopeConfig { theta, yarn: Some(Yarn::default()) });
        };
        let kind: Kind = serde_json::from_value(value.clone()).map_err(parse)?;
        let theta = kind.rope_theta.or(self.rope_theta).unwrap_or(defaults::ROPE_THETA);
        let yarn = match kind.rope_type.as_deref() {
            None | Some("default") => None,
            Some("yarn") => {
                let raw: RawYarn = serde_json::from_value(value.clone()).map_err(parse)?;
                Some(raw.resolve(self.max_position_embeddings as f64))
            }
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

/// The parameters of YaRN as they stand in the file.
#[derive(Deserialize)]
struct RawYarn {
    factor: Option<f64>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    original_max_position_embeddings: Option<f64>,
    truncate: Option<bool>,
    attention_factor: Option<f64>,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
}

impl RawYarn {
    /// Fills in what is missing as `_compute_yarn_parameters` of transformers does.
    fn resolve(self, max_position_embeddings: f64) -> Yarn {
        let set = |value: Option<f64>| value.filter(|value| *value != 0.0);
        let original = self.original_max_position_embeddings.unwrap_or(max_position_embeddings);
        let factor = self.factor.unwrap_or(max_position_embeddings / original);
        let scale = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
        let ratio = set(self.mscale).zip(set(self.mscale_all_dim)).map(|(own, all)| scale(own) / scale(all));
        Yarn {
            factor,
            beta_fast: set(self.beta_fast).unwrap_or(32.0),
            beta_slow: set(self.beta_slow).unwrap_or(1.0),
            original_max_position_embeddings: original,
            truncate: self.truncate.unwrap_or(true),
            attention_factor: self.attention_factor.or(ratio),
        }
    }
}

/// Every second layer slides, the first one first.
fn alternating(layers: usize) -> Vec<LayerType> {
    let pair = [LayerType::SlidingAttention, LayerType::FullAttention];
    pair.into_iter().cycle().take(layers).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use ternoss_backends::ClampedSwiGlu;

    fn rope(changes: serde_json::Value) -> Result<RopeConfig, ConfigError> {
        let mut json = json!({
            "model_type": "gpt_oss", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "vocab_size": 128,
            "max_position_embeddings": 65_536,
        });
        let object = json.as_object_mut().unwrap();
        object.extend(changes.as_object().unwrap().clone());
        Ok(GptOssConfig::from_json(json, Path::new("config.json"))?.rope)
    }

    /// As `_compute_yarn_parameters` and `convert_rope_params_to_dict` of transformers 5.23 read them.
    #[test]
    fn rotary_parameters_are_read_as_the_reference_reads_them() {
        let none = rope(json!({ "rope_scaling": null })).unwrap();
        assert_eq!(none, RopeConfig { theta: 150_000.0, yarn: Some(Yarn::default()) });
        assert_eq!(rope(json!({ "rope_scaling": {} })).unwrap(), none);
        assert_eq!(rope(json!({ "rope_scaling": { "rope_type": "default" }, "rope_theta": 1e4 })).unwrap().yarn, None);

        let sparse =
            rope(json!({ "rope_scaling": { "rope_type": "yarn", "factor": 4.0, "beta_fast": null } })).unwrap();
        let expected =
            Yarn { factor: 4.0, original_max_position_embeddings: 65_536.0, truncate: true, ..Yarn::default() };
        assert_eq!(sparse.yarn, Some(expected), "absent parameters are not gpt-oss's own");

        let without_factor = json!({ "type": "yarn", "original_max_position_embeddings": 4096 });
        assert_eq!(rope(json!({ "rope_scaling": without_factor })).unwrap().yarn.unwrap().factor, 16.0);

        let scaled = json!({ "rope_type": "yarn", "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 0.5 });
        let factor = rope(json!({ "rope_scaling": scaled })).unwrap().yarn.unwrap().attention_factor.unwrap();
        let scale = |mscale: f64| 0.1 * mscale * 32f64.ln() + 1.0;
        assert!((factor - scale(1.0) / scale(0.5)).abs() < 1e-12);

        let both = json!({ "rope_scaling": { "rope_type": "default", "rope_theta": 5e5 }, "rope_theta": 1e4,
            "rope_parameters": { "rope_type": "yarn", "factor": 8.0 } });
        assert_eq!(rope(both).unwrap(), RopeConfig { theta: 5e5, yarn: None }, "rope_scaling and its theta come first");
        assert!(rope(json!({ "rope_scaling": { "rope_type": "linear" } })).is_err());
    }

    #[test]
    fn the_gate_comes_from_the_file() {
        let mut json = json!({
            "model_type": "gpt_oss", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "vocab_size": 128,
        });
        let gate = |json: &serde_json::Value| {
            GptOssConfig::from_json(json.clone(), Path::new("config.json")).unwrap().activation()
        };
        assert_eq!(gate(&json), ClampedSwiGlu { alpha: 1.702, limit: 7.0 });
        json["swiglu_alpha"] = json!(1.5);
        json["swiglu_limit"] = json!(64.0);
        assert_eq!(gate(&json), ClampedSwiGlu { alpha: 1.5, limit: 64.0 });
    }
}
