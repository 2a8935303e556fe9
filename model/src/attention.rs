//! Grouped-query attention with learned sinks and an optional sliding window.
//!
//! ```
//! use burn::tensor::Tensor;
//! use ternoss_model::{Checkpoint, LoadOptions, cache::LayerCache, layer::Layer, rope::RotaryEmbedding};
//! type B = burn_flex::Flex;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let checkpoint = Checkpoint::open("../examples/tiny-gpt-oss".as_ref())?;
//! let (config, device) = (checkpoint.config(), Default::default());
//! let layer = Layer::<B>::load(&checkpoint, 0, LoadOptions::default(), &device)?;
//! // Three tokens at the positions 0 to 2, then one that sees them.
//! let rope = RotaryEmbedding::new(&config.rope, config.head_dim);
//! let mut cache = LayerCache::new(config.window(0));
//! for (tokens, positions) in [(3, 0..3), (1, 3..4)] {
//!     let x = Tensor::ones([tokens, config.hidden_size], &device);
//!     let y = layer.self_attn.forward(x, &rope.tables(positions, &device), &mut cache);
//!     assert_eq!(y.dims(), [tokens, config.hidden_size]);
//! }
//! # Ok(()) }
//! ```

use burn::{
    module::{Module, Param},
    nn,
    tensor::{Tensor, backend::Backend},
};
use ternoss_backends::{FormatError, TernaryBackend, cached_attention};
use ternoss_quant::{Linear, TernaryConfig};

use crate::{cache::LayerCache, rope::RotaryTables};

/// Attention of one layer (`self_attn`).
///
/// A sink is a logit per head that takes part in the softmax and has no value: attention may go nowhere. Source:
/// `GptOssAttention` and `eager_attention_forward` of transformers, `AttentionBlock` of openai/gpt-oss.
#[derive(Module, Debug)]
pub struct Attention<B: Backend> {
    /// `[hidden, q_heads * head_dim]`
    pub q_proj: Linear<B>,
    /// `[hidden, kv_heads * head_dim]`
    pub k_proj: Linear<B>,
    /// `[hidden, kv_heads * head_dim]`
    pub v_proj: Linear<B>,
    /// `[q_heads * head_dim, hidden]`
    pub o_proj: Linear<B>,
    /// `[q_heads]`
    pub sinks: Param<Tensor<B, 1>>,
    pub(crate) head_dim: usize,
}

impl<B: TernaryBackend> Attention<B> {
    /// `x` `[tokens, hidden]`, already normed, to the attention's output `[tokens, hidden]`; `cache` holds the tokens
    /// before these and takes these in.
    pub fn forward(&self, x: Tensor<B, 2>, rope: &RotaryTables<B>, cache: &mut LayerCache<B>) -> Tensor<B, 2> {
        self.o_proj.forward(self.mix(x, rope, cache))
    }

    /// The residual stream `x [tokens, hidden]`, which `norm` is yet to be applied to, plus the attention's output. Tokens are
    /// those of one sequence, or as many of each, sequence after sequence.
    pub fn forward_onto(
        &self,
        x: Tensor<B, 2>,
        norm: &nn::RmsNorm<B>,
        rope: &RotaryTables<B>,
        caches: &mut [&mut LayerCache<B>],
    ) -> Tensor<B, 2> {
        let [q, k, v, o] = self.projections();
        let qkv = Linear::normed_all([q, k, v], x.clone(), norm.gamma.val(), norm.epsilon);
        o.forward_onto(x, self.attend(qkv, rope, caches))
    }

    /// What `o_proj` sees: the values mixed by attention, `[tokens, hidden]` to `[tokens, q_heads * head_dim]`.
    pub fn mix(&self, x: Tensor<B, 2>, rope: &RotaryTables<B>, cache: &mut LayerCache<B>) -> Tensor<B, 2> {
        self.attend(Linear::forward_all([&self.q_proj, &self.k_proj, &self.v_proj], x), rope, &mut [cache])
    }

    /// Queries, keys and values of the tokens to the values mixed.
    fn attend(
        &self,
        qkv: [Tensor<B, 2>; 3],
        rope: &RotaryTables<B>,
        caches: &mut [&mut LayerCache<B>],
    ) -> Tensor<B, 2> {
        let scale = (self.head_dim as f32).sqrt().recip();
        cached_attention(qkv, [rope.cos.clone(), rope.sin.clone()], self.sinks.val(), scale, caches)
    }
}

impl<B: Backend> Attention<B> {
    /// Its four linears, in the order data flows.
    pub fn projections(&self) -> [&Linear<B>; 4] {
        [&self.q_proj, &self.k_proj, &self.v_proj, &self.o_proj]
    }

    /// The same attention with ternary projections.
    ///
    /// # Errors
    /// [`FormatError`] when `config` is not a valid layout.
    pub fn to_ternary(&self, config: &TernaryConfig) -> Result<Self, FormatError> {
        Ok(Self {
            q_proj: self.q_proj.to_ternary(config)?,
            k_proj: self.k_proj.to_ternary(config)?,
            v_proj: self.v_proj.to_ternary(config)?,
            o_proj: self.o_proj.to_ternary(config)?,
            ..self.clone()
        })
    }
}
