//! The key-value cache: passed to `forward`, never a field of a module.
//!
//! ```
//! use ternoss_model::{Checkpoint, GptOss, LoadOptions};
//! type B = burn_flex::Flex;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let checkpoint = Checkpoint::open("../examples/tiny-gpt-oss".as_ref())?;
//! let model = GptOss::<B>::load(&checkpoint, LoadOptions::default(), &Default::default())?;
//! let mut cache = model.new_cache();
//! model.forward(model.tokens(&[1, 2, 3])?, &mut cache);
//! assert_eq!(cache.position(), 3);
//! # Ok(()) }
//! ```

use std::ops::Range;

use burn::tensor::backend::Backend;
pub use ternoss_backends::{KvFormat, LayerCache};

use crate::config::GptOssConfig;

/// Keys and values of all layers for one sequence.
#[derive(Clone, Debug)]
pub struct KvCache<B: Backend> {
    layers: Vec<LayerCache<B>>,
}

impl<B: Backend> KvCache<B> {
    /// An empty cache for a model.
    pub fn new(config: &GptOssConfig) -> Self {
        Self::of_layers(config, 0..config.num_hidden_layers())
    }

    /// An empty cache for some layers of a model.
    pub(crate) fn of_layers(config: &GptOssConfig, layers: Range<usize>) -> Self {
        Self { layers: layers.map(|layer| LayerCache::new(config.window(layer))).collect() }
    }

    /// An empty cache that keeps its numbers in another format.
    #[must_use]
    pub fn with_format(self, format: KvFormat) -> Self {
        let layers = self.layers.into_iter().map(|layer| layer.with_format(format)).collect();
        Self { layers }
    }

    /// An empty cache from which up to `spare` tokens can be taken back.
    #[must_use]
    pub fn with_spare(self, spare: usize) -> Self {
        let layers = self.layers.into_iter().map(|layer| layer.with_spare(spare)).collect();
        Self { layers }
    }

    /// How many tokens can be taken back.
    pub fn spare(&self) -> usize {
        self.layers.first().map_or(0, LayerCache::spare)
    }

    /// Tokens seen so far: the position of the next one.
    pub fn position(&self) -> usize {
        self.layers.first().map_or(0, LayerCache::position)
    }

    /// Entries layer `layer` holds.
    pub fn entries(&self, layer: usize) -> usize {
        self.layers.get(layer).map_or(0, LayerCache::entries)
    }

    /// Takes tokens back, until `position` of them are left.
    ///
    /// # Panics
    /// If a sliding layer does not keep what is needed for it: see [`with_spare`](Self::with_spare).
    pub fn truncate(&mut self, position: usize) {
        self.layers.iter_mut().for_each(|layer| layer.truncate(position));
    }

    /// How many layers it is for.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    pub(crate) fn layer_mut(&mut self, layer: usize) -> &mut LayerCache<B> {
        &mut self.layers[layer]
    }

    pub(crate) fn layers_mut(&mut self) -> impl Iterator<Item = &mut LayerCache<B>> {
        self.layers.iter_mut()
    }
}
