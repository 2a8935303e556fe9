//! The quantization methods, by name.

use std::{fmt, str::FromStr};

use burn::tensor::{Tensor, backend::Backend};
use serde::{Deserialize, Serialize};
use ternoss_quant::{Granularity, TernaryParts, absmean};

/// How weights become ternary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Rounding by the mean magnitude, without looking at any text (BitNet b1.58, arXiv 2402.17764, section 2).
    #[default]
    Absmean,
}

impl Method {
    /// Every method there is.
    pub const ALL: [Self; 1] = [Self::Absmean];

    /// One weight matrix `[rows, in_features]` made ternary.
    pub(crate) fn ternarize<B: Backend>(self, weight: Tensor<B, 2>, granularity: Granularity) -> TernaryParts<B> {
        match self {
            Self::Absmean => absmean(weight, granularity),
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Absmean => "absmean",
        })
    }
}

impl FromStr for Method {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let known = || Self::ALL.map(|method| method.to_string()).join(", ");
        Self::ALL
            .into_iter()
            .find(|method| method.to_string() == name)
            .ok_or_else(|| format!("unknown method {name:?}, expected one of: {}", known()))
    }
}
