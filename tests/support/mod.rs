//! What several test files share: fixtures and golden tensors.
#![allow(dead_code, reason = "each test file uses its part")]

pub(crate) mod folder;

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use safetensors::{Dtype, SafeTensors};

/// A folder under `tests/fixtures`.
pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// A folder under `examples`.
pub(crate) fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples").join(name)
}

/// Runs the program.
pub(crate) fn ternoss(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ternoss")).args(args).output().expect("the program starts")
}

/// Runs the program, which must succeed, and returns what it printed.
pub(crate) fn ternoss_ok(args: &[&str]) -> String {
    let output = ternoss(args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ternoss {args:?}: {stderr}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// Runs the program, which must fail with exit code 1 and one line of error; returns that line and the hint, if any.
pub(crate) fn ternoss_err(args: &[&str]) -> String {
    let output = ternoss(args);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "ternoss {args:?}: {stderr}");
    let lines: Vec<&str> = stderr.lines().collect();
    assert!(lines[0].starts_with("error: "), "{stderr}");
    assert!(lines.len() == 1 || (lines.len() == 2 && lines[1].starts_with("hint: ")), "{stderr}");
    stderr
}

/// The names in a folder, sorted.
pub(crate) fn listing(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

/// Token ids as the program takes them.
pub(crate) fn comma_separated(ids: &[u32]) -> String {
    ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// Copies a model folder, so that a test may damage it.
pub(crate) fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// Writes the shipped model with gpt-oss's conversation tokens in place of its last six.
pub(crate) fn chat_model(to: &Path) {
    copy_folder(&example("tiny-gpt-oss"), to);
    let file = to.join("tokenizer.json");
    let mut tokenizer: serde_json::Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    let merges = tokenizer["model"]["merges"].as_array_mut().unwrap();
    merges.truncate(merges.len() - 6);
    let marks = ["<|start|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|end|>", "<|call|>"];
    for (id, mark) in (1018u64..).zip(marks) {
        tokenizer["model"]["vocab"].as_object_mut().unwrap().retain(|_, known| known.as_u64() != Some(id));
        let mut added = tokenizer["added_tokens"][2].clone();
        (added["id"], added["content"]) = (id.into(), mark.into());
        tokenizer["added_tokens"].as_array_mut().unwrap().push(added);
    }
    fs::write(file, tokenizer.to_string()).unwrap();
}

/// The tensors of a safetensors file, floats widened and integers as they are.
pub(crate) struct Golden {
    floats: HashMap<String, (Vec<usize>, Vec<f32>)>,
    ints: HashMap<String, (Vec<usize>, Vec<i32>)>,
    bytes: HashMap<String, Vec<u8>>,
}

impl Golden {
    pub(crate) fn open(path: &Path) -> Self {
        let contents = fs::read(path).unwrap();
        let file = SafeTensors::deserialize(&contents).unwrap();
        let mut golden = Self { floats: HashMap::new(), ints: HashMap::new(), bytes: HashMap::new() };
        for (name, tensor) in file.tensors() {
            let shape = tensor.shape().to_vec();
            let words = || tensor.data().chunks_exact(4).map(|word| word.try_into().unwrap());
            match tensor.dtype() {
                Dtype::F32 => {
                    golden.floats.insert(name, (shape, words().map(f32::from_le_bytes).collect()));
                }
                Dtype::I32 => {
                    golden.ints.insert(name, (shape, words().map(i32::from_le_bytes).collect()));
                }
                _ => {
                    golden.bytes.insert(name, tensor.data().to_vec());
                }
            }
        }
        golden
    }

    pub(crate) fn floats(&self, name: &str) -> &[f32] {
        &self.floats.get(name).unwrap_or_else(|| panic!("no {name}")).1
    }

    pub(crate) fn shape(&self, name: &str) -> &[usize] {
        self.floats.get(name).map_or_else(|| &self.ints[name].0, |(shape, _)| shape).as_slice()
    }

    pub(crate) fn ints(&self, name: &str) -> &[i32] {
        &self.ints.get(name).unwrap_or_else(|| panic!("no {name}")).1
    }

    pub(crate) fn bytes(&self, name: &str) -> &[u8] {
        &self.bytes[name]
    }

    pub(crate) fn ids(&self, name: &str) -> Vec<u32> {
        self.ints(name).iter().map(|id| *id as u32).collect()
    }
}

/// Asserts that two slices agree within an absolute tolerance.
pub(crate) fn assert_close(what: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len(), "{what}: lengths");
    for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
        let close = (found - expected).abs() <= tolerance;
        assert!(close, "{what}[{at}]: {found}, expected {expected} within {tolerance}");
    }
}

/// Whether there is a device for wgpu; says so where there is none, which is an error with `TERNOSS_GPU` in the environment.
#[cfg(feature = "wgpu")]
pub(crate) fn gpu() -> bool {
    match ternoss::backends::cube::devices::wgpu_devices() {
        Ok(_) => true,
        Err(error) => {
            assert!(std::env::var_os("TERNOSS_GPU").is_none(), "a GPU is required: {error}");
            eprintln!("skipped: {error}");
            false
        }
    }
}
