//! Absmean ternary quantization of weights (BitNet b1.58, arXiv 2402.17764, section 2; the rounding step of PT-BitNet).
//!
//! ```
//! use burn::tensor::Tensor;
//! use ternoss_quant::{Granularity, absmean};
//! type B = burn_flex::Flex;
//!
//! // The mean magnitude is 1: what is below half of it becomes 0.
//! let weight = Tensor::<B, 2>::from_floats([[2.0, -1.6, 0.3, 0.1]], &Default::default());
//! let trits: Vec<f32> = absmean(weight, Granularity::Row).trits.into_data().iter().collect();
//! assert_eq!(trits, [1.0, -1.0, 0.0, 0.0]);
//! ```

use burn::tensor::{Tensor, TensorData, backend::Backend};
use serde::{Deserialize, Serialize};
use ternoss_backends::reference::{magnitude, spread};

/// How many weights share one `mean|W|`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Granularity {
    /// One scale for the whole matrix.
    Tensor,
    /// One scale per output row.
    Row,
    /// One scale per this many inputs of a row: a multiple of 64; the last group of a row may be shorter.
    Group(usize),
}

impl Granularity {
    /// Inputs per stored group scale: `None` where a row has one scale.
    pub fn group_size(self) -> Option<usize> {
        match self {
            Self::Tensor | Self::Row => None,
            Self::Group(size) => Some(size),
        }
    }
}

/// A weight matrix `[rows, in_features]` taken apart into trits and scales.
///
/// `weight[r, i] = trits[r, i] * row_scales[r] * group_scales[r, i / group_size]`
#[derive(Clone, Debug)]
pub struct TernaryParts<B: Backend> {
    /// -1, 0 or +1, as floats: `[rows, in_features]`.
    pub trits: Tensor<B, 2>,
    /// `[rows]`
    pub row_scales: Tensor<B, 1>,
    /// Whole numbers in `0..=255`: `[rows, groups]`; absent where a row has one scale.
    pub group_scales: Option<Tensor<B, 2>>,
    /// Inputs per group scale.
    pub group_size: Option<usize>,
}

impl<B: Backend> TernaryParts<B> {
    /// Trits `[rows, in_features]` with a float scale for each group, `[rows, groups]`, rounded as the format stores them:
    /// whole multiples, up to 255, of a 255th of the row's largest one. Without a group size there is one scale a row.
    pub fn from_scales(trits: Tensor<B, 2>, scales: Tensor<B, 2>, group_size: Option<usize>) -> Self {
        if group_size.is_none() {
            return Self { trits, row_scales: scales.squeeze_dim(1), group_scales: None, group_size };
        }
        let (row_scales, group_scales) = snap_group_scales(scales);
        Self { trits, row_scales, group_scales: Some(group_scales), group_size }
    }

    /// The ternary matrix in full: `[rows, in_features]`.
    pub fn to_dense(&self) -> Tensor<B, 2> {
        let in_features = self.trits.dims()[1];
        let row_scales = self.row_scales.clone().unsqueeze_dim(1);
        match (&self.group_scales, self.group_size) {
            (Some(group_scales), Some(size)) => {
                let scales = group_scales.clone() * row_scales;
                self.trits.clone() * spread(scales, in_features, size)
            }
            _ => self.trits.clone() * row_scales,
        }
    }
}

/// Absmean: `a = mean|W|`, `t = clip(round(W / a), -1, 1)`, ties to even, `a` per tensor, row or group.
///
/// `weight` is `[rows, in_features]`. Trits come from the exact `a`; a group's stored scale is `a` rounded to the nearest
/// of 255 steps of the row's largest one, so that a dot product stays one integer (see `ternoss_backends::format`).
/// A group of zeros gets trits of zero. The weight must be finite: a NaN would spread over its whole group.
pub fn absmean<B: Backend>(weight: Tensor<B, 2>, granularity: Granularity) -> TernaryParts<B> {
    let [rows, in_features] = weight.dims();
    match granularity {
        Granularity::Tensor => {
            // Rows first: a fixed order of summation, whatever the number of threads.
            let mean = magnitude(weight.clone()).mean_dim(1).mean_dim(0);
            per_row(weight, mean.expand([rows, 1]))
        }
        Granularity::Row => {
            let mean = magnitude(weight.clone()).mean_dim(1);
            per_row(weight, mean)
        }
        Granularity::Group(size) => {
            let groups = in_features.div_ceil(size);
            let mean = group_means(magnitude(weight.clone()), groups, size);
            let trits = round_to_trits(weight, spread(mean.clone(), in_features, size));
            TernaryParts::from_scales(trits, mean, Some(size))
        }
    }
}

fn per_row<B: Backend>(weight: Tensor<B, 2>, mean: Tensor<B, 2>) -> TernaryParts<B> {
    TernaryParts {
        trits: round_to_trits(weight, mean.clone()),
        row_scales: mean.squeeze_dim(1),
        group_scales: None,
        group_size: None,
    }
}

/// `clip(round(weight / scale), -1, 1)`, zero where the scale is zero.
fn round_to_trits<B: Backend>(weight: Tensor<B, 2>, scale: Tensor<B, 2>) -> Tensor<B, 2> {
    let divisor = scale.clone().mask_fill(scale.equal_elem(0.0), 1.0);
    (weight / divisor).round().clamp(-1.0, 1.0)
}

/// Mean over each group of `size` inputs: `[rows, in_features]` to `[rows, groups]`.
fn group_means<B: Backend>(magnitudes: Tensor<B, 2>, groups: usize, size: usize) -> Tensor<B, 2> {
    let [rows, in_features] = magnitudes.dims();
    let device = magnitudes.device();
    let missing = groups * size - in_features;
    let padded = match missing {
        0 => magnitudes,
        _ => Tensor::cat(vec![magnitudes, Tensor::zeros([rows, missing], &device)], 1),
    };
    let sums = padded.reshape([rows, groups, size]).sum_dim(2).squeeze_dim::<2>(2);
    let mut counts = vec![size as f32; groups];
    if let Some(last) = counts.last_mut() {
        *last -= missing as f32;
    }
    sums / Tensor::from_data(TensorData::new(counts, [1, groups]), &device)
}

/// Splits group scales `[rows, groups]` into a float per row and whole multiples of it in `0..=255`.
pub(crate) fn snap_group_scales<B: Backend>(scales: Tensor<B, 2>) -> (Tensor<B, 1>, Tensor<B, 2>) {
    let step = scales.clone().max_dim(1) / 255.0;
    let divisor = step.clone().mask_fill(step.clone().equal_elem(0.0), 1.0);
    let multiples = (scales / divisor).round().clamp(0.0, 255.0);
    (step.squeeze_dim(1), multiples)
}
