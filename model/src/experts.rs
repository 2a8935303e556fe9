//! The experts: clamped SwiGLU networks of which every token uses a few.
//!
//! ```
//! use burn::tensor::Tensor;
//! use ternoss_model::{Checkpoint, LoadOptions, layer::Layer};
//! type B = burn_flex::Flex;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let checkpoint = Checkpoint::open("../examples/tiny-gpt-oss".as_ref())?;
//! let layer = Layer::<B>::load(&checkpoint, 0, LoadOptions::default(), &Default::default())?;
//! let x = Tensor::ones([3, checkpoint.config().hidden_size], &Default::default());
//! let routing = layer.mlp.router.forward(x.clone());
//! assert_eq!(routing.indices.dims(), [3, checkpoint.config().experts_per_token]);
//! assert_eq!(layer.mlp.experts.forward(x.clone(), routing).dims(), x.dims());
//! # Ok(()) }
//! ```

use burn::{
    module::{Module, Param},
    nn,
    tensor::{IndexingUpdateOp, Int, Tensor, TensorData, backend::Backend},
};
use ternoss_backends::{ClampedSwiGlu, FormatError, TernaryBackend, TernaryExperts, clamped_swiglu, ternary_experts};
use ternoss_quant::{Linear, PackedTernary, TernaryConfig, TernaryTensor};

use crate::{
    checkpoint::{Checkpoint, ExpertMatrix},
    pager::LayerPager,
    router::Routing,
};

/// The experts of one layer (`mlp.experts`).
#[derive(Module, Debug)]
pub enum Experts<B: Backend> {
    /// In full precision, in memory.
    Dense(DenseExperts<B>),
    /// In full precision, decoded from the checkpoint whenever one is chosen: for models larger than memory.
    Streamed(StreamedExperts<B>),
    /// Packed ternary weights.
    Ternary(PackedExperts<B>),
}

/// One expert on its own: in full precision, or ternary while it is calibrated.
#[derive(Module, Debug)]
pub struct Expert<B: Backend> {
    /// `[hidden, 2 * intermediate]`: gate in even columns, up in odd ones.
    pub gate_up_proj: Linear<B>,
    /// `[intermediate, hidden]`
    pub down_proj: Linear<B>,
}

/// All experts of a layer in memory.
#[derive(Module, Debug)]
pub struct DenseExperts<B: Backend> {
    /// One entry an expert.
    pub experts: Vec<Expert<B>>,
    #[module(skip)]
    pub(crate) activation: ClampedSwiGlu,
}

/// Experts that stay in the checkpoint; only their biases are in memory.
#[derive(Module, Debug)]
pub struct StreamedExperts<B: Backend> {
    /// `[experts, 2 * intermediate]`
    pub gate_up_proj_bias: Param<Tensor<B, 2>>,
    /// `[experts, hidden]`
    pub down_proj_bias: Param<Tensor<B, 2>>,
    #[module(skip)]
    pub(crate) checkpoint: Checkpoint,
    pub(crate) layer: usize,
    #[module(skip)]
    pub(crate) activation: ClampedSwiGlu,
}

/// All experts of a layer, ternary.
#[derive(Module, Debug)]
pub struct PackedExperts<B: Backend> {
    /// One matrix an expert, `[2 * intermediate, hidden]`: gate in even rows, up in odd ones.
    pub gate_up_proj: TernaryTensor<B>,
    /// `[experts, 2 * intermediate]`
    pub gate_up_proj_bias: Param<Tensor<B, 2>>,
    /// One matrix an expert, `[hidden, intermediate]`.
    pub down_proj: TernaryTensor<B>,
    /// `[experts, hidden]`
    pub down_proj_bias: Param<Tensor<B, 2>>,
    /// Gate and up to the input of the second matrix.
    #[module(skip)]
    pub activation: ClampedSwiGlu,
    /// Where memory is limited: has the chosen ones read.
    #[module(skip)]
    pub(crate) pager: Option<LayerPager>,
}

impl<B: TernaryBackend> Experts<B> {
    /// The weighted sum of each token's experts: `[tokens, hidden]` to `[tokens, hidden]`.
    pub fn forward(&self, x: Tensor<B, 2>, routing: Routing<B>) -> Tensor<B, 2> {
        match self {
            Self::Dense(dense) => mix(x, routing, |expert, x| dense.experts[expert].forward(x, dense.activation)),
            Self::Streamed(streamed) => {
                mix(x, routing, |expert, x| streamed.expert(expert).forward(x, streamed.activation))
            }
            Self::Ternary(packed) => packed.forward(x, routing),
        }
    }

    /// Packed ternary experts, if all of them are in memory.
    pub(crate) fn in_memory(&self) -> Option<TernaryExperts<B>> {
        match self {
            Self::Ternary(packed) if packed.pager.is_none() => Some(packed.tensors()),
            _ => None,
        }
    }
}

impl<B: TernaryBackend> Expert<B> {
    /// `down(swiglu(gate_up(x)))`: `[tokens, hidden]` to `[tokens, hidden]`.
    pub fn forward(&self, x: Tensor<B, 2>, activation: ClampedSwiGlu) -> Tensor<B, 2> {
        self.down_proj.forward(clamped_swiglu(self.gate_up_proj.forward(x), activation))
    }
}

impl<B: Backend> DenseExperts<B> {
    /// Experts of one activation.
    pub fn new(experts: Vec<Expert<B>>, activation: ClampedSwiGlu) -> Self {
        Self { experts, activation }
    }
}

impl<B: Backend> StreamedExperts<B> {
    /// Decodes one expert. Shapes and types were checked when the model was loaded.
    fn expert(&self, expert: usize) -> Expert<B> {
        let linear = |matrix: ExpertMatrix, bias: &Param<Tensor<B, 2>>| {
            let [in_features, out_features] = matrix.shape(self.checkpoint.config());
            let device = bias.val().device();
            let weights = self
                .checkpoint
                .expert_columns(self.layer, matrix, expert)
                .unwrap_or_else(|_| vec![f32::NAN; in_features * out_features]);
            let weight = Tensor::from_data(TensorData::new(weights, [in_features, out_features]), &device);
            Linear::Dense(nn::Linear {
                weight: Param::from_tensor(weight),
                bias: Some(Param::from_tensor(bias.val().slice_dim(0, expert..expert + 1).squeeze_dim(0))),
            })
        };
        Expert {
            gate_up_proj: linear(ExpertMatrix::GateUp, &self.gate_up_proj_bias),
            down_proj: linear(ExpertMatrix::Down, &self.down_proj_bias),
        }
    }
}

impl<B: Backend> PackedExperts<B> {
    /// Experts from their matrices and biases (`[experts, 2 * intermediate]` and `[experts, hidden]`).
    pub fn new(
        gate_up_proj: TernaryTensor<B>,
        gate_up_proj_bias: Tensor<B, 2>,
        down_proj: TernaryTensor<B>,
        down_proj_bias: Tensor<B, 2>,
        activation: ClampedSwiGlu,
    ) -> Self {
        Self {
            gate_up_proj,
            gate_up_proj_bias: Param::from_tensor(gate_up_proj_bias),
            down_proj,
            down_proj_bias: Param::from_tensor(down_proj_bias),
            activation,
            pager: None,
        }
    }
}

impl<B: TernaryBackend> PackedExperts<B> {
    fn tensors(&self) -> TernaryExperts<B> {
        TernaryExperts {
            gate_up: self.gate_up_proj.weight(),
            gate_up_bias: self.gate_up_proj_bias.val(),
            down: self.down_proj.weight(),
            down_bias: self.down_proj_bias.val(),
            activation: self.activation,
        }
    }

    fn forward(&self, x: Tensor<B, 2>, routing: Routing<B>) -> Tensor<B, 2> {
        if let Some(pager) = &self.pager {
            let chosen: Vec<i64> = routing.indices.clone().into_data().iter::<i64>().collect();
            pager.make_room(&chosen);
        }
        ternary_experts(x, routing.indices, routing.weights, &self.tensors())
    }
}

/// Runs every expert once, on the tokens routed to it, and adds the results up with the router's weights.
fn mix<B: Backend>(
    x: Tensor<B, 2>,
    routing: Routing<B>,
    expert_forward: impl Fn(usize, Tensor<B, 2>) -> Tensor<B, 2>,
) -> Tensor<B, 2> {
    let device = x.device();
    let [tokens, k] = routing.indices.dims();
    let chosen: Vec<i64> = routing.indices.into_data().iter::<i64>().collect();
    let weights = routing.weights.reshape([tokens * k]);
    let experts = chosen.iter().max().map_or(0, |last| *last as usize + 1);
    let mut slots_of = vec![Vec::new(); experts];
    for (slot, expert) in chosen.iter().enumerate() {
        slots_of[*expert as usize].push(slot as i64);
    }
    let mut sum = x.zeros_like();
    for (expert, slots) in slots_of.into_iter().enumerate().filter(|(_, slots)| !slots.is_empty()) {
        let rows: Vec<i64> = slots.iter().map(|slot| slot / k as i64).collect();
        let index = |values: Vec<i64>| {
            let shape = [values.len()];
            Tensor::<B, 1, Int>::from_data(TensorData::new(values, shape), &device)
        };
        let rows = index(rows);
        let weight = weights.clone().select(0, index(slots)).unsqueeze_dim::<2>(1);
        let y = expert_forward(expert, x.clone().select(0, rows.clone())) * weight;
        sum = sum.select_assign(0, rows, y, IndexingUpdateOp::Add);
    }
    sum
}

impl<B: Backend> Experts<B> {
    /// The same experts with absmean ternary weights; biases stay as they are. One expert at a time is in memory in full.
    ///
    /// # Errors
    /// [`FormatError`] when `config` is not a valid layout.
    pub fn to_ternary(&self, config: &TernaryConfig) -> Result<Self, FormatError> {
        let stack = |biases: Vec<Tensor<B, 1>>| Param::from_tensor(Tensor::stack(biases, 0));
        let (experts, activation): (Box<dyn Iterator<Item = Expert<B>> + '_>, _) = match self {
            Self::Ternary(packed) => return Ok(Self::Ternary(packed.clone())),
            Self::Dense(dense) => (Box::new(dense.experts.iter().cloned()), dense.activation),
            Self::Streamed(streamed) => {
                let count = streamed.checkpoint.config().num_local_experts;
                (Box::new((0..count).map(|expert| streamed.expert(expert))), streamed.activation)
            }
        };
        let (mut gate_up, mut down) = (Vec::new(), Vec::new());
        let (mut gate_up_bias, mut down_bias) = (Vec::new(), Vec::new());
        let mut device = None;
        for expert in experts {
            gate_up.push(expert.gate_up_proj.to_packed(config)?);
            down.push(expert.down_proj.to_packed(config)?);
            let zeros = |linear: &Linear<B>| Tensor::zeros([linear.shape()[1]], &B::Device::default());
            let bias = |linear: &Linear<B>| linear.bias().unwrap_or_else(|| zeros(linear)).detach();
            gate_up_bias.push(bias(&expert.gate_up_proj));
            down_bias.push(bias(&expert.down_proj));
            device = down_bias.last().map(Tensor::device);
        }
        let device = device.unwrap_or_default();
        Ok(Self::Ternary(PackedExperts {
            gate_up_proj: TernaryTensor::from_packed(PackedTernary::stack(gate_up)?, &device)?,
            gate_up_proj_bias: stack(gate_up_bias),
            down_proj: TernaryTensor::from_packed(PackedTernary::stack(down)?, &device)?,
            down_proj_bias: stack(down_bias),
            activation,
            pager: None,
        }))
    }
}
