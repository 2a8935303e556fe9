//! The router: which experts a token goes to, and with what weight.
//!
//! ```
//! use burn::tensor::Tensor;
//! use ternoss_model::{Checkpoint, LoadOptions, layer::Layer};
//! type B = burn_flex::Flex;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let checkpoint = Checkpoint::open("../examples/tiny-gpt-oss".as_ref())?;
//! let layer = Layer::<B>::load(&checkpoint, 0, LoadOptions::default(), &Default::default())?;
//! let x = Tensor::ones([3, checkpoint.config().hidden_size], &Default::default());
//! assert_eq!(layer.mlp.router.logits(x).dims(), [3, 8]);
//! # Ok(()) }
//! ```

use burn::{
    module::{Module, Param},
    nn,
    tensor::{Int, Tensor, TensorData, backend::Backend},
};
use ternoss_backends::{TernaryBackend, route};

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

    /// The router that knows only these experts, in this order: their columns and biases. The softmax over the chosen ones
    /// makes their weights add up to 1 again by itself.
    pub fn kept(&self, experts: &[usize]) -> Self {
        let device = self.linear.weight.val().device();
        let numbers: Vec<i64> = experts.iter().map(|expert| *expert as i64).collect();
        let index = Tensor::<B, 1, Int>::from_data(TensorData::new(numbers, [experts.len()]), &device);
        let weight = self.linear.weight.val().select(1, index.clone()).detach();
        let bias = self.linear.bias.as_ref().map(|bias| Param::from_tensor(bias.val().select(0, index).detach()));
        let linear = nn::Linear { weight: Param::from_tensor(weight), bias };
        Self { linear, experts_per_token: self.experts_per_token }
    }
}

impl<B: TernaryBackend> Router<B> {
    /// Top-k first, then softmax over the chosen only (`GptOssTopKRouter` of transformers).
    pub fn forward(&self, x: Tensor<B, 2>) -> Routing<B> {
        let (weight, bias) = self.parts();
        let (indices, weights) = route(x, weight, bias, self.experts_per_token);
        Routing { indices, weights }
    }

    /// Weight and bias.
    pub(crate) fn parts(&self) -> (Tensor<B, 2>, Tensor<B, 1>) {
        let weight = self.linear.weight.val();
        let bias = match &self.linear.bias {
            Some(bias) => bias.val(),
            None => Tensor::zeros([weight.dims()[1]], &weight.device()),
        };
        (weight, bias)
    }
}
