//! What a calibrated quantization promises, through the program.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod support;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;
use support::{Golden, copy_folder, example, fixture, folder::Folder, listing, ternoss, ternoss_err, ternoss_ok};

fn utf8(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Arguments that calibrate the shipped model on a little text.
fn calibrate(output: &Path, options: &[&str]) -> Vec<String> {
    let (model, text) = (example("tiny-gpt-oss"), example("text/calibration.txt"));
    let args = ["quantize", "--model", utf8(&model), "--calibration", utf8(&text), "--output", utf8(output)];
    let few = ["--calibration-tokens", "1024", "--calibration-context", "128"];
    [&args[..], &few, options].concat().iter().map(ToString::to_string).collect()
}

fn calibrated(output: PathBuf, options: &[&str]) -> PathBuf {
    ternoss_ok(&calibrate(&output, options).iter().map(String::as_str).collect::<Vec<_>>());
    output
}

fn perplexity(model: &Path) -> f64 {
    let text = example("text/prose_test.txt");
    let args = ["perplexity", "--model", utf8(model), "--text", utf8(&text), "--context", "128"];
    let object: Value =
        serde_json::from_str(&ternoss_ok(&[&args[..], &["--max-tokens", "2048", "--json"]].concat())).unwrap();
    object["perplexity"].as_f64().unwrap()
}

fn logits(model: &Path) -> Vec<f32> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("logits.safetensors");
    ternoss_ok(&["logits", "--model", utf8(model), "--tokens", "31,659,73,283,336", "--output", utf8(&file)]);
    Golden::open(&file).floats("logits").to_vec()
}

#[test]
fn looking_at_a_text_is_better_than_rounding_and_two_planes_than_one() {
    let folder = tempfile::tempdir().unwrap();
    let rounded = folder.path().join("absmean");
    let model = example("tiny-gpt-oss");
    ternoss_ok(&["quantize", "--method", "absmean", "--model", utf8(&model), "--output", utf8(&rounded)]);
    let one = calibrated(folder.path().join("one"), &[]);
    let two = calibrated(folder.path().join("two"), &["--planes", "2"]);
    let found = [&rounded, &one, &two, &model].map(|model| perplexity(model));
    assert!(found.is_sorted_by(|worse, better| worse > better), "{found:?}");
    let report: Value = serde_json::from_slice(&fs::read(one.join("calibration_report.json")).unwrap()).unwrap();
    assert_eq!(report["calibration_tokens"], 1024);
}

#[test]
fn both_packings_compute_the_same() {
    let folder = tempfile::tempdir().unwrap();
    for planes in ["1", "2"] {
        let [t2, t5] = ["t2", "t5"].map(|format| {
            logits(&calibrated(
                folder.path().join(format!("{format}-{planes}")),
                &["--format", format, "--planes", planes],
            ))
        });
        assert_eq!(t2, t5, "{planes} planes");
    }
}

#[test]
fn bytes_do_not_depend_on_the_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    for method in ["ternoss", "pt-bitnet"] {
        let [one, four] = ["1", "4"].map(|threads| {
            let output = folder.path().join(format!("{method}-{threads}"));
            let mut command = Command::new(env!("CARGO_BIN_EXE_ternoss"));
            let args = calibrate(&output, &["--method", method]);
            let finished = command.args(args).env("RAYON_NUM_THREADS", threads).output().unwrap();
            assert!(finished.status.success(), "{}", String::from_utf8_lossy(&finished.stderr));
            listing(&output)
                .into_iter()
                .map(|name| (name.clone(), fs::read(output.join(name)).unwrap()))
                .collect::<Vec<_>>()
        });
        let differs = one.iter().zip(&four).find(|(one, four)| one != four).map(|(one, _)| &one.0);
        assert_eq!(differs, None, "{method}");
    }
}

#[test]
fn bytes_do_not_depend_on_the_memory_for_activations() {
    let folder = tempfile::tempdir().unwrap();
    let gradients = ["--keep-experts", "4", "--table-planes", "2", "--reconstruction", "2", "--distill", "2"];
    let pruned = ["--method", "absmean", "--keep-experts", "3"];
    for (name, options) in [("plain", &[][..]), ("gradients", &gradients), ("pruned", &pruned)] {
        // Everything in memory, some of it, nothing.
        let [most, some, none] = ["2GB", "1MB", "1B"].map(|memory| {
            let output = folder.path().join(format!("{name}-{memory}"));
            let output = calibrated(output, &[options, &["--activation-memory", memory]].concat());
            let files = listing(&output).into_iter();
            files.map(|name| (fs::read(output.join(&name)).unwrap(), name)).collect::<Vec<_>>()
        });
        for other in [some, none] {
            assert_eq!(most.len(), other.len(), "{name}");
            let differs = most.iter().zip(&other).find(|(a, b)| a != b).map(|(a, _)| &a.1);
            assert_eq!(differs, None, "{name}");
        }
    }
    let left: Vec<_> = listing(folder.path()).into_iter().filter(|name| name.contains('.')).collect();
    assert_eq!(left, [] as [&str; 0]);
}

#[test]
fn a_calibration_that_cannot_be_done_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (output, text) = (folder.path().join("output"), folder.path().join("text"));
    let with = |model: &Path, options: &[&str], expected: &str| {
        let error = ternoss_err(&[&["quantize", "--model", utf8(model), "--output", utf8(&output)], options].concat());
        assert!(error.contains(expected), "{error} lacks {expected:?}");
        assert!(!listing(folder.path()).iter().any(|name| name.contains("output")), "{error}");
    };
    let (model, calibration) = (example("tiny-gpt-oss"), ["--calibration", utf8(&text)]);
    with(&model, &calibration, "No such file");
    fs::write(&text, [b'a', 0xff]).unwrap();
    with(&model, &calibration, "UTF-8");
    fs::write(&text, "too short").unwrap();
    with(&model, &calibration, "at least one window of 1024");
    fs::write(&text, "It is a truth universally acknowledged. ".repeat(400)).unwrap();
    for context in ["0", "1", "18446744073709551615"] {
        with(&model, &[&calibration[..], &["--calibration-context", context]].concat(), "at least one window");
    }
    with(&model, &[&calibration[..], &["--calibration-tokens", "0"]].concat(), "at least one window");
    for planes in ["0", "4", "18446744073709551615"] {
        with(&model, &[&calibration[..], &["--planes", planes]].concat(), "planes");
    }
    with(&model, &["--method", "absmean", "--planes", "2"], "2 planes");
    with(&model, &[&calibration[..], &["--without", "thinking"]].concat(), "thinking");
    with(&model, &["--method", "pt-bitnet", "--planes", "2"], "2 planes");
    with(&model, &[&calibration[..], &["--group-size", "tensor"]].concat(), "one scale a matrix is for absmean only");
    with(&model, &[&calibration[..], &["--method", "absmean"]].concat(), "looks at no calibration text");
    with(&fixture("tiny-bf16"), &calibration, "needs the model's tokenizer");
}

#[test]
fn weights_that_are_no_numbers_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let broken = folder.path().join("broken");
    copy_folder(&example("tiny-gpt-oss"), &broken);
    let whole = Folder::read(&broken);
    let names = whole.tensors.keys().filter(|name| !name.contains(".layers.") || name.contains(".layers.1."));
    let mut unnoticed = Vec::new();
    for (number, name) in names.enumerate() {
        let value = [f32::NAN, f32::INFINITY][number % 2];
        let mut damaged = whole.clone();
        damaged.tensor(name).set(1, value);
        damaged.write(&broken);
        let output = folder.path().join("output");
        let mut args = calibrate(&output, &[]);
        args[2] = utf8(&broken).into();
        let finished = ternoss(&args.iter().map(String::as_str).collect::<Vec<_>>());
        let stderr = String::from_utf8_lossy(&finished.stderr);
        let error = stderr.lines().find(|line| line.starts_with("error: ")).unwrap_or_default();
        let named = error.contains(name.as_str()) && error.contains(&format!("holds {value}"));
        if finished.status.code() != Some(1) || !named || output.exists() {
            unnoticed.push(format!("{name}: {stderr}"));
            let _ = fs::remove_dir_all(output);
        }
        assert_eq!(listing(folder.path()), ["broken"], "{name}");
    }
    assert!(unnoticed.is_empty(), "{unnoticed:#?}");
}

#[test]
fn an_ablation_names_every_step_and_keeps_nothing() {
    let (model, text) = (example("tiny-gpt-oss"), example("text/prose_test.txt"));
    let few = ["--calibration-tokens", "768", "--calibration-context", "128", "--context", "64", "--max-tokens", "256"];
    let few = [&few[..], &["--gradient-steps", "2"]].concat();
    let args = [&["ablation", "--json", "--model", utf8(&model), "--text", utf8(&text)][..], &few].concat();
    let rows: Vec<Value> = ternoss_ok(&args).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let names: Vec<&str> = rows.iter().map(|row| row["name"].as_str().unwrap()).collect();
    let expected = ["full precision", "absmean", "fitted scales only", "pt-bitnet"];
    assert_eq!(names[..4], expected);
    for step in ["rotation", "regression", "residual", "compensation", "sweeps", "bias"] {
        assert!(names.contains(&format!("ternoss without {step}").as_str()), "{names:?}");
    }
    for name in ["ternoss", "ternoss, reconstruction", "ternoss, distilled"] {
        assert!(names.contains(&name), "{names:?}");
    }
    assert!(rows.iter().all(|row| row["perplexity"].as_f64().unwrap() > 1.0), "{rows:?}");
    let perplexity = |name: &str| rows.iter().find(|row| row["name"] == name).unwrap()["perplexity"].as_f64().unwrap();
    assert!(perplexity("full precision") < perplexity("ternoss, 2 planes"));
    assert!(perplexity("ternoss, 2 planes") < perplexity("absmean"));
}

#[test]
fn a_model_agrees_with_itself_and_less_with_its_ternary_version() {
    let folder = tempfile::tempdir().unwrap();
    let ternary = calibrated(folder.path().join("ternary"), &[]);
    let (model, text) = (example("tiny-gpt-oss"), example("text/prose_test.txt"));
    let agreement = |student: &Path| -> (f64, f64) {
        let args = ["perplexity", "--model", utf8(student), "--against", utf8(&model), "--text", utf8(&text)];
        let few = ["--context", "64", "--max-tokens", "512", "--json"];
        let object: Value = serde_json::from_str(&ternoss_ok(&[&args[..], &few].concat())).unwrap();
        (object["kl_divergence"].as_f64().unwrap(), object["top_1"].as_f64().unwrap())
    };
    let (divergence, top_1) = agreement(&model);
    assert!(divergence.abs() < 1e-5 && top_1 == 1.0, "{divergence} {top_1}");
    let (divergence, top_1) = agreement(&ternary);
    assert!(divergence > 0.01 && top_1 < 1.0 && top_1 > 0.3, "{divergence} {top_1}");
}
