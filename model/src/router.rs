//! The router: which experts a token goes to, and with what weight.

use burn::{
    module::Module,
    nn,
    tensor::{Int, Tensor, activation, backend::Backend},
};

/// Scores experts and keeps the best; always in full precision.
#[derive(Module, Debug)]
pub struct Router<B: Backend> {
    /// `[hidden, experts]`
    pub linear: nn::Linear<B>,
    pub(crate) experts_per_token: usize,
}

/// Where each token goes.
#[derive(Clone, Debug)]
pub struct Routing<B: Backend> {
    /// Expert numbers, best first: `[tokens, experts_per_token]`.
    pub indices: Tensor<B, 2, Int>,
    /// Softmax over the chosen experts' logits: `[tokens, experts_per_token]`.
    pub weights: Tensor<B, 2>,
}

impl<B: Backend> Router<B> {
    /// Logits of all experts: `[tokens, hidden]` to `[tokens, experts]`.
    pub fn logits(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        self.linear.forward(x)
    }

    /// Top-k first, then softmax over the chosen only (`GptOssTopKRouter` of transformers).
    pub fn forward(&self, x: Tensor<B, 2>) -> Routing<B> {
        let (values, indices) = self.logits(x).sort_descending_with_indices(1);
        let k = self.experts_per_token;
        Routing { indices: indices.slice_dim(1, 0..k), weights: activation::softmax(values.slice_dim(1, 0..k), 1) }
    }
}
