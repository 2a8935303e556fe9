//! The output layer screened by its compact copy chooses the tokens that the whole one does.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod support;

use std::{fs, ops::ControlFlow, path::Path};

use burn::tensor::{DType, Tensor, TensorData};
use proptest::prelude::*;
use support::{comma_separated, example, fixture, ternoss_ok};
use ternoss::backends::{
    StoredFloat, StoredMatrix,
    cpu::{
        Kernels,
        bounds::bounds,
        screen::Screen,
        stored::{StoredRows, stored_linear},
    },
};
use ternoss::{
    Cpu,
    model::{
        Checkpoint, GptOss, LoadOptions, StopRules,
        sampling::{Computed, Sampler, SamplingConfig},
        screening::LazyLogits,
        table::{Screening, StoredTable, Table},
    },
};

fn load(folder: &Path, screening: Screening) -> GptOss<Cpu> {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let mut model = GptOss::<Cpu>::load(&checkpoint, LoadOptions::default(), &Default::default()).unwrap();
    model.lm_head = model.lm_head.with_screening(screening);
    model
}

fn host<const D: usize>(tensor: Tensor<Cpu, D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

/// The tokens of a golden file, in a few prompts.
fn prompts(golden: &str) -> Vec<Vec<u32>> {
    let golden: serde_json::Value = serde_json::from_slice(&fs::read(fixture(golden)).unwrap()).unwrap();
    let ids: Vec<u32> = serde_json::from_value(golden["ids"].clone()).unwrap();
    ids[..128].chunks(16).map(<[u32]>::to_vec).collect()
}

/// Writes `count` tokens after each prompt, greedily, and compares each with the largest of all its logits.
fn greedy_tokens_are_those_of_all_logits(folder: &Path, golden: &str, count: usize) -> Computed {
    let model = load(folder, Screening::Always);
    let mut screened = Sampler::new(SamplingConfig::greedy()).unwrap();
    let mut full = Sampler::new(SamplingConfig::greedy()).unwrap();
    for prompt in prompts(golden) {
        let mut cache = model.new_cache();
        let mut hidden = model.prefill_hidden(&prompt, &mut cache).unwrap();
        for n in 0..count {
            let token = model.next_token(hidden.clone(), &mut screened, &[]).unwrap();
            let expected = full.sample(&host(model.lm_head.logits(hidden)), &[]).unwrap();
            assert_eq!(token, expected, "token {n} after {prompt:?}");
            hidden = model.hidden(model.tokens(&[token]).unwrap(), &mut cache);
        }
    }
    screened.computed()
}

#[test]
fn two_thousand_greedy_tokens_are_those_of_all_logits() {
    let computed = greedy_tokens_are_those_of_all_logits(&example("tiny-gpt-oss"), "golden-small.json", 250);
    assert_eq!(computed.tokens, 2000);
    // The vocabulary has 1024 tokens; the table is narrow, so that the copy's error is large beside the logits.
    assert!(computed.mean().unwrap() < 300.0, "{computed:?}");
}

#[test]
fn two_thousand_greedy_tokens_of_a_language_model_are_those_of_all_logits() {
    match std::env::var_os("TERNOSS_A1") {
        Some(folder) => {
            let computed = greedy_tokens_are_those_of_all_logits(Path::new(&folder), "golden-a1.json", 250);
            assert_eq!(computed.tokens, 2000);
            println!("{:.1} of 49152 logits computed for a token", computed.mean().unwrap());
        }
        None => println!("skipped: TERNOSS_A1 does not name the model's folder"),
    }
}

#[test]
fn sampled_tokens_are_those_of_all_logits_with_the_same_seed() {
    let folder = example("tiny-gpt-oss");
    let (all, few) = (load(&folder, Screening::Never), load(&folder, Screening::Always));
    let base = SamplingConfig { seed: 3, ..Default::default() };
    for config in [
        SamplingConfig { top_k: Some(5), ..base },
        SamplingConfig { top_k: Some(40), top_p: Some(0.9), temperature: 0.8, ..base },
        SamplingConfig { top_p: Some(0.3), ..base },
        SamplingConfig { top_p: Some(0.9), min_p: Some(0.05), ..base },
        SamplingConfig { min_p: Some(0.2), ..base },
        SamplingConfig { repetition_penalty: 1.3, ..SamplingConfig::greedy() },
        SamplingConfig { repetition_penalty: 0.8, top_k: Some(10), ..base },
        base,
    ] {
        for prompt in prompts("golden-small.json").iter().take(2) {
            let write = |model: &GptOss<Cpu>| {
                let mut sampler = Sampler::new(config).unwrap();
                let rules = StopRules { max_tokens: 60, stop_tokens: vec![] };
                let go_on = |_| ControlFlow::Continue(());
                let tokens = model.generate(prompt, &mut model.new_cache(), &mut sampler, &rules, go_on).unwrap();
                (tokens, sampler.computed().tokens)
            };
            let (expected, nothing) = write(&all);
            let (found, screened) = write(&few);
            assert_eq!(found, expected, "{config:?}");
            assert_eq!((nothing, screened), (0, if config == base { 0 } else { 60 }), "{config:?}");
        }
    }
}

#[test]
fn errors_on_the_shipped_table_spread_as_the_formula_says() {
    let model = load(&example("tiny-gpt-oss"), Screening::Never);
    let Table::Stored(table) = &model.lm_head else { panic!("a stored table") };
    let [rows, _] = table.words.dims();
    let columns = model.config().hidden_size;
    let words: Vec<u32> = table.words.val().into_data().iter::<u32>().collect();
    let ids: Vec<u32> = prompts("golden-small.json").concat();
    let x = host(model.hidden(model.tokens(&ids).unwrap(), &mut model.new_cache()));
    let kernels = Kernels::detect();
    let matrix = StoredRows::new(&words, rows, columns, StoredFloat::Bf16).unwrap();
    let screen = Screen::new(kernels, &matrix, &mut || {});
    let run = |deviations: Option<f32>| {
        let mut out = vec![0.0; ids.len() * rows];
        match deviations {
            Some(deviations) => bounds(kernels, &screen, &x, ids.len(), deviations, &mut out).unwrap(),
            None => stored_linear(kernels, &matrix, &x, ids.len(), &mut out).unwrap(),
        }
        out
    };
    let (exact, estimate, one) = (run(None), run(Some(0.0)), run(Some(1.0)));
    let (mut squares, mut largest) = (0.0, 0f64);
    for ((exact, estimate), one) in exact.iter().zip(&estimate).zip(&one) {
        let deviation = f64::from(exact - estimate) / f64::from(one - estimate);
        (squares, largest) = (squares + deviation * deviation, largest.max(deviation.abs()));
    }
    let spread = (squares / exact.len() as f64).sqrt();
    assert!((0.8..1.05).contains(&spread) && largest < 6.0, "{spread} {largest}");
}

/// A table of bf16 rows that is always screened.
fn table(rows: &[Vec<u16>]) -> Table<Cpu> {
    let words = |row: &Vec<u16>| row.chunks(2).map(|pair| u32::from(pair[0]) | u32::from(pair[1]) << 16).collect();
    let columns = rows[0].len();
    let words: Vec<u32> = rows.iter().flat_map(|row| -> Vec<u32> { words(row) }).collect();
    let words = Tensor::from_data(TensorData::new(words, [rows.len(), columns / 2]), (&Default::default(), DType::U32));
    let matrix = StoredMatrix::new(words, columns, StoredFloat::Bf16).unwrap();
    Table::Stored(StoredTable::new(matrix)).with_screening(Screening::Always)
}

/// A row, and how it differs from the one that many share.
#[derive(Clone, Debug)]
enum Row {
    Same,
    /// One weight, one step of bf16 further from zero.
    Step(usize),
    Other(Vec<i8>),
    Zero,
    Huge,
    Tiny,
    Broken(usize, bool),
}

impl Row {
    fn any(columns: usize) -> impl Strategy<Value = Self> {
        prop_oneof![
            4 => Just(Self::Same),
            8 => (0..columns).prop_map(Self::Step),
            40 => prop::collection::vec(any::<i8>(), columns).prop_map(Self::Other),
            1 => Just(Self::Zero),
            1 => Just(Self::Tiny),
        ]
    }

    fn bits(&self, shared: &[u16]) -> Vec<u16> {
        let scaled = |exponent: i32| {
            let scaled = |bits: &u16| (f32::from_bits(u32::from(*bits) << 16) * 2f32.powi(exponent)).to_bits() >> 16;
            shared.iter().map(|bits| scaled(bits) as u16).collect()
        };
        let mut row = shared.to_vec();
        match self {
            Self::Same => {}
            Self::Step(at) => row[*at] += 1,
            Self::Other(values) => {
                let bits = |value: &i8| (f32::from(*value).to_bits() >> 16) as u16;
                row = values.iter().map(bits).collect();
            }
            Self::Zero => row.fill(0),
            Self::Huge => row = scaled(118),
            Self::Tiny => row = scaled(-120),
            Self::Broken(at, nan) => row[*at] = if *nan { 0x7fc0 } else { 0x7f80 },
        }
        row
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn close_and_broken_logits_change_nothing(
        shared in prop::collection::vec(prop::sample::select(vec![0x3f80u16, 0xbf80, 0x4000, 0xc0a0, 0x4123]), 64),
        rows in prop::collection::vec(Row::any(64), 100..400),
        unusual in prop::option::weighted(0.3, prop_oneof![
            Just(Row::Huge),
            (0..64usize, any::<bool>()).prop_map(|(at, nan)| Row::Broken(at, nan)),
        ]),
        direction in -1f32..1.0,
        noise in prop::collection::vec(-1f32..1.0, 64),
        top_k in prop::option::of(1usize..20),
    ) {
        let bits: Vec<Vec<u16>> = rows.iter().chain(&unusual).map(|row| row.bits(&shared)).collect();
        let table = table(&bits);
        // A token towards the rows that are almost the same.
        let shared = shared.iter().map(|bits| f32::from_bits(u32::from(*bits) << 16));
        let x: Vec<f32> = shared.zip(&noise).map(|(shared, noise)| direction * shared + noise).collect();
        let x = Tensor::<Cpu, 2>::from_data(TensorData::new(x, [1, 64]), &Default::default());
        let logits = table.screened(&x).unwrap().remove(0);
        let all = host(table.logits(x));
        prop_assert!(all.iter().map(|x| x.to_bits()).eq(logits.all().iter().map(|x| x.to_bits())));
        let config = match top_k {
            Some(_) => SamplingConfig { top_k, temperature: 5.0, ..Default::default() },
            None => SamplingConfig::greedy(),
        };
        let (mut full, mut screened) = (Sampler::new(config).unwrap(), Sampler::new(config).unwrap());
        for _ in 0..3 {
            let expected = format!("{:?}", full.sample(&all, &[]));
            prop_assert_eq!(format!("{:?}", screened.sample_screened(&logits, &[])), expected);
        }
    }
}

#[test]
fn a_batch_of_tokens_is_screened_as_its_tokens_are() {
    let model = load(&example("tiny-gpt-oss"), Screening::Always);
    let ids: Vec<u32> = prompts("golden-small.json").concat();
    let hidden = model.hidden(model.tokens(&ids[..16]).unwrap(), &mut model.new_cache());
    let batch = model.lm_head.screened(&hidden).unwrap();
    assert_eq!(batch.len(), 16);
    for (t, logits) in batch.iter().enumerate() {
        let alone = &model.lm_head.screened(&hidden.clone().slice_dim(0, t..t + 1)).unwrap()[0];
        assert_eq!(logits.bounds(), alone.bounds());
        assert_eq!(logits.exact(&[3, 700]), alone.exact(&[3, 700]));
    }
}

#[test]
fn small_tables_are_not_screened_and_the_program_takes_exact_output() {
    let folder = example("tiny-gpt-oss");
    assert!(!load(&folder, Screening::Auto).lm_head.prepare_screen(), "too small to be worth it");
    assert!(load(&folder, Screening::Always).lm_head.prepare_screen());
    let (folder, ids) = (folder.to_str().unwrap(), comma_separated(&prompts("golden-small.json")[0]));
    let args = ["generate", "--model", folder, "--tokens", &ids, "--greedy", "--max-tokens", "8", "--json"];
    let plain = ternoss_ok(&args);
    assert_eq!(ternoss_ok(&[args.as_slice(), &["--exact-output"]].concat()), plain);
    assert!(!plain.contains("computed_logits"));
}
