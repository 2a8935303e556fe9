use burn::tensor::{DType, Int, Tensor, TensorData, backend::Backend};
use burn_flex::Flex;
use burn_ndarray::NdArray;
use proptest::prelude::*;
use ternoss::backends::{
    FormatError, StoredFloat, StoredMatrix, TernaryBackend,
    cpu::{
        Kernels,
        stored::{LANES, StoredRows},
    },
    reference, stored_linear, stored_rows,
};

use crate::support::{Noise, all_kernels, assert_close, assert_same, matrix, values};

/// Rows of noise in some float type: words, and the values they stand for.
fn rows(float: StoredFloat, rows: usize, columns: usize, seed: u64) -> (Vec<u32>, Vec<f32>) {
    let mut words = vec![0; rows * float.words_per_row(columns).unwrap()];
    float.encode(&Noise::new(seed).floats(rows * columns), &mut words);
    let mut values = vec![0.0; rows * columns];
    float.decode(&words, &mut values);
    (words, values)
}

fn run(kernels: Kernels, float: StoredFloat, words: &[u32], shape: [usize; 2], x: &[f32]) -> Vec<f32> {
    let tokens = x.len() / shape[1];
    let mut out = vec![f32::NAN; tokens * shape[0]];
    let view = StoredRows::new(words, shape[0], shape[1], float).unwrap();
    ternoss::backends::cpu::stored::stored_linear(kernels, &view, x, tokens, &mut out).unwrap();
    out
}

/// The documented order of a dot product.
fn dot(weights: &[f32], x: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    for i in 0..weights.len().next_multiple_of(LANES) {
        let at = |values: &[f32]| values.get(i).copied().unwrap_or(0.0);
        lanes[i % LANES] = at(weights).mul_add(at(x), lanes[i % LANES]);
    }
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        (0..width).for_each(|lane| lanes[lane] += lanes[lane + width]);
    }
    lanes[0]
}

fn any_float() -> impl Strategy<Value = StoredFloat> {
    prop::sample::select(&StoredFloat::ALL)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn every_instruction_set_sums_in_the_documented_order(
        float in any_float(),
        n in 1..40usize,
        half in 1..60usize,
        tokens in 0..8usize,
        seed: u64,
    ) {
        let columns = 2 * half;
        let (words, dense) = rows(float, n, columns, seed);
        let x = Noise::new(seed ^ 1).floats(tokens * columns);
        let expected: Vec<f32> = x.chunks(columns).flat_map(|x| dense.chunks(columns).map(|row| dot(row, x))).collect();
        for kernels in all_kernels() {
            assert_same(&run(kernels, float, &words, [n, columns], &x), &expected, &format!("{} {float}", kernels.isa()));
        }
    }
}

#[test]
fn a_token_does_not_see_its_batch_nor_the_threads() {
    let shape = [700, 2880];
    let (words, _) = rows(StoredFloat::Bf16, shape[0], shape[1], 1);
    let x = Noise::new(2).floats(7 * shape[1]);
    for kernels in all_kernels() {
        let one = |x: &[f32]| run(kernels, StoredFloat::Bf16, &words, shape, x);
        let alone: Vec<f32> = x.chunks(shape[1]).flat_map(one).collect();
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            assert_same(&pool.install(|| one(&x)), &alone, &format!("{} on {threads} threads", kernels.isa()));
        }
    }
}

fn stored<B: Backend>(float: StoredFloat, words: &[u32], shape: [usize; 2]) -> StoredMatrix<B> {
    let data = TensorData::new(words.to_vec(), [shape[0], words.len() / shape[0]]);
    StoredMatrix::new(Tensor::from_data(data, (&Default::default(), DType::U32)), shape[1], float).unwrap()
}

fn ids<B: Backend>(ids: &[i64]) -> Tensor<B, 1, Int> {
    Tensor::from_data(TensorData::new(ids.to_vec(), [ids.len()]), &Default::default())
}

fn backend_agrees<B: TernaryBackend>() {
    for float in StoredFloat::ALL {
        let shape = [37, 90];
        let (words, dense) = rows(float, shape[0], shape[1], 1);
        let stored = stored::<B>(float, &words, shape);
        let x = Noise::new(2).floats(5 * shape[1]);
        let y = values(stored_linear(matrix::<B>(&x, [5, shape[1]]), &stored));
        let plain = values(reference::stored_linear(matrix::<B>(&x, [5, shape[1]]), &stored));
        assert_close(&y, &plain, 1e-5, "against plain Burn");
        let chosen = [3, 36, 0, 37, -1];
        let gathered = values(stored_rows(&stored, ids::<B>(&chosen)));
        assert_same(&gathered, &values(reference::stored_rows(&stored, ids::<B>(&chosen))), "rows");
        assert_same(&gathered[90..180], &dense[36 * 90..], "the last row");
        assert!(gathered[270..].iter().all(|x| x.is_nan()), "rows that are not there");
    }
}

#[test]
fn flex_agrees_with_plain_burn() {
    backend_agrees::<Flex>();
}

#[test]
fn ndarray_agrees_with_plain_burn() {
    backend_agrees::<NdArray>();
}

#[test]
fn plain_burn_works_in_pieces() {
    // More elements than are converted at a time.
    let shape = [1 << 12, 2050];
    let (words, dense) = rows(StoredFloat::F16, shape[0], shape[1], 1);
    let stored = stored::<Flex>(StoredFloat::F16, &words, shape);
    let x = Noise::new(2).floats(shape[1]);
    let y = values(reference::stored_linear(matrix(&x, [1, shape[1]]), &stored));
    let expected: Vec<f32> = dense.chunks(shape[1]).map(|row| dot(row, &x)).collect();
    assert_close(&y, &expected, 1e-5, "pieces");
    let grad = Noise::new(3).floats(shape[0]);
    let back = values(reference::stored_linear_transposed(matrix(&grad, [1, shape[0]]), &stored));
    let column = |c: usize| (0..shape[0]).map(|r| f64::from(grad[r]) * f64::from(dense[r * shape[1] + c])).sum::<f64>();
    let expected: Vec<f32> = (0..shape[1]).map(|c| column(c) as f32).collect();
    assert_close(&back, &expected, 1e-5, "transposed");
}

#[test]
fn rows_that_are_not_whole_words_are_refused() {
    let words = Tensor::<Flex, 2, Int>::zeros([4, 3], (&Default::default(), DType::U32));
    let odd = StoredMatrix::new(words.clone(), 5, StoredFloat::Bf16).err();
    assert_eq!(odd, Some(FormatError::RaggedRow { columns: 5, element_bytes: 2 }));
    let wrong = StoredMatrix::new(words.clone(), 8, StoredFloat::F16).err();
    assert!(matches!(wrong, Some(FormatError::Shape { .. })));
    assert_eq!(StoredMatrix::new(words, 6, StoredFloat::F16).map(|m| m.rows()).ok(), Some(4));
}
