//! How ternary weights are held in memory changes no token.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod support;

use std::path::{Path, PathBuf};

use support::{example, ternoss, ternoss_err, ternoss_ok};

fn ternary(folder: &Path, format: &str) -> PathBuf {
    let output = folder.join(format);
    let model = example("tiny-gpt-oss");
    let [model, to] = [&model, &output].map(|path| path.to_str().unwrap());
    ternoss_ok(&["quantize", "--method", "absmean", "--model", model, "--output", to, "--format", format]);
    output
}

fn arguments(model: &Path, options: &[&str]) -> Vec<String> {
    let model = model.to_str().unwrap();
    let args =
        ["generate", "--model", model, "--tokens", "3,1,4,1,5", "--max-tokens", "40", "--greedy", "--ignore-eos"];
    [&args[..], options].concat().iter().map(ToString::to_string).collect()
}

fn words(arguments: &[String]) -> Vec<&str> {
    arguments.iter().map(String::as_str).collect()
}

fn generated(model: &Path, options: &[&str]) -> String {
    ternoss_ok(&words(&arguments(model, options)))
}

/// What a refused run says it needs.
fn needed_bytes(error: &str) -> u64 {
    let needed = error.split("memory: ").nth(1).and_then(|rest| rest.split(' ').next());
    needed.and_then(|needed| needed.parse().ok()).unwrap_or_else(|| panic!("no need in {error:?}"))
}

#[test]
fn unpacked_weights_give_the_same_text() {
    let folder = tempfile::tempdir().unwrap();
    let [t2, t5] = ["t2", "t5"].map(|format| ternary(folder.path(), format));
    let expected = generated(&t5, &[]);
    assert_eq!(generated(&t5, &["--unpack"]), expected);
    assert_eq!(generated(&t2, &["--unpack"]), expected);
}

#[cfg(target_os = "linux")]
#[test]
fn a_memory_budget_changes_no_token_and_what_is_too_little_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let model = ternary(folder.path(), "t2");
    let arguments = |budget: &str| arguments(&model, &["--memory-budget", budget]);
    let error = ternoss_err(&words(&arguments("1MB")));
    assert!(error.contains("cannot run in 1000000 bytes of memory"), "{error}");
    assert!(error.contains("hint: allow more"), "{error}");
    // With hardly more than is needed, experts have to leave all the time. What is needed differs a little from run to run.
    let mut needed = needed_bytes(&error);
    let output = (0..20).find_map(|_| {
        let output = ternoss(&words(&arguments(&(needed + 500_000).to_string())));
        if output.status.success() {
            return Some(String::from_utf8(output.stdout).unwrap());
        }
        needed = needed_bytes(&String::from_utf8(output.stderr).unwrap());
        None
    });
    assert_eq!(output.expect("a run within its budget"), generated(&model, &[]));
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_precision_model_has_nothing_to_page() {
    let model = example("tiny-gpt-oss");
    let error =
        ternoss_err(&["generate", "--model", model.to_str().unwrap(), "--tokens", "3", "--memory-budget", "8GB"]);
    assert!(error.contains("0 of its bytes are ternary experts"), "{error}");
}
