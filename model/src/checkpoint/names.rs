//! Names of tensors in a checkpoint.

use std::fmt;

use crate::config::GptOssConfig;

/// The four linears of an attention, named as in the checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinearName {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Output.
    O,
}

impl LinearName {
    /// All four, in the order data flows.
    pub const ALL: [Self; 4] = [Self::Q, Self::K, Self::V, Self::O];

    /// `model.layers.N.self_attn.X_proj`
    pub fn path(self, layer: usize) -> String {
        let name = match self {
            Self::Q => "q_proj",
            Self::K => "k_proj",
            Self::V => "v_proj",
            Self::O => "o_proj",
        };
        format!("{}.self_attn.{name}", layer_path(layer))
    }

    /// `[in_features, out_features]`
    pub fn shape(self, config: &GptOssConfig) -> [usize; 2] {
        let queries = config.num_attention_heads * config.head_dim;
        let keys = config.num_key_value_heads * config.head_dim;
        match self {
            Self::Q => [config.hidden_size, queries],
            Self::K | Self::V => [config.hidden_size, keys],
            Self::O => [queries, config.hidden_size],
        }
    }
}

/// The two matrices of an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpertMatrix {
    /// Gate (even rows) and up (odd rows), interleaved.
    GateUp,
    /// Back to the residual stream.
    Down,
}

impl ExpertMatrix {
    /// Both, in the order data flows.
    pub const ALL: [Self; 2] = [Self::GateUp, Self::Down];

    /// `model.layers.N.mlp.experts.X_proj`
    pub fn path(self, layer: usize) -> String {
        format!("{}.mlp.experts.{self}", layer_path(layer))
    }

    /// `[in_features, out_features]`
    pub fn shape(self, config: &GptOssConfig) -> [usize; 2] {
        match self {
            Self::GateUp => [config.hidden_size, 2 * config.intermediate_size],
            Self::Down => [config.intermediate_size, config.hidden_size],
        }
    }
}

impl fmt::Display for ExpertMatrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::GateUp => "gate_up_proj",
            Self::Down => "down_proj",
        })
    }
}

/// `model.layers.N`
pub(crate) fn layer_path(layer: usize) -> String {
    format!("model.layers.{layer}")
}

/// Whether a tensor belongs to a layer.
pub(crate) fn is_of_layer(tensor: &str) -> bool {
    tensor.starts_with("model.layers.")
}

/// The matrices with one row a token of the vocabulary, named as in the checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableName {
    /// From tokens to the residual stream.
    Embedding,
    /// From the residual stream to logits.
    Output,
}

impl TableName {
    /// Both, in the order data flows.
    pub const ALL: [Self; 2] = [Self::Embedding, Self::Output];

    /// Those that a model has: where the output layer is the embedding, only that.
    pub fn of(config: &GptOssConfig) -> &'static [Self] {
        if config.tie_word_embeddings { &Self::ALL[..1] } else { &Self::ALL }
    }

    /// `model.embed_tokens` or `lm_head`
    pub fn path(self) -> &'static str {
        match self {
            Self::Embedding => "model.embed_tokens",
            Self::Output => "lm_head",
        }
    }

    /// Its tensor in full precision.
    pub fn weight(self) -> String {
        format!("{}.weight", self.path())
    }

    /// `[in_features, out_features]`
    pub fn shape(self, config: &GptOssConfig) -> [usize; 2] {
        [config.hidden_size, config.vocab_size]
    }
}

/// The tensors of a layer beside its ternary ones that have a row for every expert: the router's, and the biases.
pub fn tensors_by_expert(layer: usize) -> [String; 4] {
    let path = format!("{}.mlp", layer_path(layer));
    ["router.weight", "router.bias", "experts.gate_up_proj_bias", "experts.down_proj_bias"]
        .map(|name| format!("{path}.{name}"))
}

/// Norm before the output layer.
pub const FINAL_NORM: &str = "model.norm.weight";

/// Suffixes of the tensors a ternary matrix consists of.
pub(crate) const CODES: &str = "codes";
pub(crate) const ROW_SCALES: &str = "row_scales";
pub(crate) const GROUP_SCALES: &str = "group_scales";

/// Where the tensors of a ternary weight stand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TernaryPath {
    /// One matrix: the tensors have no leading dimension of matrices.
    Linear(String),
    /// The experts of a layer: the leading dimension is the expert.
    Experts(String),
}

impl TernaryPath {
    /// Name of one of the parts.
    pub(crate) fn part(&self, suffix: &str) -> String {
        let (Self::Linear(path) | Self::Experts(path)) = self;
        format!("{path}.{suffix}")
    }

    /// The shape in the file of a part that has `shape` in memory.
    pub(crate) fn file_shape<'a>(&self, shape: &'a [usize]) -> &'a [usize] {
        match self {
            Self::Linear(_) => shape.get(1..).unwrap_or_default(),
            Self::Experts(_) => shape,
        }
    }
}
