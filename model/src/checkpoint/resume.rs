//! Going on with a folder whose writing was interrupted.
//!
//! The unfinished folder says in `resume.json` what it was started with, and has a `step-NNNNN.json` for every weight file
//! that is done, written after the file itself. Nothing without such a note is trusted.

use std::{fs, path::Path};

use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use ternoss_backends::mapped::MappedFile;

use super::{CheckpointError, FolderWriter, fingerprint, read_header, write::sync};

/// What the unfinished folder was started with.
pub(super) const SETTINGS_FILE: &str = "resume.json";

/// Characters of a setting that an error shows.
const SHOWN: usize = 80;

impl FolderWriter {
    /// Starts a folder of `shards` weight files, or goes on with one that was started with the same `settings` (a JSON
    /// object). Returns the notes of the weight files that are done, in order.
    ///
    /// # Errors
    /// As [`create`](Self::create), and [`CheckpointError::OtherSettings`] when the unfinished folder was started with
    /// other settings, unless `overwrite`: then it starts anew.
    pub fn resume<T: DeserializeOwned>(
        output: &Path,
        shards: usize,
        overwrite: bool,
        settings: &Value,
    ) -> Result<(Self, Vec<T>), CheckpointError> {
        let mut writer = Self::open(output, shards, overwrite)?;
        let before = fs::read(writer.partial.join(SETTINGS_FILE)).ok();
        let before: Option<Value> = before.and_then(|text| serde_json::from_slice(&text).ok());
        let difference = before.as_ref().and_then(|before| first_difference(before, settings));
        if let (Some((setting, before, now)), false) = (&difference, overwrite) {
            writer.keep = true;
            let (path, setting) = (writer.partial.clone(), setting.clone());
            return Err(CheckpointError::OtherSettings { path, setting, before: before.clone(), now: now.clone() });
        }
        if before.is_none() || difference.is_some() {
            writer.clear()?;
            writer.file(SETTINGS_FILE, settings.to_string().as_bytes())?;
            return Ok((writer, Vec::new()));
        }
        let mut notes = Vec::new();
        while let Some(note) = writer.finished_step(notes.len()) {
            notes.push(note);
        }
        // What earlier runs finished outlives an error of this one.
        writer.keep = !notes.is_empty();
        Ok((writer, notes))
    }

    /// Notes that weight file `number` and all before it are done; the number after the last is for what is found out then.
    ///
    /// # Errors
    /// [`CheckpointError::Io`]
    pub fn commit(&self, number: usize, note: &Value) -> Result<(), CheckpointError> {
        self.file(&temporary(number), note.to_string().as_bytes())?;
        let path = self.partial.join(note_name(number));
        fs::rename(self.partial.join(temporary(number)), &path).map_err(|source| CheckpointError::io(&path, source))?;
        sync(&self.partial)
    }

    /// What was noted under a number; `None` if nothing readable was.
    pub fn note<T: DeserializeOwned>(&self, number: usize) -> Option<T> {
        serde_json::from_slice(&fs::read(self.partial.join(note_name(number))).ok()?).ok()
    }

    /// Lets what is there outlive an error from now on: an earlier run made some of it.
    pub fn keep(&mut self) {
        self.keep = true;
    }

    /// A file of the unfinished folder.
    ///
    /// # Errors
    /// [`CheckpointError::Io`]
    pub fn read(&self, name: &str) -> Result<Vec<u8>, CheckpointError> {
        let path = self.partial.join(name);
        fs::read(&path).map_err(|source| CheckpointError::io(&path, source))
    }

    /// Removes a file of the unfinished folder, if it is there.
    pub fn remove(&self, name: &str) {
        // A file that stays only takes space until the end.
        let _ = fs::remove_file(self.partial.join(name));
    }

    /// The note of a weight file that is done and readable; takes it into the index.
    fn finished_step<T: DeserializeOwned>(&mut self, number: usize) -> Option<T> {
        let note = self.note(number)?;
        let file = self.shard_name(number);
        let path = self.partial.join(&file);
        let tensors = read_header(&path, &MappedFile::open(&path).ok()?, 0).ok()?;
        for (name, entry) in tensors {
            self.total_size += entry.bytes();
            self.weight_map.insert(name, file.clone());
        }
        Some(note)
    }

    /// Removes from a finished folder what only served to go on.
    pub(super) fn remove_notes(&self, folder: &Path) {
        // They do no harm where they cannot be removed.
        let _ = fs::remove_file(folder.join(SETTINGS_FILE));
        // One more than there are weight files, for what is noted when all are done.
        for number in 0..=self.shards {
            let _ = fs::remove_file(folder.join(note_name(number)));
            let _ = fs::remove_file(folder.join(temporary(number)));
        }
    }
}

fn note_name(number: usize) -> String {
    format!("step-{number:05}.json")
}

/// A note while it is written.
fn temporary(number: usize) -> String {
    format!("{}.tmp", note_name(number))
}

/// The first setting that differs, with both values.
fn first_difference(before: &Value, now: &Value) -> Option<(String, String, String)> {
    let empty = serde_json::Map::new();
    let (before, now) = (before.as_object().unwrap_or(&empty), now.as_object().unwrap_or(&empty));
    let differs = |key: &&String| before.get(*key) != now.get(*key);
    let key = now.keys().chain(before.keys()).find(differs)?;
    let text = |settings: &serde_json::Map<String, Value>| {
        let value = settings.get(key).map_or_else(|| "nothing".into(), ToString::to_string);
        if value.chars().count() > SHOWN { value.chars().take(SHOWN).chain("...".chars()).collect() } else { value }
    };
    Some((key.clone(), text(before), text(now)))
}

/// What tells two versions of a checkpoint apart without reading its weights: its configuration, and size and time of
/// change of its files.
pub(super) fn stamp<'a>(config: &Path, files: impl Iterator<Item = &'a Path>) -> Value {
    let config = fs::read(config).unwrap_or_default();
    let files: Vec<Value> = files.map(file_stamp).collect();
    json!(format!("{:016x}", fingerprint(json!([fingerprint(config), files]).to_string().into_bytes())))
}

fn file_stamp(path: &Path) -> Value {
    let meta = fs::metadata(path).ok();
    let changed = meta.as_ref().and_then(|meta| meta.modified().ok());
    let changed = changed.and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
    json!([
        path.file_name().unwrap_or_default().to_string_lossy(),
        meta.map(|meta| meta.len()),
        changed.map(|time| time.as_nanos().to_string()),
    ])
}
