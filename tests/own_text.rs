//! What calibrating on the model's own text promises.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod support;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::{Value, json};
use support::{chat_model, example, fixture, listing, ternoss_err, ternoss_ok};
use ternoss::{
    Cpu,
    calib::{TraceOptions, Traces},
    model::{Checkpoint, GptOss, LoadOptions, tokenizer::Tokenizer},
};

fn utf8(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn model() -> GptOss<Cpu> {
    let checkpoint = Checkpoint::open(&example("tiny-gpt-oss")).unwrap();
    GptOss::load(&checkpoint, LoadOptions::default(), &Default::default()).unwrap()
}

fn options() -> TraceOptions {
    TraceOptions { tokens: 300, longest: 40, stop_tokens: vec![1], seed: 5 }
}

fn prompts() -> Vec<Vec<u32>> {
    vec![vec![31, 659, 73], vec![283], vec![336, 40]]
}

fn written(model: &GptOss<Cpu>, options: TraceOptions) -> Vec<u32> {
    let mut traces = Traces::new(prompts(), options);
    traces.write(model, &mut |_| ()).unwrap();
    traces.tokens()
}

#[test]
fn a_seed_gives_its_text_and_more_of_it_begins_the_same() {
    let model = model();
    let text = written(&model, options());
    assert_eq!(text.len(), 300);
    assert_eq!(text[..3], prompts()[0]);
    assert_eq!(text, written(&model, options()));
    assert_ne!(text, written(&model, TraceOptions { seed: 6, ..options() }));
    let more = written(&model, TraceOptions { tokens: 500, ..options() });
    assert_eq!(more[..300], text);
}

#[test]
fn every_prompt_is_gone_on_from_in_turn_and_a_stop_token_ends_a_trace() {
    let model = model();
    // Any token of the text may serve as the one that ends it.
    let free = written(&model, TraceOptions { stop_tokens: Vec::new(), ..options() });
    let [first, second] = [0, 43].map(|start| &free[start..]);
    assert_eq!((&first[..3], second[0]), (&prompts()[0][..], prompts()[1][0]));
    let stop = first[10];
    let end = 3 + first[3..].iter().position(|token| *token == stop).unwrap() + 1;
    let stopped = written(&model, TraceOptions { stop_tokens: vec![stop], ..options() });
    assert_eq!(stopped[..end], first[..end], "the stop token is part of the trace");
    assert_eq!(stopped[end], prompts()[1][0], "and the next prompt follows");
}

#[test]
fn progress_counts_every_token() {
    let (mut counted, mut traces) = (0, Traces::new(prompts(), options()));
    traces.write(&model(), &mut |tokens| counted += tokens).unwrap();
    assert!(traces.are_enough() && (300..300 + 43).contains(&counted), "{counted}");
}

#[test]
fn no_prompts_and_tokens_of_another_model_are_errors_or_nothing() {
    let model = model();
    let mut none = Traces::new(Vec::new(), options());
    none.write(&model, &mut |_| ()).unwrap();
    assert_eq!(none.tokens(), [] as [u32; 0]);
    let error = Traces::new(vec![vec![5000]], options()).write(&model, &mut |_| ()).unwrap_err().to_string();
    assert!(error.contains("cannot write its own") && error.contains("outside the vocabulary"), "{error}");
}

#[test]
fn a_run_goes_on_after_the_last_trace_that_is_whole() {
    let (folder, model) = (tempfile::tempdir().unwrap(), model());
    let file = folder.path().join("traces.jsonl");
    let run = |options: TraceOptions, stamp: &Value| {
        let mut traces = Traces::new(prompts(), options);
        traces.keep_in(&file, stamp);
        let (mut first, mut calls) = (None, 0);
        traces
            .write(&model, &mut |tokens| {
                first.get_or_insert(tokens);
                calls += 1;
            })
            .unwrap();
        (traces.tokens(), first.unwrap(), calls)
    };
    let (whole, found, _) = run(options(), &json!("a"));
    assert_eq!(found, 0);
    let lines = fs::read_to_string(&file).unwrap();
    // Nothing is left to do.
    assert_eq!(run(options(), &json!("a")), (whole.clone(), found_tokens(&lines), 1));
    // Killed at any byte, a run gives the same tokens and the same file.
    for cut in [0, 3, lines.len() / 3, lines.len() / 2, lines.len() - 1] {
        fs::write(&file, &lines[..cut]).unwrap();
        assert_eq!(run(options(), &json!("a")).0, whole, "cut at {cut}");
        assert_eq!(fs::read_to_string(&file).unwrap(), lines, "cut at {cut}");
    }
    // What it finds is used, and not written again.
    let second = lines.lines().nth(1).unwrap();
    fs::write(&file, lines.replace(second, "[7,7,7]")).unwrap();
    assert_eq!(run(options(), &json!("a")).0[..4], [7, 7, 7, prompts()[1][0]]);
    // Another seed's or another model's text is not.
    assert_eq!(run(TraceOptions { seed: 6, ..options() }, &json!("a")).1, 0);
    let (text, found, _) = run(options(), &json!("b"));
    assert_eq!((text, found), (whole, 0));
}

fn found_tokens(lines: &str) -> usize {
    lines.lines().skip(1).map(|line| serde_json::from_str::<Vec<u32>>(line).unwrap().len()).sum()
}

/// Arguments that calibrate a model on a little text of its own.
fn arguments<'a>(model: &'a Path, output: &'a Path) -> Vec<&'a str> {
    let few = ["--calibration-tokens", "640", "--calibration-context", "128"];
    [&["quantize", "--calibration", "self", "--model", utf8(model), "--output", utf8(output)][..], &few].concat()
}

fn contents(folder: &Path) -> Vec<(String, Vec<u8>)> {
    listing(folder).into_iter().map(|name| (name.clone(), fs::read(folder.join(name)).unwrap())).collect()
}

#[test]
fn a_seed_gives_the_same_ternary_model_on_any_number_of_threads() {
    let (folder, model) = (tempfile::tempdir().unwrap(), example("tiny-gpt-oss"));
    let quantized = |name: &str, threads: &str, seed: &str| {
        let output = folder.path().join(name);
        let mut command = Command::new(env!("CARGO_BIN_EXE_ternoss"));
        command.args(arguments(&model, &output)).args(["--seed", seed]).env("RAYON_NUM_THREADS", threads);
        let finished = command.output().unwrap();
        assert!(finished.status.success(), "{}", String::from_utf8_lossy(&finished.stderr));
        contents(&output)
    };
    let one = quantized("one", "1", "0");
    assert!(one == quantized("four", "4", "0"));
    assert!(one != quantized("seed", "4", "1"));
    assert_eq!(listing(folder.path()), ["four", "one", "seed"], "the text is gone with the run that needed it");
    let report: Value =
        serde_json::from_slice(&fs::read(folder.path().join("one/calibration_report.json")).unwrap()).unwrap();
    // The last of five windows is held out.
    assert_eq!((&report["calibration_tokens"], &report["held_out"]["tokens"]), (&json!(512), &json!(128)));
}

#[test]
fn a_model_that_knows_conversations_writes_conversations_which_outlive_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let [model, output, partial] = ["model", "ternary", "ternary.partial"].map(|name| folder.path().join(name));
    chat_model(&model);
    // Somebody's unfinished run, which is found when the text is written.
    fs::create_dir(&partial).unwrap();
    fs::write(partial.join("resume.json"), r#"{"program": "another"}"#).unwrap();
    let error = ternoss_err_with_warning(&arguments(&model, &output));
    assert!(error.contains("started with other settings"), "{error}");
    let lines = fs::read_to_string(folder.path().join("ternary.traces.jsonl")).unwrap();
    let traces: Vec<Vec<u32>> = lines.lines().skip(1).map(|line| serde_json::from_str(line).unwrap()).collect();
    let tokenizer = Tokenizer::from_folder(&model).unwrap();
    for (trace, effort) in traces.iter().zip(["low", "medium", "high"].into_iter().cycle()) {
        let text = tokenizer.decode(trace, false).unwrap();
        assert!(text.starts_with("<|start|>system<|message|>You are ChatGPT"), "{text}");
        assert!(text.contains(&format!("Reasoning: {effort}\n")), "{text}");
        assert!(text.contains("<|start|>user<|message|>") && text.contains("<|end|><|start|>assistant"), "{text}");
    }
    // The next run takes what is there: here one trace that is no one's.
    let settings = lines.lines().next().unwrap();
    let trace: Vec<u32> = (0..640).map(|number| number % 512).collect();
    fs::write(folder.path().join("ternary.traces.jsonl"), format!("{settings}\n{}\n", json!(trace))).unwrap();
    ternoss_ok(&[&arguments(&model, &output)[..], &["--overwrite"]].concat());
    let other = folder.path().join("other");
    ternoss_ok(&arguments(&model, &other));
    assert!(contents(&output) != contents(&other));
    assert_eq!(listing(folder.path()), ["model", "other", "ternary"]);
}

/// The error of a command that warns before it fails.
fn ternoss_err_with_warning(args: &[&str]) -> String {
    let output = support::ternoss(args);
    assert_eq!(output.status.code(), Some(1));
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn what_cannot_be_done_is_refused_before_the_model_writes() {
    let folder = tempfile::tempdir().unwrap();
    let output: PathBuf = folder.path().join("output");
    let tiny = example("tiny-gpt-oss");
    let with = |model: &Path, options: &[&str], expected: &str| {
        let own = ["quantize", "--calibration", "self", "--model", utf8(model), "--output", utf8(&output)];
        let error = ternoss_err(&[&own[..], options].concat());
        assert!(error.contains(expected), "{error} lacks {expected:?}");
        assert!(!listing(folder.path()).iter().any(|name| name.contains("traces")), "{error}");
    };
    with(&tiny, &["--calibration-tokens", "1023"], "has 1023 tokens, at least one window of 1024");
    for context in ["0", "1", "18446744073709551615"] {
        with(&tiny, &["--calibration-context", context], "at least one window");
    }
    with(&tiny, &["--method", "absmean"], "looks at no calibration text");
    with(&tiny, &["--planes", "9"], "9 planes");
    with(&fixture("tiny-bf16"), &[], "needs the model's tokenizer");
    let ternary = folder.path().join("ternary");
    ternoss_ok(&["quantize", "--method", "absmean", "--model", utf8(&tiny), "--output", utf8(&ternary)]);
    with(&ternary, &[], "ternary already");
    fs::create_dir(&output).unwrap();
    with(&tiny, &[], "pass --overwrite to replace it");
}

#[test]
fn an_ablation_takes_the_models_own_text_too() {
    let (model, text) = (example("tiny-gpt-oss"), example("text/prose_test.txt"));
    let few = ["--calibration-tokens", "128", "--calibration-context", "64", "--context", "64", "--max-tokens", "64"];
    let args = ["ablation", "--json", "--calibration", "self", "--model", utf8(&model), "--text", utf8(&text)];
    let rows = ternoss_ok(&[&args[..], &few].concat());
    assert!(rows.lines().count() > 5 && rows.contains("ternoss, 2 planes"), "{rows}");
}
