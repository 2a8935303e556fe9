//! A model on two backends: its first layers on one, such as a GPU whose memory does not hold them all, everything else on
//! the other.
//!
//! ```
//! use std::ops::ControlFlow;
//! use ternoss_model::{Checkpoint, LanguageModel, LoadOptions, SplitModel, StopRules, sampling::{Sampler, SamplingConfig}};
//! // On a GPU: `ternoss_backends::cube::Wgpu`.
//! type Fast = burn_flex::Flex;
//! type Large = burn_flex::Flex;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let checkpoint = Checkpoint::open("../examples/tiny-gpt-oss".as_ref())?;
//! let devices = (&Default::default(), &Default::default());
//! let model = SplitModel::<Fast, Large>::load(&checkpoint, LoadOptions::default(), 3, devices)?;
//! assert_eq!(model.first_layers(), 3);
//! let mut sampler = Sampler::new(SamplingConfig::greedy())?;
//! let rules = StopRules { max_tokens: 4, stop_tokens: vec![] };
//! let next = |_| ControlFlow::Continue(());
//! assert_eq!(model.generate(&[1, 2, 3], &mut model.new_cache(), &mut sampler, &rules, next)?.len(), 4);
//! # Ok(()) }
//! ```

use burn::tensor::{Tensor, backend::Backend};
use ternoss_backends::{KvFormat, TernaryBackend};

use crate::{
    Checkpoint, CheckpointError, GptOss, KvCache, LoadOptions, TokenOutOfRange,
    checkpoint::is_of_layer,
    config::Quantization,
    language_model::{LanguageModel, SequenceCache},
    layer::{Layer, apply_norm},
    rope::RotaryTables,
};

/// The first layers on `G`; embedding, the other layers and the output layer on `C`. The residual stream goes from one to the
/// other by way of this machine's memory, so results are those of the backends, each for its layers.
#[derive(Debug)]
pub struct SplitModel<G: Backend, C: Backend> {
    /// Layers `0..n`.
    first: Vec<Layer<G>>,
    first_device: G::Device,
    /// The rest, with layers `n..` alone.
    rest: GptOss<C>,
}

/// Keys and values of both parts.
#[derive(Clone, Debug)]
pub struct SplitCache<G: Backend, C: Backend> {
    first: KvCache<G>,
    rest: KvCache<C>,
    /// Tokens seen: a part without layers counts none.
    position: usize,
}

impl<G: TernaryBackend, C: TernaryBackend> SplitModel<G, C> {
    /// Loads the first `layers` layers (all of them if there are fewer) to one device and the rest to another.
    ///
    /// # Errors
    /// [`CheckpointError`], naming the file, the tensor, and what was expected.
    pub fn load(
        checkpoint: &Checkpoint,
        options: LoadOptions,
        layers: usize,
        (first_device, rest_device): (&G::Device, &C::Device),
    ) -> Result<Self, CheckpointError> {
        let layers = layers.min(checkpoint.config().num_hidden_layers());
        let first = (0..layers).map(|layer| Layer::load(checkpoint, layer, options, first_device));
        let first = first.collect::<Result<_, _>>()?;
        let rest = GptOss::load_from(checkpoint, options, layers, rest_device)?;
        Ok(Self { first, first_device: first_device.clone(), rest })
    }

    /// Layers on the first backend.
    pub fn first_layers(&self) -> usize {
        self.first.len()
    }
}

/// How many layers fit a device's memory, a tenth of which is left for what a step allocates; `None` if the whole model
/// fits. What is not ternary is widened to f32.
pub fn fitting_layers(checkpoint: &Checkpoint, memory: u64) -> Option<usize> {
    let room = memory / 10 * 9;
    let config = checkpoint.config();
    let ternary = matches!(config.quantization, Quantization::Ternary(_));
    let sizes = || {
        checkpoint.tensors().map(|(name, entry)| {
            let of_layer = is_of_layer(name);
            let bytes = if of_layer && !ternary { widened(name, entry.bytes()) } else { entry.bytes() };
            (of_layer, bytes as u64)
        })
    };
    if sizes().map(|(_, bytes)| bytes).sum::<u64>() <= room {
        return None;
    }
    let layers: u64 = sizes().filter(|(of_layer, _)| *of_layer).map(|(_, bytes)| bytes).sum();
    let one = (layers / config.num_hidden_layers().max(1) as u64).max(1);
    Some((room / one) as usize)
}

/// Bytes as f32 of a tensor that takes so many in the checkpoint: MXFP4 or bf16.
fn widened(name: &str, bytes: usize) -> usize {
    match name {
        name if name.ends_with("_blocks") => 8 * bytes,
        name if name.ends_with("_scales") => 0,
        _ => 2 * bytes,
    }
}

/// A tensor from one backend to another.
fn handed_over<A: Backend, B: Backend>(x: Tensor<A, 2>, device: &B::Device) -> Tensor<B, 2> {
    Tensor::from_data(x.into_data(), device)
}

/// The residual stream before some layers to after them.
fn through<B: TernaryBackend>(
    layers: &[Layer<B>],
    x: Tensor<B, 2>,
    rope: &RotaryTables<B>,
    cache: &mut KvCache<B>,
) -> Tensor<B, 2> {
    assert_eq!(cache.layers(), layers.len(), "layers of the cache");
    layers.iter().zip(cache.layers_mut()).fold(x, |x, (layer, cache)| layer.forward(x, rope, cache))
}

impl<G: TernaryBackend, C: TernaryBackend> LanguageModel for SplitModel<G, C> {
    type Output = C;
    type Cache = SplitCache<G, C>;

    fn last_part(&self) -> &GptOss<C> {
        &self.rest
    }

    fn last_part_mut(&mut self) -> &mut GptOss<C> {
        &mut self.rest
    }

    fn new_cache(&self) -> SplitCache<G, C> {
        let (config, format): (_, KvFormat) = (self.rest.config(), self.rest.kv_format);
        let (first, all) = (self.first.len(), config.num_hidden_layers());
        SplitCache {
            first: KvCache::of_layers(config, 0..first).with_format(format),
            rest: KvCache::of_layers(config, first..all).with_format(format),
            position: 0,
        }
    }

    fn hidden_of(&self, ids: &[u32], cache: &mut SplitCache<G, C>) -> Result<Tensor<C, 2>, TokenOutOfRange> {
        let tokens = self.rest.tokens(ids)?;
        let device = tokens.device();
        let positions = cache.position..cache.position + ids.len();
        let x = self.rest.embed_tokens.embed(tokens);
        let rope = self.rest.rope.tables(positions.clone(), &self.first_device);
        let x = through(&self.first, handed_over(x, &self.first_device), &rope, &mut cache.first);
        let rope = self.rest.rope.tables(positions.clone(), &device);
        let x = through(&self.rest.layers, handed_over(x, &device), &rope, &mut cache.rest);
        cache.position = positions.end;
        Ok(apply_norm(&self.rest.norm, x))
    }

    fn is_batch_invariant(&self) -> bool {
        G::BATCH_INVARIANT && self.first.iter().all(Layer::is_packed) && self.rest.is_batch_invariant()
    }
}

impl<G: TernaryBackend, C: TernaryBackend> SequenceCache for SplitCache<G, C> {
    fn position(&self) -> usize {
        self.position
    }

    fn spare(&self) -> usize {
        // A part without layers keeps nothing to take back.
        self.first.spare().max(self.rest.spare())
    }

    fn with_spare(self, spare: usize) -> Self {
        Self { first: self.first.with_spare(spare), rest: self.rest.with_spare(spare), position: self.position }
    }

    fn truncate(&mut self, position: usize) {
        self.first.truncate(position);
        self.rest.truncate(position);
        self.position = position;
    }
}
