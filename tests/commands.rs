//! What the commands promise, through the program itself.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod support;

use std::path::Path;

use serde_json::Value;
use support::{Golden, assert_close, comma_separated, copy_folder, example, fixture, ternoss_err, ternoss_ok};
use ternoss::{
    Cpu,
    model::{Checkpoint, GptOss, LoadOptions, tokenizer::Tokenizer},
};

const PROMPT: &str = "The history of";

fn utf8(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The JSON a command printed.
fn json_of(args: &[&str]) -> Value {
    serde_json::from_str(&ternoss_ok(args)).unwrap()
}

fn tokens_of(args: &[&str]) -> Vec<u32> {
    serde_json::from_value(json_of(args)["tokens"].clone()).unwrap()
}

/// What `logits` writes for a sequence.
fn logits(model: &Path, ids: &[u32], options: &[&str]) -> Vec<f32> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("logits.safetensors");
    let ids = comma_separated(ids);
    let args = ["logits", "--model", utf8(model), "--tokens", &ids, "--output", utf8(&file)];
    ternoss_ok(&[&args, options].concat());
    let golden = Golden::open(&file);
    let [tokens, vocabulary] = golden.shape("logits").try_into().unwrap();
    assert_eq!(golden.floats("logits").len(), tokens * vocabulary);
    golden.floats("logits").to_vec()
}

#[test]
fn logits_equal_the_reference() {
    for (name, options) in [
        ("tiny-bf16", [].as_slice()),
        ("tiny-mxfp4", &[]),
        ("tiny-bf16", &["--stream-experts"]),
        ("tiny-mxfp4", &["--stream-experts"]),
    ] {
        let golden = Golden::open(&fixture(name).join("golden.safetensors"));
        let stated: Value = serde_json::from_slice(&std::fs::read(fixture(name).join("golden.json")).unwrap()).unwrap();
        let tolerance = stated["suggested_tolerance"]["logits"].as_f64().unwrap() as f32;
        for sequence in ["seq1", "seq9", "seq40"] {
            let found = logits(&fixture(name), &golden.ids(&format!("{sequence}.input_ids")), options);
            assert_close(sequence, &found, golden.floats(&format!("{sequence}.logits")), tolerance);
        }
    }
}

#[test]
fn logits_of_the_shipped_model_are_those_of_the_library() {
    let folder = example("tiny-gpt-oss");
    let model = GptOss::<Cpu>::load(&Checkpoint::open(&folder).unwrap(), LoadOptions::default(), &Default::default());
    let model = model.unwrap();
    let ids = [31, 659, 73, 283, 336];
    let expected = model.forward(model.tokens(&ids).unwrap(), &mut model.new_cache());
    assert_eq!(logits(&folder, &ids, &[]), expected.into_data().iter::<f32>().collect::<Vec<_>>());
}

#[test]
fn greedy_generation_needs_no_tokenizer_and_equals_the_reference() {
    for name in ["tiny-bf16", "tiny-mxfp4"] {
        let golden = Golden::open(&fixture(name).join("golden.safetensors"));
        let (folder, prompt) = (fixture(name), comma_separated(&golden.ids("greedy.prompt")));
        let args = ["generate", "--model", utf8(&folder), "--tokens", &prompt, "--greedy", "--max-tokens", "32"];
        let object = json_of(&[&args[..], &["--ignore-eos", "--json"]].concat());
        let tokens: Vec<u32> = serde_json::from_value(object["tokens"].clone()).unwrap();
        assert_eq!(tokens, golden.ids("greedy.tokens"));
        assert!(object.get("text").is_none(), "there is no tokenizer to make text with");
        let plain = ternoss_ok(&[&args[..], &["--ignore-eos"]].concat());
        assert_eq!(plain.trim_end(), comma_separated(&tokens).replace(',', " "));
    }
}

#[test]
fn a_prompt_gives_tokens_and_their_text() {
    let model = example("tiny-gpt-oss");
    let args = ["generate", "--model", utf8(&model), "--prompt", PROMPT, "--greedy", "--max-tokens", "16"];
    let object = json_of(&[&args[..], &["--json"]].concat());
    let tokens: Vec<u32> = serde_json::from_value(object["tokens"].clone()).unwrap();
    let text = object["text"].as_str().unwrap();
    assert_eq!(tokens.len(), 16);
    assert_eq!(Tokenizer::from_folder(&model).unwrap().decode(&tokens, true).unwrap(), text);
    assert_eq!(tokens_of(&[&args[..6], &["--max-tokens", "0", "--json"]].concat()), [] as [u32; 0]);
    // Without --json the prompt and the text stream to stdout.
    assert_eq!(ternoss_ok(&args), format!("{PROMPT}{text}\n"));
}

#[test]
fn the_same_seed_gives_the_same_sample() {
    let model = example("tiny-gpt-oss");
    let sample = |seed: &str, threads: &str| {
        let args = ["generate", "--model", utf8(&model), "--prompt", PROMPT, "--max-tokens", "24", "--json"];
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_ternoss"))
            .args(args)
            .args(["--seed", seed, "--top-p", "0.95", "--temperature", "1.2"])
            .env("RAYON_NUM_THREADS", threads)
            .output()
            .unwrap();
        assert!(output.status.success());
        output.stdout
    };
    assert_eq!(sample("7", "1"), sample("7", "4"));
    assert_ne!(sample("7", "4"), sample("8", "4"));
}

#[test]
fn stop_tokens_end_a_text_unless_ignored() {
    let golden = Golden::open(&fixture("tiny-bf16").join("golden.safetensors"));
    let (prompt, new) = (comma_separated(&golden.ids("greedy.prompt")), golden.ids("greedy.tokens"));
    let stop = new[6];
    let before: Vec<u32> = new.iter().copied().take_while(|token| *token != stop).collect();
    let folder = tempfile::tempdir().unwrap();
    copy_folder(&fixture("tiny-bf16"), folder.path());
    let generation_config = folder.path().join("generation_config.json");
    std::fs::write(&generation_config, format!(r#"{{"eos_token_id": [{stop}, 3]}}"#)).unwrap();
    let args =
        ["generate", "--model", utf8(folder.path()), "--tokens", &prompt, "--greedy", "--max-tokens", "32", "--json"];
    assert_eq!(tokens_of(&args), before);
    assert_eq!(tokens_of(&[&args[..], &["--ignore-eos"]].concat()), new);
    // Where generation_config.json is missing, config.json says what ends a text.
    std::fs::remove_file(&generation_config).unwrap();
    let mut model = support::folder::Folder::read(folder.path());
    model.config["eos_token_id"] = stop.into();
    model.write(folder.path());
    assert_eq!(tokens_of(&args), before);
}

#[test]
fn perplexity_equals_the_reference_and_the_library() {
    let (model, text) = (example("tiny-gpt-oss"), example("text/wiki_test.txt"));
    let measure = |context: &str, tokens: &str| {
        json_of(&[
            "perplexity",
            "--model",
            utf8(&model),
            "--text",
            utf8(&text),
            "--context",
            context,
            "--max-tokens",
            tokens,
            "--json",
        ])
    };
    let golden: Value = serde_json::from_slice(&std::fs::read(fixture("golden-small.json")).unwrap()).unwrap();
    let reference = golden["mean_nll"].as_f64().unwrap().exp();
    let found = measure("128", "128");
    assert_eq!((&found["tokens"], &found["windows"]), (&127.into(), &1.into()));
    assert!((found["perplexity"].as_f64().unwrap() / reference - 1.0).abs() < 1e-4, "{found}, expected {reference}");

    let found = measure("256", "8192");
    assert_eq!((&found["tokens"], &found["windows"]), (&(32 * 255).into(), &32.into()));
    let checkpoint = Checkpoint::open(&model).unwrap();
    let loaded = GptOss::<Cpu>::load(&checkpoint, LoadOptions::default(), &Default::default()).unwrap();
    let contents = std::fs::read_to_string(&text).unwrap();
    let ids = Tokenizer::from_folder(&model).unwrap().encode(&contents, true).unwrap();
    let library = loaded.perplexity(&ids[..8192], 256, |_| {}).unwrap();
    assert_eq!(found["perplexity"].as_f64().unwrap(), library.value());
}

#[test]
fn a_text_that_is_no_whole_number_of_windows_loses_its_tail() {
    let (model, text) = (example("tiny-gpt-oss"), example("text/prose_test.txt"));
    let args = ["perplexity", "--model", utf8(&model), "--text", utf8(&text), "--context", "100"];
    let whole = ternoss_ok(&[&args[..], &["--max-tokens", "200"]].concat());
    assert_eq!(whole, ternoss_ok(&[&args[..], &["--max-tokens", "299"]].concat()));
    assert!(whole.contains("198 tokens predicted in 2 windows of 100"), "{whole}");
}

#[test]
fn inspect_tells_how_each_kind_of_model_is_stored() {
    let folder = tempfile::tempdir().unwrap();
    let ternary = folder.path().join("ternary");
    ternoss_ok(&["synthesize", "--shape", "tiny", "--format", "ternary", "--output", utf8(&ternary)]);
    for (model, stored) in [
        (fixture("tiny-bf16"), "plain floats"),
        (fixture("tiny-mxfp4"), "experts in MXFP4"),
        (ternary, "ternary (random, t2, "),
    ] {
        let plain = ternoss_ok(&["inspect", "--model", utf8(&model), "--tensors"]);
        let json = json_of(&["inspect", "--model", utf8(&model), "--json"]);
        assert!(plain.contains(&format!("stored as {stored}")), "{plain}");
        assert!(plain.contains(&format!("{} weights", json["ternary_weights"])), "{plain}");
        let checkpoint = Checkpoint::open(&model).unwrap();
        let config = checkpoint.config();
        assert_eq!(json["hidden_size"], config.hidden_size);
        assert_eq!(json["num_hidden_layers"], config.num_hidden_layers());
        assert_eq!(json["experts_per_token"], config.experts_per_token);
        let parts: Vec<&Value> = json["parts"].as_object().unwrap().values().collect();
        let sum = |key: &str| parts.iter().map(|part| part[key].as_u64().unwrap() as usize).sum::<usize>();
        assert_eq!(sum("tensors"), checkpoint.tensors().count());
        assert_eq!(sum("bytes"), checkpoint.tensors().map(|(_, entry)| entry.bytes()).sum::<usize>());
        assert!(parts.iter().all(|part| part["bytes"].as_u64() > Some(0)), "{json}");
        assert!(checkpoint.tensors().all(|(name, _)| plain.contains(name)), "{plain}");
    }
}

#[test]
fn inspect_foretells_what_quantize_makes() {
    let folder = tempfile::tempdir().unwrap();
    let model = example("tiny-gpt-oss");
    let foretold = json_of(&["inspect", "--model", utf8(&model), "--json"]);
    let output = folder.path().join("ternary");
    let report =
        json_of(&["quantize", "--method", "absmean", "--model", utf8(&model), "--output", utf8(&output), "--json"]);
    for key in ["ternary_weights", "ternary_bytes", "bits_per_weight"] {
        assert_eq!(report[key], foretold[key], "{key}");
    }
    let again = ternoss_err(&[
        "quantize",
        "--method",
        "absmean",
        "--model",
        utf8(&output),
        "--output",
        utf8(&folder.path().join("again")),
    ]);
    assert!(again.contains("ternary already"), "{again}");
}
