//! Ternary layers in a Burn module of one's own: made from dense layers, trained for a few steps, packed for inference.
//!
//! ```text
//! cargo run --release --example burn_module
//! ```
//!
//! A `BitLinear` is latent at first: it keeps float weights, computes with their ternary version, and passes gradients
//! straight through the rounding. `pack` turns it into codes and scales that the CPU kernels use.

use std::error::Error;

use burn::{
    backend::Autodiff,
    module::{AutodiffModule, Module},
    nn::LinearConfig,
    optim::{AdamConfig, GradientsParams, Optimizer},
    tensor::{Device, Distribution, Tensor, activation::relu, backend::Backend},
};
use burn_flex::Flex;
use ternoss::{
    backends::{FormatError, TernaryBackend},
    quant::{BitLinear, TernaryConfig},
};

/// Two ternary layers with a nonlinearity between them.
#[derive(Module, Debug)]
struct Mlp<B: Backend> {
    up: BitLinear<B>,
    down: BitLinear<B>,
}

impl<B: Backend> Mlp<B> {
    fn new(inputs: usize, hidden: usize, device: &B::Device) -> Self {
        // Any trained `nn::Linear` can be given here instead of a fresh one.
        let layer = |from, to| {
            let dense = LinearConfig::new(from, to).init(device);
            BitLinear::from_linear(&dense, &TernaryConfig::default())
        };
        Self { up: layer(inputs, hidden), down: layer(hidden, inputs) }
    }

    fn pack(self) -> Result<Self, FormatError> {
        Ok(Self { up: self.up.pack()?, down: self.down.pack()? })
    }
}

// Only `forward` asks for more than a `Backend`.
impl<B: TernaryBackend> Mlp<B> {
    fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        self.down.forward(relu(self.up.forward(x)))
    }
}

/// Mean squared error against a target that a linear map cannot reach.
fn loss<B: TernaryBackend>(mlp: &Mlp<B>, x: Tensor<B, 2>) -> Tensor<B, 1> {
    (mlp.forward(x.clone()) - x.abs()).square().mean()
}

fn main() -> Result<(), Box<dyn Error>> {
    type Train = Autodiff<Flex>;
    let device = Device::<Train>::default();
    Train::seed(&device, 1);
    let x = Tensor::<Train, 2>::random([256, 64], Distribution::Normal(0.0, 1.0), &device);

    let mut mlp = Mlp::<Train>::new(64, 128, &device);
    let mut optimizer = AdamConfig::new().init();
    for step in 0..=100 {
        let error = loss(&mlp, x.clone());
        if step % 20 == 0 {
            println!("step {step:>3}  loss {:.4}", error.clone().into_scalar());
        }
        let gradients = GradientsParams::from_grads(error.backward(), &mlp);
        mlp = optimizer.step(1e-2, mlp, gradients);
    }

    // Without gradients, on the backend below `Autodiff`: the packed module computes the same function.
    let latent = mlp.valid();
    let packed = latent.clone().pack()?;
    let [before, after] = [&latent, &packed].map(|mlp| loss(mlp, x.clone().inner()).into_scalar());
    println!("latent loss {before:.4}, packed loss {after:.4}");
    Ok(())
}
