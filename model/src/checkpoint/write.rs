//! Writing a model folder so that it is whole or not there.
//!
//! Everything goes to `OUTPUT.partial` first. Each file is synced to disk, `config.json`, which makes a folder a model,
//! comes last, and the folder is renamed to its final name at the very end.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fs::{self, File, TryLockError},
    io,
    path::{Path, PathBuf},
};

use safetensors::{Dtype, View};
use serde_json::json;

use ternoss_backends::mapped::MappedFile;
use ternoss_quant::PackedTernary;

use super::{
    CONFIG_FILE, Checkpoint, CheckpointError, INDEX_FILE, TernaryPath,
    names::{CODES, GROUP_SCALES, ROW_SCALES},
    read_header,
    resume::SETTINGS_FILE,
};
use crate::config::GptOssConfig;

/// Held by the process that writes; freed by the system when it ends, however it does.
const LOCK_FILE: &str = "lock";

/// A tensor to be written; its bytes may be produced when their turn comes, so that only one is in memory.
pub struct OutputTensor<'a> {
    dtype: Dtype,
    shape: Vec<usize>,
    data: Box<dyn Fn() -> Cow<'a, [u8]> + 'a>,
}

impl<'a> OutputTensor<'a> {
    /// A tensor whose little-endian bytes exist already.
    pub fn new(dtype: Dtype, shape: Vec<usize>, data: Cow<'a, [u8]>) -> Self {
        Self::lazy(dtype, shape, move || match &data {
            // A borrowed slice outlives the closure; an owned one is lent as a copy.
            Cow::Borrowed(bytes) => Cow::Borrowed(*bytes),
            Cow::Owned(bytes) => Cow::Owned(bytes.clone()),
        })
    }

    /// A tensor whose bytes `make` produces; it is called once, when the tensor is written.
    pub fn lazy(dtype: Dtype, shape: Vec<usize>, make: impl Fn() -> Cow<'a, [u8]> + 'a) -> Self {
        Self { dtype, shape, data: Box::new(make) }
    }

    /// A tensor of f32.
    pub fn floats(shape: Vec<usize>, values: &'a [f32]) -> Self {
        Self::new(Dtype::F32, shape, Cow::Borrowed(bytemuck::cast_slice(values)))
    }

    /// Bytes it takes.
    pub fn bytes(&self) -> usize {
        self.data_len()
    }

    /// The tensors of a ternary weight, with their names.
    pub fn ternary(path: &TernaryPath, packed: &'a PackedTernary) -> Vec<(String, Self)> {
        let layout = packed.layout;
        let part = |suffix, dtype, shape: &[usize], bytes: &'a [u8]| {
            let tensor = Self::new(dtype, path.file_shape(shape).to_vec(), Cow::Borrowed(bytes));
            (path.part(suffix), tensor)
        };
        let codes = bytemuck::cast_slice(&packed.codes);
        let row_scales = bytemuck::cast_slice(&packed.row_scales);
        let mut parts = vec![
            part(CODES, Dtype::U32, &layout.codes_shape(), codes),
            part(ROW_SCALES, Dtype::F32, &layout.row_scales_shape(), row_scales),
        ];
        if layout.group_size.is_some() {
            parts.push(part(GROUP_SCALES, Dtype::U8, &layout.group_scales_shape(), &packed.group_scales));
        }
        parts
    }

    /// A tensor of another checkpoint, byte for byte.
    ///
    /// # Errors
    /// [`CheckpointError::MissingTensor`]
    pub fn copied(checkpoint: &'a Checkpoint, name: &str) -> Result<Self, CheckpointError> {
        let bytes = checkpoint.bytes(name)?;
        let (dtype, shape) = checkpoint.entry(name).map_or((Dtype::U8, vec![]), |e| (e.dtype, e.shape.clone()));
        Ok(Self::new(dtype, shape, Cow::Borrowed(bytes)))
    }

    /// Some parts, by their index in the slowest dimension, of a tensor of another checkpoint, byte for byte. Parts that are
    /// not there are left out.
    ///
    /// # Errors
    /// [`CheckpointError::MissingTensor`]
    pub fn copied_parts(checkpoint: &'a Checkpoint, name: &str, parts: &[usize]) -> Result<Self, CheckpointError> {
        let bytes = checkpoint.bytes(name)?;
        let (dtype, mut shape) = checkpoint.entry(name).map_or((Dtype::U8, vec![]), |e| (e.dtype, e.shape.clone()));
        let all: Vec<&[u8]> =
            bytes.chunks_exact((bytes.len() / shape.first().copied().unwrap_or(1).max(1)).max(1)).collect();
        let kept: Vec<&[u8]> = parts.iter().filter_map(|part| all.get(*part).copied()).collect();
        if let Some(first) = shape.first_mut() {
            *first = kept.len();
        }
        Ok(Self::new(dtype, shape, Cow::Owned(kept.concat())))
    }
}

impl View for OutputTensor<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        (self.data)()
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// A model folder being written. Dropped before [`finish`](Self::finish), after an error, it removes what it wrote,
/// unless it had gone on with what an earlier run left. A process that is killed leaves it to be
/// [resumed](Self::resume).
#[derive(Debug)]
pub struct FolderWriter {
    output: PathBuf,
    pub(super) partial: PathBuf,
    overwrite: bool,
    pub(super) shards: usize,
    pub(super) weight_map: BTreeMap<String, String>,
    pub(super) total_size: usize,
    /// Whether the unfinished folder outlives this.
    pub(super) keep: bool,
    _lock: File,
}

impl FolderWriter {
    /// Starts a folder of `shards` weight files.
    ///
    /// # Errors
    /// [`CheckpointError::OutputExists`] unless `overwrite`, [`CheckpointError::NotReplaceable`] when what is there is
    /// no model, [`CheckpointError::Busy`] when another process writes it; [`CheckpointError::Io`] when the place is not
    /// writable.
    pub fn create(output: &Path, shards: usize, overwrite: bool) -> Result<Self, CheckpointError> {
        let writer = Self::open(output, shards, overwrite)?;
        writer.clear()?;
        Ok(writer)
    }

    /// Whether a folder may be written to this place, or replace what is there.
    ///
    /// # Errors
    /// [`CheckpointError::OutputExists`], [`CheckpointError::NotReplaceable`]
    pub fn check(output: &Path, overwrite: bool) -> Result<(), CheckpointError> {
        if output.exists() && !overwrite {
            return Err(CheckpointError::OutputExists { path: output.into() });
        }
        if output.exists() && !is_replaceable(output) {
            return Err(CheckpointError::NotReplaceable { path: output.into() });
        }
        let partial = Self::partial_of(output);
        if partial.join(CONFIG_FILE).exists() && !partial.join(SETTINGS_FILE).exists() {
            // A model of somebody who likes that name.
            return Err(CheckpointError::NotReplaceable { path: partial });
        }
        Ok(())
    }

    /// Takes hold of the unfinished folder, whatever is in it.
    pub(super) fn open(output: &Path, shards: usize, overwrite: bool) -> Result<Self, CheckpointError> {
        Self::check(output, overwrite)?;
        let partial = Self::partial_of(output);
        fs::create_dir_all(&partial).map_err(|source| CheckpointError::io(&partial, source))?;
        let path = partial.join(LOCK_FILE);
        let lock = File::create(&path).map_err(|source| CheckpointError::io(&path, source))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(CheckpointError::Busy { path: partial }),
            Err(TryLockError::Error(source)) => return Err(CheckpointError::io(&path, source)),
        }
        Ok(Self {
            output: output.into(),
            partial,
            overwrite,
            shards,
            weight_map: BTreeMap::new(),
            total_size: 0,
            keep: false,
            _lock: lock,
        })
    }

    /// Removes whatever an earlier run has left.
    pub(super) fn clear(&self) -> Result<(), CheckpointError> {
        let failed = |source| CheckpointError::io(&self.partial, source);
        for entry in fs::read_dir(&self.partial).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let removed = match path.file_name() {
                Some(name) if name == LOCK_FILE => Ok(()),
                _ if path.is_dir() => fs::remove_dir_all(&path),
                _ => fs::remove_file(&path),
            };
            removed.map_err(|source| CheckpointError::io(&path, source))?;
        }
        Ok(())
    }

    /// Where the folder is until it is whole.
    pub fn partial_of(output: &Path) -> PathBuf {
        let mut name = output.file_name().unwrap_or(output.as_os_str()).to_owned();
        name.push(".partial");
        output.with_file_name(name)
    }

    /// Where this folder is until it is whole.
    pub fn folder(&self) -> &Path {
        &self.partial
    }

    pub(super) fn shard_name(&self, number: usize) -> String {
        format!("model-{:05}-of-{:05}.safetensors", number + 1, self.shards)
    }

    /// Writes, syncs and reads back weight file `number` (from 0).
    ///
    /// # Errors
    /// [`CheckpointError`] when the disk is full, fails, or returns something else than was written.
    pub fn shard(&mut self, number: usize, tensors: Vec<(String, OutputTensor<'_>)>) -> Result<(), CheckpointError> {
        let file = self.shard_name(number);
        let path = self.partial.join(&file);
        let expected: BTreeMap<String, (Dtype, Vec<usize>)> =
            tensors.iter().map(|(name, t)| (name.clone(), (t.dtype, t.shape.clone()))).collect();
        self.total_size += tensors.iter().map(|(_, tensor)| tensor.data_len()).sum::<usize>();
        let format = [("format".to_string(), "pt".to_string())].into();
        safetensors::serialize_to_file(tensors, Some(format), &path).map_err(|source| match source {
            safetensors::SafeTensorError::IoError(source) => CheckpointError::io(&path, source),
            source => CheckpointError::Header { path: path.clone(), source },
        })?;
        sync(&path)?;
        verify(&path, &expected)?;
        self.weight_map.extend(expected.into_keys().map(|name| (name, file.clone())));
        Ok(())
    }

    /// The tensors of weight file `number`, which is written already, as those of a model of that configuration.
    ///
    /// # Errors
    /// [`CheckpointError`] when the file is missing or damaged.
    pub fn written(&self, number: usize, config: GptOssConfig) -> Result<Checkpoint, CheckpointError> {
        Checkpoint::of_files(&self.partial, config, vec![self.partial.join(self.shard_name(number))])
    }

    /// Writes a small file beside the weights.
    ///
    /// # Errors
    /// [`CheckpointError::Io`]
    pub fn file(&self, name: &str, contents: &[u8]) -> Result<(), CheckpointError> {
        let path = self.partial.join(name);
        fs::write(&path, contents).map_err(|source| CheckpointError::io(&path, source))?;
        sync(&path)
    }

    /// Copies a file of another folder, if it is there.
    ///
    /// # Errors
    /// [`CheckpointError::Io`]
    pub fn copy(&self, from: &Path, name: &str) -> Result<(), CheckpointError> {
        let path = from.join(name);
        match fs::read(&path) {
            Ok(contents) => self.file(name, &contents),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(source) => Err(CheckpointError::io(&path, source)),
        }
    }

    /// Writes the index and the configuration, and gives the folder its final name.
    ///
    /// # Errors
    /// [`CheckpointError`]
    pub fn finish(mut self, config: &serde_json::Value) -> Result<(), CheckpointError> {
        let index = json!({ "metadata": { "total_size": self.total_size }, "weight_map": self.weight_map });
        self.file(INDEX_FILE, pretty(&index).as_bytes())?;
        self.file(CONFIG_FILE, pretty(config).as_bytes())?;
        self.remove(LOCK_FILE);
        sync(&self.partial)?;
        let failed = |source| CheckpointError::io(&self.output, source);
        // What is replaced goes last: at no moment is neither of the two there.
        let replaced = (self.overwrite && self.output.exists()).then(|| self.unused_name());
        if let Some(replaced) = &replaced {
            fs::rename(&self.output, replaced).map_err(failed)?;
        }
        if let Err(source) = fs::rename(&self.partial, &self.output) {
            // What was there goes back to its place; if that fails too, it keeps its new name.
            let _ = replaced.map(|replaced| fs::rename(replaced, &self.output));
            return Err(failed(source));
        }
        self.keep = true;
        sync(self.output.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new(".")))?;
        self.remove_notes(&self.output);
        match replaced {
            Some(replaced) => fs::remove_dir_all(replaced).map_err(failed),
            None => Ok(()),
        }
    }

    /// A name beside the output that nothing has.
    fn unused_name(&self) -> PathBuf {
        let names = (0usize..).map(|n| self.partial.with_extension(format!("replaced-{n}")));
        names.into_iter().find(|path| !path.exists()).unwrap_or_default()
    }
}

impl Drop for FolderWriter {
    fn drop(&mut self) {
        if !self.keep {
            // Nothing to be done about a failure here, and the name says the folder is not whole.
            let _ = fs::remove_dir_all(&self.partial);
        }
    }
}

/// Whether nothing but a model is lost when a folder is replaced.
fn is_replaceable(folder: &Path) -> bool {
    folder.join(CONFIG_FILE).is_file() || fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none())
}

fn pretty(value: &serde_json::Value) -> String {
    format!("{value:#}\n")
}

pub(super) fn sync(path: &Path) -> Result<(), CheckpointError> {
    File::open(path).and_then(|file| file.sync_all()).map_err(|source| CheckpointError::io(path, source))
}

/// Whether a written file's header reads back as it was meant.
fn verify(path: &Path, expected: &BTreeMap<String, (Dtype, Vec<usize>)>) -> Result<(), CheckpointError> {
    let map = MappedFile::open(path).map_err(|source| CheckpointError::io(path, source))?;
    let found: BTreeMap<String, (Dtype, Vec<usize>)> =
        read_header(path, &map, 0)?.into_iter().map(|(name, entry)| (name, (entry.dtype, entry.shape))).collect();
    match found == *expected {
        true => Ok(()),
        false => Err(CheckpointError::Verify { path: path.into(), reason: "its tensors differ".into() }),
    }
}
