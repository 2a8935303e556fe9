//! A linear layer that is dense or ternary.
//!
//! ```
//! use burn::nn::LinearConfig;
//! use ternoss_quant::{Linear, TernaryConfig};
//! type B = burn_flex::Flex;
//!
//! let dense = Linear::<B>::Dense(LinearConfig::new(128, 32).init(&Default::default()));
//! let ternary = dense.to_ternary(&TernaryConfig::default()).unwrap();
//! assert!(ternary.is_packed() && ternary.shape() == dense.shape());
//! ```

use burn::{
    module::{Module, Param},
    nn,
    tensor::{Tensor, backend::Backend},
};
use ternoss_backends::{
    BiasedWeight, FormatError, TernaryBackend, linear_onto, norm_linears, rms_norm, ternary_linears,
};

use crate::{BitLinear, BitWeight, PackedTernary, TernaryConfig};

/// `y = x W^T + b`, its weight in full precision or ternary: the type of every linear field of a model, so that
/// making the model ternary is a matter of values, not of types.
#[derive(Module, Debug)]
pub enum Linear<B: Backend> {
    /// Full precision: Burn's own layer (weight `[in_features, out_features]`).
    Dense(nn::Linear<B>),
    /// Ternary weights, 8-bit activations.
    Ternary(BitLinear<B>),
}

impl<B: Backend> Linear<B> {
    /// `[in_features, out_features]`
    pub fn shape(&self) -> [usize; 2] {
        match self {
            Self::Dense(dense) => dense.weight.dims(),
            Self::Ternary(ternary) => ternary.shape(),
        }
    }

    /// The same layer with absmean ternary weights, packed; a layer that is ternary already is packed as it is.
    ///
    /// # Errors
    /// [`FormatError`] when `config` does not describe a valid layout (a group size that is no multiple of 64).
    pub fn to_ternary(&self, config: &TernaryConfig) -> Result<Self, FormatError> {
        match self {
            Self::Dense(dense) => BitLinear::from_linear(dense, config).pack().map(Self::Ternary),
            Self::Ternary(ternary) => ternary.clone().pack().map(Self::Ternary),
        }
    }

    /// The weight of [`to_ternary`](Self::to_ternary) in host memory.
    ///
    /// # Errors
    /// As [`to_ternary`](Self::to_ternary).
    pub fn to_packed(&self, config: &TernaryConfig) -> Result<PackedTernary, FormatError> {
        match self {
            Self::Dense(dense) => BitLinear::from_linear(dense, config).to_packed(),
            Self::Ternary(ternary) => ternary.to_packed(),
        }
    }

    /// Whether it is ternary and packed.
    pub fn is_packed(&self) -> bool {
        matches!(self, Self::Ternary(BitLinear { weight: BitWeight::Packed(_), .. }))
    }

    /// `[out_features]`
    pub fn bias(&self) -> Option<Tensor<B, 1>> {
        let (Self::Dense(nn::Linear { bias, .. }) | Self::Ternary(BitLinear { bias, .. })) = self;
        bias.as_ref().map(Param::val)
    }
}

impl<B: TernaryBackend> Linear<B> {
    /// Layers that share their input `[tokens, in_features]`: `[tokens, out_features]` each. Packed ones round it once.
    pub fn forward_all<const N: usize>(linears: [&Self; N], x: Tensor<B, 2>) -> [Tensor<B, 2>; N] {
        let packed: Option<Vec<_>> = linears.iter().map(|linear| linear.packed()).collect();
        let together = packed.map(|packed| ternary_linears(x.clone(), &packed)).unwrap_or_default();
        <[_; N]>::try_from(together).unwrap_or_else(|_| linears.map(|linear| linear.forward(x.clone())))
    }

    /// The same of the root mean square norm of `x`, which packed layers take in one pass with the rounding.
    pub fn normed_all<const N: usize>(
        linears: [&Self; N],
        x: Tensor<B, 2>,
        gamma: Tensor<B, 1>,
        epsilon: f64,
    ) -> [Tensor<B, 2>; N] {
        let packed: Option<Vec<_>> = linears.iter().map(|linear| linear.packed()).collect();
        let together =
            packed.map(|packed| norm_linears(x.clone(), gamma.clone(), epsilon, &packed)).unwrap_or_default();
        <[_; N]>::try_from(together).unwrap_or_else(|_| Self::forward_all(linears, rms_norm(x, gamma, epsilon)))
    }

    /// `residual [tokens, out_features]` plus what the layer makes of `x [tokens, in_features]`.
    pub fn forward_onto(&self, residual: Tensor<B, 2>, x: Tensor<B, 2>) -> Tensor<B, 2> {
        match self.packed() {
            Some(packed) => linear_onto(residual, x, &packed),
            None => residual + self.forward(x),
        }
    }

    /// Weight and bias, if they are packed.
    fn packed(&self) -> Option<BiasedWeight<B>> {
        match self {
            Self::Ternary(BitLinear { weight: BitWeight::Packed(weight), bias }) => {
                Some(BiasedWeight { weight: weight.weight(), bias: bias.as_ref().map(Param::val) })
            }
            _ => None,
        }
    }

    /// `[.., in_features]` to `[.., out_features]`.
    pub fn forward<const D: usize>(&self, x: Tensor<B, D>) -> Tensor<B, D> {
        match self {
            Self::Dense(dense) => dense.forward(x),
            Self::Ternary(ternary) => ternary.forward(x),
        }
    }
}
