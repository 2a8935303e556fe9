//! What block reconstruction and distillation promise, alone and together with ternary tables and fewer experts.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod support;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use burn_flex::Flex;
use support::{example, folder::Folder, listing, ternoss, ternoss_ok};
use ternoss::{
    calib::{Calibration, Report},
    model::{Agreement, Checkpoint, GptOss, LoadOptions, checkpoint::Part, tokenizer::Tokenizer},
};

const CONTEXT: usize = 64;
const TOKENS: usize = 512;

/// Everything at once.
const ALL: [&str; 8] = ["--keep-experts", "4", "--table-planes", "2", "--reconstruction", "4", "--distill", "2"];

fn utf8(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn arguments(output: &Path, options: &[&str]) -> Vec<String> {
    let (model, tokens, context) = (example("tiny-gpt-oss"), TOKENS.to_string(), CONTEXT.to_string());
    let args = ["quantize", "--model", utf8(&model), "--output", utf8(output)];
    let few = ["--calibration-tokens", &tokens, "--calibration-context", &context];
    [&args[..], &few, options].concat().iter().map(ToString::to_string).collect()
}

/// Quantizes the shipped model on a little text; the folder, and its report.
fn quantized(output: PathBuf, options: &[&str]) -> (PathBuf, Report) {
    ternoss_ok(&arguments(&output, options).iter().map(String::as_str).collect::<Vec<_>>());
    let report = Report::read(&output).unwrap();
    (output, report)
}

/// Both models on the windows that are held out, by way of the whole models.
fn agreement(student: &Path) -> Agreement {
    let model = example("tiny-gpt-oss");
    let checkpoint = Checkpoint::open(&model).unwrap();
    let text = fs::read_to_string(example("text/calibration.txt")).unwrap();
    let tokens = Tokenizer::from_folder(&model).unwrap().encode(&text, true).unwrap();
    let held_out = Calibration::new(&tokens, CONTEXT, TOKENS, checkpoint.config()).unwrap().held_out().concat();
    let load = |folder: &Path| {
        GptOss::<Flex>::load(&Checkpoint::open(folder).unwrap(), LoadOptions::default(), &Default::default()).unwrap()
    };
    load(student).agreement(&load(&model), &held_out, CONTEXT, || ()).unwrap()
}

/// The held-out figures in a report are those of the folder that stands beside it.
fn assert_measured(folder: &Path, report: &Report) {
    let (found, expected) = (report.held_out.unwrap(), agreement(folder));
    assert_eq!(found.tokens, CONTEXT);
    let off = (found.kl_divergence / expected.kl_divergence - 1.0).abs();
    assert!(off < 1e-3, "{found:?}, measured {expected:?}");
    assert!((found.top_1 - expected.top_1).abs() < 0.02, "{found:?}, measured {expected:?}");
}

/// The bytes of a report are those of the tensors that were written, and add up.
fn assert_counted(folder: &Path, report: &Report) {
    let written = Checkpoint::open(folder).unwrap();
    let size = |is: &dyn Fn(Part) -> bool| -> usize {
        written.tensors().filter(|(name, _)| is(Part::of(name))).map(|(_, entry)| entry.bytes()).sum()
    };
    for (part, bytes) in &report.parts {
        assert_eq!(*bytes, size(&|other| other == *part), "{part}");
    }
    let reduction = report.reduction.as_ref().unwrap();
    let ternary_tables = reduction.table_planes.is_some();
    let tables = |part| ternary_tables && matches!(part, Part::Embedding | Part::OutputLayer);
    assert_eq!(report.bytes(), size(&|_| true));
    assert_eq!(report.parts.values().sum::<usize>(), report.bytes());
    assert_eq!(report.ternary_bytes, size(&Part::is_ternary));
    assert_eq!(reduction.table_bytes, size(&tables));
    assert_eq!(report.full_precision_bytes, size(&|part: Part| !part.is_ternary() && !tables(part)));
    assert_eq!(report.bits_per_weight, 8.0 * report.ternary_bytes as f64 / report.ternary_weights as f64);
    assert_eq!(report.bits_per_parameter, 8.0 * report.bytes() as f64 / report.parameters as f64);
    // Three matrices of 128 by 64 that gate, up and down of an expert are.
    let per_expert = report.layers.len() * 3 * 128 * 64;
    let all = Checkpoint::open(&example("tiny-gpt-oss")).unwrap();
    let before: usize = all.tensors().map(|(_, entry)| entry.shape.iter().product::<usize>()).sum();
    let dropped = reduction.experts_before - reduction.experts_kept;
    // A row of the router, its bias, and the biases of both matrices.
    let beside = report.layers.len() * (128 + 1 + 128 + 128);
    assert_eq!(report.parameters, before - dropped * (per_expert + beside));
}

#[test]
fn every_layer_is_reconstructed_and_kept_only_where_its_error_fell() {
    let folder = tempfile::tempdir().unwrap();
    let (output, report) = quantized(folder.path().join("output"), &["--reconstruction", "6"]);
    assert_eq!((report.layers.len(), report.steps.reconstruction), (4, 6));
    for (number, layer) in report.layers.iter().enumerate() {
        let found = layer.reconstruction.unwrap();
        assert!(found.before.is_finite() && found.after.is_finite() && found.before > 0.0, "{number}: {found:?}");
        assert_eq!(found.kept, found.after < found.before, "{number}: {found:?}");
    }
    assert!(report.layers.iter().any(|layer| layer.reconstruction.unwrap().kept), "{report:?}");
    assert_measured(&output, &report);
    let (_, plain) = quantized(folder.path().join("plain"), &[]);
    assert!(plain.layers.iter().all(|layer| layer.reconstruction.is_none()) && plain.distillation.is_none());
    // The first layer has the same inputs in both runs: a layer that was kept is another one.
    let first = |name: &str| {
        let name = format!("model.layers.0.{name}");
        ["output", "plain"]
            .map(|folder_name| Folder::read(&folder.path().join(folder_name)).tensors[&name].data.clone())
    };
    let [tuned, plain] = first("self_attn.q_proj.row_scales");
    assert_eq!(tuned != plain, report.layers[0].reconstruction.unwrap().kept);
}

#[test]
fn distillation_changes_scales_and_norms_but_no_trit_and_is_kept_only_where_it_helps() {
    let folder = tempfile::tempdir().unwrap();
    let (plain, before) = quantized(folder.path().join("plain"), &[]);
    let (output, report) = quantized(folder.path().join("output"), &["--distill", "6"]);
    assert_eq!(listing(folder.path()), ["output", "plain"]);
    let (distilled, held_out) = (report.distillation.unwrap(), report.held_out.unwrap());
    assert_eq!(distilled.steps, 6);
    let apart = (distilled.before.kl_divergence / before.held_out.unwrap().kl_divergence - 1.0).abs();
    assert!(apart < 1e-3, "{distilled:?}, {before:?}");
    match distilled.kept {
        true => assert!(held_out.kl_divergence < distilled.before.kl_divergence, "{report:?}"),
        false => assert_eq!(held_out, distilled.before),
    }
    assert!(distilled.kept, "six steps help: {distilled:?}, {held_out:?}");
    assert_measured(&output, &report);
    let (plain, output) = (Folder::read(&plain), Folder::read(&output));
    assert!(plain.tensors.keys().eq(output.tensors.keys()));
    let mut changed = Vec::new();
    for (name, tensor) in &plain.tensors {
        let same = output.tensors[name].data == tensor.data;
        if name.ends_with(".codes") || name.ends_with("lm_head.weight") || name.ends_with("embed_tokens.weight") {
            assert!(same, "{name}");
        }
        changed.extend((!same).then_some(name.as_str()));
    }
    for name in ["model.norm.weight", "model.layers.0.input_layernorm.weight", "model.layers.3.mlp.router.weight"] {
        assert!(changed.contains(&name), "{name} is as before: {changed:?}");
    }
    assert!(changed.iter().any(|name| name.ends_with("_scales")), "{changed:?}");
}

#[test]
fn distillation_goes_on_from_the_model_before_it() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, _) = quantized(folder.path().join("whole"), &["--distill", "2"]);
    let undistilled = folder.path().join("output.undistilled");
    quantized(undistilled.clone(), &[]);
    // A mark that tells whether this very folder was used.
    let name = undistilled.join("calibration_report.json");
    let report = fs::read_to_string(&name).unwrap();
    fs::write(&name, report.replace("\"calibration_tokens\": 512", "\"calibration_tokens\": 513")).unwrap();
    let (output, report) = quantized(folder.path().join("output"), &["--distill", "2"]);
    assert_eq!(report.calibration_tokens, 513);
    assert!(!undistilled.exists());
    for name in listing(&whole).iter().filter(|name| !name.starts_with("calibration_report")) {
        assert!(fs::read(whole.join(name)).unwrap() == fs::read(output.join(name)).unwrap(), "{name}");
    }
    // A model with other settings is not taken for it.
    quantized(undistilled.clone(), &["--planes", "2"]);
    let args = arguments(&folder.path().join("third"), &["--distill", "2"]);
    fs::rename(&undistilled, folder.path().join("third.undistilled")).unwrap();
    let finished = ternoss(&args.iter().map(String::as_str).collect::<Vec<_>>());
    let error = String::from_utf8_lossy(&finished.stderr);
    assert_eq!(finished.status.code(), Some(1), "{error}");
    assert!(error.contains("third.undistilled") && error.contains("hint: pass --overwrite"), "{error}");
}

#[test]
fn everything_together_is_one_whole_model() {
    let folder = tempfile::tempdir().unwrap();
    let (output, report) = quantized(folder.path().join("output"), &ALL);
    assert_eq!(listing(folder.path()), ["output"]);
    let reduction = report.reduction.clone().unwrap();
    assert_eq!((reduction.experts_kept, reduction.experts_before), (4, 8));
    assert_eq!((reduction.table_planes, reduction.tables.len()), (Some(2), 2));
    assert_eq!(report.distillation.unwrap().steps, 2);
    for layer in &report.layers {
        let reconstruction = layer.reconstruction.unwrap();
        assert_eq!(reconstruction.kept, reconstruction.after < reconstruction.before);
        assert_eq!((layer.kept.len(), layer.expert_tokens.len()), (4, 4));
        // Every token goes to two of those that stay.
        assert_eq!(layer.expert_tokens.iter().sum::<usize>(), 2 * TOKENS);
    }
    assert_eq!(report.expert_loads.unwrap().experts, 16);
    assert_counted(&output, &report);
    assert_measured(&output, &report);
    let shown = ternoss_ok(&["inspect", "--model", utf8(&output)]);
    assert!(shown.contains("4 experts of 64 neurons") && shown.contains("the embedding is ternary"), "{shown}");
    ternoss_ok(&["generate", "--model", utf8(&output), "--tokens", "1,2,3", "--max-tokens", "4"]);
    let svg = fs::read_to_string(output.join("calibration_report.svg")).unwrap();
    assert!(svg.contains("4 of 8 experts a layer; ternary embedding and output layer, planes: 2"));
}

#[test]
fn held_out_figures_and_sizes_hold_for_every_mixture_of_options() {
    let folder = tempfile::tempdir().unwrap();
    let reconstruction = ["--keep-experts", "3", "--reconstruction", "2", "--without", "bias"];
    for (name, options) in [
        ("tables", &["--table-planes", "1"][..]),
        ("experts", &reconstruction),
        ("both", &["--table-planes", "3", "--keep-experts", "2", "--method", "pt-bitnet"]),
        ("rounded", &["--table-planes", "2", "--keep-experts", "5", "--method", "absmean", "--distill", "2"]),
    ] {
        let (output, report) = quantized(folder.path().join(name), options);
        assert_counted(&output, &report);
        assert_measured(&output, &report);
    }
    let (output, report) = quantized(folder.path().join("alone"), &["--method", "absmean", "--distill", "1"]);
    assert_measured(&output, &report);
}

#[test]
fn a_target_size_counts_what_gradients_change() {
    let folder = tempfile::tempdir().unwrap();
    let options = ["--target-size", "600kB", "--format", "t5", "--reconstruction", "2", "--distill", "1"];
    let (output, report) = quantized(folder.path().join("output"), &options);
    let size: u64 = listing(&output).iter().map(|name| fs::metadata(output.join(name)).unwrap().len()).sum();
    assert!(size <= 600_000, "{size}");
    assert_counted(&output, &report);
}

#[test]
fn bytes_do_not_depend_on_the_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    let [one, four] = ["1", "4"].map(|threads| {
        let output = folder.path().join(threads);
        let mut command = Command::new(env!("CARGO_BIN_EXE_ternoss"));
        let finished = command.args(arguments(&output, &ALL)).env("RAYON_NUM_THREADS", threads).output().unwrap();
        assert!(finished.status.success(), "{}", String::from_utf8_lossy(&finished.stderr));
        let files = listing(&output).into_iter();
        files.map(|name| (fs::read(output.join(&name)).unwrap(), name)).collect::<Vec<_>>()
    });
    let differs = one.iter().zip(&four).find(|(one, four)| one != four).map(|(one, _)| &one.1);
    assert_eq!(differs, None);
}
