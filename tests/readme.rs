//! What README.md shows works: its hub commands are run against a hub on this machine, and its Rust code is the
//! examples' own. Its other commands are run by `.ci/readme`.
#![cfg(all(feature = "cli", unix))]
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod hub_server;
mod support;

use std::{fs, path::Path, process::Command};

use hub_server::{HubServer, RepoFile};

/// The model that README.md downloads; the hub here gives out the small one under its name, with its special tokens.
const MODEL: &str = "openai/gpt-oss-20b";

/// How README.md calls the program.
const PROGRAM: &str = "cargo run --release -- ";

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

/// The code blocks of README.md that are marked so.
fn blocks(mark: &str) -> Vec<String> {
    let readme = read("README.md");
    let (mut blocks, mut lines) = (Vec::new(), readme.lines());
    while let Some(line) = lines.next() {
        let Some(found) = line.strip_prefix("```") else { continue };
        let block: Vec<&str> = lines.by_ref().take_while(|line| *line != "```").collect();
        if found == mark {
            blocks.push(block.join("\n"));
        }
    }
    assert!(!blocks.is_empty(), "README.md has no blocks marked {mark:?}");
    blocks
}

/// Each line without its indentation.
fn flat(code: &str) -> String {
    code.lines().map(str::trim).collect::<Vec<_>>().join("\n")
}

#[test]
fn hub_commands_work_in_their_order() {
    let model = tempfile::tempdir().unwrap();
    support::chat_model(model.path());
    let file =
        |entry: fs::DirEntry| RepoFile::large(entry.file_name().to_str().unwrap(), fs::read(entry.path()).unwrap());
    let hub = HubServer::start_as(MODEL, fs::read_dir(model.path()).unwrap().flatten().map(file).collect());
    let home = tempfile::tempdir().unwrap();
    for line in blocks("sh hub").join("\n").lines().filter(|line| !line.is_empty()) {
        let arguments =
            line.strip_prefix(PROGRAM).unwrap_or_else(|| panic!("{line:?} does not start with {PROGRAM:?}"));
        let mut command = Command::new("/bin/sh");
        command.env_clear().env("HOME", home.path()).env("HF_ENDPOINT", hub.address()).current_dir(home.path());
        let output =
            command.arg("-c").arg(format!("'{}' {arguments}", env!("CARGO_BIN_EXE_ternoss"))).output().unwrap();
        assert!(output.status.success(), "{line}\n{}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn rust_code_is_that_of_the_examples() {
    let examples = ["examples/cpu_inference.rs", "examples/burn_module.rs"].map(|path| flat(&read(path)));
    for block in blocks("rust") {
        for part in block.split("\n\n") {
            assert!(examples.iter().any(|example| example.contains(&flat(part))), "in no example:\n{part}");
        }
    }
}
