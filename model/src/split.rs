//! A model on two backends: its first layers on one, such as a GPU whose memory does not hold them all, everything else on
//! the other.

use burn::tensor::{Tensor, backend::Backend};
use ternoss_backends::{KvFormat, TernaryBackend};

use crate::{
    Checkpoint, CheckpointError, GptOss, KvCache, LoadOptions, TokenOutOfRange,
    language_model::{LanguageModel, SequenceCache},
    layer::{Layer, apply_norm},
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

/// A tensor from one backend to another.
fn handed_over<A: Backend, B: Backend>(x: Tensor<A, 2>, device: &B::Device) -> Tensor<B, 2> {
    Tensor::from_data(x.into_data(), device)
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
        let mut x: Tensor<G, 2> = handed_over(x, &self.first_device);
        let rope = self.rest.rope.tables(positions.clone(), &self.first_device);
        for (layer, cache) in self.first.iter().zip(cache.first.layers_mut()) {
            x = layer.forward(x, &rope, cache);
        }
        let mut x: Tensor<C, 2> = handed_over(x, &device);
        let rope = self.rest.rope.tables(positions.clone(), &device);
        for (layer, cache) in self.rest.layers.iter().zip(cache.rest.layers_mut()) {
            x = layer.forward(x, &rope, cache);
        }
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
