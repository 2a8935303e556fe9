//! BitLinear: a linear layer with ternary weights and 8-bit activations.
//!
//! ```
//! use burn::tensor::Tensor;
//! use ternoss_quant::{BitLinear, BitLinearConfig};
//! type B = burn_flex::Flex;
//!
//! let device = Default::default();
//! let packed: BitLinear<B> = BitLinearConfig::new(128, 32).init(&device).pack().unwrap();
//! assert_eq!(packed.forward(Tensor::<B, 3>::ones([2, 5, 128], &device)).dims(), [2, 5, 32]);
//! ```

use burn::{
    config::Config,
    module::{Module, Param, ParamId},
    nn,
    tensor::{Tensor, backend::Backend},
};
use ternoss_backends::{
    FormatError, TernaryBackend, reference::rotate, round_activations, ternary_linear, tuned_linear,
};

use crate::{PackedTernary, TernaryConfig, TernaryTensor, absmean};

/// `y = Q8(x) T(W)^T + b`: 8-bit activations, one scale a token ([`round_activations`]), times ternary weights ([`mod@absmean`]).
///
/// The weight is *latent* (float, ternarized anew in every forward pass, straight-through gradient: for training and
/// calibration) or *packed* (codes and scales, for inference). Both compute the same function: equal codes, outputs
/// equal up to the float rounding of the dense product. A *tuned* weight has packed trits and scales that gradients reach.
#[derive(Module, Debug)]
pub struct BitLinear<B: Backend> {
    /// Latent, packed or tuned.
    pub weight: BitWeight<B>,
    /// `[out_features]`
    pub bias: Option<Param<Tensor<B, 1>>>,
}

/// The weight of a [`BitLinear`].
#[derive(Module, Debug)]
pub enum BitWeight<B: Backend> {
    /// Floats that are ternarized in every forward pass.
    Latent(LatentWeight<B>),
    /// Codes and scales.
    Packed(TernaryTensor<B>),
    /// Codes, and scales in floats that gradients reach.
    Tuned(TunedWeight<B>),
}

/// Packed trits whose scales are computed elsewhere, by something that learns.
#[derive(Module, Debug)]
pub struct TunedWeight<B: Backend> {
    /// One matrix; its own scales say nothing.
    pub trits: TernaryTensor<B>,
    /// `[planes, rows, groups]`, one group where a row has one scale.
    scales: Param<Tensor<B, 3>>,
}

/// A float weight and the way it becomes ternary.
#[derive(Module, Debug)]
pub struct LatentWeight<B: Backend> {
    /// `[out_features, in_features]`, of the rotated input where the configuration has a rotation.
    pub weight: Param<Tensor<B, 2>>,
    config: TernaryConfig,
    /// Whether the weight is ternary as it stands, composed of trits and scales by its owner.
    composed: bool,
}

impl<B: Backend> BitWeight<B> {
    fn latent(weight: Param<Tensor<B, 2>>, config: &TernaryConfig, composed: bool) -> Self {
        Self::Latent(LatentWeight { weight, config: *config, composed })
    }
}

impl<B: Backend> TunedWeight<B> {
    /// With the scales as they are, rounded as the format stores them.
    pub fn rounded(&self) -> TernaryTensor<B> {
        self.trits.with_scales(self.scales.val().detach())
    }
}

impl<B: Backend> LatentWeight<B> {
    fn to_packed(&self) -> Result<PackedTernary, FormatError> {
        let parts = absmean(self.weight.val().detach(), self.config.granularity);
        PackedTernary::pack(&[parts], self.config.format, self.config.rotation)
    }

    /// The ternary matrix in full, with a straight-through gradient to the latent weight: `[out_features, in_features]`.
    pub fn fake_quantize(&self) -> Tensor<B, 2> {
        let latent = self.weight.val();
        if self.composed {
            return latent;
        }
        let frozen = latent.clone().detach();
        let ternary = absmean(frozen.clone(), self.config.granularity).to_dense();
        // The difference is exactly zero for finite numbers, so the value passes unchanged to the last bit.
        ternary + (latent - frozen)
    }
}

/// Configuration of a [`BitLinear`] that starts from random latent weights.
#[derive(Config, Debug)]
pub struct BitLinearConfig {
    /// Size of the input features.
    pub d_input: usize,
    /// Size of the output features.
    pub d_output: usize,
    /// Whether there is a bias.
    #[config(default = true)]
    pub bias: bool,
    /// How the latent weight becomes ternary.
    #[config(default = "TernaryConfig::default()")]
    pub ternary: TernaryConfig,
}

impl BitLinearConfig {
    /// A latent layer, initialized as Burn's own linear layer is.
    pub fn init<B: Backend>(&self, device: &B::Device) -> BitLinear<B> {
        let dense = nn::LinearConfig::new(self.d_input, self.d_output).with_bias(self.bias).init(device);
        BitLinear::from_linear(&dense, &self.ternary)
    }
}

impl<B: Backend> BitLinear<B> {
    /// A latent layer with the weight and bias of a dense one.
    ///
    /// Make it on `Autodiff<B>` where it is to be trained: a `Param` that is made without gradients has none after
    /// [`Module::train`] either.
    pub fn from_linear(linear: &nn::Linear<B>, config: &TernaryConfig) -> Self {
        // Detached last: a view of a parameter would be no leaf of the gradients' graph.
        let weight = linear.weight.val().transpose().detach();
        let weight = match config.rotation {
            Some(rotation) => rotate(weight, rotation),
            None => weight,
        };
        Self {
            weight: BitWeight::latent(Param::from_tensor(weight), config, false),
            // A parameter that was never used draws its random values anew in every clone.
            bias: linear.bias.as_ref().map(|bias| Param::initialized(bias.id, bias.val())),
        }
    }

    /// A layer whose weight (`[out_features, in_features]`, of the rotated input where `config` has a rotation) is composed
    /// of trits and scales elsewhere and used as it is: gradients flow through it to whatever it was composed of.
    pub fn composed(weight: Tensor<B, 2>, bias: Option<Tensor<B, 1>>, config: &TernaryConfig) -> Self {
        let keep = |tensor| Param::initialized(ParamId::new(), tensor);
        Self {
            weight: BitWeight::latent(Param::initialized(ParamId::new(), weight), config, true),
            bias: bias.map(keep),
        }
    }

    /// A layer with the trits of a packed matrix, the only one of its tensor, and scales that something else computes:
    /// `[planes, rows, groups]`, one group where a row has one scale. Gradients flow to them; packing rounds them.
    pub fn tuned(trits: TernaryTensor<B>, scales: Tensor<B, 3>, bias: Option<Tensor<B, 1>>) -> Self {
        let scales = Param::initialized(ParamId::new(), scales);
        let bias = bias.map(|bias| Param::initialized(ParamId::new(), bias));
        Self { weight: BitWeight::Tuned(TunedWeight { trits, scales }), bias }
    }

    /// A layer around packed weights.
    pub fn from_packed(weight: TernaryTensor<B>, bias: Option<Tensor<B, 1>>) -> Self {
        Self { weight: BitWeight::Packed(weight), bias: bias.map(Param::from_tensor) }
    }

    /// `[in_features, out_features]`
    pub fn shape(&self) -> [usize; 2] {
        match &self.weight {
            BitWeight::Latent(latent) => {
                let [out_features, in_features] = latent.weight.dims();
                [in_features, out_features]
            }
            BitWeight::Packed(packed) | BitWeight::Tuned(TunedWeight { trits: packed, .. }) => {
                [packed.layout().in_features, packed.layout().rows]
            }
        }
    }

    /// The same layer with its weight packed; one that is packed already stays as it is.
    ///
    /// # Errors
    /// [`FormatError`] when the configuration does not describe a valid layout.
    pub fn pack(self) -> Result<Self, FormatError> {
        let packed = match self.weight {
            BitWeight::Latent(latent) => {
                TernaryTensor::from_packed(latent.to_packed()?, &latent.weight.val().device())?
            }
            BitWeight::Packed(packed) => packed,
            BitWeight::Tuned(tuned) => tuned.rounded(),
        };
        Ok(Self { weight: BitWeight::Packed(packed), bias: self.bias })
    }

    /// The packed weight in host memory.
    ///
    /// # Errors
    /// As [`pack`](Self::pack).
    pub fn to_packed(&self) -> Result<PackedTernary, FormatError> {
        match &self.weight {
            BitWeight::Latent(latent) => latent.to_packed(),
            BitWeight::Packed(packed) => Ok(packed.to_packed()),
            BitWeight::Tuned(tuned) => Ok(tuned.rounded().to_packed()),
        }
    }
}

impl<B: TernaryBackend> BitLinear<B> {
    /// `[.., in_features]` to `[.., out_features]`.
    pub fn forward<const D: usize>(&self, x: Tensor<B, D>) -> Tensor<B, D> {
        let y = match &self.weight {
            BitWeight::Latent(latent) => each_token(x, |x| {
                round_activations(x, latent.config.rotation).matmul(latent.fake_quantize().transpose())
            }),
            BitWeight::Packed(packed) => ternary_linear(x, &packed.weight(), 0),
            BitWeight::Tuned(TunedWeight { trits, scales }) => {
                each_token(x, |x| tuned_linear(x, &trits.weight(), scales.val()))
            }
        };
        match &self.bias {
            Some(bias) => y + bias.val().unsqueeze(),
            None => y,
        }
    }
}

/// A product with tokens `[tokens, in_features]` for `x [.., in_features]`.
fn each_token<B: Backend, const D: usize>(
    x: Tensor<B, D>,
    product: impl FnOnce(Tensor<B, 2>) -> Tensor<B, 2>,
) -> Tensor<B, D> {
    let mut shape = x.dims();
    let tokens = shape[..D - 1].iter().product();
    let y = product(x.reshape([tokens, shape[D - 1]]));
    shape[D - 1] = y.dims()[1];
    y.reshape(shape)
}
