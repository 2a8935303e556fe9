//! The whole model.
//!
//! ```
//! use ternoss_model::{Checkpoint, GptOss, LoadOptions};
//! type B = burn_flex::Flex;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let checkpoint = Checkpoint::open("../examples/tiny-gpt-oss".as_ref())?;
//! let model = GptOss::<B>::load(&checkpoint, LoadOptions::default(), &Default::default())?;
//! let ternary = model.to_ternary(&Default::default())?;
//! let logits = ternary.forward(ternary.tokens(&[1, 2, 3])?, &mut ternary.new_cache());
//! assert_eq!(logits.dims(), [3, ternary.config().vocab_size]);
//! # Ok(()) }
//! ```

use burn::{
    module::Module,
    nn,
    tensor::{Int, Tensor, TensorData, backend::Backend},
};
use ternoss_backends::{FormatError, KvFormat, TernaryBackend};
use ternoss_quant::TernaryConfig;

use crate::{
    cache::KvCache,
    config::GptOssConfig,
    layer::{Layer, apply_norm},
    rope::RotaryEmbedding,
    table::Table,
};

/// A gpt-oss model: dense, ternary, or layer by layer either.
///
/// Field names are those of the checkpoint, so a tensor's name is its path in the module. What came before a call is in the
/// [`KvCache`] passed to it, one for each sequence.
#[derive(Module, Debug)]
pub struct GptOss<B: Backend> {
    /// Token embedding.
    pub embed_tokens: Table<B>,
    /// Transformer layers.
    pub layers: Vec<Layer<B>>,
    /// Norm before the output layer.
    pub norm: nn::RmsNorm<B>,
    /// Output layer.
    pub lm_head: Table<B>,
    #[module(skip)]
    pub(crate) rope: RotaryEmbedding,
    #[module(skip)]
    pub(crate) config: GptOssConfig,
    #[module(skip)]
    pub(crate) kv_format: KvFormat,
}

/// A token that is not in the vocabulary.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("token {token} at position {position} is outside the vocabulary of {vocab_size}")]
pub struct TokenOutOfRange {
    /// The token.
    pub token: u32,
    /// Its place in the input.
    pub position: usize,
    /// Tokens 0 to this minus one exist.
    pub vocab_size: usize,
}

impl<B: Backend> GptOss<B> {
    /// Sizes and switches.
    pub fn config(&self) -> &GptOssConfig {
        &self.config
    }

    /// An empty cache for one sequence, in the format that the model was loaded with.
    pub fn new_cache(&self) -> KvCache<B> {
        KvCache::new(&self.config).with_format(self.kv_format)
    }

    /// Moves token ids to the model's device: `[tokens]`.
    ///
    /// # Errors
    /// [`TokenOutOfRange`] for the first id outside the vocabulary.
    pub fn tokens(&self, ids: &[u32]) -> Result<Tensor<B, 1, Int>, TokenOutOfRange> {
        let vocab_size = self.config.vocab_size;
        if let Some(position) = ids.iter().position(|id| *id as usize >= vocab_size) {
            return Err(TokenOutOfRange { token: ids[position], position, vocab_size });
        }
        let ids: Vec<i64> = ids.iter().map(|id| i64::from(*id)).collect();
        let shape = [ids.len()];
        Ok(Tensor::from_data(TensorData::new(ids, shape), &self.norm.gamma.val().device()))
    }

    /// The same model with absmean ternary attention and experts.
    ///
    /// # Errors
    /// [`FormatError`] when `config` is not a valid layout.
    pub fn to_ternary(&self, config: &TernaryConfig) -> Result<Self, FormatError> {
        let layers = self.layers.iter().map(|layer| layer.to_ternary(config)).collect::<Result<_, _>>()?;
        Ok(Self { layers, ..self.clone() })
    }
}

impl<B: TernaryBackend> GptOss<B> {
    /// Logits of every token: `[tokens]` to `[tokens, vocabulary]`. At least one token.
    ///
    /// # Panics
    /// If the cache is not one of as many layers.
    pub fn forward(&self, tokens: Tensor<B, 1, Int>, cache: &mut KvCache<B>) -> Tensor<B, 2> {
        self.lm_head.logits(self.hidden(tokens, cache))
    }

    /// What the output layer sees: `[tokens]` to `[tokens, hidden]`, normed.
    ///
    /// # Panics
    /// If the cache is not one of as many layers.
    pub fn hidden(&self, tokens: Tensor<B, 1, Int>, cache: &mut KvCache<B>) -> Tensor<B, 2> {
        self.hidden_batch(tokens, &mut [cache])
    }

    /// What the output layer sees of several sequences: as many tokens of each, sequence after sequence, `[tokens]` to
    /// `[tokens, hidden]`, normed. The weights are read once for all of them.
    ///
    /// # Panics
    /// If there are no sequences, they do not share the tokens evenly, or a cache is not one of as many layers.
    pub fn hidden_batch(&self, tokens: Tensor<B, 1, Int>, caches: &mut [&mut KvCache<B>]) -> Tensor<B, 2> {
        let x = self.through_layers(tokens, caches, |_, _| {});
        apply_norm(&self.norm, x)
    }

    /// Runs all layers and shows `observe` the residual stream `[tokens, hidden]` before each layer (by its number)
    /// and after the last; returns the latter.
    ///
    /// # Panics
    /// If the cache is not one of as many layers.
    pub fn hidden_states(
        &self,
        tokens: Tensor<B, 1, Int>,
        cache: &mut KvCache<B>,
        observe: impl FnMut(usize, &Tensor<B, 2>),
    ) -> Tensor<B, 2> {
        self.through_layers(tokens, &mut [cache], observe)
    }

    fn through_layers(
        &self,
        tokens: Tensor<B, 1, Int>,
        caches: &mut [&mut KvCache<B>],
        mut observe: impl FnMut(usize, &Tensor<B, 2>),
    ) -> Tensor<B, 2> {
        let (count, sequences) = (tokens.dims()[0], caches.len());
        assert!(sequences > 0 && count.is_multiple_of(sequences), "{count} tokens of {sequences} sequences");
        let all = self.layers.len();
        assert!(caches.iter().all(|cache| cache.layers() == all), "a cache of {all} layers, as the model has");
        let new = count / sequences;
        let positions: Vec<_> = caches.iter().flat_map(|cache| cache.position()..cache.position() + new).collect();
        let mut x = self.embed_tokens.embed(tokens);
        let rope = self.rope.tables(positions.into_iter(), &x.device());
        for (number, layer) in self.layers.iter().enumerate() {
            observe(number, &x);
            let mut caches: Vec<_> = caches.iter_mut().map(|cache| cache.layer_mut(number)).collect();
            x = layer.forward_batch(x, &rope, &mut caches);
        }
        observe(self.layers.len(), &x);
        x
    }
}
