//! What a model on two backends promises: the same results, wherever it is cut.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod support;

use std::ops::ControlFlow;

use serde_json::Value;
use support::{example, fixture, ternoss_ok};
use ternoss::{
    Cpu, NdArray,
    backends::{KvFormat, TernaryBackend},
    model::{
        Checkpoint, GptOss, LanguageModel, LoadOptions, SplitModel, StopRules,
        language_model::SequenceCache,
        sampling::{Sampler, SamplingConfig},
    },
};

/// A small ternary model with four layers.
fn ternary(folder: &std::path::Path) -> Checkpoint {
    let output = folder.join("ternary");
    let model = example("tiny-gpt-oss");
    let options = ["--method", "absmean", "--output", output.to_str().unwrap()];
    ternoss_ok(&[&["quantize", "--model", model.to_str().unwrap()], &options[..]].concat());
    Checkpoint::open(&output).unwrap()
}

fn logits<M: LanguageModel>(model: &M, ids: &[u32]) -> Vec<f32>
where
    M::Output: TernaryBackend,
{
    // In two pieces, so that what the caches keep counts.
    let mut cache = model.new_cache();
    let pieces = [&ids[..5], &ids[5..]].map(|ids| model.logits_of(ids, &mut cache).unwrap().into_data());
    pieces.iter().flat_map(|data| data.iter::<f32>().collect::<Vec<_>>()).collect()
}

const IDS: [u32; 24] = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43, 38, 32, 79, 50, 28, 84, 19, 71, 69, 39, 93];

#[test]
fn a_model_on_two_backends_gives_the_bits_of_one() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = ternary(folder.path());
    let options = LoadOptions::default();
    let whole = GptOss::<Cpu>::load(&checkpoint, options, &Default::default()).unwrap();
    let expected = logits(&whole, &IDS);
    for layers in [0, 1, 3, 4, 9] {
        let devices = (&Default::default(), &Default::default());
        let split = SplitModel::<NdArray, Cpu>::load(&checkpoint, options, layers, devices).unwrap();
        assert_eq!(split.first_layers(), layers.min(4));
        let found = logits(&split, &IDS);
        assert!(found.iter().map(|x| x.to_bits()).eq(expected.iter().map(|x| x.to_bits())), "{layers} layers");
        let whole = whole.perplexity(&IDS, 8, |_| ()).unwrap();
        assert_eq!(LanguageModel::perplexity(&split, &IDS, 8, |_| ()).unwrap(), whole);
    }
}

#[test]
fn it_writes_the_same_text_with_guesses_and_without() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = ternary(folder.path());
    let options = LoadOptions { kv_format: KvFormat::F16, ..LoadOptions::default() };
    let rules = StopRules { max_tokens: 40, stop_tokens: Vec::new() };
    let go_on = |_| ControlFlow::Continue(());
    let sampler = || Sampler::new(SamplingConfig::greedy()).unwrap();
    let whole = GptOss::<Cpu>::load(&checkpoint, options, &Default::default()).unwrap();
    let expected = whole.generate(&IDS, &mut whole.new_cache(), &mut sampler(), &rules, go_on).unwrap();
    for layers in [0, 2, 4] {
        let devices = (&Default::default(), &Default::default());
        let split = SplitModel::<NdArray, Cpu>::load(&checkpoint, options, layers, devices).unwrap();
        for spare in [0, 6] {
            let mut cache = split.new_cache().with_spare(spare);
            let found = split.generate(&IDS, &mut cache, &mut sampler(), &rules, go_on).unwrap();
            assert_eq!(found, expected, "{layers} layers, {spare} guesses");
            assert_eq!(cache.position(), IDS.len() + expected.len() - 1);
        }
    }
}

#[test]
fn the_program_takes_layers_for_each_command_that_runs_a_model() {
    let model = fixture("tiny-bf16");
    let model = model.to_str().unwrap();
    let generate = |more: &[&str]| -> Value {
        let arguments = ["generate", "--model", model, "--tokens", "1,2,3", "--greedy", "--max-tokens", "6", "--json"];
        serde_json::from_str(&ternoss_ok(&[&arguments, more].concat())).unwrap()
    };
    assert_eq!(generate(&["--backend", "ndarray", "--gpu-layers", "1"])["tokens"], generate(&[])["tokens"]);
    let folder = tempfile::tempdir().unwrap();
    let logits = |name: &str, more: &[&str]| -> Vec<f32> {
        let file = folder.path().join(name);
        let arguments = ["logits", "--model", model, "--tokens", "1,2,3", "--output", file.to_str().unwrap()];
        ternoss_ok(&[&arguments, more].concat());
        let bytes = std::fs::read(file).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let data = tensors.tensor("logits").unwrap().data().to_vec();
        data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    };
    let (whole, split) = (logits("whole", &[]), logits("split", &["--backend", "ndarray", "--gpu-layers", "2"]));
    // Dense products are Burn's own, and differ between backends.
    assert!(whole.len() == split.len() && whole.iter().zip(&split).all(|(a, b)| (a - b).abs() < 1e-3));
}
