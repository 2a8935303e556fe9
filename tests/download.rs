//! What `ternoss download` promises, against a hub on this machine.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod hub_server;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use hub_server::{COMMIT, Faults, GATED, HubServer, MODEL, RepoFile, TOKEN};
use tempfile::TempDir;

const WEIGHTS: &str = "model-00001-of-00002.safetensors";

/// Bytes without a pattern that a wrong offset could hide in.
fn noise(size: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let step = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..size).map(step).collect()
}

/// A repository with everything that gpt-oss's has.
fn model() -> Vec<RepoFile> {
    let mut second = noise(40_000);
    second.reverse();
    let index = format!(r#"{{"weight_map": {{"a": "{WEIGHTS}", "b": "model-00002-of-00002.safetensors"}}}}"#);
    vec![
        RepoFile::small(".gitattributes", "*.safetensors filter=lfs"),
        RepoFile::small("LICENSE", "as is"),
        RepoFile::small("README.md", "# tiny"),
        RepoFile::small("USAGE_POLICY", "as is"),
        RepoFile::small("chat_template.jinja", "{{ messages }}"),
        RepoFile::small("config.json", r#"{"model_type": "gpt_oss"}"#),
        RepoFile::small("generation_config.json", ""),
        RepoFile::large("metal/model.bin", noise(1000)),
        RepoFile::large(WEIGHTS, noise(1_500_000)),
        RepoFile::large("model-00002-of-00002.safetensors", second),
        RepoFile::small("model.safetensors.index.json", index),
        RepoFile::small("original/config.json", "{}"),
        RepoFile::large("original/model.safetensors", noise(2000)),
        RepoFile::small("special_tokens_map.json", "{}"),
        RepoFile::large("tokenizer.json", noise(50_000)),
        RepoFile::small("tokenizer_config.json", "{}"),
    ]
}

/// A home without anything, a hub, and a folder to download to.
struct Setup {
    home: TempDir,
    hub: HubServer,
}

impl Setup {
    fn new(files: Vec<RepoFile>) -> Self {
        Self { home: tempfile::tempdir().unwrap(), hub: HubServer::start(files) }
    }

    fn folder(&self) -> PathBuf {
        self.home.path().join("model")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ternoss"));
        command.env_clear().env("HOME", self.home.path()).env("HF_ENDPOINT", self.hub.address());
        command.args(arguments);
        command
    }

    fn download(&self, model: &str) -> Output {
        self.command(&["download", model, "--output"]).arg(self.folder()).output().unwrap()
    }

    /// The first bytes of the ranges in which a file was fetched.
    fn fetched(&self, name: &str) -> Vec<usize> {
        self.hub.fetched().into_iter().filter(|(file, _)| file == name).map(|(_, first)| first).collect()
    }
}

#[track_caller]
fn assert_ok(output: &Output) {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// That a command failed, with one line that says `what` and at most one with a hint.
#[track_caller]
fn assert_error(output: &Output, what: &str) {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && output.stdout.is_empty(), "{text}");
    let errors: Vec<_> = text.lines().filter(|line| line.starts_with("error: ")).collect();
    assert!(errors.len() == 1 && errors[0].contains(what), "{text}");
}

#[track_caller]
fn assert_whole(folder: &Path) {
    for file in model() {
        let path = folder.join(&file.name);
        let wanted = !file.name.contains('/') && !file.name.starts_with('.') && !file.data.is_empty();
        assert_eq!(path.exists(), wanted, "{}", file.name);
        assert!(!wanted || fs::read(path).unwrap() == file.data, "{}", file.name);
    }
}

fn staging(folder: &Path) -> PathBuf {
    folder.join(".download")
}

#[test]
fn fetches_the_model_and_nothing_else() {
    let setup = Setup::new(model());
    let output = setup.download(MODEL);
    assert_ok(&output);
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), setup.folder().to_str().unwrap());
    assert_whole(&setup.folder());
    assert!(!staging(&setup.folder()).exists());
    let extra = setup.hub.fetched().into_iter().find(|(name, _)| name.contains('/') || name.starts_with('.'));
    assert_eq!(extra, None);
}

#[test]
fn a_cut_connection_is_taken_up_again() {
    let setup = Setup::new(model());
    setup.hub.set_faults(Faults { cut: Some((WEIGHTS.into(), 700_000, 1)), ..Faults::default() });
    assert_ok(&setup.download(MODEL));
    assert_whole(&setup.folder());
    assert_eq!(setup.fetched(WEIGHTS), [0, 700_000]);
}

#[test]
fn a_broken_download_does_not_look_whole_and_the_next_run_continues_it() {
    let setup = Setup::new(model());
    setup.hub.set_faults(Faults { cut: Some((WEIGHTS.into(), 700_000, usize::MAX)), ..Faults::default() });
    assert_error(&setup.download(MODEL), &format!("the download of {WEIGHTS} broke off"));
    assert!(!setup.folder().join("config.json").exists());
    assert!(!setup.folder().join(WEIGHTS).exists());
    setup.hub.set_faults(Faults::default());
    assert_ok(&setup.download(MODEL));
    assert_whole(&setup.folder());
    assert_eq!(setup.fetched(WEIGHTS).last(), Some(&700_000));
    assert_eq!(setup.fetched("tokenizer.json"), [0]);
}

#[test]
fn a_killed_download_continues() {
    let setup = Setup::new(model());
    setup.hub.set_faults(Faults { pause: Duration::from_millis(40), ..Faults::default() });
    let mut command = setup.command(&["download", MODEL, "--output"]);
    let mut child = command.arg(setup.folder()).stderr(Stdio::null()).spawn().unwrap();
    let part = staging(&setup.folder()).join("models--org--tiny/blobs");
    let arrived = || {
        let weights = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "part");
        let mut paths = fs::read_dir(&part).into_iter().flatten().flatten().map(|entry| entry.path()).filter(weights);
        paths.any(|path| fs::metadata(path).is_ok_and(|meta| meta.len() > 200_000))
    };
    let started = Instant::now();
    while !arrived() && started.elapsed() < Duration::from_secs(30) {
        thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!setup.folder().join("config.json").exists());
    setup.hub.set_faults(Faults::default());
    assert_ok(&setup.download(MODEL));
    assert_whole(&setup.folder());
    assert!(*setup.fetched(WEIGHTS).last().unwrap() > 200_000);
}

#[test]
fn a_part_that_had_all_its_bytes_continues() {
    let setup = Setup::new(model());
    let weights = model().into_iter().find(|file| file.name == WEIGHTS).unwrap();
    setup.hub.set_faults(Faults { cut: Some((WEIGHTS.into(), 700_000, usize::MAX)), ..Faults::default() });
    setup.download(MODEL);
    setup.hub.set_faults(Faults::default());
    let blobs = staging(&setup.folder()).join("models--org--tiny/blobs");
    let paths = fs::read_dir(blobs).unwrap().flatten().map(|entry| entry.path());
    let part =
        paths.filter(|path| path.extension().is_some()).find(|path| fs::metadata(path).unwrap().len() == 700_000);
    fs::write(part.unwrap(), &weights.data).unwrap();
    assert_ok(&setup.download(MODEL));
    assert_whole(&setup.folder());
}

#[test]
fn a_finished_download_is_checked_and_only_what_differs_fetched_again() {
    let setup = Setup::new(model());
    assert_ok(&setup.download(MODEL));
    let first = setup.hub.fetched().len();
    assert_ok(&setup.download(MODEL));
    assert_eq!(setup.hub.fetched().len(), first);

    let mut damaged = fs::read(setup.folder().join(WEIGHTS)).unwrap();
    damaged[1234] ^= 1;
    fs::write(setup.folder().join(WEIGHTS), damaged).unwrap();
    fs::remove_file(setup.folder().join("LICENSE")).unwrap();
    assert_ok(&setup.download(MODEL));
    assert_whole(&setup.folder());
    assert_eq!(setup.hub.fetched().len(), first + 2);
}

#[test]
fn a_file_with_the_wrong_checksum_is_refused() {
    let damage = |file: RepoFile| {
        if file.name == WEIGHTS { file.damaged() } else { file }
    };
    let setup = Setup::new(model().into_iter().map(damage).collect());
    assert_error(&setup.download(MODEL), &format!("{WEIGHTS} arrived damaged"));
    assert!(!setup.folder().join("config.json").exists());
    setup.hub.set_files(model());
    assert_ok(&setup.download(MODEL));
    assert_whole(&setup.folder());
}

#[test]
fn a_gated_model_takes_the_token_of_the_environment() {
    let setup = Setup::new(model());
    assert_error(&setup.download(GATED), "needs a token");
    let with =
        |token| setup.command(&["download", GATED, "--output"]).arg(setup.folder()).env("HF_TOKEN", token).output();
    assert_error(&with("hf_other").unwrap(), "the token gives no access to org/gated");
    assert_ok(&with(TOKEN).unwrap());
    assert_whole(&setup.folder());
}

#[test]
fn what_does_not_exist_is_told_in_one_line() {
    let setup = Setup::new(model());
    assert_error(&setup.download("org/nothing"), "no model org/nothing at http://127.0.0.1");
    assert_error(&setup.download("org/private"), "org/private does not exist or needs a token");
    assert_error(&setup.download("org/tiny@v9"), "org/tiny has no revision \"v9\"");
    let output = setup.command(&["download", MODEL, "--revision", "v9"]).output().unwrap();
    assert_error(&output, "org/tiny has no revision \"v9\"");
    let output = setup.command(&["download", MODEL]).env("HF_ENDPOINT", "http://127.0.0.1:9").output().unwrap();
    assert_error(&output, "cannot reach http://127.0.0.1:9");
    let output = setup.command(&["download", MODEL]).env("HF_HUB_OFFLINE", "1").output().unwrap();
    assert_error(&output, "HF_HUB_OFFLINE");
}

#[test]
fn a_repository_without_weights_is_refused() {
    let setup = Setup::new(model().into_iter().filter(|file| !file.name.ends_with(".safetensors")).collect());
    assert_error(&setup.download(MODEL), "has no safetensors weights");
}

#[test]
fn a_folder_with_another_model_is_left_alone() {
    let setup = Setup::new(model());
    fs::create_dir_all(setup.folder()).unwrap();
    fs::write(setup.folder().join("model.safetensors"), "mine").unwrap();
    assert_error(&setup.download(MODEL), "already holds model.safetensors");
    assert_eq!(fs::read_dir(setup.folder()).unwrap().count(), 1);
}

#[test]
fn without_an_output_folder_the_hubs_cache_is_used() {
    let setup = Setup::new(model());
    let download = || setup.command(&["download", MODEL]).output().unwrap();
    let output = download();
    assert_ok(&output);
    let cache = setup.home.path().join(".cache/huggingface/hub/models--org--tiny");
    let snapshot = cache.join("snapshots").join(COMMIT);
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), snapshot.to_str().unwrap());
    assert_whole(&snapshot);
    let references: Vec<_> =
        fs::read_dir(cache.join("refs")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(references, ["main"]);
    assert_eq!(fs::read_to_string(cache.join("refs/main")).unwrap(), COMMIT);
    let first = setup.hub.fetched().len();
    assert_ok(&download());
    assert_eq!(setup.hub.fetched().len(), first);
}

#[test]
fn a_hub_id_stands_for_a_model_folder() {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/tiny-gpt-oss");
    let read =
        |entry: fs::DirEntry| RepoFile::large(entry.file_name().to_str().unwrap(), fs::read(entry.path()).unwrap());
    let setup = Setup::new(fs::read_dir(example).unwrap().flatten().map(read).collect());
    let inspect = |model: &str| setup.command(&["inspect", "--model", model]);
    assert_error(&inspect(MODEL).env("HF_HUB_OFFLINE", "1").output().unwrap(), "org/tiny is not in the cache");
    assert_ok(&inspect(MODEL).output().unwrap());
    assert_ok(&inspect(MODEL).env("HF_HUB_OFFLINE", "1").output().unwrap());
    assert_ok(&inspect(&format!("{MODEL}@{COMMIT}")).env("HF_HUB_OFFLINE", "1").output().unwrap());
    assert_error(
        &inspect("no-such-folder").output().unwrap(),
        "\"no-such-folder\" is neither a folder here nor a hub id",
    );

    // A folder of that name goes before the hub.
    fs::create_dir_all(setup.home.path().join(MODEL)).unwrap();
    let output = inspect(MODEL).current_dir(setup.home.path()).output().unwrap();
    assert_error(&output, "config.json");
}
