//! Attention over a cache: the kernels against Burn's operations, whatever the steps in which tokens come.

use std::ops::Range;

use burn_flex::Flex;
use burn_ndarray::NdArray;
use proptest::prelude::*;
use ternoss::backends::{
    AttentionSpec, KvFormat, LayerCache, TernaryBackend, cached_attention,
    cpu::{HeadCaches, attention},
    reference,
};

use crate::support::{Noise, all_kernels, assert_close, assert_same, matrix, values};

#[derive(Debug)]
pub(crate) struct Case {
    /// Query heads, key heads, tokens, size of a head.
    pub(crate) sizes: [usize; 4],
    pub(crate) window: Option<usize>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    angles: Vec<f32>,
    sinks: Vec<f32>,
}

const SCALE: f32 = 0.4;

impl Case {
    pub(crate) fn new(sizes: [usize; 4], window: Option<usize>, seed: u64) -> Self {
        let [heads, kv_heads, tokens, size] = sizes;
        let mut noise = Noise::new(seed);
        let mut floats = |n| noise.floats(n).iter().map(|x| x * 3.0).collect::<Vec<_>>();
        let (q, k, v) =
            (floats(tokens * heads * size), floats(tokens * kv_heads * size), floats(tokens * kv_heads * size));
        Self { sizes, window, q, k, v, angles: floats(tokens * size / 2), sinks: floats(heads) }
    }

    /// Tokens of `range` through an operation.
    pub(crate) fn step<B: TernaryBackend>(
        &self,
        range: Range<usize>,
        cache: &mut LayerCache<B>,
        plain: bool,
    ) -> Vec<f32> {
        self.steps(&[range], &mut [cache], plain)
    }

    /// The same side by side: as many tokens of each range, each after what its cache holds.
    fn steps<B: TernaryBackend>(
        &self,
        ranges: &[Range<usize>],
        caches: &mut [&mut LayerCache<B>],
        plain: bool,
    ) -> Vec<f32> {
        let [heads, kv_heads, _, size] = self.sizes;
        let tokens = ranges.iter().map(Range::len).sum();
        let rows = |values: &[f32], width: usize| {
            let parts = ranges.iter().map(|range| &values[range.start * width..range.end * width]);
            matrix::<B>(&parts.collect::<Vec<_>>().concat(), [tokens, width])
        };
        let qkv = [rows(&self.q, heads * size), rows(&self.k, kv_heads * size), rows(&self.v, kv_heads * size)];
        let table = |f: fn(f32) -> f32| rows(&self.angles.iter().map(|x| f(*x)).collect::<Vec<_>>(), size / 2);
        let rope = [table(f32::cos), table(f32::sin)];
        let sinks = matrix::<B>(&self.sinks, [1, heads]).reshape([heads]);
        values(match plain {
            true => reference::cached_attention(qkv, rope, sinks, SCALE, caches),
            false => cached_attention(qkv, rope, sinks, SCALE, caches),
        })
    }

    /// `new` more tokens of each sequence side by side; `check` gets what comes out, and those rows of `all`.
    pub(crate) fn advance<B: TernaryBackend>(
        &self,
        caches: &mut [&mut LayerCache<B>],
        new: usize,
        plain: bool,
        all: &[f32],
        check: impl Fn(&[f32], &[f32]),
    ) {
        let width = all.len() / self.sizes[2];
        let ranges: Vec<_> = caches.iter().map(|cache| cache.position()..cache.position() + new).collect();
        let found = self.steps(&ranges, caches, plain);
        let expected: Vec<_> = ranges.iter().map(|range| &all[range.start * width..range.end * width]).collect();
        check(&found, &expected.concat());
    }

    /// Three sequences of these tokens, at different positions, side by side: `new` tokens of each at a time. One leaves for a
    /// step, and one is copied, and the copy goes its own way. `check` gets what comes out, and what would of each alone.
    pub(crate) fn side_by_side<B: TernaryBackend>(&self, new: usize, plain: bool, check: impl Fn(&[f32], &[f32])) {
        let tokens = self.sizes[2];
        let all = self.run::<Flex>(tokens, self.cache(), plain);
        let mut caches = [0, tokens / 4, tokens / 2].map(|start| {
            let mut cache = self.cache::<B>();
            let start = start.min(tokens - 4 * new);
            if start > 0 {
                self.step(0..start, &mut cache, plain);
            }
            cache
        });
        for round in [[0, 1, 2].as_slice(), &[0, 1, 2], &[2, 0], &[0, 1, 2]] {
            let mut free = caches.each_mut().map(Some);
            let mut caches: Vec<_> = round.iter().filter_map(|sequence| free[*sequence].take()).collect();
            self.advance(&mut caches, new, plain, &all, &check);
            // What this one writes is not what the sequence it is a copy of will.
            self.step(tokens - new..tokens, &mut caches[0].clone(), plain);
        }
    }

    pub(crate) fn cache<B: TernaryBackend>(&self) -> LayerCache<B> {
        LayerCache::new(self.window)
    }

    /// All tokens in steps of `step`.
    pub(crate) fn run<B: TernaryBackend>(&self, step: usize, mut cache: LayerCache<B>, plain: bool) -> Vec<f32> {
        let tokens = self.sizes[2];
        let steps = (0..tokens).step_by(step).map(|start| start..(start + step).min(tokens));
        let out = steps.flat_map(|range| self.step(range, &mut cache, plain)).collect();
        assert_eq!(cache.position(), tokens);
        assert_eq!(cache.entries(), self.window.map_or(tokens, |window| window.min(tokens)));
        out
    }
}

pub(crate) fn any_case() -> impl Strategy<Value = Case> {
    let window = prop_oneof![Just(None), Just(Some(1)), Just(Some(16)), (2..60usize).prop_map(Some)];
    let sizes = (1..=3usize, 1..=9usize, 1..=70usize, prop_oneof![Just(2usize), Just(16), Just(24), Just(64)]);
    (sizes, window, any::<u64>()).prop_map(|((kv_heads, group, tokens, size), window, seed)| {
        Case::new([kv_heads * group, kv_heads, tokens, size], window, seed)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn any_steps_give_the_same_bits_and_the_reference_s_numbers(case in any_case(), step in 1..=80usize) {
        let expected = case.run::<NdArray>(case.sizes[2], case.cache(), true);
        let together = case.run::<Flex>(case.sizes[2], case.cache(), false);
        assert_close(&together, &expected, 1e-5, "kernels");
        assert_same(&case.run::<Flex>(step, case.cache(), false), &together, "in steps");
        assert_same(&case.run::<NdArray>(1, case.cache(), false), &together, "one by one on ndarray");
        assert_close(&case.run::<Flex>(step, case.cache(), true), &expected, 1e-5, "plain Burn in steps");
    }

    #[test]
    fn sequences_side_by_side_are_those_of_each_alone(case in any_case(), new in 1..=20usize) {
        let new = new.min(case.sizes[2] / 4);
        if case.sizes[2] >= 4 {
            case.side_by_side::<Flex>(new, false, |found, expected| assert_same(found, expected, "flex"));
            case.side_by_side::<NdArray>(new, false, |found, expected| assert_same(found, expected, "ndarray"));
            case.side_by_side::<Flex>(new, true, |found, expected| assert_close(found, expected, 1e-5, "plain Burn"));
        }
    }

    #[test]
    fn entries_taken_back_leave_no_trace(case in any_case(), keep in 0..70usize, plain in any::<bool>()) {
        let tokens = case.sizes[2];
        let keep = keep.min(tokens - 1);
        let mut cache = case.cache::<Flex>().with_spare(tokens - keep);
        let all = case.step(0..tokens, &mut cache, plain);
        cache.truncate(keep);
        assert_eq!(cache.position(), keep);
        let again = case.step(keep..tokens, &mut cache, plain);
        let width = all.len() / tokens;
        if plain {
            assert_close(&again, &all[keep * width..], 1e-5, "again");
        } else {
            assert_same(&again, &all[keep * width..], "again");
        }
    }

    #[test]
    fn instruction_sets_and_formats(case in any_case()) {
        let [heads, kv_heads, tokens, size] = case.sizes;
        for (format, tolerance) in [(KvFormat::F32, 0.0), (KvFormat::F16, 5e-3), (KvFormat::Int8, 5e-2)] {
            let mut cache = HeadCaches::new(kv_heads, size, format);
            let width = kv_heads * size;
            case.k.chunks(width).zip(case.v.chunks(width)).for_each(|(k, v)| cache.push(k, v));
            let spec = AttentionSpec { scale: SCALE / 8.0, window: case.window };
            let outs: Vec<Vec<f32>> = all_kernels().map(|kernels| {
                let mut out = vec![0.0; tokens * heads * size];
                attention::cached_attention(kernels, &case.q, &[&cache], &case.sinks, spec, &mut out).unwrap();
                out
            }).collect();
            outs.iter().for_each(|out| assert_same(out, &outs[0], "instruction sets"));
            let mut exact = HeadCaches::new(kv_heads, size, KvFormat::F32);
            case.k.chunks(width).zip(case.v.chunks(width)).for_each(|(k, v)| exact.push(k, v));
            let mut expected = vec![0.0; tokens * heads * size];
            let kernels = all_kernels().next().unwrap();
            attention::cached_attention(kernels, &case.q, &[&exact], &case.sinks, spec, &mut expected).unwrap();
            assert_close(&outs[0], &expected, tolerance, "formats");
        }
    }
}

#[test]
fn long_contexts_are_cut_into_chunks_without_a_seam() {
    for window in [None, Some(1500)] {
        let case = Case::new([2, 1, 2300, 16], window, 4);
        let expected = case.run::<NdArray>(2300, case.cache(), true);
        let together = case.run::<Flex>(2300, case.cache(), false);
        assert_close(&together, &expected, 1e-5, "kernels");
        assert_same(&case.run::<Flex>(700, case.cache(), false), &together, "in steps");
        let mut cache = HeadCaches::new(1, 16, KvFormat::F16);
        case.k.chunks(16).zip(case.v.chunks(16)).for_each(|(k, v)| cache.push(k, v));
        let last = &case.q[2290 * 32..];
        let outs: Vec<Vec<f32>> = all_kernels()
            .map(|kernels| {
                let mut out = vec![0.0; last.len()];
                let spec = AttentionSpec { scale: SCALE, window };
                attention::cached_attention(kernels, last, &[&cache], &case.sinks, spec, &mut out).unwrap();
                out
            })
            .collect();
        outs.iter().for_each(|out| assert_same(out, &outs[0], "instruction sets"));
    }
}

#[test]
fn a_sliding_layer_keeps_its_window_and_the_spare_entries() {
    let case = Case::new([4, 2, 300, 16], Some(32), 1);
    for spare in [0, 5] {
        let mut cache = case.cache::<Flex>().with_spare(spare).with_format(KvFormat::Int8);
        case.step(0..300, &mut cache, false);
        assert_eq!(cache.entries(), 32 + spare);
    }
}

#[test]
fn a_key_that_is_no_number_spoils_only_those_who_see_it() {
    for format in [KvFormat::F32, KvFormat::F16, KvFormat::Int8] {
        let mut case = Case::new([1, 1, 40, 16], Some(8), 2);
        case.k[3 * 16] = f32::NAN;
        let out = case.run::<Flex>(7, case.cache().with_format(format), false);
        for (token, out) in out.chunks(16).enumerate() {
            assert_eq!(out.iter().any(|x| x.is_nan()), (3..11).contains(&token), "token {token}");
        }
    }
}

#[test]
#[should_panic(expected = "entries to take back")]
fn what_was_not_kept_cannot_be_taken_back() {
    let case = Case::new([1, 1, 40, 16], Some(8), 3);
    let mut cache = case.cache::<Flex>().with_spare(2);
    case.step(0..40, &mut cache, false);
    cache.truncate(37);
}
