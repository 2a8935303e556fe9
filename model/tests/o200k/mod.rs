//! gpt-oss's `tokenizer.json`, rebuilt from OpenAI's published ranks.
//!
//! The file itself is 28 MB and is not kept in the repository. The ranks come with the crate `tiktoken-rs`; the
//! conversion is the one of `tests/fixtures/tools/make_tokenizer.py`, whose result equals the published file byte for byte.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::{Value, json};

/// How text is cut into words before merging (`o200k_base` of tiktoken's `openai_public.py`).
const PATTERN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|",
    r"\p{N}{1,3}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|",
    r"\s*[\r\n]+|",
    r"\s+(?!\S)|",
    r"\s+",
);

/// Builds the tokenizer once and returns its file.
pub(crate) fn tokenizer_file(special_tokens: &Value) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let file = folder.join("o200k_harmony.tokenizer.json");
    if !file.exists() {
        let partial = folder.join(format!("o200k_harmony.{}.partial", std::process::id()));
        let json = build(&read_ranks(), special_tokens);
        fs::write(&partial, serde_json::to_vec(&json).unwrap()).unwrap();
        fs::rename(&partial, &file).unwrap();
    }
    file
}

/// Bytes of every token to its rank.
fn read_ranks() -> HashMap<Vec<u8>, u32> {
    let text = fs::read_to_string(ranks_file()).unwrap();
    text.lines()
        .map(|line| {
            let (token, rank) = line.split_once(' ').unwrap();
            (base64(token), rank.parse().unwrap())
        })
        .collect()
}

/// The platform that the compiler runs on.
fn host() -> String {
    let output = Command::new("rustc").arg("-vV").output().unwrap();
    let version = String::from_utf8(output.stdout).unwrap();
    version.lines().find_map(|line| line.strip_prefix("host: ")).unwrap().into()
}

/// The ranks inside the sources of the crate `tiktoken-rs`.
fn ranks_file() -> PathBuf {
    // Without a platform cargo asks for the packages of all, and only those that are built here are sure to be here.
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--offline", "--filter-platform", &host()])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let package = packages.iter().find(|package| package["name"] == "tiktoken-rs").unwrap();
    let manifest = Path::new(package["manifest_path"].as_str().unwrap());
    manifest.with_file_name("assets").join("o200k_base.tiktoken")
}

fn base64(text: &str) -> Vec<u8> {
    const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let (mut bytes, mut buffer, mut bits) = (Vec::new(), 0u32, 0);
    for digit in text.bytes().filter(|digit| *digit != b'=') {
        let value = ALPHABET.iter().position(|letter| *letter == digit).unwrap();
        buffer = buffer << 6 | value as u32;
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            bytes.push((buffer >> bits) as u8);
        }
    }
    bytes
}

/// GPT-2's printable stand-ins for bytes.
fn byte_letters() -> Vec<char> {
    let printable = |byte: u32| (33..127).contains(&byte) || (161..173).contains(&byte) || (174..256).contains(&byte);
    let mut next = 256;
    (0u32..256)
        .map(|byte| {
            let code = if printable(byte) { byte } else { next };
            next += u32::from(!printable(byte));
            char::from_u32(code).unwrap()
        })
        .collect()
}

fn build(ranks: &HashMap<Vec<u8>, u32>, special_tokens: &Value) -> Value {
    let letters = byte_letters();
    let spell = |token: &[u8]| token.iter().map(|byte| letters[usize::from(*byte)]).collect::<String>();
    let mut tokens: Vec<(&Vec<u8>, u32)> = ranks.iter().map(|(token, rank)| (token, *rank)).collect();
    tokens.sort_by_key(|(_, rank)| *rank);
    let mut merges = Vec::new();
    for (token, _) in &tokens {
        // Every split into two tokens merges, as in tiktoken.
        let mut splits: Vec<(u32, u32, usize)> = (1..token.len())
            .filter_map(|at| Some((*ranks.get(&token[..at])?, *ranks.get(&token[at..])?, at)))
            .collect();
        splits.sort_unstable();
        merges.extend(splits.into_iter().map(|(_, _, at)| json!([spell(&token[..at]), spell(&token[at..])])));
    }
    let vocab: serde_json::Map<String, Value> =
        tokens.iter().map(|(token, rank)| (spell(token), json!(rank))).collect();
    let mut added: Vec<(&String, u64)> =
        special_tokens.as_object().unwrap().iter().map(|(token, id)| (token, id.as_u64().unwrap())).collect();
    added.sort_by_key(|(_, id)| *id);
    let added: Vec<Value> = added
        .into_iter()
        .map(|(token, id)| {
            json!({ "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": true })
        })
        .collect();
    let byte_level = |add_prefix_space: bool, trim_offsets: bool, use_regex: bool| {
        json!({ "type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": trim_offsets,
                "use_regex": use_regex })
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": { "type": "Sequence", "pretokenizers": [
            { "type": "Split", "pattern": { "Regex": PATTERN }, "behavior": "Isolated", "invert": false },
            byte_level(false, true, false),
        ] },
        "post_processor": byte_level(true, false, true),
        "decoder": byte_level(true, true, true),
        "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                   "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": true,
                   "vocab": vocab, "merges": merges },
    })
}
