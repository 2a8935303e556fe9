//! What leaving out experts, and a target size, promise.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod support;

use std::{
    fs,
    path::{Path, PathBuf},
};

use burn::tensor::Tensor;
use burn_flex::Flex;
use serde_json::Value;
use support::{example, folder::Folder, listing, ternoss_err, ternoss_ok};
use ternoss::model::{
    Checkpoint, ExpertPlacement, GptOss, LoadOptions, cache::LayerCache, experts::Experts, rope::RotaryEmbedding,
    tokenizer::Tokenizer,
};

const LAYERS: usize = 4;
const EXPERTS: usize = 8;

fn utf8(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Few tokens, in windows of 128.
const FEW: [&str; 4] = ["--calibration-tokens", "1024", "--calibration-context", "128"];

fn arguments<'a>(model: &'a Path, output: &'a Path, options: &[&'a str]) -> Vec<&'a str> {
    [&["quantize", "--model", utf8(model), "--output", utf8(output)], options].concat()
}

fn quantized(output: PathBuf, options: &[&str]) -> PathBuf {
    ternoss_ok(&arguments(&example("tiny-gpt-oss"), &output, &[&FEW[..], options].concat()));
    output
}

fn json(folder: &Path, name: &str) -> Value {
    serde_json::from_slice(&fs::read(folder.join(name)).unwrap()).unwrap()
}

/// The experts that a report says were kept in a layer, with their shares.
fn kept(report: &Value, layer: usize) -> Vec<(usize, f64)> {
    let entries = report["layers"][layer]["kept"].as_array().unwrap().iter();
    entries.map(|e| (e["expert"].as_u64().unwrap() as usize, e["importance"].as_f64().unwrap())).collect()
}

fn folder_size(folder: &Path) -> u64 {
    listing(folder).iter().map(|name| fs::metadata(folder.join(name)).unwrap().len()).sum()
}

#[test]
fn the_kept_experts_are_written_with_their_router_and_biases() {
    let folder = tempfile::tempdir().unwrap();
    let full = Folder::read(&example("tiny-gpt-oss"));
    for (method, without) in [("absmean", ""), ("ternoss", "bias"), ("ternoss", "")] {
        let mut options = vec!["--method", method, "--keep-experts", "4"];
        if !without.is_empty() {
            options.extend(["--without", without]);
        }
        let output = quantized(folder.path().join(format!("{method}{without}")), &options);
        let (config, report) = (json(&output, "config.json"), json(&output, "calibration_report.json"));
        assert_eq!(config["num_local_experts"], 4);
        assert_eq!(report["reduction"]["experts_kept"], 4);
        assert!(report["reduction"]["warning"].as_str().unwrap().contains("4 of 8 experts"));
        let written = Folder::read(&output);
        for layer in 0..LAYERS {
            let numbers: Vec<usize> = kept(&report, layer).into_iter().map(|(expert, _)| expert).collect();
            assert!(numbers.len() == 4 && numbers.is_sorted(), "{numbers:?}");
            let path = format!("model.layers.{layer}.mlp");
            let mut rows = vec![format!("{path}.router.weight"), format!("{path}.router.bias")];
            if method == "absmean" || !without.is_empty() {
                rows.extend(["gate_up", "down"].map(|name| format!("{path}.experts.{name}_proj_bias")));
            }
            for name in rows {
                let (before, after) = (&full.tensors[&name], &written.tensors[&name]);
                assert_eq!((after.dtype, after.shape[0]), (before.dtype, 4), "{name}");
                let size = before.data.len() / EXPERTS;
                let expected: Vec<u8> =
                    numbers.iter().flat_map(|expert| before.data[expert * size..][..size].to_vec()).collect();
                assert!(after.data == expected, "{name}");
            }
            assert_eq!(written.tensors[&format!("{path}.experts.gate_up_proj.codes")].shape[..3], [4, 1, 128]);
            assert_eq!(written.tensors[&format!("{path}.experts.down_proj_bias")].shape, [4, 128]);
            // Matrices are named after the full-precision model's experts.
            let names = report["layers"][layer]["matrices"].as_array().unwrap().iter();
            let names: Vec<&str> = names.map(|matrix| matrix["name"].as_str().unwrap()).collect();
            for expert in 0..EXPERTS {
                let name = format!("{path}.experts.down_proj.{expert}");
                assert_eq!(names.contains(&name.as_str()), numbers.contains(&expert), "{name}");
            }
        }
        let args = ["generate", "--model", utf8(&output), "--prompt", "It was", "--max-tokens", "8", "--json"];
        let object: Value = serde_json::from_str(&ternoss_ok(&args)).unwrap();
        assert!(object["text"].is_string());
        let shown = ternoss_ok(&["inspect", "--model", utf8(&output)]);
        assert!(shown.contains("4 experts of 64 neurons, 2 per token"), "{shown}");
    }
}

/// The importance of every expert of every layer by its formula, one window and one token at a time.
fn importance(max_tokens: usize, context: usize) -> Vec<Vec<f64>> {
    let folder = example("tiny-gpt-oss");
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let options = LoadOptions { experts: ExpertPlacement::Resident, ..LoadOptions::default() };
    let model = GptOss::<Flex>::load(&checkpoint, options, &Default::default()).unwrap();
    let config = checkpoint.config();
    let text = fs::read_to_string(example("text/calibration.txt")).unwrap();
    let tokens = Tokenizer::from_folder(&folder).unwrap().encode(&text, true).unwrap();
    let rope = RotaryEmbedding::new(&config.rope, config.head_dim).tables(0..context, &Default::default());
    let mut importance = vec![vec![0.0; EXPERTS]; LAYERS];
    for window in tokens.chunks(context).take(max_tokens / context) {
        let mut states: Vec<Tensor<Flex, 2>> = Vec::new();
        let ids = model.tokens(window).unwrap();
        model.hidden_states(ids, &mut model.new_cache(), |_, state| states.push(state.clone()));
        for (number, layer) in model.layers.iter().enumerate() {
            let x = states[number].clone();
            let mut cache = LayerCache::new(config.window(number));
            let x = x.clone() + layer.self_attn.forward(layer.input_layernorm.forward(x), &rope, &mut cache);
            let x = layer.post_attention_layernorm.forward(x);
            let routing = layer.mlp.router.forward(x.clone());
            let chosen: Vec<i64> = routing.indices.into_data().iter::<i64>().collect();
            let weights: Vec<f32> = routing.weights.into_data().iter::<f32>().collect();
            let Experts::Dense(dense) = &layer.mlp.experts else { panic!("not in memory") };
            for (slot, (expert, weight)) in chosen.into_iter().zip(weights).enumerate() {
                let token = x.clone().slice_dim(0, slot / 2..slot / 2 + 1);
                let y = dense.experts[expert as usize].forward(token, config.activation());
                let norm = y.into_data().iter::<f32>().map(|y| f64::from(y).powi(2)).sum::<f64>().sqrt();
                importance[number][expert as usize] += f64::from(weight) * norm;
            }
        }
    }
    importance
}

#[test]
fn the_most_important_experts_on_the_full_precision_stream_stay() {
    let folder = tempfile::tempdir().unwrap();
    let importance = importance(512, 128);
    for method in ["absmean", "pt-bitnet", "ternoss"] {
        let text = example("text/calibration.txt");
        let options = ["--method", method, "--keep-experts", "3", "--calibration", utf8(&text)];
        let few = ["--calibration-tokens", "512", "--calibration-context", "128"];
        let output = folder.path().join(method);
        ternoss_ok(&arguments(&example("tiny-gpt-oss"), &output, &[&options[..], &few].concat()));
        let report = json(&output, "calibration_report.json");
        assert_eq!(report["reduction"]["importance_tokens"], 512);
        assert_eq!(report["calibration_tokens"], if method == "absmean" { 0 } else { 512 });
        for (layer, importance) in importance.iter().enumerate() {
            let mut order: Vec<usize> = (0..EXPERTS).collect();
            order.sort_by(|a, b| importance[*b].total_cmp(&importance[*a]));
            order.truncate(3);
            order.sort_unstable();
            let total: f64 = importance.iter().sum();
            let kept = kept(&report, layer);
            assert_eq!(kept.iter().map(|(expert, _)| *expert).collect::<Vec<_>>(), order, "{method}, layer {layer}");
            for (expert, share) in kept {
                assert!((share - importance[expert] / total).abs() < 1e-5, "{method}, layer {layer}, expert {expert}");
            }
        }
    }
}

#[test]
fn keeping_all_experts_is_the_same_as_saying_nothing() {
    let folder = tempfile::tempdir().unwrap();
    for method in ["absmean", "ternoss"] {
        let plain = quantized(folder.path().join(method), &["--method", method]);
        let all = quantized(folder.path().join(format!("{method}-all")), &["--method", method, "--keep-experts", "8"]);
        assert_eq!(listing(&plain), listing(&all));
        for name in listing(&plain) {
            assert!(fs::read(plain.join(&name)).unwrap() == fs::read(all.join(&name)).unwrap(), "{method}: {name}");
        }
    }
}

#[test]
fn more_experts_are_better() {
    let folder = tempfile::tempdir().unwrap();
    let text = example("text/prose_test.txt");
    let perplexity = |keep: &str| -> f64 {
        let output = quantized(folder.path().join(keep), &["--keep-experts", keep]);
        let args = ["perplexity", "--model", utf8(&output), "--text", utf8(&text), "--context", "128"];
        let few = ["--max-tokens", "2048", "--json"];
        let object: Value = serde_json::from_str(&ternoss_ok(&[&args[..], &few].concat())).unwrap();
        object["perplexity"].as_f64().unwrap()
    };
    let found = ["2", "4", "8"].map(perplexity);
    assert!(found.is_sorted_by(|fewer, more| fewer > more) && found[0] < 500.0, "{found:?}");
}

#[test]
fn a_target_size_is_met_with_as_little_loss_as_possible() {
    let folder = tempfile::tempdir().unwrap();
    let model = example("tiny-gpt-oss");
    let mut found = Vec::new();
    for target in ["1MB", "700kB", "500kB", "400kB", "350kB"] {
        let output = folder.path().join(target);
        let options = ["--method", "absmean", "--format", "t5", "--group-size", "row", "--target-size", target];
        let shown = ternoss_ok(&arguments(&model, &output, &[&FEW[..], &options].concat()));
        let report = json(&output, "calibration_report.json");
        let reduction = &report["reduction"];
        let bytes = reduction["target_bytes"].as_u64().unwrap();
        assert!(folder_size(&output) + 4096 <= bytes, "{target}: {}", folder_size(&output));
        let (planes, kept) = (reduction["table_planes"].as_u64(), reduction["experts_kept"].as_u64().unwrap());
        assert!(shown.contains(&format!("{kept} of 8")), "{shown}");
        assert_eq!(shown.contains("warning: "), planes.is_some() || kept < 8, "{shown}");
        ternoss_ok(&["generate", "--model", utf8(&output), "--tokens", "1,2", "--max-tokens", "2", "--json"]);
        found.push((planes, kept));
    }
    assert_eq!(found[..2], [(None, 8), (Some(3), 8)]);
    assert!(matches!(found[2], (Some(2), 4..8)) && matches!(found[3], (Some(2), 2..4)), "{found:?}");
    assert!(matches!(found[4], (Some(1), 2..8)), "{found:?}");

    // What is set already stays as it is.
    let output = folder.path().join("fixed");
    let fixed = ["--method", "absmean", "--target-size", "600kB", "--table-planes", "3", "--format", "t5"];
    ternoss_ok(&arguments(&model, &output, &[&FEW[..], &fixed].concat()));
    let report = json(&output, "calibration_report.json");
    assert_eq!(report["reduction"]["table_planes"], 3);
    assert!(folder_size(&output) <= 600_000);
}

#[test]
fn what_cannot_be_done_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (model, output) = (example("tiny-gpt-oss"), folder.path().join("output"));
    let refused = |model: &Path, options: &[&str], expected: &str| {
        let error = ternoss_err(&arguments(model, &output, options));
        assert!(error.contains(expected), "{error} lacks {expected:?}");
        assert_eq!(listing(folder.path()), [] as [&str; 0]);
        error
    };
    for keep in ["0", "1", "9", "18446744073709551615"] {
        let expected = format!("{keep} experts to keep: this model sends a token to 2 experts and has 8 a layer");
        refused(&model, &["--keep-experts", keep], &expected);
    }
    for planes in ["0", "4"] {
        let expected = format!("{planes} planes for embedding and output layer: 1 to 3 are possible");
        refused(&model, &["--method", "absmean", "--table-planes", planes], &expected);
    }
    let error = refused(&model, &["--target-size", "100kB"], "a folder of 100000 bytes is not possible");
    assert!(error.contains("hint: --format t5 --group-size row"), "{error}");
    // The size it names is one that works.
    let smallest = error.lines().next().unwrap().rsplit(' ').next().unwrap();
    let [less, enough] = [-1i64, 0].map(|change| (smallest.parse::<i64>().unwrap() + change).to_string());
    refused(&model, &["--target-size", &less], "is not possible");
    let few = ["--method", "absmean", "--calibration-tokens", "256", "--calibration-context", "128"];
    refused(&support::fixture("tiny-bf16"), &["--method", "absmean", "--keep-experts", "3"], "tokenizer");
    refused(&model, &["--keep-experts", "4", "--calibration-tokens", "0"], "at least one window");
    for size in ["fast", "1.5XB", "-1GB", "0"] {
        let arguments = arguments(&model, &output, &["--target-size", size]);
        assert_eq!(support::ternoss(&arguments).status.code(), Some(2), "{size}");
    }
    // absmean has other biases than the default method: its folder is smaller still.
    ternoss_ok(&arguments(&model, &output, &[&few[..], &["--target-size", &enough]].concat()));
    assert!(folder_size(&output) <= enough.parse().unwrap());
}

#[test]
fn an_expert_that_is_no_number_is_named_even_where_it_would_be_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let broken = folder.path().join("broken");
    for method in ["absmean", "ternoss"] {
        for expert in 0..EXPERTS {
            let name = "model.layers.1.mlp.experts.down_proj";
            let mut model = Folder::read(&example("tiny-gpt-oss"));
            model.tensor(name).set(expert * 128 * 64 + 5, f32::NAN);
            model.write(&broken);
            let output = folder.path().join("output");
            let options = ["--method", method, "--keep-experts", "2"];
            let finished = support::ternoss(&arguments(&broken, &output, &[&FEW[..], &options].concat()));
            let error = String::from_utf8_lossy(&finished.stderr);
            assert!(error.contains(name) && error.contains("holds NaN"), "{method}, expert {expert}: {error}");
            assert_eq!(listing(folder.path()), ["broken"]);
        }
    }
}
