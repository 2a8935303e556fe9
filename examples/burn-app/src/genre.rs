//! The small model: two layers that were `Linear` and are `BitLinear` now.

use burn::{
    module::Module,
    nn::{LinearConfig, loss::CrossEntropyLossConfig},
    tensor::{Device, Int, Tensor, activation::gelu, backend::Backend},
};
use ternoss::{
    backends::{FormatError, TernaryBackend},
    quant::{BitLinear, TernaryConfig},
};

const HIDDEN: usize = 64;
pub const GENRES: usize = 2;

/// Tells novels from encyclopedias.
#[derive(Module, Debug)]
pub struct Genre<B: Backend> {
    up: BitLinear<B>,
    down: BitLinear<B>,
}

impl<B: Backend> Genre<B> {
    pub fn new(inputs: usize, device: &Device<B>) -> Self {
        // A trained `Linear` would be taken over in the same way.
        let layer = |from, to| {
            let dense = LinearConfig::new(from, to).init(device);
            BitLinear::from_linear(&dense, &TernaryConfig::default())
        };
        Self { up: layer(inputs, HIDDEN), down: layer(HIDDEN, GENRES) }
    }

    /// From floats that learn to trits that run: the same function.
    pub fn pack(self) -> Result<Self, FormatError> {
        Ok(Self { up: self.up.pack()?, down: self.down.pack()? })
    }
}

impl<B: TernaryBackend> Genre<B> {
    /// `[texts, inputs]` to logits `[texts, genres]`.
    pub fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        self.down.forward(gelu(self.up.forward(x)))
    }

    /// Mean cross-entropy in nats: `[1]`.
    pub fn loss(&self, x: Tensor<B, 2>, genres: Tensor<B, 1, Int>) -> Tensor<B, 1> {
        let loss = CrossEntropyLossConfig::new().init(&x.device());
        loss.forward(self.forward(x), genres)
    }
}
