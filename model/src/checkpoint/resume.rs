//! Going on with a folder whose writing was interrupted.
//!
//! The unfinished folder says in `resume.json` what it was started with, and has a `step-NNNNN.json` for every weight file
//! that is done, written after the file itself. Nothing without such a note is trusted; all of it is gone at the end.

use std::{fs, path::Path};

use serde_json::{Value, json};
use ternoss_backends::mapped::MappedFile;

use super::{CheckpointError, FolderWriter, read_header};

/// What the unfinished folder was started with.
const SETTINGS_FILE: &str = "resume.json";

impl FolderWriter {
    /// Starts a folder of `shards` weight files, or goes on with one that was started with the same `settings` (a JSON
    /// object). Returns the notes of the weight files that are done, in order.
    ///
    /// # Errors
    /// As [`create`](Self::create), and [`CheckpointError::OtherSettings`] when the unfinished folder was started with
    /// other settings, unless `overwrite`: then it starts anew.
    pub fn resume(
        output: &Path,
        shards: usize,
        overwrite: bool,
        settings: &Value,
    ) -> Result<(Self, Vec<Value>), CheckpointError> {
        let partial = Self::partial_of(output);
        let before = fs::read(partial.join(SETTINGS_FILE)).ok();
        let before: Option<Value> = before.and_then(|text| serde_json::from_slice(&text).ok());
        let difference = before.as_ref().map(|before| first_difference(before, settings));
        match difference {
            Some(None) => Self::check_output(output, overwrite)?,
            Some(Some((setting, before, now))) if !overwrite => {
                return Err(CheckpointError::OtherSettings { path: partial, setting, before, now });
            }
            _ => {
                let writer = Self::create(output, shards, overwrite)?;
                writer.file(SETTINGS_FILE, settings.to_string().as_bytes())?;
                return Ok((writer, Vec::new()));
            }
        }
        let mut writer = Self::in_folder(output, partial, shards, overwrite);
        let mut notes = Vec::new();
        while let Some(note) = writer.note(notes.len()) {
            writer.count(notes.len())?;
            notes.push(note);
        }
        Ok((writer, notes))
    }

    /// Notes that weight file `number` and all before it are done.
    ///
    /// # Errors
    /// [`CheckpointError::Io`]
    pub fn commit(&self, number: usize, note: &Value) -> Result<(), CheckpointError> {
        let (name, temporary) = (note_name(number), format!("{}.tmp", note_name(number)));
        self.file(&temporary, note.to_string().as_bytes())?;
        let path = self.partial.join(name);
        fs::rename(self.partial.join(temporary), &path).map_err(|source| CheckpointError::io(&path, source))
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

    fn note(&self, number: usize) -> Option<Value> {
        serde_json::from_slice(&fs::read(self.partial.join(note_name(number))).ok()?).ok()
    }

    /// Takes a finished weight file into the index.
    fn count(&mut self, number: usize) -> Result<(), CheckpointError> {
        let file = self.shard_name(number);
        let path = self.partial.join(&file);
        let map = MappedFile::open(&path).map_err(|source| CheckpointError::io(&path, source))?;
        for (name, entry) in read_header(&path, &map, 0)? {
            self.total_size += entry.bytes();
            self.weight_map.insert(name, file.clone());
        }
        Ok(())
    }

    /// Removes what only served to go on.
    pub(super) fn remove_notes(&self) {
        self.remove(SETTINGS_FILE);
        (0..self.shards).for_each(|number| self.remove(&note_name(number)));
    }
}

fn note_name(number: usize) -> String {
    format!("step-{number:05}.json")
}

/// The first setting that differs, with both values.
fn first_difference(before: &Value, now: &Value) -> Option<(String, String, String)> {
    let empty = serde_json::Map::new();
    let (before, now) = (before.as_object().unwrap_or(&empty), now.as_object().unwrap_or(&empty));
    let differs = |key: &&String| before.get(*key) != now.get(*key);
    let key = now.keys().chain(before.keys()).find(differs)?;
    let text = |settings: &serde_json::Map<String, Value>| {
        settings.get(key).map_or_else(|| "nothing".into(), ToString::to_string)
    };
    Some((key.clone(), text(before), text(now)))
}

/// What tells two versions of a file apart without reading it: size and time of the last change.
pub(super) fn file_stamp(path: &Path) -> Value {
    let meta = fs::metadata(path).ok();
    let changed = meta.as_ref().and_then(|meta| meta.modified().ok());
    let changed = changed.and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
    json!({
        "file": path.file_name().unwrap_or_default().to_string_lossy(),
        "size": meta.map(|meta| meta.len()),
        "changed": changed.map(|time| time.as_nanos().to_string()),
    })
}
