use burn::tensor::{DType, Tensor, TensorData, backend::Backend};
use burn_flex::Flex;
use burn_ndarray::NdArray;
use proptest::prelude::*;
use ternoss::backends::{AttentionSpec, TernaryBackend, reference, sink_attention};

use crate::support::{Noise, assert_close, assert_same, values};

struct Case {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    sinks: Vec<f32>,
    /// Query heads, key heads, queries, keys, size of a head.
    sizes: [usize; 5],
    spec: AttentionSpec,
}

impl Case {
    fn new(sizes: [usize; 5], window: Option<usize>, seed: u64) -> Self {
        let [heads, kv_heads, queries, keys, size] = sizes;
        let mut noise = Noise::new(seed);
        let mut large = |n| noise.floats(n).iter().map(|x| x * 4.0).collect();
        Self {
            q: large(heads * queries * size),
            k: large(kv_heads * keys * size),
            v: large(kv_heads * keys * size),
            sinks: large(heads),
            sizes,
            spec: AttentionSpec { scale: 1.0 / (size as f32).sqrt(), window },
        }
    }

    fn run<B: TernaryBackend>(&self) -> Vec<f32> {
        let [q, k, v, sinks] = self.tensors::<B>();
        let y = sink_attention(q, k, v, sinks.reshape([-1]), self.spec);
        assert_eq!(y.dims(), [self.sizes[2], self.sizes[0] * self.sizes[4]]);
        values(y)
    }

    fn plain<B: Backend>(&self) -> Vec<f32> {
        let [q, k, v, sinks] = self.tensors::<B>();
        values(reference::sink_attention(q, k, v, sinks.reshape([-1]), self.spec))
    }

    fn tensors<B: Backend>(&self) -> [Tensor<B, 3>; 4] {
        let [heads, kv_heads, queries, keys, size] = self.sizes;
        let tensor = |values: &[f32], shape: [usize; 3]| {
            Tensor::from_data(TensorData::new(values.to_vec(), shape), (&B::Device::default(), DType::F32))
        };
        [
            tensor(&self.q, [heads, queries, size]),
            tensor(&self.k, [kv_heads, keys, size]),
            tensor(&self.v, [kv_heads, keys, size]),
            tensor(&self.sinks, [heads, 1, 1]),
        ]
    }

    /// The definition, one query at a time in `f64`.
    fn naive(&self) -> Vec<f32> {
        let [heads, kv_heads, queries, keys, size] = self.sizes;
        let mut out = vec![0.0; queries * heads * size];
        for h in 0..heads {
            let kv = h / (heads / kv_heads) * keys;
            for i in 0..queries {
                let position = keys - queries + i;
                let first = self.spec.window.map_or(0, |window| (position + 1).saturating_sub(window));
                let q = &self.q[(h * queries + i) * size..][..size];
                let score = |j: usize| -> f64 {
                    let k = &self.k[(kv + j) * size..][..size];
                    let dot: f64 = q.iter().zip(k).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
                    dot * f64::from(self.spec.scale)
                };
                let shares: Vec<f64> = (first..=position).map(|j| score(j).exp()).collect();
                let total = shares.iter().sum::<f64>() + f64::from(self.sinks[h]).exp();
                for d in 0..size {
                    let value = |j: usize| f64::from(self.v[(kv + j) * size + d]);
                    let sum: f64 = shares.iter().enumerate().map(|(n, share)| share * value(first + n)).sum();
                    out[(i * heads + h) * size + d] = (sum / total) as f32;
                }
            }
        }
        out
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn attention_is_the_naive_loop(
        kv_heads in 1..=3usize,
        group in 1..=4usize,
        queries in 1..=20usize,
        before in 0..=20usize,
        window in prop_oneof![Just(None), Just(Some(1)), Just(Some(8)), Just(Some(100)), (1..40usize).prop_map(Some)],
        seed: u64,
    ) {
        let case = Case::new([kv_heads * group, kv_heads, queries, before + queries, 16], window, seed);
        assert_close(&case.run::<Flex>(), &case.naive(), 1e-5, "flex");
    }
}

#[test]
fn ndarray_gives_the_same() {
    for window in [None, Some(1), Some(8), Some(200)] {
        let case = Case::new([6, 2, 30, 50, 8], window, 1);
        assert_close(&case.run::<NdArray>(), &case.naive(), 1e-5, "ndarray");
        assert_close(&case.plain::<NdArray>(), &case.naive(), 1e-5, "plain Burn on ndarray");
    }
}

#[test]
fn long_inputs_are_cut_into_chunks_without_a_seam() {
    // 8 heads of 1,500 queries on 1,500 keys are more scores than are held at a time; the windows make chunks of their own.
    for window in [None, Some(128), Some(64), Some(3)] {
        let case = Case::new([8, 1, 1500, 1500, 2], window, 2);
        assert_close(&case.plain::<Flex>(), &case.naive(), 1e-4, "plain Burn");
        assert_close(&case.run::<Flex>(), &case.naive(), 1e-4, "flex");
    }
}

#[test]
fn decoding_one_by_one_gives_what_prefill_gives() {
    let window = Some(8);
    let all = Case::new([4, 2, 20, 20, 16], window, 3);
    let together = all.run::<Flex>();
    for n in 1..=20 {
        let part = |values: &[f32], heads: usize, range: std::ops::Range<usize>| -> Vec<f32> {
            (0..heads).flat_map(|h| values[(h * 20 + range.start) * 16..(h * 20 + range.end) * 16].to_vec()).collect()
        };
        let one = Case {
            q: part(&all.q, 4, n - 1..n),
            k: part(&all.k, 2, 0..n),
            v: part(&all.v, 2, 0..n),
            sinks: all.sinks.clone(),
            sizes: [4, 2, 1, n, 16],
            spec: all.spec,
        };
        assert_close(&one.run::<Flex>(), &together[(n - 1) * 64..n * 64], 1e-5, "one by one");
    }
}

#[test]
fn a_huge_sink_takes_everything_and_an_absent_one_nothing() {
    let mut case = Case::new([2, 1, 3, 5, 4], None, 4);
    case.sinks = vec![1e4; 2];
    assert_same(&case.run::<Flex>(), &[0.0; 24], "huge sink");
    case.sinks = vec![f32::NEG_INFINITY; 2];
    assert_close(&case.run::<Flex>(), &case.naive(), 1e-5, "no sink");
    case.k.iter_mut().for_each(|k| *k *= 1e4);
    assert!(case.run::<Flex>().iter().all(|y| y.is_finite()), "large scores do not overflow");
}

#[test]
fn no_queries_give_no_rows() {
    let case = Case::new([4, 2, 0, 3, 8], None, 5);
    assert!(case.run::<Flex>().is_empty());
}
