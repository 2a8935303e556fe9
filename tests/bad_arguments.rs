//! Every request that cannot be served gets one line of error and leaves nothing behind.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod support;

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use safetensors::Dtype;
use serde_json::json;
use support::{copy_folder, example, fixture, folder::Folder, listing, ternoss, ternoss_err, ternoss_ok};

fn utf8(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// That a command fails with exit code 1 and a message that holds all of `expected`.
#[track_caller]
fn refused(args: &[&str], expected: &[&str]) {
    let error = ternoss_err(args);
    assert!(expected.iter().all(|part| error.contains(part)), "{error} lacks one of {expected:?}");
}

/// That the command line itself is refused: exit code 2, a message that holds `expected`, nothing on stdout.
#[track_caller]
fn misused(args: &[&str], expected: &str) {
    let output = ternoss(args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.starts_with("error: ") && stderr.contains(expected), "{stderr}");
    assert_eq!(stderr.matches("error: ").count(), 1, "{stderr}");
    assert!(output.stdout.is_empty());
}

#[test]
fn a_command_line_that_makes_no_sense_is_refused() {
    let model = fixture("tiny-bf16");
    let model = utf8(&model);
    misused(&["generate", "--model", model, "--prompt", "a", "--tokens", "1"], "cannot be used with");
    misused(&["generate", "--model", model], "required");
    misused(&["generate", "--model", model, "--tokens", "1,x"], "\"x\" is not a token id");
    misused(&["generate", "--model", model, "--tokens", "-1"], "-1");
    misused(&["generate", "--model", model, "--tokens", "4294967296"], "not a token id");
    for size in ["63", "0", "65", "rows", ""] {
        misused(&["quantize", "--model", model, "--output", "/nowhere", "--group-size", size], "--group-size");
    }
    misused(&["quantize", "--model", model, "--output", "/nowhere", "--format", "t3"], "t3");
    misused(
        &["quantize", "--model", model, "--output", "/nowhere", "--activation-memory", "much"],
        "unknown unit \"much\"",
    );
    misused(&["quantize", "--model", model, "--output", "/nowhere", "--method", "magic"], "magic");
    misused(&["synthesize", "--shape", "huge", "--format", "bf16", "--output", "/nowhere"], "huge");
    misused(&["turn-to-gold"], "turn-to-gold");
}

#[test]
fn tokens_that_are_not_the_models_are_refused() {
    let model = fixture("tiny-bf16");
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("logits.safetensors");
    let outside = "token 512 at position 1 is outside the vocabulary of 512";
    refused(&["generate", "--model", utf8(&model), "--tokens", "1,512"], &[outside]);
    refused(&["logits", "--model", utf8(&model), "--tokens", "1,512", "--output", utf8(&output)], &[outside]);
    refused(&["generate", "--model", utf8(&model), "--tokens", ""], &["the prompt is empty"]);
    refused(&["generate", "--model", utf8(&example("tiny-gpt-oss")), "--prompt", ""], &["the prompt is empty"]);
    refused(&["logits", "--model", utf8(&model), "--tokens", "", "--output", utf8(&output)], &["at least one"]);
    refused(&["logits", "--model", utf8(&model), "--tokens", "1;2", "--output", utf8(&output)], &["not a token id"]);
    assert_eq!(listing(folder.path()), [] as [&str; 0]);
}

#[test]
fn text_needs_a_tokenizer() {
    let model = tempfile::tempdir().unwrap();
    copy_folder(&fixture("tiny-bf16"), model.path());
    let text = example("text/wiki_test.txt");
    let generate = ["generate", "--model", utf8(model.path()), "--prompt", "a"];
    let perplexity = ["perplexity", "--model", utf8(model.path()), "--text", utf8(&text)];
    for args in [&generate, &perplexity[..]] {
        refused(args, &["needs the model's tokenizer", "tokenizer.json"]);
    }
    fs::write(model.path().join("tokenizer.json"), "{}").unwrap();
    for args in [&generate, &perplexity[..]] {
        refused(args, &["not a tokenizer.json"]);
    }
    fs::write(model.path().join("generation_config.json"), "[").unwrap();
    refused(&["generate", "--model", utf8(model.path()), "--tokens", "1"], &["generation_config.json: "]);
}

#[test]
fn a_text_that_cannot_be_measured_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (model, text) = (example("tiny-gpt-oss"), folder.path().join("text"));
    let with = |options: &[&str], expected: &[&str]| {
        refused(&[&["perplexity", "--model", utf8(&model), "--text", utf8(&text)], options].concat(), expected);
    };
    with(&[], &[utf8(&text), "No such file"]);
    fs::write(&text, [b"caf".as_slice(), &[0xe9], b" au lait"].concat()).unwrap();
    with(&[], &[utf8(&text), "UTF-8"]);
    fs::write(&text, "").unwrap();
    with(&[], &["the text has 0 tokens, at least one window of 512 is needed"]);
    fs::write(&text, "once upon a time ".repeat(100)).unwrap();
    with(&["--context", "4096"], &["at least one window of 4096"]);
    with(&["--max-tokens", "63", "--context", "64"], &["the text has 63 tokens"]);
    for context in ["0", "1"] {
        with(&["--context", context], &["the context must be at least 2 tokens"]);
    }
    refused(&["perplexity", "--model", utf8(&model), "--text", utf8(folder.path())], &[utf8(folder.path())]);
}

#[test]
fn sampling_that_makes_no_sense_is_refused() {
    let model = fixture("tiny-bf16");
    for (option, value) in [
        ("--temperature", "NaN"),
        ("--top-k", "0"),
        ("--top-p", "1.5"),
        ("--min-p", "2"),
        ("--repetition-penalty", "0"),
    ] {
        let parameter = option.trim_start_matches('-').replace('-', "_");
        refused(&["generate", "--model", utf8(&model), "--tokens", "1", option, value], &[&parameter, "must be"]);
    }
}

#[test]
fn a_folder_that_is_no_model_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    refused(&["inspect", "--model", utf8(folder.path())], &["is not a model folder: it has no config.json"]);
    fs::copy(fixture("tiny-bf16/config.json"), folder.path().join("config.json")).unwrap();
    refused(&["inspect", "--model", utf8(folder.path())], &["has neither model.safetensors nor"]);
    refused(&["inspect", "--model", utf8(&folder.path().join("absent"))], &["absent"]);
}

/// A ternary copy of the shipped model, taken apart.
fn ternary() -> Folder {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("ternary");
    ternoss_ok(&[
        "quantize",
        "--method",
        "absmean",
        "--model",
        utf8(&example("tiny-gpt-oss")),
        "--output",
        utf8(&output),
    ]);
    Folder::read(&output)
}

#[test]
fn a_damaged_ternary_tensor_is_refused_by_name() {
    let whole = ternary();
    let path = "model.layers.1.self_attn.k_proj";
    let with = |change: &dyn Fn(&mut Folder), expected: &[&str]| {
        let model = tempfile::tempdir().unwrap();
        let mut folder = whole.clone();
        change(&mut folder);
        folder.write(model.path());
        refused(&["generate", "--model", utf8(model.path()), "--tokens", "1,2"], expected);
    };
    let name = |suffix: &str| format!("{path}.{suffix}");
    for part in ["row_scales", "group_scales"].map(name) {
        with(&|folder| drop(folder.tensors.remove(&part)), &[&part, "is missing"]);
        with(&|folder| folder.tensor(&part).shape.push(1), &[&part, "has shape"]);
    }
    let codes = name("codes");
    with(&|folder| folder.tensor(&codes).shape.reverse(), &[&codes, "shape"]);
    with(&|folder| folder.tensor(&codes).dtype = Dtype::I32, &[&codes, "is I32"]);
    with(&|folder| folder.tensor(&name("row_scales")).dtype = Dtype::U32, &[&name("row_scales"), "is U32"]);
    let set = |key: &'static str, value: serde_json::Value| {
        move |folder: &mut Folder| folder.config["quantization_config"][key] = value.clone()
    };
    with(&set("group_size", json!(63)), &["group of 63 inputs"]);
    with(&set("group_size", json!(128)), &["group_scales", "has shape"]);
    with(&set("format", json!("t5")), &["codes", "has shape"]);
    with(&set("format", json!("t9")), &["config.json: ", "t9"]);
    with(&set("version", json!(2)), &["quantization_config.version is 2, expected 1"]);
    with(&set("activation_bits", json!(4)), &["quantization_config.activation_bits is 4, expected 8"]);
    with(&|folder| drop(folder.config.as_object_mut().unwrap().shift_remove("quantization_config")), &["codes"]);
    with(&|folder| folder.tensor(&name("row_scales")).set(3, f32::NAN), &["weights or its input are broken"]);
}

#[test]
fn codes_that_stand_for_nothing_do_no_harm() {
    let mut folder = ternary();
    for (name, tensor) in folder.tensors.iter_mut().filter(|(name, _)| name.contains("codes")) {
        tensor.data.fill(if name.contains("q_proj") { 0xff } else { 0x3f });
    }
    let model = tempfile::tempdir().unwrap();
    folder.write(model.path());
    // Loading does not scan the codes; what they compute means nothing, but all of it stays in bounds.
    ternoss_ok(&["generate", "--model", utf8(model.path()), "--tokens", "1,2,3", "--max-tokens", "3", "--json"]);
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let model = example("tiny-gpt-oss");
    let text = example("text/wiki_test.txt");
    let (generate, perplexity) = (["generate", "--prompt", "It was", "--max-tokens", "4"], ["perplexity", "--text"]);
    for args in [
        [&generate[..], &["--model", utf8(&model)]].concat(),
        [&generate[..], &["--model", utf8(&model), "--json"]].concat(),
        [&perplexity[..], &[utf8(&text), "--max-tokens", "64", "--context", "64", "--model", utf8(&model)]].concat(),
        vec!["inspect", "--model", utf8(&model), "--tensors"],
        vec!["inspect", "--model", utf8(&model), "--json"],
        vec!["--help"],
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let child =
            Command::new(env!("CARGO_BIN_EXE_ternoss")).args(&args).stdout(writer).stderr(Stdio::piped()).spawn();
        let output = child.unwrap().wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && stderr.is_empty(), "{args:?}: {stderr}");
    }
}
