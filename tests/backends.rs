//! What the program promises about backends and devices: the same results on each, and one line where one is missing.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod support;

use std::{fs, path::Path, process::Command};

use roxmltree::Document;
use serde_json::Value;
use support::{example, fixture, ternoss, ternoss_err, ternoss_ok};

fn json(args: &[&str]) -> Value {
    serde_json::from_str(&ternoss_ok(args)).unwrap()
}

/// One of the backends in the list of devices.
fn listed(backend: &str) -> Value {
    let devices = json(&["devices", "--json"]);
    devices["backends"].as_array().unwrap().iter().find(|found| found["backend"] == backend).unwrap().clone()
}

#[test]
fn devices_are_listed_and_what_is_missing_says_why() {
    let printed = ternoss_ok(&["devices"]);
    for backend in ["flex", "ndarray", "wgpu", "cuda"] {
        let found = listed(backend);
        assert!(printed.lines().any(|line| line.starts_with(backend)), "{printed}");
        if found["devices"].as_array().unwrap().is_empty() {
            assert!(found["missing"].as_str().is_some() && found["hint"].as_str().is_some(), "{found}");
            let reason = found["missing"].as_str().unwrap();
            assert!(printed.contains(&format!("not usable: {reason}")), "{printed}");
        }
    }
    let processor = &listed("flex")["devices"][0];
    assert!(processor["threads"].as_u64() > Some(0) && processor["instruction_set"].is_string(), "{processor}");
}

#[test]
fn automatic_is_never_a_software_device() {
    let devices = json(&["devices", "--json"]);
    let chosen = devices["auto"].as_str().unwrap();
    let found = listed(chosen);
    assert_eq!(found["devices"][0]["software"], false, "{devices}");
}

#[test]
fn every_backend_that_is_there_writes_the_same_text() {
    let model = fixture("tiny-bf16");
    let generate = |backend: &str| {
        let model = model.to_str().unwrap();
        let arguments = ["generate", "--model", model, "--tokens", "1,2,3", "--greedy", "--max-tokens", "4", "--json"];
        json(&[&arguments[..], &["--backend", backend]].concat())["tokens"].clone()
    };
    let expected = generate("flex");
    for backend in ["auto", "ndarray", "wgpu", "cuda"] {
        if backend == "auto" || !listed(backend)["devices"].as_array().unwrap().is_empty() {
            assert_eq!(generate(backend), expected, "{backend}");
        }
    }
}

#[test]
fn quantizing_works_on_the_other_processor_backend() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("ternary");
    let (model, output) = (example("tiny-gpt-oss"), output.to_str().unwrap());
    let options = ["--calibration-tokens", "512", "--calibration-context", "256", "--backend", "ndarray", "--json"];
    let quantize = ["quantize", "--model", model.to_str().unwrap(), "--output", output];
    let report = json(&[&quantize[..], &options].concat());
    assert!(report["bits_per_weight"].as_f64().unwrap() < 3.0, "{report}");
}

/// What calibration says of each layer's matrices: how much of their output is lost, q, k and v in front.
fn relative_errors(folder: &str) -> Vec<Vec<f64>> {
    let report: Value =
        serde_json::from_slice(&fs::read(Path::new(folder).join("calibration_report.json")).unwrap()).unwrap();
    let errors = |layer: &Value| {
        let matrices = layer["matrices"].as_array().unwrap();
        matrices.iter().map(|matrix| matrix["relative_error"].as_f64().unwrap()).collect()
    };
    report["layers"].as_array().unwrap().iter().map(errors).collect()
}

#[test]
fn a_gpu_calibrates_and_measures_as_the_processor_does() {
    let folder = tempfile::tempdir().unwrap();
    let (model, text) = (example("tiny-gpt-oss"), example("text/prose_test.txt"));
    let perplexity = |model: &str, backend: &str| {
        let text = ["--text", text.to_str().unwrap(), "--context", "128", "--max-tokens", "4096", "--json"];
        json(&[&["perplexity", "--model", model, "--backend", backend], &text[..]].concat())["perplexity"]
            .as_f64()
            .unwrap()
    };
    let close = |found: f64, expected: f64, share: f64, what: &str| {
        assert!((found / expected - 1.0).abs() < share, "{what}: {found} {expected}");
    };
    for gpu in ["wgpu", "cuda"] {
        if listed(gpu)["devices"].as_array().unwrap().is_empty() {
            continue;
        }
        for (name, gradients) in [("plain", &[][..]), ("gradients", &["--reconstruction", "1", "--distill", "1"][..])] {
            let [flex, other] = ["flex", gpu].map(|backend| {
                let output = folder.path().join(format!("{backend}-{name}")).to_str().unwrap().to_string();
                let quantize = ["quantize", "--model", model.to_str().unwrap(), "--calibration-tokens", "2048"];
                let options = ["--calibration-context", "128", "--backend", backend, "--output", &output];
                ternoss_ok(&[&quantize[..], &options, gradients].concat());
                output
            });
            let expected = perplexity(&flex, "flex");
            close(perplexity(&flex, gpu), expected, 0.005, gpu);
            // The last bits of sums decide a trit here or there, of which a small model's perplexity is no mean.
            close(perplexity(&other, "flex"), expected, 0.05, gpu);
            if name == "plain" {
                let (flex, other) = (relative_errors(&flex), relative_errors(&other));
                for (found, expected) in other[0][..3].iter().zip(&flex[0]) {
                    close(*found, *expected, 1e-4, "the first matrices, before anything differs");
                }
                for (found, expected) in other.iter().zip(&flex) {
                    close(found.iter().sum(), expected.iter().sum(), 0.01, "a layer");
                }
            }
        }
    }
}

#[test]
fn a_backend_that_is_missing_is_one_line_and_a_hint() {
    let model = fixture("tiny-bf16");
    for backend in ["wgpu", "cuda"] {
        if listed(backend)["devices"].as_array().unwrap().is_empty() {
            let arguments = ["logits", "--model", model.to_str().unwrap(), "--tokens", "1", "--output", "/dev/null"];
            let failed = ternoss_err(&[&arguments[..], &["--backend", backend]].concat());
            assert!(failed.starts_with(&format!("error: --backend {backend}: ")), "{failed}");
            assert!(failed.contains("\nhint: "), "{failed}");
        }
    }
}

#[test]
fn without_a_driver_wgpu_is_one_line_and_a_hint() {
    let model = fixture("tiny-bf16");
    let mut command = Command::new(env!("CARGO_BIN_EXE_ternoss"));
    command.args(["logits", "--model", model.to_str().unwrap(), "--tokens", "1", "--output", "/dev/null"]);
    command.args(["--backend", "wgpu"]).env("VK_ICD_FILENAMES", "/nonexistent").env("VK_DRIVER_FILES", "/nonexistent");
    if cfg!(not(target_os = "linux")) {
        return;
    }
    let output = command.output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    let lines: Vec<&str> = stderr.lines().collect();
    assert!(lines.len() == 2 && lines[0].starts_with("error: --backend wgpu: "), "{stderr}");
    assert!(lines[1].starts_with("hint: "), "{stderr}");
}

#[test]
fn an_unknown_backend_is_refused() {
    let output = ternoss(&["logits", "--backend", "abacus", "--model", "m", "--tokens", "1", "--output", "o"]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(2) && stderr.contains("abacus"), "{stderr}");
}

#[test]
fn backends_are_compared_row_by_row() {
    let folder = tempfile::tempdir().unwrap();
    let (model, picture) = (folder.path().join("ternary"), folder.path().join("backends.svg"));
    let (model, picture) = (model.to_str().unwrap(), picture.to_str().unwrap());
    ternoss_ok(&["synthesize", "--shape", "tiny", "--format", "ternary", "--output", model]);
    let options = ["--prefill", "8", "--decode", "2", "--runs", "1", "--picture", picture, "--json"];
    let found = json(&[&["bench", "--model", model, "--backends"], &options[..]].concat());
    let rows = found["backends"].as_array().unwrap();
    for row in rows {
        if row["missing"].is_null() {
            for key in ["decode_tokens_per_second", "prefill_tokens_per_second", "load_seconds"] {
                assert!(row[key].as_f64().unwrap() > 0.0, "{key} of {row}");
            }
            let most = if row["operations"] == "quantized" { 0.2 } else { 1e-4 };
            assert!(row["logit_difference"].as_f64().unwrap() <= most, "{row}");
        }
    }
    let row = |backend: &str, operations: &str| {
        rows.iter().find(|row| row["backend"] == backend && row["operations"] == operations).unwrap()
    };
    assert_eq!(row("ndarray", "burn")["logit_difference"], 0.0);
    for backend in ["flex", "ndarray"] {
        for operations in ["burn", "kernels"] {
            assert!(row(backend, operations)["calibration_seconds"].as_f64().unwrap() > 0.0);
        }
    }
    let svg = std::fs::read_to_string(picture).unwrap();
    assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    let document = Document::parse(&svg).unwrap();
    let texts: Vec<&str> = document.descendants().filter_map(|node| node.text()).collect();
    assert!(texts.contains(&"flex, ternoss"), "{texts:?}");
}
