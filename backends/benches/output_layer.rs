//! The output layer of gpt-oss-20b, bf16 [201088, 2880], in full and screened, on one thread.
//!
//! ```text
//! taskset -c 0 cargo bench -p ternoss-backends --bench output_layer
//! ```
//!
//! `screened` is what a token takes: the bounds of all rows, closer ones of 6,000, and the exact products of 256 of them.

use std::{hint::black_box, time::Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ternoss_backends::{
    StoredFloat,
    cpu::{
        Kernels,
        bounds::{bounds, closer_bounds},
        screen::{DEVIATIONS, Screen},
        stored::{StoredRows, stored_linear, stored_linear_at},
    },
};

const ROWS: usize = 201_088;
const COLUMNS: usize = 2880;
const CLOSER: usize = 6_000;
const EXACT: usize = 256;

/// Numbers without a pattern, the same every time (Marsaglia's xorshift).
struct Noise(u32);

impl Noise {
    fn next(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 17;
        self.0 ^= self.0 << 5;
        self.0
    }
}

fn output_layer(c: &mut Criterion) {
    let mut noise = Noise(1);
    // Pairs of bf16 numbers of any sign between 2^-5 and 2^-3.
    let words: Vec<u32> = (0..ROWS * COLUMNS / 2).map(|_| noise.next() & 0x80ff_80ff | 0x3d00_3d00).collect();
    let matrix = StoredRows::new(&words, ROWS, COLUMNS, StoredFloat::Bf16).expect("whole rows");
    let kernels = Kernels::detect();
    for threads in [1, 2] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
        let started = Instant::now();
        let screen = pool.install(|| Screen::new(kernels, &matrix, &mut || {}));
        println!("made on {threads} threads in {:.2} s, {} bytes", started.elapsed().as_secs_f64(), screen.bytes());
    }
    rayon::ThreadPoolBuilder::new().num_threads(1).build_global().expect("the first use of the pool");
    let screen = Screen::new(kernels, &matrix, &mut || {});
    // Far from each other, in order.
    let closer: Vec<u32> = (0..CLOSER).map(|n| (n * ROWS / CLOSER) as u32).collect();
    let rows: Vec<Option<usize>> = (0..EXACT).map(|n| Some(n * 7919 % ROWS)).collect();
    let mut group = c.benchmark_group("output_layer");
    group.sample_size(10);
    for batch in [1, 4, 16] {
        let x: Vec<f32> = (0..batch * COLUMNS).map(|_| noise.next() as f32 / u32::MAX as f32 - 0.5).collect();
        let mut out = vec![0.0; batch * ROWS];
        let mut exact = vec![0.0; batch * EXACT];
        group.throughput(Throughput::Elements((ROWS * COLUMNS * batch) as u64));
        group.bench_function(format!("full/batch-{batch}"), |bench| {
            bench.iter(|| stored_linear(kernels, &matrix, black_box(&x), batch, black_box(&mut out)));
        });
        group.bench_function(format!("screened/batch-{batch}"), |bench| {
            bench.iter(|| {
                bounds(kernels, &screen, black_box(&x), batch, DEVIATIONS, black_box(&mut out))?;
                for x in x.chunks(COLUMNS) {
                    closer_bounds(kernels, &screen, x, &closer, DEVIATIONS, black_box(&mut out[..CLOSER]))?;
                }
                stored_linear_at(kernels, &matrix, black_box(&x), batch, &rows, black_box(&mut exact))
            });
        });
    }
    group.finish();
}

criterion_group!(benches, output_layer);
criterion_main!(benches);
