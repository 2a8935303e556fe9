//! What `generate --chat` promises.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod support;

use std::path::Path;

use serde_json::Value;
use support::{chat_model, example, ternoss, ternoss_err, ternoss_ok};
use ternoss::model::{harmony::Harmony, tokenizer::Tokenizer};

fn utf8(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn ask<'a>(model: &'a Path, options: &[&'a str]) -> Vec<&'a str> {
    let args = ["generate", "--chat", "--model", utf8(model), "--prompt", "How is Emma?"];
    [&args[..], options].concat()
}

#[test]
fn an_answer_is_what_the_model_says_to_the_user() {
    let folder = tempfile::tempdir().unwrap();
    chat_model(folder.path());
    let tokenizer = Tokenizer::from_folder(folder.path()).unwrap();
    let harmony = Harmony::new(&tokenizer).unwrap();
    // A small model knows no conversations. Hot enough, it writes their marks by chance.
    let mut shown = 0;
    for seed in 0..16 {
        let seed = seed.to_string();
        let args = ask(folder.path(), &["--temperature", "20", "--max-tokens", "300", "--seed", &seed]);
        let object: Value = serde_json::from_str(&ternoss_ok(&[&args[..], &["--json"]].concat())).unwrap();
        let tokens: Vec<u32> = serde_json::from_value(object["tokens"].clone()).unwrap();
        let messages = harmony.parse(&tokens).unwrap();
        let found: Vec<&str> =
            object["messages"].as_array().unwrap().iter().map(|message| message["text"].as_str().unwrap()).collect();
        assert_eq!(found, messages.iter().map(|message| message.text()).collect::<Vec<_>>());
        let output = ternoss(&args);
        assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("{}\n", object["text"].as_str().unwrap()));
        let noted = String::from_utf8_lossy(&output.stderr).contains("note: no answer within");
        assert_eq!(noted, object["text"] == "");
        shown += usize::from(!noted);
    }
    assert!(shown > 0, "no seed gave an answer");
}

#[test]
fn effort_and_seed_decide_the_answer() {
    let folder = tempfile::tempdir().unwrap();
    chat_model(folder.path());
    let answer = |options: &[&str]| ternoss_ok(&[&ask(folder.path(), options)[..], &["--json"]].concat());
    assert_eq!(answer(&[]), answer(&["--reasoning", "medium", "--seed", "0"]));
    assert_ne!(answer(&[]), answer(&["--seed", "1"]));
    assert_ne!(answer(&["--reasoning", "low"]), answer(&["--reasoning", "high"]));
}

#[test]
fn a_model_without_conversations_is_refused() {
    let error = ternoss_err(&ask(&example("tiny-gpt-oss"), &[]));
    assert!(error.contains("no token <|start|>") && error.contains("hint: without --chat"), "{error}");
}

#[test]
fn options_that_make_no_sense_together_are_refused() {
    let model = example("tiny-gpt-oss");
    for (args, expected) in [
        (["--chat", "--tokens", "1"].as_slice(), "cannot be used with"),
        (&["--prompt", "a", "--reasoning", "low"], "--chat"),
        (&["--prompt", "a", "--chat", "--ignore-eos"], "cannot be used with"),
        (&["--prompt", "a", "--chat", "--reasoning", "deep"], "expected low, medium or high"),
    ] {
        let output = ternoss(&[&["generate", "--model", utf8(&model)], args].concat());
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(stderr.contains(expected), "{stderr} lacks {expected:?}");
    }
}
