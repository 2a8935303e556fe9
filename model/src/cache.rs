//! The key-value cache: passed to `forward`, never a field of a module.

use burn::tensor::{Tensor, backend::Backend};

use crate::config::GptOssConfig;

/// Keys and values of all layers for one sequence.
#[derive(Clone, Debug)]
pub struct KvCache<B: Backend> {
    layers: Vec<LayerCache<B>>,
    position: usize,
}

/// Keys and values of one layer, each `[kv_heads, entries, head_dim]`.
#[derive(Clone, Debug)]
pub struct LayerCache<B: Backend> {
    entries: Option<(Tensor<B, 3>, Tensor<B, 3>)>,
    window: Option<usize>,
}

impl<B: Backend> KvCache<B> {
    /// An empty cache for a model.
    pub fn new(config: &GptOssConfig) -> Self {
        let layers = (0..config.num_hidden_layers())
            .map(|layer| LayerCache { entries: None, window: config.window(layer) })
            .collect();
        Self { layers, position: 0 }
    }

    /// Tokens seen so far: the position of the next one.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Entries layer `layer` holds.
    pub fn entries(&self, layer: usize) -> usize {
        self.layers.get(layer).and_then(|cache| cache.entries.as_ref()).map_or(0, |(keys, _)| keys.dims()[1])
    }

    pub(crate) fn layers_mut(&mut self) -> impl Iterator<Item = &mut LayerCache<B>> {
        self.layers.iter_mut()
    }

    pub(crate) fn advance(&mut self, tokens: usize) {
        self.position += tokens;
    }
}

impl<B: Backend> LayerCache<B> {
    /// A cache of one layer, for running that layer alone; `window` as in the layer's attention.
    pub fn new(window: Option<usize>) -> Self {
        Self { entries: None, window }
    }

    /// Appends the keys and values of new tokens and returns all that these tokens may see, in order.
    ///
    /// A sliding layer keeps no more entries than its window.
    pub(crate) fn append(&mut self, keys: Tensor<B, 3>, values: Tensor<B, 3>) -> (Tensor<B, 3>, Tensor<B, 3>) {
        let (keys, values) = match self.entries.take() {
            Some((old_keys, old_values)) => {
                (Tensor::cat(vec![old_keys, keys], 1), Tensor::cat(vec![old_values, values], 1))
            }
            None => (keys, values),
        };
        let kept = |tensor: &Tensor<B, 3>| {
            let entries = tensor.dims()[1];
            let first = entries - self.window.unwrap_or(entries).min(entries);
            tensor.clone().slice_dim(1, first..entries)
        };
        self.entries = Some((kept(&keys), kept(&values)));
        (keys, values)
    }
}
