//! From a checkpoint to Burn modules.

use std::sync::Arc;

use burn::{
    module::Param,
    nn,
    tensor::{Tensor, TensorData, backend::Backend},
};
use ternoss_backends::KvFormat;
use ternoss_quant::{BitLinear, Linear, TernaryTensor};

use super::{
    Checkpoint, CheckpointError, ExpertMatrix, LinearName, TableName, TernaryPath,
    names::{CODES, FINAL_NORM, layer_path},
    weights::{ExpertStorage, transpose},
};
use crate::{
    GptOss,
    attention::Attention,
    experts::{DenseExperts, Expert, Experts, PackedExperts, StreamedExperts},
    layer::{Layer, Mlp},
    pager::Pager,
    rope::RotaryEmbedding,
    router::Router,
    table::{StoredTable, Table},
};

/// Where full-precision experts live while the model runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ExpertPlacement {
    /// In memory when all of them take at most 4 GiB in f32, else streamed.
    #[default]
    Auto,
    /// In memory as f32.
    Resident,
    /// In the checkpoint, decoded whenever chosen: slow, but a model larger than memory runs.
    Streamed,
}

/// Choices when loading a model.
#[derive(Clone, Copy, Debug, Default)]
pub struct LoadOptions {
    /// Where full-precision experts live.
    pub experts: ExpertPlacement,
    /// Resident bytes of this process at most, mapped files included: experts of a ternary model are read when they are
    /// chosen, and the coldest leave for them. Results do not change. Only where `/proc` says how much is resident.
    pub memory_budget: Option<u64>,
    /// Rewrite t5 codes as t2 in memory: faster, and the ternary weights are then held in memory instead of
    /// being used in the mapped files.
    pub unpack: bool,
    /// How [`new_cache`](GptOss::new_cache) keeps keys and values.
    pub kv_format: KvFormat,
}

const AUTO_RESIDENT_BYTES: usize = 4 << 30;

impl<B: Backend> GptOss<B> {
    /// Loads a model, one tensor at a time.
    ///
    /// Embedding, output layer and ternary weights point into the mapped files; everything else is widened to f32.
    ///
    /// # Errors
    /// [`CheckpointError`], naming the file, the tensor, and what was expected.
    pub fn load(checkpoint: &Checkpoint, options: LoadOptions, device: &B::Device) -> Result<Self, CheckpointError> {
        Self::load_from(checkpoint, options, 0, device)
    }

    /// The same without the layers before `first`, which are elsewhere.
    pub(crate) fn load_from(
        checkpoint: &Checkpoint,
        options: LoadOptions,
        first: usize,
        device: &B::Device,
    ) -> Result<Self, CheckpointError> {
        let config = checkpoint.config();
        let pager = options.memory_budget.map(|budget| Pager::new(checkpoint, budget)).transpose()?;
        let experts_resident = experts_resident(checkpoint, options);
        let loader = Loader { checkpoint, device, experts_resident, unpack: options.unpack, pager };
        let (norm, lm_head) = Self::load_output(checkpoint, device)?;
        let lm_head = lm_head.with_pager(loader.pager.clone());
        let layers = first..config.num_hidden_layers();
        Ok(Self {
            embed_tokens: Table::embedding(checkpoint, device)?,
            layers: layers.map(|layer| loader.layer(layer)).collect::<Result<_, _>>()?,
            norm,
            lm_head,
            rope: RotaryEmbedding::new(&config.rope, config.head_dim),
            config: config.clone(),
            kv_format: options.kv_format,
        })
    }

    /// Loads the last norm and the output layer alone, as [`load`](Self::load) does.
    ///
    /// # Errors
    /// [`CheckpointError`], naming the file, the tensor, and what was expected.
    pub fn load_output(
        checkpoint: &Checkpoint,
        device: &B::Device,
    ) -> Result<(nn::RmsNorm<B>, Table<B>), CheckpointError> {
        let norm = Loader::new(checkpoint, LoadOptions::default(), device).norm(FINAL_NORM)?;
        Ok((norm, Table::output(checkpoint, device)?))
    }
}

impl<B: Backend> Table<B> {
    /// Loads the token embedding alone, as [`GptOss::load`] does.
    ///
    /// # Errors
    /// [`CheckpointError`], naming the file, the tensor, and what was expected.
    pub fn embedding(checkpoint: &Checkpoint, device: &B::Device) -> Result<Self, CheckpointError> {
        Self::load(checkpoint, TableName::Embedding, device)
    }

    /// Loads the output layer alone, as [`GptOss::load`] does: the embedding where it is tied to that.
    ///
    /// # Errors
    /// [`CheckpointError`], naming the file, the tensor, and what was expected.
    pub fn output(checkpoint: &Checkpoint, device: &B::Device) -> Result<Self, CheckpointError> {
        match checkpoint.config().tie_word_embeddings {
            true => Self::embedding(checkpoint, device),
            false => Self::load(checkpoint, TableName::Output, device),
        }
    }

    /// A table, ternary when the checkpoint has codes for it.
    fn load(checkpoint: &Checkpoint, name: TableName, device: &B::Device) -> Result<Self, CheckpointError> {
        let shape @ [hidden, vocabulary] = name.shape(checkpoint.config());
        if checkpoint.table_planes(name).is_some() {
            let path = TernaryPath::Linear(name.path().into());
            return checkpoint.ternary_weight(&path, shape, device).map(TernaryTensor::new).map(Self::Ternary);
        }
        let matrix = checkpoint.stored_matrix(&name.weight(), [vocabulary, hidden], device)?;
        Ok(Self::Stored(StoredTable::new(matrix)))
    }
}

impl<B: Backend> Layer<B> {
    /// Loads one layer alone, as [`GptOss::load`] does.
    ///
    /// # Errors
    /// [`CheckpointError`], naming the file, the tensor, and what was expected.
    pub fn load(
        checkpoint: &Checkpoint,
        layer: usize,
        options: LoadOptions,
        device: &B::Device,
    ) -> Result<Self, CheckpointError> {
        Loader::new(checkpoint, options, device).layer(layer)
    }
}

fn experts_resident(checkpoint: &Checkpoint, options: LoadOptions) -> bool {
    let config = checkpoint.config();
    let weights: usize = ExpertMatrix::ALL.iter().map(|matrix| matrix.shape(config).iter().product::<usize>()).sum();
    let bytes = weights
        .saturating_mul(config.num_local_experts)
        .saturating_mul(config.num_hidden_layers())
        .saturating_mul(size_of::<f32>());
    match options.experts {
        ExpertPlacement::Resident => true,
        ExpertPlacement::Streamed => false,
        ExpertPlacement::Auto => bytes <= AUTO_RESIDENT_BYTES,
    }
}

struct Loader<'a, B: Backend> {
    checkpoint: &'a Checkpoint,
    device: &'a B::Device,
    experts_resident: bool,
    unpack: bool,
    pager: Option<Arc<Pager>>,
}

impl<'a, B: Backend> Loader<'a, B> {
    /// For parts of a model, whose full-precision experts are in memory unless they are to be streamed.
    fn new(checkpoint: &'a Checkpoint, options: LoadOptions, device: &'a B::Device) -> Self {
        let experts_resident = options.experts != ExpertPlacement::Streamed;
        Self { checkpoint, device, experts_resident, unpack: options.unpack, pager: None }
    }

    fn ternary(&self, path: &TernaryPath, shape: [usize; 2]) -> Result<TernaryTensor<B>, CheckpointError> {
        let weight = self.checkpoint.ternary_weight(path, shape, self.device)?;
        Ok(TernaryTensor::new(if self.unpack { weight.unpacked() } else { weight }))
    }

    fn layer(&self, layer: usize) -> Result<Layer<B>, CheckpointError> {
        let path = layer_path(layer);
        Ok(Layer {
            input_layernorm: self.norm(&format!("{path}.input_layernorm.weight"))?,
            self_attn: self.attention(layer)?,
            post_attention_layernorm: self.norm(&format!("{path}.post_attention_layernorm.weight"))?,
            mlp: Mlp { router: self.router(layer)?, experts: self.experts(layer)? },
        })
    }

    fn norm(&self, name: &str) -> Result<nn::RmsNorm<B>, CheckpointError> {
        let config = self.checkpoint.config();
        Ok(nn::RmsNorm { gamma: self.vector(name, config.hidden_size)?, epsilon: config.rms_norm_eps })
    }

    fn attention(&self, layer: usize) -> Result<Attention<B>, CheckpointError> {
        let config = self.checkpoint.config();
        let linear = |name: LinearName| self.linear(&name.path(layer), name.shape(config), config.attention_bias);
        Ok(Attention {
            q_proj: linear(LinearName::Q)?,
            k_proj: linear(LinearName::K)?,
            v_proj: linear(LinearName::V)?,
            o_proj: linear(LinearName::O)?,
            sinks: self.vector(&format!("{}.self_attn.sinks", layer_path(layer)), config.num_attention_heads)?,
            head_dim: config.head_dim,
        })
    }

    fn router(&self, layer: usize) -> Result<Router<B>, CheckpointError> {
        let config = self.checkpoint.config();
        let path = format!("{}.mlp.router", layer_path(layer));
        let linear = self.dense(&path, [config.hidden_size, config.num_local_experts], true)?;
        Ok(Router { linear, experts_per_token: config.experts_per_token })
    }

    fn experts(&self, layer: usize) -> Result<Experts<B>, CheckpointError> {
        let config = self.checkpoint.config();
        let activation = config.activation();
        let experts = config.num_local_experts;
        let bias = |matrix: ExpertMatrix| {
            let [_, out_features] = matrix.shape(self.checkpoint.config());
            let name = format!("{}_bias", matrix.path(layer));
            self.checkpoint.float_tensor::<B, 2>(&name, [experts, out_features], self.device)
        };
        let (gate_up_bias, down_bias) = (bias(ExpertMatrix::GateUp)?, bias(ExpertMatrix::Down)?);
        if self.checkpoint.expert_storage(layer, ExpertMatrix::GateUp)? == ExpertStorage::Ternary {
            let packed = |matrix: ExpertMatrix| {
                let shape = matrix.shape(self.checkpoint.config());
                let path = TernaryPath::Experts(matrix.path(layer));
                self.ternary(&path, shape)
            };
            return Ok(Experts::Ternary(PackedExperts {
                gate_up_proj: packed(ExpertMatrix::GateUp)?,
                gate_up_proj_bias: Param::from_tensor(gate_up_bias),
                down_proj: packed(ExpertMatrix::Down)?,
                down_proj_bias: Param::from_tensor(down_bias),
                activation,
                pager: self.pager.as_ref().map(|pager| pager.layer(layer)),
            }));
        }
        if !self.experts_resident {
            self.checkpoint.check_experts(layer)?;
            return Ok(Experts::Streamed(StreamedExperts {
                gate_up_proj_bias: Param::from_tensor(gate_up_bias),
                down_proj_bias: Param::from_tensor(down_bias),
                checkpoint: self.checkpoint.clone(),
                layer,
                activation,
            }));
        }
        let expert = |expert: usize| {
            Ok(Expert {
                gate_up_proj: self.expert_linear(layer, ExpertMatrix::GateUp, expert, &gate_up_bias)?,
                down_proj: self.expert_linear(layer, ExpertMatrix::Down, expert, &down_bias)?,
            })
        };
        let experts = (0..experts).map(expert).collect::<Result<_, CheckpointError>>()?;
        Ok(Experts::Dense(DenseExperts { experts, activation }))
    }

    fn expert_linear(
        &self,
        layer: usize,
        matrix: ExpertMatrix,
        expert: usize,
        biases: &Tensor<B, 2>,
    ) -> Result<Linear<B>, CheckpointError> {
        let weights = self.checkpoint.expert_columns(layer, matrix, expert)?;
        let data = TensorData::new(weights, matrix.shape(self.checkpoint.config()));
        let bias = biases.clone().slice_dim(0, expert..expert + 1).squeeze_dim(0);
        let weight = Param::from_tensor(Tensor::from_data(data, self.device));
        Ok(Linear::Dense(nn::Linear { weight, bias: Some(Param::from_tensor(bias)) }))
    }

    /// A linear of the attention, ternary when the checkpoint has codes for it.
    fn linear(&self, path: &str, shape: [usize; 2], bias: bool) -> Result<Linear<B>, CheckpointError> {
        if self.checkpoint.entry(&format!("{path}.{CODES}")).is_none() {
            return self.dense(path, shape, bias).map(Linear::Dense);
        }
        let weight = self.ternary(&TernaryPath::Linear(path.into()), shape)?;
        let bias = match bias {
            true => Some(self.checkpoint.float_tensor(&format!("{path}.bias"), [shape[1]], self.device)?),
            false => None,
        };
        Ok(Linear::Ternary(BitLinear::from_packed(weight, bias)))
    }

    fn dense(
        &self,
        path: &str,
        [in_features, out_features]: [usize; 2],
        bias: bool,
    ) -> Result<nn::Linear<B>, CheckpointError> {
        let rows = self.checkpoint.floats(&format!("{path}.weight"), &[out_features, in_features])?;
        let data = TensorData::new(transpose(&rows, out_features, in_features), [in_features, out_features]);
        let bias = match bias {
            true => Some(self.vector(&format!("{path}.bias"), out_features)?),
            false => None,
        };
        Ok(nn::Linear { weight: Param::from_tensor(Tensor::from_data(data, self.device)), bias })
    }

    fn vector(&self, name: &str, size: usize) -> Result<Param<Tensor<B, 1>>, CheckpointError> {
        self.checkpoint.float_tensor(name, [size], self.device).map(Param::from_tensor)
    }
}
