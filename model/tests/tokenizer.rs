//! Tokens equal the reference tokenizers', and streamed text equals text decoded at once.
#![cfg(feature = "tokenizer")]
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

mod o200k;

use std::{path::Path, sync::LazyLock};

use proptest::prelude::*;
use serde_json::Value;
use ternoss_model::tokenizer::{Tokenizer, TokenizerError};

fn repository(path: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

fn json(path: &str) -> Value {
    serde_json::from_slice(&std::fs::read(repository(path)).unwrap()).unwrap()
}

static GOLDEN: LazyLock<Value> = LazyLock::new(|| json("tests/fixtures/tokenizer/golden_tokens.json"));

static HARMONY: LazyLock<Tokenizer> =
    LazyLock::new(|| Tokenizer::from_file(&o200k::tokenizer_file(&GOLDEN["special_tokens"])).unwrap());

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn o200k_harmony_gives_the_golden_ids() {
    let special = GOLDEN["special_tokens"].as_object().unwrap();
    let cases = GOLDEN["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 48);
    for case in cases {
        let text = case["text"].as_str().unwrap();
        let expected = ids(&case["ids"]);
        assert_eq!(HARMONY.decode(&expected, false).unwrap(), text);
        // tiktoken's ordinary mode takes special tokens for plain text; a tokenizer.json never does.
        let ambiguous = case["mode"] == "ordinary" && special.keys().any(|token| text.contains(token));
        if !ambiguous {
            assert_eq!(HARMONY.encode(text, false).unwrap(), expected, "{text:?}");
        }
    }
}

#[test]
fn rendered_conversations_give_the_golden_ids() {
    let golden = json("tests/fixtures/tokenizer/golden_harmony.json");
    for prompt in golden["prompts"].as_array().unwrap() {
        let text = prompt["prompt"].as_str().unwrap();
        assert_eq!(HARMONY.encode(text, false).unwrap(), ids(&prompt["ids"]), "{}", prompt["name"]);
    }
    assert_eq!(HARMONY.token_id("<|return|>"), Some(200_002));
    assert_eq!(HARMONY.token_id("<|call|>"), Some(200_012));
    assert_eq!(HARMONY.token_id("<|no such token|>"), None);
}

fn streamed(tokenizer: &Tokenizer, tokens: &[u32]) -> String {
    let mut stream = tokenizer.stream();
    let mut text: String = tokens.iter().filter_map(|token| stream.push(*token).unwrap()).collect();
    text.extend(stream.finish().unwrap());
    text
}

#[test]
fn streaming_equals_decoding_at_once() {
    for case in GOLDEN["cases"].as_array().unwrap() {
        let tokens = ids(&case["ids"]);
        assert_eq!(streamed(&HARMONY, &tokens), HARMONY.decode(&tokens, true).unwrap());
    }
}

#[test]
fn a_character_in_several_tokens_comes_out_whole() {
    let tokens = HARMONY.encode("𓀀", false).unwrap();
    assert!(tokens.len() > 1);
    let mut stream = HARMONY.stream();
    let pieces: Vec<Option<String>> = tokens.iter().map(|token| stream.push(*token).unwrap()).collect();
    assert!(pieces[..pieces.len() - 1].iter().all(Option::is_none));
    assert_eq!(pieces.last().unwrap().as_deref(), Some("𓀀"));
}

#[test]
fn the_shipped_tokenizer_round_trips() {
    let tokenizer = Tokenizer::from_folder(&repository("examples/tiny-gpt-oss")).unwrap();
    let text = "It is a truth universally acknowledged, naïve façade 😀\n";
    let tokens = tokenizer.encode(text, false).unwrap();
    assert_eq!(tokenizer.decode(&tokens, true).unwrap(), text);
    assert!(tokens.iter().all(|token| (*token as usize) < tokenizer.vocab_size()));
    let golden = json("tests/fixtures/golden-small.json");
    let wiki = std::fs::read_to_string(repository("examples/text/wiki_test.txt")).unwrap();
    let expected = ids(&golden["ids"]);
    assert_eq!(tokenizer.encode(&wiki, true).unwrap()[..expected.len()], expected);
}

#[test]
fn bad_input_is_named() {
    let missing = Tokenizer::from_folder(Path::new("no/such/folder")).unwrap_err();
    assert!(missing.to_string().starts_with("no/such/folder/tokenizer.json: "), "{missing}");
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), "{\"model\": 3}").unwrap();
    let broken = Tokenizer::from_folder(folder.path()).unwrap_err();
    assert!(broken.to_string().contains("not a tokenizer.json"), "{broken}");
    let unknown = HARMONY.decode(&[1, 300_000], true).unwrap_err();
    assert!(matches!(unknown, TokenizerError::UnknownToken { token: 300_000, .. }));
    assert!(HARMONY.stream().push(300_000).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_text_is_lost_or_doubled(tokens in prop::collection::vec(0u32..200_019, 0..40)) {
        prop_assume!(tokens.iter().all(|token| HARMONY.decode(&[*token], false).is_ok()));
        prop_assert_eq!(streamed(&HARMONY, &tokens), HARMONY.decode(&tokens, true).unwrap());
    }

    #[test]
    fn any_text_round_trips(text in "\\PC*") {
        let tokens = HARMONY.encode(&text, false).unwrap();
        prop_assert_eq!(HARMONY.decode(&tokens, false).unwrap(), text);
    }
}
