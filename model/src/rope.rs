//! Rotary position embedding with YaRN scaling.
//!
//! Source: `_compute_yarn_parameters` and `apply_rotary_pos_emb` of Hugging Face transformers' gpt-oss; the paper is
//! arXiv 2309.00071. Angles are float32 as there, so far positions agree to float32's resolution of the angle.
//!
//! ```
//! use ternoss_model::{config::RopeConfig, rope::RotaryEmbedding};
//!
//! // Without YaRN: one radian a position for the first pair, `theta^(-2i / head_dim)` for the pair `i`.
//! let rope = RotaryEmbedding::new(&RopeConfig { theta: 10_000.0, yarn: None }, 4);
//! assert_eq!(rope.inv_freq(), [1.0, 0.01]);
//! ```

use std::f64::consts::PI;

use burn::tensor::{Tensor, TensorData, backend::Backend};

use ternoss_backends::reference::rotate_heads;

use crate::config::{RopeConfig, Yarn};

/// Rotation frequencies of a head's pairs of dimensions.
#[derive(Clone, Debug)]
pub struct RotaryEmbedding {
    inv_freq: Vec<f32>,
    attention_scaling: f32,
}

/// cos and sin of a run of positions, each `[tokens, head_dim / 2]`.
#[derive(Clone, Debug)]
pub struct RotaryTables<B: Backend> {
    /// Scaled cosines.
    pub cos: Tensor<B, 2>,
    /// Scaled sines.
    pub sin: Tensor<B, 2>,
}

impl RotaryEmbedding {
    /// Frequencies for heads of `head_dim` (even).
    pub fn new(config: &RopeConfig, head_dim: usize) -> Self {
        let frequency = |pair: usize| config.theta.powf(-2.0 * pair as f64 / head_dim as f64);
        let pairs = head_dim / 2;
        let Some(yarn) = &config.yarn else {
            let inv_freq = (0..pairs).map(|pair| frequency(pair) as f32).collect();
            return Self { inv_freq, attention_scaling: 1.0 };
        };
        let (low, high) = ramp_bounds(config.theta, yarn, head_dim);
        let inv_freq = (0..pairs)
            .map(|pair| {
                let interpolated = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
                let frequency = frequency(pair);
                (frequency / yarn.factor * interpolated + frequency * (1.0 - interpolated)) as f32
            })
            .collect();
        let default_scaling = if yarn.factor > 1.0 { 0.1 * yarn.factor.ln() + 1.0 } else { 1.0 };
        Self { inv_freq, attention_scaling: yarn.attention_factor.unwrap_or(default_scaling) as f32 }
    }

    /// Radians per position: `[head_dim / 2]`.
    pub fn inv_freq(&self) -> &[f32] {
        &self.inv_freq
    }

    /// Factor on cos and sin.
    pub fn attention_scaling(&self) -> f32 {
        self.attention_scaling
    }

    /// Tables for tokens at these positions, mostly a range.
    pub fn tables<B: Backend>(
        &self,
        positions: impl ExactSizeIterator<Item = usize>,
        device: &B::Device,
    ) -> RotaryTables<B> {
        let shape = [positions.len(), self.inv_freq.len()];
        let angles: Vec<f32> = positions
            .flat_map(|position| self.inv_freq.iter().map(move |frequency| position as f32 * frequency))
            .collect();
        let table = |f: fn(f32) -> f32| {
            let values: Vec<f32> = angles.iter().map(|angle| f(*angle) * self.attention_scaling).collect();
            Tensor::from_data(TensorData::new(values, shape), device)
        };
        RotaryTables { cos: table(f32::cos), sin: table(f32::sin) }
    }
}

impl<B: Backend> RotaryTables<B> {
    /// Rotates `x` `[heads, tokens, head_dim]`; a pair is dimension `i` and `i + head_dim / 2`.
    pub fn rotate(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        rotate_heads(x, self.cos.clone(), self.sin.clone())
    }
}

/// The pairs between which YaRN blends from kept to interpolated frequencies.
fn ramp_bounds(theta: f64, yarn: &Yarn, head_dim: usize) -> (f64, f64) {
    let dim = head_dim as f64;
    let pair_of = |rotations: f64| {
        dim * (yarn.original_max_position_embeddings / (rotations * 2.0 * PI)).ln() / (2.0 * theta.ln())
    };
    let (mut low, mut high) = (pair_of(yarn.beta_fast), pair_of(yarn.beta_slow));
    if yarn.truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, high) = (low.max(0.0), high.min(dim - 1.0));
    // The reference avoids a division by zero the same way.
    (low, if low == high { high + 0.001 } else { high })
}
