use burn::tensor::{DType, Int, Tensor, TensorData, backend::Backend};

use crate::ops::StoredMatrix;

/// Elements that are converted to `f32` at a time: 16 MiB.
const CHUNK: usize = 4 << 20;

/// [`stored_linear`](crate::stored_linear) as matrix products with a few rows at a time. The order of the sums is the
/// backend's.
#[must_use]
pub fn stored_linear<B: Backend>(x: Tensor<B, 2>, matrix: &StoredMatrix<B>) -> Tensor<B, 2> {
    let parts = row_chunks(matrix).map(|rows| x.clone().matmul(dense_rows(matrix, rows).transpose()));
    let parts: Vec<_> = parts.collect();
    if parts.is_empty() {
        return Tensor::zeros([x.dims()[0], 0], &x.device());
    }
    Tensor::cat(parts, 1)
}

/// [`stored_linear_at`](crate::stored_linear_at) as a product with the rows as floats.
#[must_use]
pub fn stored_linear_at<B: Backend>(
    x: Tensor<B, 2>,
    matrix: &StoredMatrix<B>,
    rows: Tensor<B, 1, Int>,
) -> Tensor<B, 2> {
    if rows.dims()[0] == 0 {
        return Tensor::zeros([x.dims()[0], 0], &x.device());
    }
    x.matmul(stored_rows(matrix, rows).transpose())
}

/// The gradient of [`stored_linear`] for `x`: `grad [tokens, rows]` times the matrix, `[tokens, columns]`.
#[must_use]
pub fn stored_linear_transposed<B: Backend>(grad: Tensor<B, 2>, matrix: &StoredMatrix<B>) -> Tensor<B, 2> {
    let tokens = grad.dims()[0];
    let zero = Tensor::zeros([tokens, matrix.columns()], (&grad.device(), DType::F32));
    row_chunks(matrix)
        .fold(zero, |sum, rows| sum + grad.clone().slice([0..tokens, rows.clone()]).matmul(dense_rows(matrix, rows)))
}

/// [`stored_rows`](crate::stored_rows), decoded on the host.
#[must_use]
pub fn stored_rows<B: Backend>(matrix: &StoredMatrix<B>, ids: Tensor<B, 1, Int>) -> Tensor<B, 2> {
    let device = ids.device();
    let columns = matrix.columns();
    let ids: Vec<i64> = ids.into_data().iter::<i64>().collect();
    let mut rows = vec![f32::NAN; ids.len() * columns];
    for (id, row) in ids.iter().zip(rows.chunks_exact_mut(columns)) {
        if let Some(id) = usize::try_from(*id).ok().filter(|&id| id < matrix.rows()) {
            decode(matrix, id..id + 1, row);
        }
    }
    Tensor::from_data(TensorData::new(rows, [ids.len(), columns]), (&device, DType::F32))
}

fn row_chunks<B: Backend>(matrix: &StoredMatrix<B>) -> impl Iterator<Item = std::ops::Range<usize>> {
    let (rows, step) = (matrix.rows(), (CHUNK / matrix.columns()).max(1));
    (0..rows).step_by(step).map(move |start| start..(start + step).min(rows))
}

fn dense_rows<B: Backend>(matrix: &StoredMatrix<B>, rows: std::ops::Range<usize>) -> Tensor<B, 2> {
    let shape = [rows.len(), matrix.columns()];
    let mut dense = vec![0.0; shape[0] * shape[1]];
    decode(matrix, rows, &mut dense);
    Tensor::from_data(TensorData::new(dense, shape), (&matrix.words.device(), DType::F32))
}

fn decode<B: Backend>(matrix: &StoredMatrix<B>, rows: std::ops::Range<usize>, out: &mut [f32]) {
    let words: Vec<u32> = matrix.words.clone().slice([rows]).into_data().iter::<u32>().collect();
    // Rows are whole words, so many rows decode like a long one.
    matrix.float().decode(&words, out);
}
