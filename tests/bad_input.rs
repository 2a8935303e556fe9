//! Every damaged model is refused with one line that names what is wrong, and nothing is left behind.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod support;

use std::{fs, path::Path};

use safetensors::Dtype;
use serde_json::{Value, json};
use support::{copy_folder, fixture, folder::Folder, listing, ternoss_err, ternoss_ok};

const LAYER: &str = "model.layers.2";

fn utf8(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// That both commands which read all of a model refuse it with a message that holds `expected`, and write nothing.
#[track_caller]
fn refused(model: &Path, expected: &[&str]) {
    refused_by_generate(model, expected);
    refused_by_quantize(model, expected);
}

#[track_caller]
fn refused_by_generate(model: &Path, expected: &[&str]) {
    let error = ternoss_err(&["generate", "--model", utf8(model), "--tokens", "1,2", "--max-tokens", "2"]);
    assert!(expected.iter().all(|part| error.contains(part)), "{error} lacks one of {expected:?}");
}

#[track_caller]
fn refused_by_quantize(model: &Path, expected: &[&str]) {
    let parent = tempfile::tempdir().unwrap();
    let output = parent.path().join("ternary");
    let error = ternoss_err(&["quantize", "--method", "absmean", "--model", utf8(model), "--output", utf8(&output)]);
    assert!(expected.iter().all(|part| error.contains(part)), "{error} lacks one of {expected:?}");
    assert_eq!(listing(parent.path()), [] as [&str; 0], "{error}");
}

/// A copy of a fixture, changed by `change`.
fn changed(name: &str, change: impl FnOnce(&mut Folder)) -> tempfile::TempDir {
    let mut folder = Folder::read(&fixture(name));
    change(&mut folder);
    let output = tempfile::tempdir().unwrap();
    folder.write(output.path());
    output
}

fn with_config(key: &str, value: Value) -> tempfile::TempDir {
    changed("tiny-bf16", |folder| folder.config[key] = value)
}

fn with_tensor(name: &str, change: impl FnOnce(&mut support::folder::Stored)) -> tempfile::TempDir {
    changed("tiny-bf16", |folder| change(folder.tensor(name)))
}

/// A copy of a fixture whose first weight file is changed byte by byte.
fn with_bytes(change: impl FnOnce(Vec<u8>) -> Vec<u8>) -> tempfile::TempDir {
    let output = tempfile::tempdir().unwrap();
    copy_folder(&fixture("tiny-bf16"), output.path());
    let file = output.path().join("model.safetensors");
    fs::write(&file, change(fs::read(&file).unwrap())).unwrap();
    output
}

/// The same with the header as JSON.
fn with_header(change: impl FnOnce(&mut Value)) -> tempfile::TempDir {
    with_bytes(|bytes| {
        let end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut header: Value = serde_json::from_slice(&bytes[8..end]).unwrap();
        change(&mut header);
        let header = header.to_string();
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &bytes[end..]].concat()
    })
}

#[test]
fn a_damaged_weight_file_is_named() {
    let file = "model.safetensors: not a whole safetensors file";
    for length in [0, 7, 8, 1000, 900_000] {
        refused(with_bytes(|bytes| bytes[..length].to_vec()).path(), &[file]);
    }
    refused(with_bytes(|bytes| [bytes, vec![0; 64]].concat()).path(), &[file]);
    for length in [u64::MAX, 1 << 62, 99_999_999, 1, 0] {
        refused(with_bytes(|bytes| [&length.to_le_bytes(), &bytes[8..]].concat()).path(), &[file]);
    }
    refused(with_bytes(|bytes| vec![b'{'; bytes.len()]).path(), &[file]);
    let sinks = format!("{LAYER}.self_attn.sinks");
    refused(with_header(|header| header[&sinks]["data_offsets"] = json!([0, 16])).path(), &[file]);
    refused(with_header(|header| drop(header.as_object_mut().unwrap().shift_remove(&sinks))).path(), &[file]);
    refused(with_header(|header| header[&sinks]["data_offsets"] = json!([u64::MAX, 16])).path(), &[file]);
    refused(with_header(|header| header[&sinks]["shape"] = json!([u64::MAX, u64::MAX])).path(), &[file]);
    refused(with_header(|header| header[&sinks]["dtype"] = json!("BF17")).path(), &[file]);
}

#[test]
fn a_damaged_index_is_named() {
    let damaged = |change: &dyn Fn(&mut Value)| {
        let output = tempfile::tempdir().unwrap();
        copy_folder(&fixture("tiny-mxfp4"), output.path());
        let path = output.path().join("model.safetensors.index.json");
        let mut index: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut index);
        fs::write(path, index.to_string()).unwrap();
        output
    };
    for shard in ["../model.safetensors", "/etc/passwd", "gone.safetensors", "..", ""] {
        let folder = damaged(&|index| index["weight_map"]["lm_head.weight"] = json!(shard));
        refused(folder.path(), &["index.json names the shard", shard]);
    }
    refused(damaged(&|index| *index = json!([])).path(), &["model.safetensors.index.json: "]);
    refused(damaged(&|index| index["weight_map"] = json!({})).path(), &["tensor model.", "is missing"]);
    let folder = damaged(&|_| {});
    fs::remove_file(folder.path().join("model-00001-of-00002.safetensors")).unwrap();
    refused(folder.path(), &["model-00001-of-00002.safetensors", "not in its folder", "hint: "]);
    fs::copy(
        folder.path().join("model-00000-of-00002.safetensors"),
        folder.path().join("model-00001-of-00002.safetensors"),
    )
    .unwrap();
    refused(folder.path(), &["stands in another shard too"]);
}

#[test]
fn a_tensor_that_does_not_fit_is_named() {
    for name in ["model.embed_tokens.weight", "model.layers.2.mlp.experts.down_proj", "model.layers.2.self_attn.sinks"]
    {
        let missing = changed("tiny-bf16", |folder| drop(folder.tensors.remove(name)));
        refused_by_generate(missing.path(), &[name, "is missing"]);
        let reshaped = with_tensor(name, |tensor| tensor.shape.push(1));
        refused_by_generate(reshaped.path(), &[name, "has shape", "config.json says"]);
        let typed = with_tensor(name, |tensor| tensor.dtype = Dtype::I16);
        refused_by_generate(typed.path(), &[name, "is I16, expected BF16, F16 or F32"]);
    }
    for name in ["q_proj.weight", "v_proj.weight"].map(|name| format!("{LAYER}.self_attn.{name}")) {
        refused(changed("tiny-bf16", |folder| drop(folder.tensors.remove(&name))).path(), &[&name, "is missing"]);
        refused(with_tensor(&name, |tensor| tensor.shape.reverse()).path(), &[&name, "has shape"]);
        refused(with_tensor(&name, |tensor| tensor.dtype = Dtype::U16).path(), &[&name, "is U16"]);
    }
}

#[test]
fn damaged_mxfp4_experts_are_named() {
    let blocks = format!("{LAYER}.mlp.experts.down_proj_blocks");
    let scales = format!("{LAYER}.mlp.experts.down_proj_scales");
    refused(changed("tiny-mxfp4", |folder| drop(folder.tensors.remove(&scales))).path(), &[&scales, "is missing"]);
    refused(changed("tiny-mxfp4", |folder| folder.tensor(&scales).dtype = Dtype::I8).path(), &[&scales, "is I8"]);
    refused(changed("tiny-mxfp4", |folder| folder.tensor(&blocks).shape.reverse()).path(), &[&blocks, "has shape"]);
    let scale = |scale: u8, code: u8| {
        changed("tiny-mxfp4", |folder| {
            folder.tensor(&scales).data[77] = scale;
            folder.tensor(&blocks).data[77 * 16..78 * 16].fill(code);
        })
    };
    refused(scale(255, 0x77).path(), &[&blocks, "holds inf at position"]);
    refused(scale(254, 0xff).path(), &[&blocks, "holds -inf at position"]);
    let streamed = scale(254, 0x77);
    let args = ["generate", "--model", utf8(streamed.path()), "--tokens", "1", "--stream-experts"];
    let error = ternoss_err(&args);
    assert!(error.contains(&blocks), "{error}");
    // The largest scale that leaves every code finite: nothing to complain about.
    let parent = tempfile::tempdir().unwrap();
    ternoss_ok(&[
        "quantize",
        "--method",
        "absmean",
        "--model",
        utf8(scale(252, 0x77).path()),
        "--output",
        utf8(&parent.path().join("x")),
    ]);
}

#[test]
fn weights_that_are_no_numbers_are_named_by_quantize() {
    let names: Vec<String> = Folder::read(&fixture("tiny-bf16"))
        .tensors
        .into_keys()
        .filter(|name| !name.contains(".layers.") || name.contains(LAYER))
        .collect();
    assert_eq!(names.len(), 3 + 17);
    for (number, name) in names.iter().enumerate() {
        let value = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][number % 3];
        let position = 3;
        let folder = with_tensor(name, |tensor| tensor.set(position, value));
        refused_by_quantize(
            folder.path(),
            &["model.safetensors: tensor ", name, &format!("holds {value} at position")],
        );
    }
}

#[test]
fn weights_that_are_no_numbers_do_not_pass_for_a_result() {
    let text = tempfile::NamedTempFile::new().unwrap();
    fs::write(text.path(), "to be or not to be, that is the question ".repeat(20)).unwrap();
    for name in ["model.norm.weight", &format!("{LAYER}.mlp.router.bias"), &format!("{LAYER}.self_attn.q_proj.weight")]
    {
        let mut folder = Folder::read(&support::example("tiny-gpt-oss"));
        folder.tensor(name).set(0, f32::NAN);
        let model = tempfile::tempdir().unwrap();
        folder.write(model.path());
        refused_by_generate(model.path(), &["the model's weights or its input are broken"]);
        let args = ["perplexity", "--model", utf8(model.path()), "--text", utf8(text.path()), "--context", "32"];
        for args in [&args[..], &[&args[..], &["--json"]].concat()] {
            let error = ternoss_err(args);
            assert!(error.contains("the model's weights are broken"), "{error}");
        }
    }
}

#[test]
fn a_configuration_no_model_can_have_is_refused_by_key() {
    for (key, value) in [
        ("num_local_experts", json!(0)),
        ("sliding_window", json!(0)),
        ("sliding_window", json!(u64::MAX)),
        ("num_experts_per_tok", json!(9)),
        ("num_experts_per_tok", json!(0)),
        ("head_dim", json!(15)),
        ("num_key_value_heads", json!(3)),
        ("hidden_size", json!(1u64 << 40)),
        ("vocab_size", json!(0)),
        ("num_hidden_layers", json!(u64::MAX)),
        ("num_hidden_layers", json!(5)),
        ("rms_norm_eps", json!(0)),
        ("swiglu_limit", json!(-7)),
        ("layer_types", json!(["full_attention"])),
    ] {
        let key_in_message = if key == "num_hidden_layers" && value == json!(5) { "layer_types" } else { key };
        refused(with_config(key, value).path(), &["config.json", key_in_message, "expected"]);
    }
    for (key, value) in
        [("hidden_size", json!(-1)), ("layer_types", json!(["linear_attention"])), ("vocab_size", json!(1.5))]
    {
        refused(with_config(key, value).path(), &["config.json: "]);
    }
    refused(with_config("model_type", json!("llama")).path(), &["model_type is \"llama\""]);
    refused(with_config("rope_scaling", json!({ "rope_type": "longrope" })).path(), &["rope_type", "longrope"]);
    refused(with_config("rope_scaling", json!({ "rope_type": "yarn", "factor": 0 })).path(), &["rope_scaling.factor"]);
    let theta = json!({ "rope_type": "default", "rope_theta": 1 });
    refused(with_config("rope_scaling", theta).path(), &["config.json", "rope_theta", "expected"]);
    refused(with_config("quantization_config", json!({ "quant_method": "gptq" })).path(), &["quant_method", "gptq"]);
    let folder = with_config("vocab_size", json!(512));
    for contents in ["", "{", "[]", "null", &"[".repeat(100_000)] {
        fs::write(folder.path().join("config.json"), contents).unwrap();
        refused(folder.path(), &[]);
    }
}

#[test]
fn absurd_sizes_are_refused_before_anything_is_made_of_them() {
    for key in ["hidden_size", "intermediate_size", "vocab_size", "num_local_experts", "head_dim"] {
        refused_by_generate(with_config(key, json!(1 << 24)).path(), &["has shape", "config.json says"]);
    }
    let huge = changed("tiny-bf16", |folder| {
        for key in
            ["hidden_size", "intermediate_size", "num_local_experts", "num_attention_heads", "num_key_value_heads"]
        {
            folder.config[key] = json!(1 << 24);
        }
        folder.config["head_dim"] = json!(1 << 24);
        folder.config["num_hidden_layers"] = json!(1 << 16);
        folder.config.as_object_mut().unwrap().shift_remove("layer_types");
    });
    refused(huge.path(), &["config.json"]);
    let error = ternoss_err(&["inspect", "--model", utf8(huge.path())]);
    assert!(error.contains("config.json"), "{error}");
    let long = with_config("max_position_embeddings", json!(1u64 << 60));
    ternoss_ok(&["generate", "--model", utf8(long.path()), "--tokens", "1", "--max-tokens", "1"]);
}
