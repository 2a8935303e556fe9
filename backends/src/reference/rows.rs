use burn::tensor::{DType, Int, Tensor, backend::Backend};

use super::rotate_back;
use crate::format::TernaryWeight;

/// [`ternary_rows`](crate::ternary_rows), one row at a time, differentiable in the row scales.
#[must_use]
pub fn ternary_rows<B: Backend>(weight: &TernaryWeight<B>, matrix: usize, ids: Tensor<B, 1, Int>) -> Tensor<B, 2> {
    let options = (&weight.row_scales.device(), DType::F32);
    let in_features = weight.layout.in_features;
    let row = |id: i64| match usize::try_from(id).ok().filter(|&id| id < weight.layout.rows) {
        Some(id) => weight.row(matrix, id).to_dense(0),
        None => Tensor::full([1, in_features], f32::NAN, options),
    };
    let rows: Vec<_> = ids.into_data().iter::<i64>().map(row).collect();
    if rows.is_empty() {
        return Tensor::zeros([0, in_features], options);
    }
    let rows = Tensor::cat(rows, 0);
    match weight.layout.rotation {
        Some(rotation) => rotate_back(rows, rotation),
        None => rows,
    }
}
