use burn::tensor::{Tensor, backend::Backend};

use crate::cpu::HeadCaches;

/// How a key-value cache keeps its numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvFormat {
    /// As they are.
    #[default]
    F32,
    /// Rounded to half precision: 2 bytes.
    F16,
    /// Rounded to 8 bits, with one scale for each key and each value of each head.
    Int8,
}

impl KvFormat {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Int8];

    /// Bytes of a key, or of a value, of `head_dim` numbers.
    #[must_use]
    pub const fn bytes(self, head_dim: usize) -> usize {
        match self {
            Self::F32 => 4 * head_dim,
            Self::F16 => 2 * head_dim,
            Self::Int8 => head_dim + 4,
        }
    }
}

impl std::fmt::Display for KvFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Int8 => "int8",
        })
    }
}

/// Keys and values of one layer for one sequence: see [`cached_attention`](crate::cached_attention).
///
/// A layer with a window keeps what the next query can see, and `spare` entries more, so that as many can be taken
/// [back](Self::truncate).
#[derive(Debug, Clone)]
pub struct LayerCache<B: Backend> {
    window: Option<usize>,
    spare: usize,
    format: KvFormat,
    position: usize,
    /// `[kv_heads, entries, head_dim]` each, on backends without a cache of their own.
    tensors: Option<(Tensor<B, 3>, Tensor<B, 3>)>,
    heads: Option<HeadCaches>,
    ring: Option<Ring<B>>,
}

/// Keys and values on a device, `[slots, kv_heads * head_dim]` each, written in place: the entry of position `p` lies in slot
/// `p % slots`.
#[derive(Debug, Clone)]
pub(crate) struct Ring<B: Backend> {
    pub(crate) keys: Tensor<B, 2>,
    pub(crate) values: Tensor<B, 2>,
}

impl<B: Backend> LayerCache<B> {
    /// An empty cache; `window` is how many positions a query sees, itself included, `None` for all that came before.
    #[must_use]
    pub fn new(window: Option<usize>) -> Self {
        Self { window, spare: 0, format: KvFormat::F32, position: 0, tensors: None, heads: None, ring: None }
    }

    /// The same, kept in another format; backends without a cache of their own keep floats.
    #[must_use]
    pub fn with_format(self, format: KvFormat) -> Self {
        Self { format, ..self }
    }

    /// The same, but up to `spare` entries can be taken back.
    #[must_use]
    pub fn with_spare(self, spare: usize) -> Self {
        Self { spare, ..self }
    }

    /// Tokens seen so far: the position of the next one.
    #[must_use]
    pub fn position(&self) -> usize {
        self.position
    }

    /// Entries that can be taken back.
    #[must_use]
    pub fn spare(&self) -> usize {
        self.spare
    }

    /// How many positions a query sees.
    #[must_use]
    pub fn window(&self) -> Option<usize> {
        self.window
    }

    /// Entries the next query can see, and those that are kept beside them.
    #[must_use]
    pub fn entries(&self) -> usize {
        self.window.map_or(self.position, |window| self.position.min(window + self.spare))
    }

    /// Takes entries back, until `position` tokens are left.
    ///
    /// # Panics
    /// If a window needs entries for it that are not kept any more.
    pub fn truncate(&mut self, position: usize) {
        let back = self.position.saturating_sub(position);
        assert!(back <= self.spare || self.window.is_none(), "{back} entries to take back, {} kept", self.spare);
        self.position -= back;
        if let Some(heads) = &mut self.heads {
            heads.truncate(self.position);
        }
        let shorter = |tensor: Tensor<B, 3>| {
            let entries = tensor.dims()[1];
            tensor.slice_dim(1, 0..entries - back)
        };
        self.tensors = self.tensors.take().map(|(keys, values)| (shorter(keys), shorter(values)));
    }

    /// Appends the keys and values of new tokens and returns all that these tokens may see, in order.
    pub(crate) fn append(&mut self, keys: Tensor<B, 3>, values: Tensor<B, 3>) -> (Tensor<B, 3>, Tensor<B, 3>) {
        self.position += keys.dims()[1];
        let (keys, values) = match self.tensors.take() {
            Some((old_keys, old_values)) => {
                (Tensor::cat(vec![old_keys, keys], 1), Tensor::cat(vec![old_values, values], 1))
            }
            None => (keys, values),
        };
        let kept = |tensor: &Tensor<B, 3>| {
            let entries = tensor.dims()[1];
            let first = entries - self.window.map_or(entries, |window| window + self.spare).min(entries);
            tensor.clone().slice_dim(1, first..entries)
        };
        self.tensors = Some((kept(&keys), kept(&values)));
        (keys, values)
    }

    /// Appends to the cache in memory: `keys` and `values` are `[tokens, kv_heads * head_dim]`.
    pub(crate) fn push(&mut self, keys: &[f32], values: &[f32], kv_heads: usize, head_dim: usize) -> &mut HeadCaches {
        let heads = self.heads.get_or_insert_with(|| HeadCaches::new(kv_heads, head_dim, self.format));
        let width = kv_heads * head_dim;
        for (key, value) in keys.chunks_exact(width).zip(values.chunks_exact(width)) {
            heads.push(key, value);
        }
        self.position = heads.end();
        heads
    }

    /// The ring, if there is one already.
    pub(crate) fn take_ring(&mut self) -> Option<Ring<B>> {
        self.ring.take()
    }

    /// Puts the ring back, with the entries of `tokens` more.
    pub(crate) fn put_ring(&mut self, ring: Ring<B>, tokens: usize) {
        self.ring = Some(ring);
        self.position += tokens;
    }

    /// Forgets what no later query can see.
    pub(crate) fn forget(&mut self) {
        if let (Some(window), Some(heads)) = (self.window, &mut self.heads) {
            heads.forget(self.position.saturating_sub(window + self.spare));
        }
    }
}
