//! A matrix on its way to being ternary: trits and float scales on the host.

use burn::tensor::{Tensor, TensorData, backend::Backend};
use rayon::prelude::*;
use ternoss_quant::TernaryParts;

use crate::levels::{Levels, MAX_PLANES, fit_scales, search_threshold};

/// Sizes of a matrix and of what shares a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// Outputs.
    pub(crate) rows: usize,
    /// Inputs.
    pub(crate) in_features: usize,
    /// Inputs per scale; `None` for one scale a row.
    pub(crate) group_size: Option<usize>,
    /// Trits a weight is the sum of.
    pub(crate) planes: usize,
}

impl Geometry {
    /// Inputs per scale.
    pub(crate) fn group(&self) -> usize {
        self.group_size.unwrap_or(self.in_features).min(self.in_features)
    }

    /// Scales in a row of one plane.
    pub(crate) fn groups(&self) -> usize {
        self.in_features.div_ceil(self.group())
    }
}

/// One row: its trits `[planes, in_features]` and scales `[planes, groups]`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Row {
    pub(crate) trits: Vec<i8>,
    pub(crate) scales: Vec<f32>,
}

impl Row {
    pub(crate) fn empty(geometry: &Geometry) -> Self {
        let Geometry { in_features, planes, .. } = *geometry;
        Self { trits: vec![0; planes * in_features], scales: vec![0.0; planes * geometry.groups()] }
    }

    /// The levels of one group.
    pub(crate) fn levels(&self, geometry: &Geometry, group: usize) -> Levels {
        let mut scales = [0.0; MAX_PLANES];
        for (plane, scale) in scales.iter_mut().enumerate().take(geometry.planes) {
            *scale = self.scales[plane * geometry.groups() + group];
        }
        Levels::new(&scales[..geometry.planes])
    }

    pub(crate) fn set_scales(&mut self, geometry: &Geometry, group: usize, scales: &[f32; MAX_PLANES]) {
        for plane in 0..geometry.planes {
            self.scales[plane * geometry.groups() + group] = scales[plane];
        }
    }

    pub(crate) fn set_trits(&mut self, geometry: &Geometry, input: usize, trits: [i8; MAX_PLANES]) {
        for plane in 0..geometry.planes {
            self.trits[plane * geometry.in_features + input] = trits[plane];
        }
    }

    /// The weights that trits and scales stand for.
    pub(crate) fn dense(&self, geometry: &Geometry, out: &mut [f32]) {
        out.fill(0.0);
        for (trits, scales) in self.trits.chunks(geometry.in_features).zip(self.scales.chunks(geometry.groups())) {
            for (i, (out, trit)) in out.iter_mut().zip(trits).enumerate() {
                *out += f32::from(*trit) * scales[i / geometry.group()];
            }
        }
    }
}

/// All rows of a matrix.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Solution {
    pub(crate) geometry: Geometry,
    pub(crate) rows: Vec<Row>,
}

impl Solution {
    /// Every group on its own, without looking at any text: the scales that fit the weights best.
    pub(crate) fn fitted(weights: &[f32], geometry: Geometry) -> Self {
        let importance = vec![1.0; geometry.group()];
        Self::by_group(weights, geometry, |group, row, index, first| {
            let scales = fit_scales(group, &importance[..group.len()], geometry.planes);
            row.set_scales(&geometry, index, &scales);
            let levels = Levels::new(&scales[..geometry.planes]);
            for (i, w) in group.iter().enumerate() {
                row.set_trits(&geometry, first + i, levels.nearest(*w).1);
            }
        })
    }

    /// Stage 1 of PT-BitNet as described: [`search_threshold`] on every group, one plane.
    pub(crate) fn searched(weights: &[f32], geometry: Geometry) -> Self {
        Self::by_group(weights, geometry, |group, row, index, first| {
            let (threshold, scale) = search_threshold(group);
            row.scales[index] = scale;
            for (i, w) in group.iter().enumerate() {
                row.trits[first + i] = if w.abs() > threshold { w.signum() as i8 } else { 0 };
            }
        })
    }

    /// Calls `each` with every group of every row, the row, the group's index and its first input.
    fn by_group(
        weights: &[f32],
        geometry: Geometry,
        each: impl Fn(&[f32], &mut Row, usize, usize) + Send + Sync,
    ) -> Self {
        let rows = weights.par_chunks(geometry.in_features).map(|weights| {
            let mut row = Row::empty(&geometry);
            for (index, group) in weights.chunks(geometry.group()).enumerate() {
                each(group, &mut row, index, index * geometry.group());
            }
            row
        });
        Self { geometry, rows: rows.collect() }
    }

    /// Rounds the scales as the format stores them, so that what follows works with what will be read.
    pub(crate) fn snap_scales(&mut self) {
        if self.geometry.group_size.is_none() {
            return;
        }
        let groups = self.geometry.groups();
        self.rows.par_iter_mut().flat_map_iter(|row| row.scales.chunks_mut(groups)).for_each(|scales| {
            let step = scales.iter().copied().fold(0.0, f32::max) / 255.0;
            if step > 0.0 {
                scales.iter_mut().for_each(|scale| *scale = (*scale / step).round_ties_even() * step);
            }
        });
    }

    /// The weights that it stands for: `[rows, in_features]`.
    pub(crate) fn dense<B: Backend>(&self, device: &B::Device) -> Tensor<B, 2> {
        let Geometry { rows, in_features, .. } = self.geometry;
        let mut dense = vec![0.0; rows * in_features];
        dense.par_chunks_mut(in_features).zip(&self.rows).for_each(|(out, row)| row.dense(&self.geometry, out));
        Tensor::from_data(TensorData::new(dense, [rows, in_features]), device)
    }

    /// One part a plane, its scales rounded as the format stores them.
    pub(crate) fn parts<B: Backend>(&self, device: &B::Device) -> Vec<TernaryParts<B>> {
        let Geometry { rows, in_features, group_size, planes } = self.geometry;
        let groups = self.geometry.groups();
        let part = |plane: usize| {
            let trits: Vec<f32> = self
                .rows
                .iter()
                .flat_map(|row| row.trits[plane * in_features..][..in_features].iter().map(|trit| f32::from(*trit)))
                .collect();
            let scales: Vec<f32> =
                self.rows.iter().flat_map(|row| row.scales[plane * groups..][..groups].iter().copied()).collect();
            TernaryParts::from_scales(
                Tensor::from_data(TensorData::new(trits, [rows, in_features]), device),
                Tensor::from_data(TensorData::new(scales, [rows, groups]), device),
                group_size,
            )
        };
        (0..planes).map(part).collect()
    }
}

pub(crate) fn host<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

/// In double precision and a fixed order, so that it does not depend on the thread count.
pub(crate) fn sum<B: Backend>(values: Tensor<B, 2>) -> f64 {
    values.sum_dim(1).into_data().iter::<f32>().map(f64::from).sum()
}
