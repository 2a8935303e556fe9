//! Trained models equal the reference implementation, and so does every variant a configuration may ask for.
//!
//! The golden files are made by `tests/fixtures/tools/golden_lm.py`. The model that is shipped is always checked; two
//! larger ones only where the environment variables `TERNOSS_A1` and `TERNOSS_A2` name their folders.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod support;

use std::{fs, ops::ControlFlow, path::Path};

use burn::tensor::{Int, Tensor, TensorData};
use safetensors::Dtype;
use serde::Deserialize;
use serde_json::{Value, json};
use support::{Golden, assert_close, example, fixture, folder::Folder};
use ternoss::{
    Cpu,
    model::{
        Checkpoint, ExpertPlacement, GptOss, LoadOptions, StopRules,
        cache::LayerCache,
        checkpoint::ExpertMatrix,
        rope::RotaryEmbedding,
        router::Routing,
        sampling::{Sampler, SamplingConfig},
        tokenizer::Tokenizer,
    },
};

const TOLERANCE: f32 = 1e-3;

#[derive(Deserialize)]
struct LanguageModel {
    text_file: String,
    ids: Vec<u32>,
    nll: Vec<f32>,
    last8_top5: Vec<Vec<(u32, f32)>>,
    routing_last_token: std::collections::BTreeMap<usize, Vec<Vec<(u32, f32)>>>,
    greedy: Vec<Continuation>,
}

#[derive(Deserialize)]
struct Continuation {
    prompt: String,
    prompt_ids: Vec<u32>,
    ids: Vec<u32>,
    text: String,
}

fn load(folder: &Path) -> GptOss<Cpu> {
    let checkpoint = Checkpoint::open(folder).unwrap();
    GptOss::load(&checkpoint, LoadOptions::default(), &Default::default()).unwrap()
}

fn host<const D: usize>(tensor: Tensor<Cpu, D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

fn logits(model: &GptOss<Cpu>, ids: &[u32]) -> Vec<f32> {
    host(model.forward(model.tokens(ids).unwrap(), &mut model.new_cache()))
}

fn equals_the_reference(folder: &Path, golden: &str) {
    let golden: LanguageModel = serde_json::from_slice(&fs::read(fixture(golden)).unwrap()).unwrap();
    let (model, tokenizer) = (load(folder), Tokenizer::from_folder(folder).unwrap());
    let text = fs::read_to_string(example("text").join(&golden.text_file)).unwrap();
    assert_eq!(tokenizer.encode(&text, true).unwrap()[..golden.ids.len()], golden.ids);

    let nll: Vec<f32> = model.log_likelihoods(&golden.ids).unwrap().iter().map(|likelihood| -likelihood).collect();
    assert_close("nll", &nll, &golden.nll, TOLERANCE);

    let logits = logits(&model, &golden.ids);
    let last = logits.chunks(model.config().vocab_size).skip(golden.ids.len() - 8);
    for (row, top) in last.zip(&golden.last8_top5) {
        let mut order: Vec<usize> = (0..row.len()).collect();
        order.sort_by(|a, b| row[*b].total_cmp(&row[*a]));
        let expected: Vec<usize> = top.iter().map(|(token, _)| *token as usize).collect();
        assert_eq!(order[..5], expected);
        let found: Vec<f32> = expected.iter().map(|token| row[*token]).collect();
        assert_close("top 5", &found, &top.iter().map(|(_, logit)| *logit).collect::<Vec<_>>(), TOLERANCE);
    }

    for (layer, expected) in &golden.routing_last_token {
        let found = routing_of_the_last_token(&model, &golden.ids, *layer);
        let [expected] = expected.as_slice() else { panic!("one token") };
        assert!(found.iter().map(|(expert, _)| expert).eq(expected.iter().map(|(expert, _)| expert)), "layer {layer}");
        let weights = |routing: &[(u32, f32)]| routing.iter().map(|(_, weight)| *weight).collect::<Vec<f32>>();
        assert_close("routing", &weights(&found), &weights(expected), TOLERANCE);
    }

    for continuation in &golden.greedy {
        assert_eq!(tokenizer.encode(&continuation.prompt, true).unwrap(), continuation.prompt_ids);
        let rules = StopRules { max_tokens: continuation.ids.len(), stop_tokens: vec![] };
        let mut sampler = Sampler::new(SamplingConfig::greedy()).unwrap();
        let (mut cache, go_on) = (model.new_cache(), |_| ControlFlow::Continue(()));
        let new = model.generate(&continuation.prompt_ids, &mut cache, &mut sampler, &rules, go_on).unwrap();
        assert_eq!(tokenizer.decode(&new, false).unwrap(), continuation.text);
        assert_eq!(new, continuation.ids);
    }
}

/// The experts a layer sends the last token to, in order of their numbers, with their weights.
fn routing_of_the_last_token(model: &GptOss<Cpu>, ids: &[u32], number: usize) -> Vec<(u32, f32)> {
    let mut states = Vec::new();
    let tokens = model.tokens(ids).unwrap();
    model.hidden_states(tokens, &mut model.new_cache(), |_, state| states.push(state.clone()));
    let (x, layer, config) = (states[number].clone(), &model.layers[number], model.config());
    let rope = RotaryEmbedding::new(&config.rope, config.head_dim).tables(0..ids.len(), &x.device());
    let mut cache = LayerCache::new(config.window(number));
    let x = x.clone() + layer.self_attn.forward(layer.input_layernorm.forward(x), &rope, &mut cache);
    let last = layer.post_attention_layernorm.forward(x).slice_dim(0, ids.len() - 1..ids.len());
    let routing = layer.mlp.router.forward(last);
    let experts: Vec<u32> = routing.indices.into_data().iter::<u32>().collect();
    let mut chosen: Vec<(u32, f32)> = experts.into_iter().zip(host(routing.weights)).collect();
    chosen.sort_by_key(|(expert, _)| *expert);
    chosen
}

#[test]
fn the_shipped_model_equals_the_reference() {
    equals_the_reference(&example("tiny-gpt-oss"), "golden-small.json");
}

fn where_named(variable: &str, golden: &str) {
    match std::env::var_os(variable) {
        Some(folder) => equals_the_reference(Path::new(&folder), golden),
        None => println!("skipped: {variable} does not name the model's folder"),
    }
}

#[test]
fn a_language_model_with_all_experts_active_equals_the_reference() {
    where_named("TERNOSS_A1", "golden-a1.json");
}

#[test]
fn a_sparsely_routed_language_model_equals_the_reference() {
    where_named("TERNOSS_A2", "golden-a2.json");
}

/// A fixture changed, written and loaded again.
fn variant(name: &str, shards: usize, change: impl FnOnce(&mut Folder)) -> GptOss<Cpu> {
    let mut folder = Folder::read(&fixture(name));
    change(&mut folder);
    let output = tempfile::tempdir().unwrap();
    folder.write_shards(output.path(), shards);
    // On Unix the mapped files outlive their names.
    load(output.path())
}

fn golden(length: usize) -> (Vec<u32>, Vec<f32>) {
    let golden = Golden::open(&fixture("tiny-bf16").join("golden.safetensors"));
    let logits = golden.floats(&format!("seq{length}.logits")).to_vec();
    (golden.ids(&format!("seq{length}.input_ids")), logits)
}

fn differ(found: &[f32], other: &[f32]) -> bool {
    found.iter().zip(other).any(|(a, b)| (a - b).abs() > 0.01)
}

#[test]
fn an_expert_clamps_at_the_configured_limit() {
    let (ids, usual) = golden(40);
    for limit in [0.5, 2.0, 64.0] {
        let model = variant("tiny-bf16", 1, |folder| folder.config["swiglu_limit"] = json!(limit));
        assert!(differ(&logits(&model, &ids), &usual), "a limit of {limit} changes nothing");
        let checkpoint = Checkpoint::open(&fixture("tiny-bf16")).unwrap();
        let config = checkpoint.config();
        let (hidden, experts) = (config.hidden_size, config.num_local_experts);
        let x: Vec<f32> = (0..hidden).map(|i| ((i * i) as f32).sin() * 4.0).collect();
        let input = Tensor::<Cpu, 2>::from_data(TensorData::new(x.clone(), [1, hidden]), &Default::default());
        for expert in [0, experts - 1] {
            let device = Default::default();
            let indices = Tensor::<Cpu, 2, Int>::from_data(TensorData::new(vec![expert as i64], [1, 1]), &device);
            let routing = Routing { indices, weights: Tensor::ones([1, 1], &device) };
            let found = host(model.layers[1].mlp.experts.forward(input.clone(), routing));
            assert_close("expert", &found, &plain_expert(&checkpoint, 1, expert, &x, limit), TOLERANCE);
        }
    }
}

/// The expert as the model card writes it, in double precision.
fn plain_expert(checkpoint: &Checkpoint, layer: usize, expert: usize, x: &[f32], limit: f64) -> Vec<f32> {
    let product = |matrix: ExpertMatrix, x: &[f64]| -> Vec<f64> {
        let [inputs, outputs] = matrix.shape(checkpoint.config());
        let rows = checkpoint.expert_rows(layer, matrix, expert).unwrap();
        let name = format!("{}_bias", matrix.path(layer));
        let biases = checkpoint.floats(&name, &[checkpoint.config().num_local_experts, outputs]).unwrap();
        let dot = |row: &[f32]| row.iter().zip(x).map(|(weight, x)| f64::from(*weight) * x).sum::<f64>();
        rows.chunks(inputs).zip(&biases[expert * outputs..]).map(|(row, bias)| dot(row) + f64::from(*bias)).collect()
    };
    let gate_up = product(ExpertMatrix::GateUp, &x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>());
    let act = |pair: &[f64]| {
        let (gate, up) = (pair[0].min(limit), pair[1].clamp(-limit, limit));
        (up + 1.0) * gate / (1.0 + (-1.702 * gate).exp())
    };
    let act: Vec<f64> = gate_up.chunks(2).map(act).collect();
    product(ExpertMatrix::Down, &act).iter().map(|y| *y as f32).collect()
}

#[test]
fn a_model_may_have_no_sliding_layers() {
    let model = variant("tiny-bf16", 1, |folder| folder.config["layer_types"] = vec!["full_attention"; 4].into());
    // Within the window of 8 both kinds of layers see the same.
    let (ids, expected) = golden(8);
    assert_close("8 tokens", &logits(&model, &ids), &expected, TOLERANCE);
    let (ids, windowed) = golden(9);
    assert!(differ(&logits(&model, &ids), &windowed));
    let mut cache = model.new_cache();
    model.forward(model.tokens(&ids).unwrap(), &mut cache);
    assert_eq!(cache.entries(0), 9, "nothing is forgotten");
}

#[test]
fn missing_keys_mean_what_they_mean_to_transformers() {
    let (ids, expected) = golden(40);
    let remove = |keys: &'static [&str]| {
        move |folder: &mut Folder| {
            keys.iter().for_each(|key| drop(folder.config.as_object_mut().unwrap().shift_remove(*key)))
        }
    };
    let equal = |model: GptOss<Cpu>| assert_close("logits", &logits(&model, &ids), &expected, 2e-4);
    equal(variant("tiny-bf16", 1, remove(&["layer_types", "swiglu_limit", "rms_norm_eps", "attention_bias"])));
    equal(variant("tiny-bf16", 1, remove(&["rope_scaling", "num_experts_per_tok"])));
    equal(variant("tiny-bf16", 1, |folder| folder.config["rope_scaling"] = Value::Null));
}

#[test]
fn a_model_may_do_without_yarn() {
    let (ids, expected) = golden(40);
    let plain = |scaling: Value| {
        let model = variant("tiny-bf16", 1, |folder| folder.config["rope_scaling"] = scaling);
        assert_eq!(model.config().rope.yarn, None);
        let rope = RotaryEmbedding::new(&model.config().rope, model.config().head_dim);
        let frequencies: Vec<f32> = (0..8).map(|pair| 150_000f64.powf(-f64::from(pair) / 8.0) as f32).collect();
        assert_close("inv_freq", rope.inv_freq(), &frequencies, 1e-7);
        assert_eq!(rope.attention_scaling(), 1.0);
        logits(&model, &ids)
    };
    let found = plain(json!({ "rope_type": "default" }));
    assert!(differ(&found, &expected));
    assert_eq!(found, plain(json!({ "type": "default", "rope_theta": 150_000.0 })));
}

#[test]
fn embedding_and_output_layer_may_be_one() {
    let (ids, _) = golden(40);
    let tied = variant("tiny-bf16", 1, |folder| {
        folder.tensors.remove("lm_head.weight");
        folder.config["tie_word_embeddings"] = json!(true);
    });
    let twice = variant("tiny-bf16", 1, |folder| {
        let embedding = folder.tensors["model.embed_tokens.weight"].clone();
        folder.tensors.insert("lm_head.weight".into(), embedding);
    });
    assert_eq!(logits(&tied, &ids), logits(&twice, &ids));
}

#[test]
fn weights_may_be_stored_in_any_float_type() {
    let (ids, expected) = golden(40);
    for (dtype, tolerance) in [(Dtype::F32, 2e-4), (Dtype::F16, 2e-3)] {
        let model = variant("tiny-bf16", 1, |folder| {
            for tensor in folder.tensors.values_mut().filter(|tensor| tensor.dtype == Dtype::BF16) {
                tensor.data = match dtype {
                    Dtype::F32 => tensor.bf16().flat_map(f32::to_le_bytes).collect(),
                    _ => tensor.bf16().flat_map(|x| half::f16::from_f32(x).to_le_bytes()).collect(),
                };
                tensor.dtype = dtype;
            }
        });
        assert_close("logits", &logits(&model, &ids), &expected, tolerance);
    }
}

#[test]
fn how_a_model_is_sharded_changes_nothing() {
    for name in ["tiny-bf16", "tiny-mxfp4"] {
        let (ids, whole) = (golden(40).0, load(&fixture(name)));
        for shards in [1, 5] {
            let model = variant(name, shards, |_| {});
            assert_eq!(logits(&model, &ids), logits(&whole, &ids), "{name} in {shards}");
        }
        let device = Default::default();
        let checkpoint = Checkpoint::open(&fixture(name)).unwrap();
        let options = LoadOptions { experts: ExpertPlacement::Streamed, ..LoadOptions::default() };
        let streamed = GptOss::<Cpu>::load(&checkpoint, options, &device).unwrap();
        assert_eq!(logits(&streamed, &ids), logits(&whole, &ids));
    }
}
