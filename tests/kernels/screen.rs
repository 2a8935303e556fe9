use burn::tensor::{DType, Tensor, TensorData};
use burn_flex::Flex;
use burn_ndarray::NdArray;
use proptest::prelude::*;
use ternoss::backends::{
    StoredFloat, StoredMatrix, TernaryBackend, closer_bounds as closer_bounds_op,
    cpu::{
        Kernels,
        bounds::{bounds, closer_bounds},
        screen::{DEVIATIONS, Screen},
        stored::{StoredRows, stored_linear, stored_linear_at},
    },
    reference, screen, screen_bounds,
};

use crate::support::{Noise, all_kernels, assert_close, assert_same, matrix, values};

/// A stored matrix and its sizes.
struct Stored {
    words: Vec<u32>,
    shape: [usize; 2],
    float: StoredFloat,
}

impl Stored {
    fn new(float: StoredFloat, shape: [usize; 2], values: &[f32]) -> Self {
        let mut words = vec![0; shape[0] * float.words_per_row(shape[1]).unwrap()];
        float.encode(values, &mut words);
        Self { words, shape, float }
    }

    fn noise(float: StoredFloat, shape: [usize; 2], seed: u64) -> Self {
        Self::new(float, shape, &Noise::new(seed).floats(shape[0] * shape[1]))
    }

    fn view(&self) -> StoredRows<'_> {
        StoredRows::new(&self.words, self.shape[0], self.shape[1], self.float).unwrap()
    }

    fn exact(&self, x: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; x.len() / self.shape[1] * self.shape[0]];
        stored_linear(Kernels::detect(), &self.view(), x, x.len() / self.shape[1], &mut out).unwrap();
        out
    }
}

fn bounds_of(kernels: Kernels, screen: &Screen, x: &[f32], deviations: f32) -> Vec<f32> {
    let tokens = x.len() / screen.columns();
    let mut out = vec![f32::NAN; tokens * screen.rows()];
    bounds(kernels, screen, x, tokens, deviations, &mut out).unwrap();
    out
}

/// The same with the copy's last bits.
fn closer_bounds_of(kernels: Kernels, screen: &Screen, x: &[f32], deviations: f32) -> Vec<f32> {
    let rows: Vec<u32> = (0..screen.rows() as u32).collect();
    let mut out = bounds_of(kernels, screen, x, deviations);
    for (x, out) in x.chunks(screen.columns()).zip(out.chunks_mut(rows.len())) {
        closer_bounds(kernels, screen, x, &rows, deviations, out).unwrap();
    }
    out
}

/// How bounds are made.
type Bounds = fn(Kernels, &Screen, &[f32], f32) -> Vec<f32>;

/// How far each product is from its estimate, in standard deviations: bounds are linear in their number.
fn deviations(stored: &Stored, x: &[f32], bounds: Bounds) -> Vec<f64> {
    let kernels = Kernels::detect();
    let screen = Screen::new(kernels, &stored.view(), &mut || {});
    let (estimate, one) = (bounds(kernels, &screen, x, 0.0), bounds(kernels, &screen, x, 1.0));
    let sigma = estimate.iter().zip(&one).map(|(estimate, one)| f64::from(one - estimate));
    let error = stored.exact(x).into_iter().zip(&estimate).map(|(exact, estimate)| f64::from(exact - estimate));
    error.zip(sigma).map(|(error, sigma)| error / sigma).collect()
}

#[track_caller]
fn spread_is_as_promised(stored: &Stored, x: &[f32], room: f64, what: &str) {
    for bounds in [bounds_of as Bounds, closer_bounds_of] {
        let deviations = deviations(stored, x, bounds);
        let count = deviations.len() as f64;
        let mean = deviations.iter().sum::<f64>() / count;
        let spread = (deviations.iter().map(|d| d * d).sum::<f64>() / count).sqrt();
        let largest = deviations.iter().fold(0f64, |largest, d| largest.max(d.abs()));
        let is_spread = (0.85 - room..1.0 + room).contains(&spread);
        assert!(mean.abs() < room && is_spread && largest < 6.0, "{what}: {mean} {spread} {largest}");
    }
}

#[test]
fn the_last_bits_halve_the_error() {
    let stored = Stored::noise(StoredFloat::Bf16, [2000, 2880], 1);
    let x = Noise::new(2).floats(2880);
    let screen = Screen::new(Kernels::detect(), &stored.view(), &mut || {});
    let errors = |bounds: Bounds| -> f32 {
        let estimates = bounds(Kernels::detect(), &screen, &x, 0.0);
        stored.exact(&x).iter().zip(&estimates).map(|(exact, estimate)| (exact - estimate).powi(2)).sum()
    };
    let ratio = errors(closer_bounds_of) / errors(bounds_of);
    assert!((0.2..0.3).contains(&ratio), "{ratio} of the squared error");
    let room = |bounds: Bounds| -> f32 {
        let bounds = bounds(Kernels::detect(), &screen, &x, DEVIATIONS);
        stored.exact(&x).iter().zip(&bounds).map(|(exact, bound)| bound - exact).sum()
    };
    assert!((0.45..0.55).contains(&(room(closer_bounds_of) / room(bounds_of))), "half the distance");
}

#[test]
fn errors_spread_as_the_formula_says() {
    let (shape, tokens) = ([3000, 2880], 20);
    let x = Noise::new(1).floats(tokens * shape[1]);
    spread_is_as_promised(&Stored::noise(StoredFloat::Bf16, shape, 2), &x, 0.05, "noise");
    // Weights that are the same again and again, where rounding to the nearest code is off by the same every time. All rows
    // have the same error but for their size, so that there are as few samples as tokens.
    let (few, many) = ([30, shape[1]], Noise::new(4).floats(300 * shape[1]));
    let constant: Vec<f32> = (0..few[0] * few[1]).map(|i| 1.0 + (i / few[1]) as f32 / 512.0).collect();
    spread_is_as_promised(&Stored::new(StoredFloat::F32, few, &constant), &many, 0.25, "equal weights");
    // A few inputs that are far larger than the others, in weights and tokens.
    let outliers = |values: &[f32]| -> Vec<f32> {
        values.iter().enumerate().map(|(i, x)| if i % shape[1] % 720 == 7 { x * 50.0 } else { *x }).collect()
    };
    let weights = outliers(&Noise::new(3).floats(shape[0] * shape[1]));
    spread_is_as_promised(&Stored::new(StoredFloat::Bf16, shape, &weights), &outliers(&x), 0.1, "outliers");
    // Tokens that are rows of the matrix: large products.
    let rows: Vec<f32> = weights[..tokens * shape[1]].to_vec();
    spread_is_as_promised(&Stored::new(StoredFloat::Bf16, shape, &weights), &rows, 0.1, "own rows");
}

fn any_float() -> impl Strategy<Value = StoredFloat> {
    prop::sample::select(&StoredFloat::ALL)
}

/// Factors of rows and tokens, from zero to out of range.
fn any_size() -> impl Strategy<Value = f32> {
    let unusual = vec![0.0, 1e-44, 1e-38, 1e-20, 1e20, 1e38, f32::MAX, f32::INFINITY, f32::NAN];
    prop_oneof![4 => Just(1.0f32), 1 => prop::sample::select(unusual)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_instruction_set_gives_the_same_bounds_and_they_hold(
        float in any_float(),
        row_sizes in prop::collection::vec(any_size(), 1..90),
        half in prop_oneof![1..=120usize, Just(288), Just(512)],
        token_sizes in prop::collection::vec(any_size(), 0..11),
        seed: u64,
    ) {
        let columns = 2 * half;
        let scaled = |sizes: &[f32], seed| -> Vec<f32> {
            let values = Noise::new(seed).floats(sizes.len() * columns);
            values.iter().enumerate().map(|(i, x)| x * sizes[i / columns]).collect()
        };
        let stored = Stored::new(float, [row_sizes.len(), columns], &scaled(&row_sizes, seed));
        let x = scaled(&token_sizes, seed ^ 1);
        let plain = all_kernels().next().unwrap();
        let expected = Screen::new(plain, &stored.view(), &mut || {});
        let expected_bounds = bounds_of(plain, &expected, &x, DEVIATIONS);
        let expected_closer = closer_bounds_of(plain, &expected, &x, DEVIATIONS);
        for kernels in all_kernels() {
            let screen = Screen::new(kernels, &stored.view(), &mut || {});
            prop_assert!(screen == expected, "{}", kernels.isa());
            assert_same(&bounds_of(kernels, &screen, &x, DEVIATIONS), &expected_bounds, &format!("{}", kernels.isa()));
            let closer = closer_bounds_of(kernels, &screen, &x, DEVIATIONS);
            assert_same(&closer, &expected_closer, &format!("{}, closer", kernels.isa()));
        }
        let bounds = stored.exact(&x).into_iter().zip(expected_bounds.into_iter().zip(expected_closer));
        for (exact, bound) in bounds.flat_map(|(exact, (bound, closer))| [(exact, bound), (exact, closer)]) {
            prop_assert!(exact <= bound || exact.is_nan() && bound == f32::INFINITY, "{exact} above {bound}");
        }
    }
}

#[test]
fn a_screen_and_its_bounds_do_not_depend_on_threads_or_batch() {
    let stored = Stored::noise(StoredFloat::Bf16, [1500, 2880], 1);
    let x = Noise::new(2).floats(11 * 2880);
    for kernels in all_kernels() {
        let expected = Screen::new(kernels, &stored.view(), &mut || {});
        let alone: Vec<f32> = x.chunks(2880).flat_map(|x| bounds_of(kernels, &expected, x, DEVIATIONS)).collect();
        let closer = |row: u32| {
            let mut bound = [alone[row as usize]];
            closer_bounds(kernels, &expected, &x[..2880], &[row], DEVIATIONS, &mut bound).unwrap();
            bound[0]
        };
        let expected_closer: Vec<f32> = (0..1500).map(closer).collect();
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let screen = Screen::new(kernels, &stored.view(), &mut || {});
                assert!(screen == expected, "{} on {threads} threads", kernels.isa());
                assert_same(&bounds_of(kernels, &screen, &x, DEVIATIONS), &alone, &format!("{threads} threads"));
                let closer = closer_bounds_of(kernels, &screen, &x[..2880], DEVIATIONS);
                assert_same(&closer, &expected_closer, &format!("closer, {threads} threads"));
            });
        }
    }
}

#[test]
fn chosen_rows_have_the_bits_of_the_whole_product() {
    for (float, shape) in [(StoredFloat::Bf16, [500, 2880]), (StoredFloat::F16, [37, 90]), (StoredFloat::F32, [9, 31])]
    {
        let stored = Stored::noise(float, shape, 1);
        let x = Noise::new(2).floats(5 * shape[1]);
        let whole = stored.exact(&x);
        let chosen: Vec<Option<usize>> = (0..613).map(|n| Some(n * 7919 % (shape[0] + 1))).chain([None]).collect();
        for kernels in all_kernels() {
            let mut found = vec![0.0; 5 * chosen.len()];
            stored_linear_at(kernels, &stored.view(), &x, 5, &chosen, &mut found).unwrap();
            let row =
                |t: usize, row: Option<usize>| row.filter(|row| *row < shape[0]).map(|row| whole[t * shape[0] + row]);
            let expected: Vec<f32> =
                (0..5).flat_map(|t| chosen.iter().map(move |n| row(t, *n).unwrap_or(f32::NAN))).collect();
            assert_same(&found, &expected, &format!("{float} {}", kernels.isa()));
        }
    }
}

fn backend_screens<B: TernaryBackend>() {
    let stored = Stored::noise(StoredFloat::Bf16, [300, 90], 1);
    let words = TensorData::new(stored.words.clone(), [300, 45]);
    let words = Tensor::from_data(words, (&B::Device::default(), DType::U32));
    let table = StoredMatrix::<B>::new(words, 90, StoredFloat::Bf16).unwrap();
    let x = Noise::new(2).floats(3 * 90);
    let screen = screen(&table, || {}).unwrap();
    assert!(screen == Screen::new(Kernels::detect(), &stored.view(), &mut || {}));
    let found = values(screen_bounds(matrix::<B>(&x, [3, 90]), &screen));
    assert_same(&found, &bounds_of(Kernels::detect(), &screen, &x, DEVIATIONS), "bounds");
    let mut closer = [found[299], found[5], 7.0];
    closer_bounds_op(matrix::<B>(&x[..90], [1, 90]), &screen, &[299, 5, 300], &mut closer);
    let expected = closer_bounds_of(Kernels::detect(), &screen, &x[..90], DEVIATIONS);
    assert_same(&closer, &[expected[299], expected[5], 7.0], "closer bounds, and no row");
    let ids = Tensor::from_data(TensorData::new(vec![5i64, 299, 300, -1], [4]), &B::Device::default());
    let at = values(ternoss::backends::stored_linear_at(matrix::<B>(&x, [3, 90]), &table, ids.clone()));
    let whole = stored.exact(&x);
    for (at, whole) in at.chunks(4).zip(whole.chunks(300)) {
        assert_same(at, &[whole[5], whole[299], f32::NAN, f32::NAN], "chosen rows");
    }
    let plain = values(reference::stored_linear_at(matrix::<B>(&x, [3, 90]), &table, ids));
    assert_close(&plain, &at, 1e-5, "plain Burn");
}

#[test]
fn flex_and_ndarray_screen() {
    backend_screens::<Flex>();
    backend_screens::<NdArray>();
}
