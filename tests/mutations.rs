//! Whatever the bytes of a model folder are, opening, loading and running it gives a result or an error: no panic, and
//! nothing made of sizes that the files do not back.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod support;

use std::{
    fs,
    ops::Range,
    path::{Path, PathBuf},
    sync::LazyLock,
};

use proptest::{prelude::*, sample::Index};
use serde_json::{Value, json};
use support::{copy_folder, fixture, folder::Folder, listing, ternoss, ternoss_ok};
use tempfile::TempDir;
use ternoss::{
    Cpu,
    model::{Checkpoint, ExpertPlacement, GptOss, LoadOptions},
};

/// Float, MXFP4 in three shards, and ternary in three shards.
static MODELS: LazyLock<[PathBuf; 3]> = LazyLock::new(|| {
    let ternary = Path::new(env!("CARGO_TARGET_TMPDIR")).join("mutated-ternary");
    let output = ternary.to_str().unwrap();
    let args = ["synthesize", "--shape", "tiny", "--format", "ternary", "--output", output, "--overwrite"];
    ternoss_ok(&args);
    [fixture("tiny-bf16"), fixture("tiny-mxfp4"), ternary]
});

/// A copy of one of the models.
fn copy(model: usize) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    copy_folder(&MODELS[model], folder.path());
    folder
}

/// Changes one of a folder's weight files.
fn change_weights(folder: &Path, which: Index, change: impl FnOnce(&mut Vec<u8>)) {
    let names = listing(folder);
    let files: Vec<&String> = names.iter().filter(|name| name.starts_with("model") && name.ends_with("s")).collect();
    change_file(&folder.join(which.get(&files)), change);
}

fn change_file(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    fs::write(path, bytes).unwrap();
}

/// Opens, loads and runs a model; the error, if there is one, has a text of one line.
fn run(folder: &Path, experts: ExpertPlacement) -> Result<Vec<f32>, String> {
    let one_line = |error: &dyn std::error::Error| {
        let text = error.to_string();
        assert!(!text.is_empty() && !text.contains('\n'), "{text}");
        text
    };
    let checkpoint = Checkpoint::open(folder).map_err(|error| one_line(&error))?;
    let model =
        GptOss::<Cpu>::load(&checkpoint, LoadOptions { experts, ..LoadOptions::default() }, &Default::default());
    let model = model.map_err(|error| one_line(&error))?;
    let tokens = model.tokens(&[1, 2]).map_err(|error| one_line(&error))?;
    Ok(model.forward(tokens, &mut model.new_cache()).into_data().iter::<f32>().collect())
}

fn run_both(folder: &Path) {
    let (resident, streamed) = (run(folder, ExpertPlacement::Auto), run(folder, ExpertPlacement::Streamed));
    // What is refused must not depend on where experts live.
    assert_eq!(resident.is_ok(), streamed.is_ok(), "{resident:?} {streamed:?}");
}

/// The bytes of the header, behind its length.
fn header(bytes: &[u8]) -> Range<usize> {
    8..8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize
}

fn a_byte() -> impl Strategy<Value = u8> {
    prop_oneof![any::<u8>(), prop::sample::select(b"0123456789,:[]{}\"-.eE nulltrue\\".to_vec())]
}

/// Values that a careless reader trips over.
fn a_value() -> impl Strategy<Value = Value> {
    let numbers = [0u64, 1, 2, 3, 7, 16, 63, 64, 65, 512, 1 << 16, 1 << 24, (1 << 24) + 1, 1 << 32, 1 << 63, u64::MAX];
    prop_oneof![
        4 => prop::sample::select(numbers.to_vec()).prop_map(|number| json!(number)),
        1 => prop::sample::select(vec![-1.0, 0.5, 1e-300, 1e300]).prop_map(|number| json!(number)),
        1 => prop::sample::select(vec![
            json!(null), json!(true), json!("t5"), json!("yarn"), json!([]), json!({}), json!(["full_attention"]),
            json!({ "rope_type": "yarn", "factor": 1e300, "beta_fast": 1e-300, "truncate": true }),
            json!({ "rope_type": "yarn", "original_max_position_embeddings": 1e300, "attention_factor": -1e300 }),
            json!({ "quant_method": "mxfp4" }),
        ]),
    ]
}

/// The value at a position of a JSON document, counting all of them.
fn value_at(root: &mut Value, at: Index) -> &mut Value {
    fn paths(value: &Value, path: String, all: &mut Vec<String>) {
        match value {
            Value::Object(map) => map.iter().for_each(|(key, value)| paths(value, format!("{path}/{key}"), all)),
            Value::Array(list) => {
                list.iter().enumerate().for_each(|(number, value)| paths(value, format!("{path}/{number}"), all));
            }
            _ => {}
        }
        all.push(path);
    }
    let mut all = Vec::new();
    paths(root, String::new(), &mut all);
    let path = at.get(&all).clone();
    root.pointer_mut(&path).unwrap()
}

/// Bytes to write at places of a file.
fn byte_edits() -> impl Strategy<Value = Vec<(Index, u8)>> {
    prop::collection::vec((any::<Index>(), a_byte()), 1..6)
}

/// Values to put at places of a JSON document.
fn value_edits() -> impl Strategy<Value = Vec<(Index, Value)>> {
    prop::collection::vec((any::<Index>(), a_value()), 1..4)
}

fn apply(edits: Vec<(Index, Value)>, json: &[u8]) -> Vec<u8> {
    let mut json: Value = serde_json::from_slice(json).unwrap();
    edits.into_iter().for_each(|(at, value)| *value_at(&mut json, at) = value);
    json.to_string().into_bytes()
}

fn config_with(model: usize, edits: Vec<(Index, Value)>) -> TempDir {
    let folder = copy(model);
    change_file(&folder.path().join("config.json"), |bytes| *bytes = apply(edits, bytes));
    folder
}

fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(cases(200))]

    #[test]
    fn any_bytes_in_a_header(model in 0..3usize, file: Index, edits in byte_edits()) {
        let folder = copy(model);
        change_weights(folder.path(), file, |bytes| {
            let header = header(bytes);
            edits.iter().for_each(|(at, byte)| *at.get_mut(&mut bytes[header.clone()]) = *byte);
        });
        run_both(folder.path());
    }

    #[test]
    fn any_length_of_a_header(model in 0..3usize, file: Index, length in prop_oneof![any::<u64>(), 0..200_000u64]) {
        let folder = copy(model);
        change_weights(folder.path(), file, |bytes| bytes[..8].copy_from_slice(&length.to_le_bytes()));
        prop_assert!(run(folder.path(), ExpertPlacement::Auto).is_err());
    }

    #[test]
    fn any_length_of_a_file(model in 0..3usize, file: Index, length: Index, longer: bool) {
        let folder = copy(model);
        change_weights(folder.path(), file, |bytes| match longer {
            true => bytes.extend(vec![0; length.index(5000) + 1]),
            false => bytes.truncate(length.index(bytes.len())),
        });
        prop_assert!(run(folder.path(), ExpertPlacement::Auto).is_err());
    }

    #[test]
    fn any_values_in_a_header(model in 0..3usize, file: Index, edits in value_edits()) {
        let folder = copy(model);
        change_weights(folder.path(), file, |bytes| {
            let header = header(bytes);
            let json = apply(edits, &bytes[header.clone()]);
            bytes.splice(0..header.end, [&(json.len() as u64).to_le_bytes(), json.as_slice()].concat());
        });
        run_both(folder.path());
    }

    #[test]
    fn any_values_in_the_configuration(model in 0..3usize, edits in value_edits()) {
        run_both(config_with(model, edits).path());
    }

    #[test]
    fn any_bytes_in_the_configuration_and_the_index(model in 0..3usize, file: Index, edits in byte_edits()) {
        let folder = copy(model);
        let json = |name: &String| name.ends_with(".json") && !name.contains("golden");
        let files: Vec<String> = listing(folder.path()).into_iter().filter(json).collect();
        change_file(&folder.path().join(file.get(&files)), |bytes| {
            edits.iter().for_each(|(at, byte)| *at.get_mut(bytes) = *byte);
        });
        run_both(folder.path());
    }

    #[test]
    fn any_shapes_and_names_of_the_same_bytes(model in 0..3usize, one: Index, other: Index, kind in 0..4usize) {
        let mut folder = Folder::read(&MODELS[model]);
        let names: Vec<String> = folder.tensors.keys().cloned().collect();
        let (one, other) = (one.get(&names), other.get(&names));
        let tensor = folder.tensor(one);
        match kind {
            0 => tensor.shape.reverse(),
            1 => tensor.shape = vec![tensor.shape.iter().product()],
            2 => {
                tensor.shape.push(0);
                tensor.data.clear();
            }
            _ => {
                let (here, there) = (folder.tensors[one].clone(), folder.tensors[other].clone());
                folder.tensors.extend([(one.clone(), there), (other.clone(), here)]);
            }
        }
        let output = tempfile::tempdir().unwrap();
        folder.write(output.path());
        run_both(output.path());
    }

    #[test]
    fn any_bytes_in_the_weights(model in 0..3usize, file: Index, first: Index, length in 1..5000usize, byte: u8) {
        let folder = copy(model);
        change_weights(folder.path(), file, |bytes| {
            let start = header(bytes).end;
            let first = start + first.index(bytes.len() - start);
            let last = (first + length).min(bytes.len());
            bytes[first..last].fill(byte);
        });
        run_both(folder.path());
    }
}

proptest! {
    #![proptest_config(cases(40))]

    #[test]
    fn any_configuration_given_to_the_program(model in 0..2usize, edits in value_edits()) {
        let (folder, parent) = (config_with(model, edits), tempfile::tempdir().unwrap());
        let (model, output) = (folder.path().to_str().unwrap(), parent.path().join("ternary"));
        let inspect = ["inspect", "--model", model];
        let quantize = ["quantize", "--method", "absmean", "--model", model, "--output", output.to_str().unwrap()];
        for args in [&inspect[..], &quantize] {
            let finished = ternoss(args);
            let stderr = String::from_utf8_lossy(&finished.stderr);
            match finished.status.code() {
                Some(0) => prop_assert!(stderr.is_empty(), "{}", stderr),
                Some(1) => prop_assert!(stderr.starts_with("error: ") && !output.exists(), "{}", stderr),
                _ => prop_assert!(false, "{}", stderr),
            }
        }
        prop_assert!(output.exists() || listing(parent.path()).is_empty());
    }
}

#[test]
fn untouched_models_run() {
    for model in 0..3 {
        let folder = copy(model);
        let logits = run(folder.path(), ExpertPlacement::Auto).unwrap();
        assert!(logits.iter().all(|logit| logit.is_finite()));
        assert_eq!(run(folder.path(), ExpertPlacement::Streamed).unwrap(), logits);
    }
}

#[test]
fn sizes_that_the_files_do_not_back_are_refused_before_anything_is_made_of_them() {
    for model in 0..3 {
        for key in [
            "hidden_size",
            "intermediate_size",
            "vocab_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "num_local_experts",
            "num_hidden_layers",
        ] {
            let mut folder = Folder::read(&MODELS[model]);
            folder.config[key] = json!(if key == "num_hidden_layers" { 1 << 16 } else { 1 << 24 });
            folder.config.as_object_mut().unwrap().shift_remove("layer_types");
            let output = tempfile::tempdir().unwrap();
            folder.write(output.path());
            run(output.path(), ExpertPlacement::Auto).unwrap_err();
        }
        // These size nothing before there are as many tokens.
        let mut folder = Folder::read(&MODELS[model]);
        folder.config["max_position_embeddings"] = json!(1u64 << 60);
        folder.config["sliding_window"] = json!(1 << 30);
        let output = tempfile::tempdir().unwrap();
        folder.write(output.path());
        run(output.path(), ExpertPlacement::Auto).unwrap();
    }
}
