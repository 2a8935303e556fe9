//! What the bytes of a model are spent on.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::names::{CODES, FINAL_NORM, TableName, is_of_layer};

/// The role of a tensor, told by its name: in a full-precision model as well as in a ternary one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// Matrices of the attention: their codes, or their floats.
    AttentionCodes,
    /// The scales that go with them.
    AttentionScales,
    /// Matrices of the experts: their codes, their MXFP4 blocks, or their floats.
    ExpertCodes,
    /// The scales that go with them.
    ExpertScales,
    /// Embedding table, in full precision or ternary with its scales.
    Embedding,
    /// Output layer, in full precision or ternary with its scales.
    OutputLayer,
    /// Routers, with their biases.
    Router,
    /// Norms.
    Norms,
    /// Biases of the attention and of the experts, and the attention's sinks.
    BiasesAndSinks,
    /// Tensors that gpt-oss does not have, carried along.
    Other,
}

impl Part {
    /// All parts, in the order in which they are shown.
    pub const ALL: [Self; 10] = [
        Self::AttentionCodes,
        Self::AttentionScales,
        Self::ExpertCodes,
        Self::ExpertScales,
        Self::Embedding,
        Self::OutputLayer,
        Self::Router,
        Self::Norms,
        Self::BiasesAndSinks,
        Self::Other,
    ];

    /// The part that a tensor of this name belongs to. Every tensor belongs to one.
    pub fn of(tensor: &str) -> Self {
        // `row_scales` and `group_scales` of ternary matrices, `down_proj_scales` of MXFP4.
        let scales = tensor.ends_with("_scales");
        let of_table = |table: TableName| belongs_to(tensor, table.path());
        match tensor {
            _ if of_table(TableName::Embedding) => Self::Embedding,
            _ if of_table(TableName::Output) => Self::OutputLayer,
            FINAL_NORM => Self::Norms,
            _ if !is_of_layer(tensor) => Self::Other,
            _ if tensor.ends_with("layernorm.weight") => Self::Norms,
            _ if tensor.contains(".mlp.router.") => Self::Router,
            _ if tensor.ends_with("bias") || tensor.ends_with(".sinks") => Self::BiasesAndSinks,
            _ if tensor.contains(".mlp.experts.") && scales => Self::ExpertScales,
            _ if tensor.contains(".mlp.experts.") => Self::ExpertCodes,
            _ if tensor.contains(".self_attn.") && scales => Self::AttentionScales,
            _ if tensor.contains(".self_attn.") && (tensor.ends_with(CODES) || tensor.ends_with("_proj.weight")) => {
                Self::AttentionCodes
            }
            _ => Self::Other,
        }
    }

    /// Whether these bytes are what the matrices of attention and experts take.
    pub fn is_ternary(self) -> bool {
        matches!(self, Self::AttentionCodes | Self::AttentionScales | Self::ExpertCodes | Self::ExpertScales)
    }
}

/// Whether a tensor is `path` followed by a dot and something.
fn belongs_to(tensor: &str, path: &str) -> bool {
    tensor.strip_prefix(path).is_some_and(|rest| rest.starts_with('.'))
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::AttentionCodes => "attention codes",
            Self::AttentionScales => "attention scales",
            Self::ExpertCodes => "expert codes",
            Self::ExpertScales => "expert scales",
            Self::Embedding => "embedding",
            Self::OutputLayer => "output layer",
            Self::Router => "router",
            Self::Norms => "norms",
            Self::BiasesAndSinks => "biases and sinks",
            Self::Other => "other",
        })
    }
}

/// Bytes as people read them, in powers of 1000: `863.1 kB`.
pub fn readable_size(bytes: usize) -> String {
    match bytes as f64 {
        n if n >= 1e9 => format!("{:.2} GB", n / 1e9),
        n if n >= 1e6 => format!("{:.2} MB", n / 1e6),
        n => format!("{:.1} kB", n / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_of_a_model_tells_its_part() {
        for (name, part) in [
            ("model.embed_tokens.weight", Part::Embedding),
            ("model.embed_tokens.codes", Part::Embedding),
            ("model.embed_tokens.group_scales", Part::Embedding),
            ("lm_head.weight", Part::OutputLayer),
            ("lm_head.codes", Part::OutputLayer),
            ("lm_head.row_scales", Part::OutputLayer),
            ("model.norm.weight", Part::Norms),
            ("model.layers.3.input_layernorm.weight", Part::Norms),
            ("model.layers.3.post_attention_layernorm.weight", Part::Norms),
            ("model.layers.3.mlp.router.weight", Part::Router),
            ("model.layers.3.mlp.router.bias", Part::Router),
            ("model.layers.3.self_attn.sinks", Part::BiasesAndSinks),
            ("model.layers.3.self_attn.q_proj.bias", Part::BiasesAndSinks),
            ("model.layers.3.mlp.experts.down_proj_bias", Part::BiasesAndSinks),
            ("model.layers.3.self_attn.o_proj.weight", Part::AttentionCodes),
            ("model.layers.3.self_attn.o_proj.codes", Part::AttentionCodes),
            ("model.layers.3.self_attn.o_proj.group_scales", Part::AttentionScales),
            ("model.layers.3.self_attn.o_proj.row_scales", Part::AttentionScales),
            ("model.layers.3.mlp.experts.gate_up_proj", Part::ExpertCodes),
            ("model.layers.3.mlp.experts.gate_up_proj_blocks", Part::ExpertCodes),
            ("model.layers.3.mlp.experts.gate_up_proj_scales", Part::ExpertScales),
            ("model.layers.3.mlp.experts.gate_up_proj.codes", Part::ExpertCodes),
            ("model.layers.3.mlp.experts.gate_up_proj.row_scales", Part::ExpertScales),
            ("model.layers.3.self_attn.rotary_emb.inv_freq", Part::Other),
            ("value_head.weight", Part::Other),
            ("lm_head_2.weight", Part::Other),
        ] {
            assert_eq!(Part::of(name), part, "{name}");
        }
    }

    #[test]
    fn sizes_are_readable() {
        assert_eq!(readable_size(0), "0.0 kB");
        assert_eq!(readable_size(863_123), "863.1 kB");
        assert_eq!(readable_size(2_450_000), "2.45 MB");
        assert_eq!(readable_size(7_610_000_000), "7.61 GB");
    }
}
