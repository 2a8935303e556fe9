//! What a ternary embedding and output layer promise.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod support;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use burn::tensor::{Int, Tensor, TensorData};
use burn_flex::Flex;
use burn_ndarray::NdArray;
use serde_json::{Value, json};
use support::{Golden, assert_close, example, folder::Folder, listing, ternoss_err, ternoss_ok};
use ternoss::{
    backends::{CodeFormat, Rotation, TernaryBackend, reference::fake_quantize},
    model::{Checkpoint, GptOss, LoadOptions, table::Table},
};

fn utf8(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn quantized(model: &Path, output: PathBuf, options: &[&str]) -> PathBuf {
    ternoss_ok(&[&["quantize", "--model", utf8(model), "--output", utf8(&output)], options].concat());
    output
}

/// Options that fit scales and rotate, without looking at a text.
const FITTED: [&str; 2] = ["--without", "regression,residual,compensation,sweeps,bias"];

fn logits(model: &Path) -> Vec<f32> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("logits.safetensors");
    ternoss_ok(&["logits", "--model", utf8(model), "--tokens", "31,659,73,283,336", "--output", utf8(&file)]);
    Golden::open(&file).floats("logits").to_vec()
}

fn report(folder: &Path) -> Value {
    serde_json::from_slice(&fs::read(folder.join("calibration_report.json")).unwrap()).unwrap()
}

/// The table that a folder's tensors stand for, one weight at a time, rotated back.
fn decoded(folder: &Path, path: &str, format: CodeFormat, group_size: Option<usize>) -> Vec<Vec<f32>> {
    let mut folder = Folder::read(folder);
    let rotated = folder.config["quantization_config"]["rotation"].is_object();
    let codes = folder.tensor(&format!("{path}.codes")).clone();
    let &[planes, rows, words] = codes.shape.as_slice() else { panic!("{:?}", codes.shape) };
    let numbers = |data: &[u8]| data.chunks_exact(4).map(|four| four.try_into().unwrap()).collect::<Vec<[u8; 4]>>();
    let row_scales: Vec<f32> =
        numbers(&folder.tensor(&format!("{path}.row_scales")).data).into_iter().map(f32::from_le_bytes).collect();
    let codes: Vec<u32> = numbers(&codes.data).into_iter().map(u32::from_le_bytes).collect();
    let group_scales = group_size.map(|_| folder.tensor(&format!("{path}.group_scales")).data.clone());
    let row = |row: usize| {
        let mut dense = vec![0.0f32; 128];
        for at in (0..planes).map(|plane| plane * rows + row) {
            let mut trits = [0i8; 128];
            format.unpack_row(&codes[at * words..(at + 1) * words], &mut trits).unwrap();
            for (i, (dense, trit)) in dense.iter_mut().zip(trits).enumerate() {
                let group = group_scales.as_ref().map_or(1.0, |s| f32::from(s[at * 2 + i / group_size.unwrap()]));
                *dense += f32::from(trit) * group * row_scales[at];
            }
        }
        if rotated {
            Rotation::default().rotate_back(&mut dense);
        }
        dense
    };
    (0..rows).map(row).collect()
}

fn tables_are_used_as_they_stand<B: TernaryBackend>(folder: &Path, format: CodeFormat, group_size: Option<usize>) {
    let device = B::Device::default();
    let checkpoint = Checkpoint::open(folder).unwrap();
    let rotation = Folder::read(folder).config["quantization_config"]["rotation"].is_object();
    let model = GptOss::<B>::load(&checkpoint, LoadOptions::default(), &device).unwrap();
    assert!(matches!((&model.embed_tokens, &model.lm_head), (Table::Ternary(_), Table::Ternary(_))));

    let ids = [0i64, 1023, 7, 7, 500];
    let tokens = Tensor::<B, 1, Int>::from_data(TensorData::new(ids.to_vec(), [ids.len()]), &device);
    let found: Vec<f32> = model.embed_tokens.embed(tokens).into_data().iter::<f32>().collect();
    let table = decoded(folder, "model.embed_tokens", format, group_size);
    let expected: Vec<f32> = ids.iter().flat_map(|id| table[*id as usize].clone()).collect();
    assert_close("embedding", &found, &expected, 0.0);

    let x: Vec<f32> = (0..3 * 128).map(|i| ((i * 37 % 101) as f32 - 50.0) / 20.0).collect();
    // Tokens are rotated, rounded to int8, and rotated back: then the plain table serves.
    let rotate = |x: &[f32], with: &dyn Fn(&mut [f32])| -> Vec<f32> {
        let mut x = x.to_vec();
        if rotation {
            x.chunks_mut(128).for_each(with);
        }
        x
    };
    let rotated = rotate(&x, &|x| Rotation::default().rotate(x));
    let rounded = fake_quantize(Tensor::<B, 2>::from_data(TensorData::new(rotated, [3, 128]), &device));
    let rounded: Vec<f32> = rounded.into_data().iter::<f32>().collect();
    let seen = rotate(&rounded, &|x| Rotation::default().rotate_back(x));
    let output = decoded(folder, "lm_head", format, group_size);
    let dot = |row: &Vec<f32>, x: &[f32]| row.iter().zip(x).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let expected: Vec<f32> = seen.chunks(128).flat_map(|x| output.iter().map(|row| dot(row, x) as f32)).collect();
    let found = model.lm_head.logits(Tensor::from_data(TensorData::new(x, [3, 128]), &device));
    assert_close("logits", &found.into_data().iter::<f32>().collect::<Vec<_>>(), &expected, 1e-4);
}

#[test]
fn embedding_and_logits_are_those_of_the_stored_planes() {
    let folder = tempfile::tempdir().unwrap();
    let model = example("tiny-gpt-oss");
    for (planes, format, group, rotated) in
        [("1", CodeFormat::T2, "64", true), ("2", CodeFormat::T5, "row", true), ("3", CodeFormat::T5, "64", false)]
    {
        let packing = format.to_string();
        let options = ["--table-planes", planes, "--format", &packing, "--group-size", group];
        let how: &[&str] = if rotated { &FITTED } else { &["--method", "absmean"] };
        let output = quantized(&model, folder.path().join(planes), &[&options[..], how].concat());
        assert_eq!(Checkpoint::open(&output).unwrap().entry("model.embed_tokens.weight").map(|e| e.bytes()), None);
        tables_are_used_as_they_stand::<Flex>(&output, format, group.parse().ok());
        tables_are_used_as_they_stand::<NdArray>(&output, format, group.parse().ok());
    }
}

#[test]
fn both_packings_compute_the_same_and_more_planes_are_nearer() {
    let folder = tempfile::tempdir().unwrap();
    let model = example("tiny-gpt-oss");
    let full = logits(&quantized(&model, folder.path().join("full"), &FITTED));
    let mut distances = Vec::new();
    for planes in ["1", "2", "3"] {
        let [t2, t5] = ["t2", "t5"].map(|format| {
            let output = folder.path().join(format!("{format}-{planes}"));
            let options = [&FITTED[..], &["--format", format, "--table-planes", planes]].concat();
            logits(&quantized(&model, output, &options))
        });
        assert_eq!(t2, t5, "planes: {planes}");
        distances.push(t2.iter().zip(&full).map(|(a, b)| (a - b).powi(2)).sum::<f32>());
    }
    assert!(distances.is_sorted_by(|more, less| *more > 3.0 * less), "{distances:?}");
    let errors = ["t2-1", "t2-2", "t2-3"].map(|name| {
        let report = report(&folder.path().join(name));
        report["reduction"]["tables"][1]["relative_error"].as_f64().unwrap()
    });
    assert!(errors[0] < 0.3 && errors[1] < 0.05 && errors[2] < 0.01, "{errors:?}");
}

#[test]
fn sizes_are_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let output = quantized(
        &example("tiny-gpt-oss"),
        folder.path().join("output"),
        &["--method", "absmean", "--format", "t5", "--table-planes", "2"],
    );
    let report = report(&output);
    let bytes = |key: &Value| key.as_u64().unwrap();
    // Two planes of 1024 rows: 7 words, a row scale and two group scales each, and the same again.
    assert_eq!(bytes(&report["reduction"]["table_bytes"]), 2 * 2 * 1024 * (28 + 4 + 2));
    let shown = ternoss_ok(&["inspect", "--model", utf8(&output)]);
    assert!(shown.contains("the embedding is ternary: planes 2, 4.250 bits per weight"), "{shown}");
    assert!(shown.contains("the output layer is ternary: planes 2"), "{shown}");
    let object: Value = serde_json::from_str(&ternoss_ok(&["inspect", "--model", utf8(&output), "--json"])).unwrap();
    let parts = &object["parts"];
    assert_eq!(parts["embedding and output"]["bytes"], report["reduction"]["table_bytes"]);
    let ternary = bytes(&parts["attention"]["bytes"]) + bytes(&parts["experts"]["bytes"]);
    assert_eq!(ternary, bytes(&report["ternary_bytes"]));
    assert_eq!(bytes(&parts["router, norms, biases, sinks"]["bytes"]), bytes(&report["full_precision_bytes"]));
    assert_eq!(object["table_planes"], 2);
    assert_eq!(object["bits_per_weight"].as_f64().unwrap(), 8.0 * ternary as f64 / 950_272.0);
}

#[test]
fn a_tied_output_layer_is_the_ternary_embedding() {
    let folder = tempfile::tempdir().unwrap();
    let mut model = Folder::read(&example("tiny-gpt-oss"));
    model.config["tie_word_embeddings"] = json!(true);
    let source = folder.path().join("stray");
    model.write(&source);
    model.tensors.remove("lm_head.weight");
    let clean = folder.path().join("clean");
    model.write(&clean);
    let options = [&FITTED[..], &["--table-planes", "3"]].concat();
    let [stray, clean_output] = [&source, &clean].map(|model| {
        let output = quantized(model, model.with_extension("ternary"), &options);
        assert!(Checkpoint::open(&output).unwrap().tensors().all(|(name, _)| !name.starts_with("lm_head")));
        logits(&output)
    });
    assert_eq!(stray, clean_output);
    let stored = logits(&quantized(&clean, folder.path().join("stored"), &FITTED));
    let power = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>();
    let error = power(&mut stored.iter().zip(&stray).map(|(a, b)| a - b));
    assert!(error > 0.0 && error < 0.1 * power(&mut stored.iter().copied()), "{error}");
}

#[test]
fn bytes_do_not_depend_on_the_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    let model = example("tiny-gpt-oss");
    let [one, four] = ["1", "4"].map(|threads| {
        let output = folder.path().join(threads);
        let args = ["quantize", "--model", utf8(&model), "--output", utf8(&output), "--table-planes", "2"];
        let options = ["--keep-experts", "4", "--calibration-tokens", "512", "--calibration-context", "128"];
        let mut command = Command::new(env!("CARGO_BIN_EXE_ternoss"));
        let finished = command.args(args).args(options).env("RAYON_NUM_THREADS", threads).output().unwrap();
        assert!(finished.status.success(), "{}", String::from_utf8_lossy(&finished.stderr));
        let files = listing(&output).into_iter();
        files.map(|name| (fs::read(output.join(&name)).unwrap(), name)).collect::<Vec<_>>()
    });
    let differs = one.iter().zip(&four).find(|(one, four)| one != four).map(|(one, _)| &one.1);
    assert_eq!(differs, None);
}

#[test]
fn a_damaged_table_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let broken = folder.path().join("broken");
    for name in ["model.embed_tokens.weight", "lm_head.weight"] {
        let mut model = Folder::read(&example("tiny-gpt-oss"));
        model.tensor(name).set(70_000, f32::NAN);
        model.write(&broken);
        let output = folder.path().join("output");
        let args = ["quantize", "--model", utf8(&broken), "--output", utf8(&output), "--table-planes", "2"];
        let error = ternoss_err(&[&args[..], &["--method", "absmean"]].concat());
        assert!(error.contains(name) && error.contains("holds NaN at position 70000"), "{error}");
        assert_eq!(listing(folder.path()), ["broken"]);
    }
    let whole = quantized(
        &example("tiny-gpt-oss"),
        folder.path().join("whole"),
        &["--method", "absmean", "--table-planes", "2"],
    );
    for part in ["row_scales", "group_scales"] {
        let mut model = Folder::read(&whole);
        let name = format!("lm_head.{part}");
        model.tensors.remove(&name);
        let damaged = folder.path().join(part);
        model.write(&damaged);
        let error = ternoss_err(&["generate", "--model", utf8(&damaged), "--tokens", "1"]);
        assert!(error.contains(&name) && error.contains("is missing"), "{error}");
    }
}
