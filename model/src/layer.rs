//! One transformer layer: attention, then experts, each on the normed residual stream and added back to it.
//!
//! ```
//! use burn::tensor::Tensor;
//! use ternoss_model::{Checkpoint, LoadOptions, cache::LayerCache, layer::Layer, rope::RotaryEmbedding};
//! use ternoss_quant::TernaryConfig;
//! type B = burn_flex::Flex;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let checkpoint = Checkpoint::open("../examples/tiny-gpt-oss".as_ref())?;
//! let (config, device) = (checkpoint.config(), Default::default());
//! let layer = Layer::<B>::load(&checkpoint, 0, LoadOptions::default(), &device)?;
//! let rope = RotaryEmbedding::new(&config.rope, config.head_dim).tables(0..3, &device);
//! let x = Tensor::ones([3, config.hidden_size], &device);
//! // The same layer, with every linear rounded to trits.
//! for layer in [layer.to_ternary(&TernaryConfig::default())?, layer] {
//!     let y = layer.forward(x.clone(), &rope, &mut LayerCache::new(config.window(0)));
//!     assert_eq!(y.dims(), x.dims());
//! }
//! # Ok(()) }
//! ```

use burn::{
    module::Module,
    nn,
    tensor::{Tensor, backend::Backend},
};
use ternoss_backends::{ExpertLayer, FormatError, TernaryBackend, expert_layer, rms_norm};
use ternoss_quant::{Linear, TernaryConfig};

use crate::{attention::Attention, cache::LayerCache, experts::Experts, rope::RotaryTables, router::Router};

/// One layer (`layers.N`).
#[derive(Module, Debug)]
pub struct Layer<B: Backend> {
    /// Norm before the attention.
    pub input_layernorm: nn::RmsNorm<B>,
    /// Attention.
    pub self_attn: Attention<B>,
    /// Norm before the experts.
    pub post_attention_layernorm: nn::RmsNorm<B>,
    /// Router and experts.
    pub mlp: Mlp<B>,
}

/// The mixture of experts of one layer (`mlp`).
#[derive(Module, Debug)]
pub struct Mlp<B: Backend> {
    /// Chooses the experts.
    pub router: Router<B>,
    /// Does the work.
    pub experts: Experts<B>,
}

impl<B: TernaryBackend> Mlp<B> {
    /// `[tokens, hidden]`, already normed, to `[tokens, hidden]`.
    pub fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let routing = self.router.forward(x.clone());
        self.experts.forward(x, routing)
    }

    /// The residual stream `x [tokens, hidden]`, which `norm` is yet to be applied to, plus what the experts make of it.
    pub fn forward_onto(&self, x: Tensor<B, 2>, norm: &nn::RmsNorm<B>) -> Tensor<B, 2> {
        let Some(experts) = self.experts.in_memory() else {
            return x.clone() + self.forward(apply_norm(norm, x));
        };
        let (router, router_bias) = self.router.parts();
        let layer = ExpertLayer {
            gamma: norm.gamma.val(),
            epsilon: norm.epsilon,
            router,
            router_bias,
            experts_per_token: self.router.experts_per_token,
            experts,
        };
        expert_layer(x, &layer)
    }
}

impl<B: TernaryBackend> Layer<B> {
    /// The residual stream `[tokens, hidden]` before the layer to after it.
    pub fn forward(&self, x: Tensor<B, 2>, rope: &RotaryTables<B>, cache: &mut LayerCache<B>) -> Tensor<B, 2> {
        self.forward_batch(x, rope, &mut [cache])
    }

    /// The same of several sequences: as many tokens of each, sequence after sequence.
    pub fn forward_batch(
        &self,
        x: Tensor<B, 2>,
        rope: &RotaryTables<B>,
        caches: &mut [&mut LayerCache<B>],
    ) -> Tensor<B, 2> {
        let x = self.self_attn.forward_onto(x, &self.input_layernorm, rope, caches);
        self.mlp.forward_onto(x, &self.post_attention_layernorm)
    }
}

/// The norm of tokens `x [tokens, hidden]`: what the module's own `forward` gives, by the backend's operation.
pub fn apply_norm<B: TernaryBackend>(norm: &nn::RmsNorm<B>, x: Tensor<B, 2>) -> Tensor<B, 2> {
    rms_norm(x, norm.gamma.val(), norm.epsilon)
}

impl<B: Backend> Layer<B> {
    /// Whether all its linears are packed ternary weights.
    pub(crate) fn is_packed(&self) -> bool {
        self.self_attn.projections().into_iter().all(Linear::is_packed)
            && matches!(self.mlp.experts, Experts::Ternary(_))
    }

    /// The same layer with ternary linears; norms, router, biases and sinks as they are.
    ///
    /// # Errors
    /// [`FormatError`] when `config` is not a valid layout.
    pub fn to_ternary(&self, config: &TernaryConfig) -> Result<Self, FormatError> {
        let experts = self.mlp.experts.to_ternary(config)?;
        Ok(Self {
            self_attn: self.self_attn.to_ternary(config)?,
            mlp: Mlp { experts, router: self.mlp.router.clone() },
            ..self.clone()
        })
    }
}
