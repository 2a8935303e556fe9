//! The quantization methods, by name, and the steps they consist of.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// How weights become ternary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Rounding by the mean magnitude, without looking at any text (BitNet b1.58, arXiv 2402.17764, section 2).
    Absmean,
    /// PT-BitNet as described (Guo et al., Neural Networks 191:107855, 2025): per group the best of 21 thresholds with its
    /// least-squares scale, then greedy changes of single trits on the output error of a calibration text.
    PtBitnet,
    /// All steps that help, in order: see [`Steps`].
    #[default]
    Ternoss,
}

/// The steps of a calibrated method; each can be left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Steps {
    /// Rotate every linear's input and its weights with it ([`Rotation`](ternoss_backends::Rotation)).
    pub rotation: bool,
    /// Aim for the teacher's outputs from the inputs that the ternary layers before really give:
    /// `W* = W (I + s (G - H)(H + l I)^-1)`, `H = E[x~ x~^T]`, `G = E[x x~^T]`, `s` for each row the share of it that is more than
    /// chance: little where tokens are few for the inputs.
    pub regression: bool,
    /// Make up for what came before: what is added to the residual stream also aims at what the student's stream lacks of
    /// the teacher's, as far as the inputs tell: `W* += s E[e x~^T](H + l I)^-1`, `e` the difference of the streams, for
    /// `down` with what dropped experts would have added, `s` as above.
    pub residual: bool,
    /// Round column by column and pass each error on (ternary GPTQ). Without it, every group is fitted on its own.
    pub compensation: bool,
    /// Passes of greedy changes of single trits; before each and after the last the scales are refitted in closed form.
    pub sweeps: usize,
    /// Fold the mean error of every output into its bias: `b + W E[x] - Q E[x~]`. The steps above then work with moments about the
    /// means, for no weight needs to make up for a mean.
    pub bias: bool,
    /// Steps of block reconstruction by gradients on every layer.
    pub reconstruction: usize,
}

impl Steps {
    /// Nothing but the best scales for each group of weights: looks at no text.
    pub const NONE: Self = Self {
        rotation: false,
        regression: false,
        residual: false,
        compensation: false,
        sweeps: 0,
        bias: false,
        reconstruction: 0,
    };
    /// Names of the steps, as [`without`](Self::without) takes them.
    pub const NAMES: [&str; 7] =
        ["rotation", "regression", "residual", "compensation", "sweeps", "bias", "reconstruction"];

    /// The steps with one of them left out.
    ///
    /// # Errors
    /// The names there are, if `step` is none of them.
    pub fn without(mut self, step: &str) -> Result<Self, String> {
        match step {
            "rotation" => self.rotation = false,
            "regression" => self.regression = false,
            "residual" => self.residual = false,
            "compensation" => self.compensation = false,
            "sweeps" => self.sweeps = 0,
            "bias" => self.bias = false,
            "reconstruction" => self.reconstruction = 0,
            _ => return Err(format!("unknown step {step:?}, expected one of: {}", Self::NAMES.join(", "))),
        }
        Ok(self)
    }

    /// Whether a calibration text is needed.
    pub fn look_at_text(&self) -> bool {
        self.regression || self.residual || self.compensation || self.sweeps > 0 || self.bias || self.reconstruction > 0
    }
}

impl Method {
    /// Every method there is.
    pub const ALL: [Self; 3] = [Self::Absmean, Self::PtBitnet, Self::Ternoss];

    /// The method's steps.
    pub fn steps(self) -> Steps {
        match self {
            Self::Absmean => Steps::NONE,
            Self::PtBitnet => Steps { sweeps: 2, ..Steps::NONE },
            Self::Ternoss => Steps {
                rotation: true,
                regression: true,
                residual: true,
                compensation: true,
                sweeps: 2,
                bias: true,
                reconstruction: 0,
            },
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Absmean => "absmean",
            Self::PtBitnet => "pt-bitnet",
            Self::Ternoss => "ternoss",
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
