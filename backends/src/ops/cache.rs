use std::sync::Arc;

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
    kept: Kept<B>,
}

/// Keys and values, as the backend keeps them.
#[derive(Debug, Clone)]
enum Kept<B: Backend> {
    Nothing,
    /// `[kv_heads, entries, head_dim]` each, on backends without a cache of their own.
    Tensors(Tensor<B, 3>, Tensor<B, 3>),
    Heads(HeadCaches),
    Ring(Ring<B>),
}

/// Keys and values on a device, written in place: the entry of position `p` lies in slot `p % slots`.
///
/// Sequences that are computed side by side share their buffers, so that one kernel sees all of them.
#[derive(Debug, Clone)]
pub(crate) struct Ring<B: Backend> {
    /// `[slots of all sequences, kv_heads * head_dim]`
    pub(crate) keys: Tensor<B, 2>,
    pub(crate) values: Tensor<B, 2>,
    /// First slot of this sequence.
    pub(crate) first: usize,
    /// Slots of this sequence.
    pub(crate) slots: usize,
    /// The same one for all rings in these buffers.
    pub(crate) company: Arc<()>,
    /// Every copy of this cache holds it: while there are several, none may write into these slots.
    pub(crate) own: Arc<()>,
}

impl<B: Backend> LayerCache<B> {
    /// An empty cache; `window` is how many positions a query sees, itself included, `None` for all that came before.
    #[must_use]
    pub fn new(window: Option<usize>) -> Self {
        Self { window, spare: 0, format: KvFormat::F32, position: 0, kept: Kept::Nothing }
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
        match &mut self.kept {
            Kept::Heads(heads) => heads.truncate(self.position),
            Kept::Tensors(keys, values) => {
                for tensor in [keys, values] {
                    let entries = tensor.dims()[1];
                    *tensor = tensor.clone().slice_dim(1, 0..entries - back);
                }
            }
            // What comes next is written over them.
            Kept::Ring(_) | Kept::Nothing => {}
        }
    }

    /// Appends the keys and values of new tokens and returns all that these tokens may see, in order.
    pub(crate) fn append(&mut self, keys: Tensor<B, 3>, values: Tensor<B, 3>) -> (Tensor<B, 3>, Tensor<B, 3>) {
        self.position += keys.dims()[1];
        let (keys, values) = match self.take() {
            Kept::Tensors(old_keys, old_values) => {
                (Tensor::cat(vec![old_keys, keys], 1), Tensor::cat(vec![old_values, values], 1))
            }
            _ => (keys, values),
        };
        let kept = |tensor: &Tensor<B, 3>| {
            let entries = tensor.dims()[1];
            let first = entries - self.window.map_or(entries, |window| window + self.spare).min(entries);
            tensor.clone().slice_dim(1, first..entries)
        };
        self.kept = Kept::Tensors(kept(&keys), kept(&values));
        (keys, values)
    }

    /// The cache in memory, to be appended to and put back.
    pub(crate) fn take_heads(&mut self, kv_heads: usize, head_dim: usize) -> HeadCaches {
        match self.take() {
            Kept::Heads(heads) => heads,
            _ => HeadCaches::new(kv_heads, head_dim, self.format),
        }
    }

    /// Puts the cache in memory back, without what no later query can see.
    pub(crate) fn put_heads(&mut self, mut heads: HeadCaches) {
        self.position = heads.end();
        if let Some(window) = self.window {
            heads.forget(self.position.saturating_sub(window + self.spare));
        }
        self.kept = Kept::Heads(heads);
    }

    /// The ring, if there is one already.
    pub(crate) fn ring(&self) -> Option<&Ring<B>> {
        match &self.kept {
            Kept::Ring(ring) => Some(ring),
            _ => None,
        }
    }

    /// The same, to be put back.
    pub(crate) fn take_ring(&mut self) -> Option<Ring<B>> {
        match self.take() {
            Kept::Ring(ring) => Some(ring),
            _ => None,
        }
    }

    /// Puts the ring back, with the entries of `tokens` more.
    pub(crate) fn put_ring(&mut self, ring: Ring<B>, tokens: usize) {
        self.kept = Kept::Ring(ring);
        self.position += tokens;
    }

    fn take(&mut self) -> Kept<B> {
        std::mem::replace(&mut self.kept, Kept::Nothing)
    }
}
