//! Attention of one token over a long cache: multiply-adds a second, on one thread.
//!
//! ```text
//! taskset -c 0 cargo bench -p ternoss-backends --bench attention
//! ```
//!
//! The sizes are gpt-oss-20b's: 64 queries on 8 heads of 64 numbers. Forty layers take turns, so that the cache comes from
//! memory (8 MB a layer in f16): some servers have 260 MB of last-level cache.

use std::{hint::black_box, time::Duration};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ternoss_backends::{
    AttentionSpec, KvFormat,
    cpu::{HeadCaches, Isa, Kernels, attention::cached_attention},
};

const QUERIES: usize = 64;
const HEADS: usize = 8;
const SIZE: usize = 64;
const CONTEXT: usize = 4096;
const LAYERS: usize = 40;

/// Numbers without a pattern, the same every time (Marsaglia's xorshift).
struct Noise(u32);

impl Noise {
    fn floats(&mut self, n: usize) -> Vec<f32> {
        let next = |_| {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 17;
            self.0 ^= self.0 << 5;
            self.0 as f32 / u32::MAX as f32 - 0.5
        };
        (0..n).map(next).collect()
    }
}

fn attention(c: &mut Criterion) {
    rayon::ThreadPoolBuilder::new().num_threads(1).build_global().expect("the first use of the pool");
    let mut noise = Noise(1);
    let spec = AttentionSpec { scale: 0.125, window: None };
    let (q, sinks) = (noise.floats(QUERIES * SIZE), noise.floats(QUERIES));
    let mut out = vec![0.0; q.len()];
    let mut group = c.benchmark_group("attention");
    group.sample_size(20).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(1000));
    group.throughput(Throughput::Elements((2 * QUERIES * SIZE * CONTEXT) as u64));
    for format in [KvFormat::F16, KvFormat::Int8] {
        let mut cache = HeadCaches::new(HEADS, SIZE, format);
        (0..CONTEXT).for_each(|_| cache.push(&noise.floats(HEADS * SIZE), &noise.floats(HEADS * SIZE)));
        let layers = vec![cache; LAYERS];
        for isa in Isa::available().iter().filter(|isa| **isa != Isa::Scalar) {
            let Some(kernels) = Kernels::new(*isa) else { continue };
            let mut turn = layers.iter().cycle();
            group.bench_function(format!("{format}/{isa}"), |bench| {
                bench.iter(|| {
                    let cache = turn.next().expect("a cycle has no end");
                    cached_attention(kernels, black_box(&q), &[cache], &sinks, spec, black_box(&mut out))
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, attention);
criterion_main!(benches);
