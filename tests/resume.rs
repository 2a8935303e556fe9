//! A quantization that is killed goes on where it was.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod support;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use support::{example, ternoss_err, ternoss_ok};

/// `method` may have options behind it.
fn arguments(output: &Path, method: &str) -> Vec<String> {
    let mut words = method.split_whitespace();
    let method = words.next().unwrap();
    let (model, text) = (example("tiny-gpt-oss"), example("text/prose_test.txt"));
    let [model, text, output] = [&model, &text, output].map(|path| path.to_str().unwrap());
    let mut arguments = vec!["quantize", "--model", model, "--output", output, "--method", method];
    if method != "absmean" {
        arguments.extend(["--calibration", text, "--calibration-tokens", "4096", "--calibration-context", "128"]);
    }
    arguments.extend(words);
    arguments.into_iter().map(String::from).collect()
}

fn quantize(output: &Path, method: &str) {
    ternoss_ok(&arguments(output, method).iter().map(String::as_str).collect::<Vec<_>>());
}

/// Starts a run and kills it once `enough`; whether it was still at work then.
fn killed(arguments: &[String], mut enough: impl FnMut() -> bool) -> bool {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ternoss"));
    let mut child = command.args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    while !enough() && child.try_wait().unwrap().is_none() {
        thread::sleep(Duration::from_millis(1));
    }
    let at_work = child.try_wait().unwrap().is_none();
    child.kill().unwrap();
    child.wait().unwrap();
    at_work
}

fn assert_same(one: &Path, other: &Path) {
    let (one, other) = (contents(one), contents(other));
    assert_eq!(one.keys().collect::<Vec<_>>(), other.keys().collect::<Vec<_>>());
    for (name, bytes) in one {
        assert!(bytes == other[&name], "{} differs", name.display());
    }
}

fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| (path.file_name().unwrap().into(), fs::read(&path).unwrap())).collect()
}

fn steps(partial: &Path) -> usize {
    let entries = fs::read_dir(partial).into_iter().flatten().flatten().map(|entry| entry.file_name());
    entries.filter(|name| name.to_string_lossy().starts_with("step-")).count()
}

/// Ten kills at moments spread over the run; every run keeps what those before it had finished.
fn kills_change_nothing(method: &str) {
    let folder = tempfile::tempdir().unwrap();
    let (whole, broken) = (folder.path().join("whole"), folder.path().join("broken"));
    let started = Instant::now();
    quantize(&whole, method);
    let duration = started.elapsed();
    let partial = folder.path().join("broken.partial");
    let mut finished = 0;
    // Multiples of the golden ratio, modulo 1: spread like random numbers, and the same each time.
    for share in (1..=10).map(|i| f64::from(i) * 0.618_034 % 1.0) {
        let started = Instant::now();
        if !killed(&arguments(&broken, method), || started.elapsed() > duration.mul_f64(share)) {
            break;
        }
        if broken.exists() {
            // Killed after the folder got its name, so it has to be whole; notes of the run may still lie in it.
            for name in contents(&broken).into_keys().filter(|name| !whole.join(name).exists()) {
                let note = name.to_string_lossy();
                assert!(note == "resume.json" || note.starts_with("step-"), "{note}");
                fs::remove_file(broken.join(&name)).unwrap();
            }
            break;
        }
        assert!(steps(&partial) >= finished, "a run threw away what was finished");
        finished = steps(&partial);
    }
    // A half-written model that looks whole is found by the comparison.
    if !broken.exists() {
        quantize(&broken, method);
    }
    assert!(!partial.exists());
    assert_same(&whole, &broken);
}

#[test]
fn a_calibration_killed_again_and_again_gives_the_same_bytes() {
    kills_change_nothing("ternoss");
}

#[test]
fn a_calibration_on_disk_killed_again_and_again_gives_the_same_bytes() {
    kills_change_nothing("ternoss --activation-memory 1B");
}

#[test]
fn a_run_killed_at_its_very_end_gives_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, output) = (folder.path().join("whole"), folder.path().join("output"));
    quantize(&whole, "ternoss");
    let partial = folder.path().join("output.partial");
    // The note after the last layer's: from then on what the layers left is removed.
    let caught = (0..100).any(|_| {
        let _ = fs::remove_dir_all(&output);
        let at_work = killed(&arguments(&output, "ternoss"), || partial.join("step-00005.json").exists());
        at_work && partial.exists() && !output.exists()
    });
    assert!(caught, "every run ended before it could be killed");
    for layers in 0..=4 {
        let _ = fs::remove_file(partial.join(format!("activations-{layers:05}.bin")));
    }
    quantize(&output, "ternoss");
    assert_same(&whole, &output);
}

#[test]
fn a_distillation_killed_again_and_again_gives_the_same_bytes() {
    kills_change_nothing("absmean --calibration-tokens 2688 --calibration-context 128 --distill 24");
}

#[test]
fn a_distillation_goes_on_from_the_state_it_was_killed_at() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, output) = (folder.path().join("whole"), folder.path().join("output"));
    let method = "absmean --calibration-tokens 2688 --calibration-context 128 --distill 12";
    quantize(&whole, method);
    let state = folder.path().join("output.partial/distillation-state.bin");
    assert!(killed(&arguments(&output, method), || state.exists()), "the run ended before it could be killed");
    let refused = |options: &str, reason: &str| {
        let arguments = arguments(&output, &format!("{method} {options}"));
        let error = ternoss_err(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        assert!(error.contains(reason), "{error}");
    };
    refused("--distill-rate 0.5", "learning rate was");
    let saved = fs::read(&state).unwrap();
    // It is read, and what is left of it not taken for the whole.
    fs::write(&state, &saved[..saved.len() - 1]).unwrap();
    refused("", "distillation-state.bin in the unfinished output is damaged");
    fs::write(&state, &saved).unwrap();
    quantize(&output, method);
    assert_same(&whole, &output);
    assert!(!folder.path().join("output.undistilled").exists() && !folder.path().join("output.partial").exists());
}

#[test]
fn rounding_killed_again_and_again_gives_the_same_bytes() {
    kills_change_nothing("absmean");
}

#[test]
fn dropping_experts_killed_again_and_again_gives_the_same_bytes() {
    kills_change_nothing("absmean --keep-experts 3 --table-planes 2 --calibration-context 128");
    kills_change_nothing("ternoss --keep-experts 3 --table-planes 2");
}

#[test]
fn other_settings_are_refused_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("output");
    let partial = folder.path().join("output.partial");
    assert!(killed(&arguments(&output, "ternoss"), || steps(&partial) >= 2), "the run ended before it could be killed");
    let refused = |change: &[&str], reason: &str| {
        let arguments = arguments(&output, "ternoss");
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).chain(change.iter().copied()).collect();
        let error = ternoss_err(&arguments);
        assert!(error.contains("started with other settings") && error.contains(reason), "{error}");
        assert_eq!(error.lines().count(), 2, "a hint");
    };
    refused(&["--planes", "2"], "planes was 1, now 2");
    refused(&["--without", "bias"], "steps was");
    refused(&["--group-size", "128"], "scales and packing was");
    refused(&["--keep-experts", "4"], "experts kept was null, now 4");
    refused(&["--table-planes", "1"], "planes of the tables was null, now 1");
    assert!(steps(&partial) >= 2, "nothing was thrown away");

    // With --overwrite another run starts anew.
    let mut other = arguments(&output, "absmean");
    other.push("--overwrite".into());
    ternoss_ok(&other.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(!partial.exists() && output.join("config.json").exists());
}

#[test]
fn a_changed_text_or_model_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let (model, text) = (folder.path().join("model"), folder.path().join("text.txt"));
    support::copy_folder(&example("tiny-gpt-oss"), &model);
    let words = fs::read_to_string(example("text/prose_test.txt")).unwrap();
    fs::write(&text, &words).unwrap();
    let output = folder.path().join("output");
    let paths = [&model, &text, &output].map(|path| path.to_str().unwrap().to_string());
    let arguments = ["quantize", "--model", &paths[0], "--calibration", &paths[1], "--output", &paths[2]];
    let arguments = [&arguments[..], &["--calibration-tokens", "4096", "--calibration-context", "128"]].concat();
    let partial = folder.path().join("output.partial");
    let owned: Vec<String> = arguments.iter().map(ToString::to_string).collect();
    assert!(killed(&owned, || steps(&partial) >= 1), "the run ended before it could be killed");
    fs::write(&text, &words[100..]).unwrap();
    assert!(ternoss_err(&arguments).contains("calibration text was"));
    fs::write(&text, &words).unwrap();
    let weights = fs::read(model.join("model.safetensors")).unwrap();
    fs::write(model.join("model.safetensors"), weights).unwrap();
    assert!(ternoss_err(&arguments).contains("model was"));
}

#[test]
fn two_runs_do_not_write_one_folder() {
    let folder = tempfile::tempdir().unwrap();
    let (output, partial) = (folder.path().join("output"), folder.path().join("output.partial"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_ternoss"));
    let command = command.args(arguments(&output, "ternoss")).stdout(Stdio::null()).stderr(Stdio::null());
    let mut first = command.spawn().unwrap();
    while steps(&partial) < 1 && first.try_wait().unwrap().is_none() {
        thread::sleep(Duration::from_millis(1));
    }
    let second = arguments(&output, "ternoss");
    let error = ternoss_err(&second.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(error.contains("output.partial is being written by another process"), "{error}");
    assert!(first.wait().unwrap().success(), "the first one was disturbed");
    assert!(output.join("config.json").exists() && !partial.exists());
}

#[test]
fn what_a_killed_run_left_is_not_in_the_model() {
    let folder = tempfile::tempdir().unwrap();
    let (output, partial) = (folder.path().join("output"), folder.path().join("output.partial"));
    assert!(killed(&arguments(&output, "ternoss"), || steps(&partial) >= 2), "the run ended before it could be killed");
    // As after a kill between a note and the removal of what came before it.
    fs::write(partial.join("activations-00000.bin"), "stale").unwrap();
    fs::write(partial.join("step-00004.json.tmp"), "half").unwrap();
    fs::write(partial.join("activations-00004.bin.tmp"), "half").unwrap();
    fs::write(partial.join("spill-00099.bin"), "stale").unwrap();
    quantize(&output, "ternoss");
    let extra = |name: &PathBuf| {
        let name = name.to_string_lossy().into_owned();
        ["activations", "spill-", "step-", "resume", "lock"].iter().any(|prefix| name.starts_with(prefix))
    };
    assert_eq!(contents(&output).keys().find(|name| extra(name)), None);
}

#[test]
fn a_damaged_weight_file_is_written_again() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, output) = (folder.path().join("whole"), folder.path().join("output"));
    quantize(&whole, "absmean");
    let partial = folder.path().join("output.partial");
    if killed(&arguments(&output, "absmean"), || steps(&partial) >= 2) {
        fs::write(partial.join("model-00001-of-00005.safetensors"), "damaged").unwrap();
        quantize(&output, "absmean");
    }
    assert_same(&whole, &output);
}
