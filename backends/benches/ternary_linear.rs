//! Weights a second of the ternary kernels, and bytes a second of the stored matrices, on one thread.
//!
//! ```text
//! taskset -c 0 cargo bench -p ternoss-backends --bench ternary_linear
//! ```
//!
//! The sizes are those of one gpt-oss expert's first matrix (4 MB of codes: the second or third cache level) and of a piece
//! of the output layer (74 MB: memory).

use std::{hint::black_box, time::Duration};

use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime};
use ternoss_backends::{
    CodeFormat, StoredFloat, TernaryLayout,
    cpu::{
        Isa, Kernels, TernaryMatrices,
        linear::ternary_linear,
        lookup::{self, LookupRows, Tables},
        stored::{StoredRows, stored_linear},
        tokens::Tokens,
    },
};

/// Numbers without a pattern, the same every time (Marsaglia's xorshift).
struct Noise(u32);

impl Noise {
    fn next(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 17;
        self.0 ^= self.0 << 5;
        self.0
    }

    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.next() as f32 / u32::MAX as f32 - 0.5).collect()
    }
}

/// Packed weights of some layout, full of noise.
struct Weights {
    layout: TernaryLayout,
    codes: Vec<u32>,
    row_scales: Vec<f32>,
    group_scales: Option<Vec<u8>>,
}

impl Weights {
    fn new(format: CodeFormat, rows: usize, in_features: usize, group_size: Option<usize>) -> Self {
        let layout = TernaryLayout { format, matrices: 1, planes: 1, rows, in_features, group_size, rotation: None };
        let mut noise = Noise(1);
        let words = layout.words_per_row();
        let mut codes = vec![0; rows * words];
        for row in codes.chunks_exact_mut(words) {
            let trits: Vec<i8> = (0..in_features).map(|_| (noise.next() % 3) as i8 - 1).collect();
            format.pack_row(&trits, row);
        }
        let groups = rows * layout.groups();
        let group_scales = group_size.map(|_| (0..groups).map(|_| noise.next() as u8).collect());
        Self { layout, codes, row_scales: noise.floats(rows), group_scales }
    }

    fn view(&self) -> TernaryMatrices<'_> {
        TernaryMatrices::new(self.layout, &self.codes, &self.row_scales, self.group_scales.as_deref())
            .expect("the slices follow the layout")
    }
}

/// What is measured quickly, so that all of it takes less than a minute.
fn quick<'a>(c: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(name);
    group.sample_size(20).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(600));
    group
}

/// The instruction sets at hand, without plain Rust.
fn all_kernels() -> impl Iterator<Item = Kernels> {
    Isa::available().iter().filter(|isa| **isa != Isa::Scalar).filter_map(|isa| Kernels::new(*isa))
}

const CASES: [(&str, CodeFormat, Option<usize>); 4] = [
    ("t2", CodeFormat::T2, None),
    ("t2-u8-per-64", CodeFormat::T2, Some(64)),
    ("t5", CodeFormat::T5, None),
    ("t5-u8-per-64", CodeFormat::T5, Some(64)),
];

fn ternary(c: &mut Criterion) {
    let (rows, in_features) = (5760, 2880);
    let mut group = quick(c, "ternary_linear");
    for (name, format, group_size) in CASES {
        let weights = Weights::new(format, rows, in_features, group_size);
        let matrix = weights.view().matrix(0).expect("one matrix");
        for (batch, kernels) in [1, 8, 16, 64].into_iter().flat_map(|batch| all_kernels().map(move |k| (batch, k))) {
            let tokens = Tokens::quantize(kernels, &Noise(2).floats(batch * in_features), in_features, None);
            let mut out = vec![0.0; batch * rows];
            group.throughput(Throughput::Elements((rows * in_features * batch) as u64));
            group.bench_function(format!("{name}/{}/batch-{batch}", kernels.isa()), |bench| {
                bench.iter(|| ternary_linear(kernels, &matrix, black_box(&tokens), black_box(&mut out)));
            });
        }
    }
    let kernels = Kernels::detect();
    let x = Noise(3).floats(in_features);
    group.throughput(Throughput::Elements(in_features as u64));
    group
        .bench_function("quantize", |bench| bench.iter(|| Tokens::quantize(kernels, black_box(&x), in_features, None)));
    group.finish();
}

/// Weights larger than any cache, so that they come from memory each time: the experts of several layers.
fn from_memory(c: &mut Criterion) {
    let (rows, in_features) = (5760 * 24, 2880);
    let mut group = quick(c, "ternary_linear_from_memory");
    for (name, format, group_size) in CASES {
        let weights = Weights::new(format, rows, in_features, group_size);
        let matrix = weights.view().matrix(0).expect("one matrix");
        for (batch, kernels) in [1, 8].into_iter().flat_map(|batch| all_kernels().map(move |k| (batch, k))) {
            let tokens = Tokens::quantize(kernels, &Noise(2).floats(batch * in_features), in_features, None);
            let mut out = vec![0.0; batch * rows];
            group.throughput(Throughput::Elements((rows * in_features * batch) as u64));
            group.bench_function(format!("{name}/{}/batch-{batch}", kernels.isa()), |bench| {
                bench.iter(|| ternary_linear(kernels, &matrix, black_box(&tokens), black_box(&mut out)));
            });
        }
    }
    group.finish();
}

/// The lookup-table family on the same shapes; its tables are made beforehand.
fn by_lookup(c: &mut Criterion) {
    let in_features = 2880;
    let mut group = quick(c, "lookup");
    // Instruction sets above AVX2 look up as it does.
    let kernels = all_kernels().next().unwrap_or(Kernels::detect());
    for (place, rows) in [("cache", 5760), ("memory", 5760 * 24)] {
        for (name, format, group_size) in CASES.into_iter().filter(|(_, format, _)| *format == CodeFormat::T2) {
            let weights = Weights::new(format, rows, in_features, group_size);
            let matrix = weights.view().matrix(0).and_then(|rows| LookupRows::new(&rows)).expect("one t2 matrix");
            for batch in [1, 8] {
                let tokens = Tokens::quantize(kernels, &Noise(2).floats(batch * in_features), in_features, None);
                let (tables, mut out) = (Tables::new(&tokens), vec![0.0; batch * rows]);
                group.throughput(Throughput::Elements((rows * in_features * batch) as u64));
                group.bench_function(format!("{name}/{}/{place}/batch-{batch}", kernels.isa()), |bench| {
                    bench.iter(|| lookup::ternary_linear(kernels, &matrix, black_box(&tables), black_box(&mut out)));
                });
            }
        }
    }
    group.finish();
}

fn stored(c: &mut Criterion) {
    let (rows, columns) = (12_800, 2880);
    let float = StoredFloat::Bf16;
    let mut group = c.benchmark_group("stored_linear");
    group.sample_size(20);
    let values = Noise(4).floats(rows * columns);
    let mut words = vec![0; rows * columns / 2];
    float.encode(&values, &mut words);
    let matrix = StoredRows::new(&words, rows, columns, float).expect("whole rows");
    for isa in Isa::available() {
        let Some(kernels) = Kernels::new(*isa) else {
            continue;
        };
        for batch in [1, 3, 24] {
            let x = Noise(5).floats(batch * columns);
            let mut out = vec![0.0; batch * rows];
            group.throughput(Throughput::Bytes((rows * columns * 2) as u64));
            group.bench_function(format!("{float}/{isa}/batch-{batch}"), |bench| {
                bench.iter(|| stored_linear(kernels, &matrix, black_box(&x), batch, black_box(&mut out)));
            });
        }
    }
    group.finish();
}

fn one_thread(c: &mut Criterion) {
    rayon::ThreadPoolBuilder::new().num_threads(1).build_global().expect("the first use of the pool");
    ternary(c);
    from_memory(c);
    by_lookup(c);
    stored(c);
}

criterion_group!(benches, one_thread);
criterion_main!(benches);
