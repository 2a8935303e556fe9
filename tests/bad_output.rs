//! Where nothing can be written, one line says so, nothing half-written stays and nothing is lost.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod support;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use support::{copy_folder, example, fixture, folder::Folder, listing, ternoss, ternoss_err, ternoss_ok};

fn utf8(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The three commands that write, each with this output.
fn writers(model: &Path, output: &Path) -> [Vec<String>; 3] {
    let words = |line: &[&str]| line.iter().map(ToString::to_string).collect();
    [
        words(&["quantize", "--method", "absmean", "--model", utf8(model), "--output", utf8(output)]),
        words(&["synthesize", "--shape", "tiny", "--format", "mxfp4", "--output", utf8(output)]),
        words(&["logits", "--model", utf8(model), "--tokens", "1,2,3", "--output", utf8(output)]),
    ]
}

fn refused(args: &[String], expected: &str) {
    let error = ternoss_err(&args.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(error.contains(expected), "{error} lacks {expected:?}");
}

#[test]
fn an_output_that_cannot_be_made_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "precious").unwrap();
    for args in writers(&fixture("tiny-bf16"), &file.join("output")) {
        refused(&args, utf8(&file));
    }
    for args in writers(&fixture("tiny-bf16"), Path::new("/proc/ternoss/output")) {
        refused(&args, "/proc/ternoss");
    }
    assert_eq!(listing(folder.path()), ["file"]);
    assert_eq!(fs::read(&file).unwrap(), b"precious");
}

#[test]
fn nothing_but_a_model_is_ever_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let (file, thesis) = (folder.path().join("file"), folder.path().join("thesis"));
    fs::write(&file, "precious").unwrap();
    fs::create_dir(&thesis).unwrap();
    fs::write(thesis.join("chapter-1.tex"), "precious").unwrap();
    for output in [&file, &thesis] {
        for args in &writers(&fixture("tiny-bf16"), output)[..2] {
            refused(args, "exists already");
            refused(&[args.as_slice(), &["--overwrite".into()]].concat(), "exists and is not replaced");
        }
    }
    refused(&writers(&fixture("tiny-bf16"), &thesis)[2], utf8(&thesis));
    assert_eq!(listing(folder.path()), ["file", "thesis"]);
    assert_eq!((fs::read(&file).unwrap(), listing(&thesis)), (b"precious".to_vec(), vec!["chapter-1.tex".into()]));
}

#[test]
fn a_model_is_not_replaced_by_its_own_ternary_version() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    copy_folder(&fixture("tiny-bf16"), &model);
    let before = listing(&model);
    let twisted = folder.path().join("model/../model");
    for output in [&model, &twisted] {
        let args = [&writers(&model, output)[0][..], &["--overwrite".into()]].concat();
        refused(&args, "is the model's own folder");
    }
    assert_eq!(listing(folder.path()), ["model"]);
    assert_eq!(listing(&model), before);

    // Nor under the name that the unfinished output would have.
    let partial = folder.path().join("other.partial");
    fs::rename(&model, &partial).unwrap();
    let args = &writers(&partial, &folder.path().join("other"))[0];
    refused(args, "is the model's own folder");
    assert_eq!(listing(&partial), before);
    copy_folder(&partial, &model);
    refused(&writers(&model, &folder.path().join("other"))[0], "exists and is not replaced");
    assert_eq!(listing(&partial), before, "somebody's model");
}

#[test]
fn a_failed_replacement_keeps_what_was_there() {
    let folder = tempfile::tempdir().unwrap();
    let (broken, output) = (folder.path().join("broken"), folder.path().join("output"));
    let mut model = Folder::read(&fixture("tiny-bf16"));
    model.tensor("model.layers.3.mlp.experts.down_proj").set(9, f32::NAN);
    model.write(&broken);
    copy_folder(&fixture("tiny-bf16"), &output);
    let before = listing(&output);
    refused(&[&writers(&broken, &output)[0][..], &["--overwrite".into()]].concat(), "holds NaN");
    assert_eq!(listing(&output), before);
    assert_eq!(listing(folder.path()), ["broken", "output"]);
}

#[test]
fn what_an_interrupted_run_left_is_cleared_away() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("output");
    fs::create_dir(folder.path().join("output.partial")).unwrap();
    fs::write(folder.path().join("output.partial/model-00001-of-00005.safetensors"), "half").unwrap();
    for args in &writers(&fixture("tiny-bf16"), &output)[..2] {
        ternoss_ok(&args.iter().map(String::as_str).chain(["--overwrite"]).collect::<Vec<_>>());
        assert_eq!(listing(folder.path()), ["output"]);
        assert!(listing(&output).contains(&"config.json".into()));
    }
}

#[test]
fn files_beside_the_output_are_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("logits.partial"), "precious").unwrap();
    let args = &writers(&fixture("tiny-bf16"), &folder.path().join("logits.safetensors"))[2];
    ternoss_ok(&args.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(listing(folder.path()), ["logits.partial", "logits.safetensors"]);
    assert_eq!(fs::read(folder.path().join("logits.partial")).unwrap(), b"precious");
}

#[test]
#[cfg(target_os = "linux")]
fn results_that_cannot_be_printed_are_an_error() {
    let model = fixture("tiny-bf16");
    for args in
        [["inspect", "--model", utf8(&model)].as_slice(), &["generate", "--model", utf8(&model), "--tokens", "1"]]
    {
        let full = fs::File::create("/dev/full").unwrap();
        let output = Command::new(env!("CARGO_BIN_EXE_ternoss")).args(args).stdout(full).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(stderr.starts_with("error: No space left on device"), "{stderr}");
    }
}

/// A small file system, unmounted at the end.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(folder: &Path, size: &str) -> Option<Self> {
        let options = format!("size={size}");
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(folder).output();
        mount.is_ok_and(|output| output.status.success()).then(|| Self(folder.into()))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).output();
    }
}

#[test]
fn a_full_disk_is_told_and_nothing_half_written_stays() {
    for size in ["8k", "64k", "256k"] {
        let folder = tempfile::tempdir().unwrap();
        let Some(disk) = SmallDisk::mount(folder.path(), size) else {
            println!("skipped: mounting a small file system is not permitted here");
            return;
        };
        let mut commands = writers(&fixture("tiny-bf16"), &disk.0.join("output"));
        let ids: Vec<String> = (0..400).map(|id| id.to_string()).collect();
        commands[2][4] = ids.join(",");
        for args in commands {
            told_of_a_full_disk(&disk, size, &args);
        }
    }
}

/// With a text, the activations after each layer are written too. The sizes end the run in the first weight file, in the
/// activations, in later layers, and at the end.
#[test]
fn a_full_disk_is_told_in_a_calibration() {
    let sizes = ["8k", "300k", "700k", "1100k", "1200k", "1250k"].map(|size| (size, "2GB"));
    // Without memory for them, the activations are on that disk from the beginning.
    for (size, memory) in sizes.into_iter().chain([("300k", "1B"), ("900k", "1B"), ("1250k", "1B")]) {
        let folder = tempfile::tempdir().unwrap();
        let Some(disk) = SmallDisk::mount(folder.path(), size) else {
            println!("skipped: mounting a small file system is not permitted here");
            return;
        };
        let (model, output) = (example("tiny-gpt-oss"), disk.0.join("output"));
        let args = ["quantize", "--model", utf8(&model), "--output", utf8(&output)];
        let few = ["--calibration-tokens", "256", "--calibration-context", "128", "--activation-memory", memory];
        let args: Vec<String> = [&args[..], &few].concat().iter().map(ToString::to_string).collect();
        told_of_a_full_disk(&disk, size, &args);
    }
}

#[track_caller]
fn told_of_a_full_disk(disk: &SmallDisk, size: &str, args: &[String]) {
    let output = ternoss(&args.iter().map(String::as_str).collect::<Vec<_>>());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{size} {args:?}: {stderr}");
    let lines: Vec<&str> = stderr.lines().filter(|line| !line.starts_with("warning: ")).collect();
    assert!(lines.len() == 2 && lines[0].starts_with("error: ") && lines[1].starts_with("hint: "), "{stderr}");
    assert!(lines[0].contains("No space left on device"), "{stderr}");
    assert!(lines[0].contains(utf8(&disk.0)) && lines[1].contains("free some space"), "{stderr}");
    assert_eq!(listing(&disk.0), [] as [&str; 0], "{size} {args:?}");
}
