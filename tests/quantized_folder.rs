//! What a ternary folder promises: read by every command, the same bytes every time, everything else kept.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod support;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use support::{Golden, example, fixture, folder::Folder, listing, ternoss_ok};
use ternoss::model::Checkpoint;

fn utf8(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn quantized(model: &Path, output: PathBuf, options: &[&str]) -> PathBuf {
    let args = ["quantize", "--method", "absmean", "--model", utf8(model), "--output", utf8(&output)];
    ternoss_ok(&[&args[..], options].concat());
    output
}

fn synthesized(output: PathBuf, format: &str, options: &[&str]) -> PathBuf {
    let args = ["synthesize", "--shape", "tiny", "--format", format, "--output", utf8(&output)];
    ternoss_ok(&[&args[..], options].concat());
    output
}

fn logits(model: &Path) -> Vec<f32> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("logits.safetensors");
    ternoss_ok(&["logits", "--model", utf8(model), "--tokens", "3,1,4,1,5,9,2,6", "--output", utf8(&file)]);
    let logits = Golden::open(&file).floats("logits").to_vec();
    assert!(logits.iter().all(|logit| logit.is_finite()));
    logits
}

/// Every file of a folder with its contents.
fn contents(folder: &Path) -> Vec<(String, Vec<u8>)> {
    listing(folder).into_iter().map(|name| (name.clone(), fs::read(folder.join(&name)).unwrap())).collect()
}

fn config(folder: &Path) -> Value {
    serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap()
}

#[test]
fn every_command_reads_a_ternary_folder() {
    let folder = tempfile::tempdir().unwrap();
    let model = example("tiny-gpt-oss");
    let dense = logits(&model);
    for (number, options) in [["64", "t2"], ["128", "t5"], ["row", "t2"], ["tensor", "t5"]].iter().enumerate() {
        let output = folder.path().join(number.to_string());
        let ternary = quantized(&model, output, &["--group-size", options[0], "--format", options[1]]);
        assert_ne!(logits(&ternary), dense);
        let text = example("text/prose_test.txt");
        let args = ["perplexity", "--model", utf8(&ternary), "--text", utf8(&text), "--context", "128"];
        let measured: Value =
            serde_json::from_str(&ternoss_ok(&[&args[..], &["--max-tokens", "512", "--json"]].concat())).unwrap();
        let perplexity = measured["perplexity"].as_f64().unwrap();
        assert!((30.0..3000.0).contains(&perplexity), "{options:?}: {perplexity}");
        let args = ["generate", "--model", utf8(&ternary), "--prompt", "It was", "--max-tokens", "8", "--json"];
        let object: Value = serde_json::from_str(&ternoss_ok(&args)).unwrap();
        assert!(object["text"].is_string());
        let shown = ternoss_ok(&["inspect", "--model", utf8(&ternary)]);
        assert!(shown.contains(&format!("ternary (absmean, {}, ", options[1])), "{shown}");
    }
}

#[test]
fn both_packings_compute_the_same() {
    let folder = tempfile::tempdir().unwrap();
    for (model, name) in [(fixture("tiny-mxfp4"), "mxfp4"), (example("tiny-gpt-oss"), "bf16")] {
        for group_size in ["64", "row", "tensor"] {
            let [t2, t5] = ["t2", "t5"].map(|format| {
                let output = folder.path().join(format!("{name}-{group_size}-{format}"));
                logits(&quantized(&model, output, &["--group-size", group_size, "--format", format]))
            });
            assert_eq!(t2, t5, "{name}, {group_size}");
        }
    }
}

#[test]
fn bytes_do_not_depend_on_the_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    let run = |threads: &str, args: &[&str]| {
        let output = folder.path().join(format!("{}-{threads}", args[0]));
        let status = Command::new(env!("CARGO_BIN_EXE_ternoss"))
            .args(args)
            .args(["--output", utf8(&output)])
            .env("RAYON_NUM_THREADS", threads)
            .output()
            .unwrap()
            .status;
        assert!(status.success());
        if output.is_dir() { contents(&output) } else { vec![(String::new(), fs::read(&output).unwrap())] }
    };
    let model = fixture("tiny-mxfp4");
    let mut commands = vec![
        vec!["synthesize", "--shape", "tiny", "--format", "ternary"],
        vec!["synthesize", "--shape", "tiny", "--format", "mxfp4", "--overwrite"],
        vec!["logits", "--model", utf8(&model), "--tokens", "1,2,3,4,5,6,7,8,9,10,11,12"],
    ];
    for group_size in ["64", "row", "tensor"] {
        commands.push(vec![
            "quantize",
            "--method",
            "absmean",
            "--model",
            utf8(&model),
            "--group-size",
            group_size,
            "--overwrite",
        ]);
    }
    for command in commands {
        assert!(run("1", &command) == run("4", &command), "{command:?}");
    }
}

#[test]
fn everything_but_the_ternary_weights_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["tiny-mxfp4", "tiny-bf16"] {
        let (source, output) = (folder.path().join(name), folder.path().join(format!("{name}-ternary")));
        let mut model = Folder::read(&fixture(name));
        model.config["a_key_of_tomorrow"] = serde_json::json!({ "nested": [1, 2.5, null] });
        model.write_shards(&source, 2);
        let companions = ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];
        for name in companions {
            fs::write(source.join(name), format!("{{\"of\": {name:?}}}")).unwrap();
        }
        quantized(&source, output.clone(), &[]);
        for name in companions {
            assert_eq!(fs::read(output.join(name)).unwrap(), fs::read(source.join(name)).unwrap());
        }
        let mut written = config(&output);
        assert_eq!(written["quantization_config"]["quant_method"], "ternoss");
        let report: Value = serde_json::from_slice(&fs::read(output.join("calibration_report.json")).unwrap()).unwrap();
        assert_eq!(report["bits_per_weight"], written["quantization_config"]["bits_per_weight"]);
        assert_eq!(report["layers"].as_array().unwrap().len(), 4);
        for config in [&mut written, &mut model.config] {
            config.as_object_mut().unwrap().shift_remove("quantization_config");
        }
        assert_eq!(written, model.config);
        let (before, after) = (Checkpoint::open(&source).unwrap(), Checkpoint::open(&output).unwrap());
        let ternary = |name: &str| name.contains("_proj.weight") || name.contains("experts") && !name.contains("bias");
        let mut kept = 0;
        for (name, entry) in before.tensors().filter(|(name, _)| !ternary(name)) {
            let copy = after.entry(name).unwrap();
            assert_eq!((copy.dtype, &copy.shape), (entry.dtype, &entry.shape), "{name}");
            assert!(before.bytes(name).unwrap() == after.bytes(name).unwrap(), "{name}");
            kept += 1;
        }
        // Embedding, output layer and norm; sinks, two norms, the router's two, four biases and two more a layer.
        assert_eq!(kept, 3 + 4 * 11);
        let parts = ["codes", "row_scales", "group_scales"];
        let made = after.tensors().filter(|(name, _)| parts.iter().any(|part| name.ends_with(part))).count();
        assert_eq!((made, after.tensors().count()), (4 * 6 * 3, kept + made));
    }
}

#[test]
fn tensors_are_aligned_for_mapping() {
    let folder = tempfile::tempdir().unwrap();
    let ternary = [
        quantized(&fixture("tiny-mxfp4"), folder.path().join("mxfp4"), &["--group-size", "row"]),
        quantized(&example("tiny-gpt-oss"), folder.path().join("bf16"), &[]),
        synthesized(folder.path().join("synthesized"), "ternary", &["--code-format", "t5"]),
    ];
    for folder in ternary {
        let mut codes = 0;
        for name in listing(&folder).iter().filter(|name| name.ends_with(".safetensors")) {
            let bytes = fs::read(folder.join(name)).unwrap();
            let (header, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
            for (name, info) in metadata.tensors() {
                let mapped =
                    info.dtype == Dtype::U32 || name.ends_with("embed_tokens.weight") || name == "lm_head.weight";
                codes += usize::from(info.dtype == Dtype::U32);
                let offset = 8 + header + info.data_offsets.0;
                assert!(offset.is_multiple_of(if mapped { 4 } else { info.dtype.bitsize() / 8 }), "{name} at {offset}");
            }
        }
        assert!(codes > 0);
    }
}

#[test]
fn synthesized_models_serve_every_command() {
    let folder = tempfile::tempdir().unwrap();
    for format in ["bf16", "mxfp4", "ternary"] {
        let model = synthesized(folder.path().join(format), format, &["--seed", "5"]);
        let again = synthesized(folder.path().join(format!("{format}-again")), format, &["--seed", "5"]);
        let other = synthesized(folder.path().join(format!("{format}-other")), format, &["--seed", "6"]);
        assert!(contents(&model) == contents(&again), "the same seed gives the same bytes");
        assert!(contents(&model) != contents(&other), "another seed gives others");
        ternoss_ok(&["inspect", "--model", utf8(&model)]);
        logits(&model);
        ternoss_ok(&["generate", "--model", utf8(&model), "--tokens", "1,2", "--max-tokens", "4", "--json"]);
        if format != "ternary" {
            logits(&quantized(&model, folder.path().join(format!("{format}-ternary")), &[]));
        }
    }
}

#[test]
fn an_existing_output_is_replaced_only_when_asked() {
    let folder = tempfile::tempdir().unwrap();
    let output = synthesized(folder.path().join("model"), "bf16", &[]);
    let first = contents(&output);
    let refused = support::ternoss_err(&[
        "quantize",
        "--method",
        "absmean",
        "--model",
        utf8(&fixture("tiny-bf16")),
        "--output",
        utf8(&output),
    ]);
    assert!(refused.contains("exists already") && refused.contains("hint: pass --overwrite"), "{refused}");
    assert!(contents(&output) == first);
    quantized(&fixture("tiny-bf16"), output.clone(), &["--overwrite"]);
    assert_eq!(config(&output)["quantization_config"]["quant_method"], "ternoss");
    assert_eq!(listing(folder.path()), ["model"]);
}
