//! Model folders on disk: bytes and names, never arithmetic on weights.
//!
//! A model folder holds `config.json` and safetensors files, one or sharded with an index. Both the checkpoints of
//! Hugging Face and ternary models are such folders; a tensor's name is its path in [`GptOss`](crate::GptOss).
//!
//! ```
//! use ternoss_model::Checkpoint;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let checkpoint = Checkpoint::open("../examples/tiny-gpt-oss".as_ref())?;
//! let norm = checkpoint.entry("model.norm.weight").ok_or("no last norm")?;
//! assert_eq!(norm.shape, [checkpoint.config().hidden_size]);
//! # Ok(()) }
//! ```

mod error;
mod load;
mod names;
mod part;
mod resume;
mod weights;
mod write;

pub use error::CheckpointError;
pub use load::{ExpertPlacement, LoadOptions};
pub(crate) use names::is_of_layer;
pub use names::{ExpertMatrix, FINAL_NORM, LinearName, TableName, TernaryPath, tensors_by_expert};
pub use part::{Part, readable_size};
pub use write::{FolderWriter, OutputTensor};

use std::{
    collections::BTreeMap,
    ops::Range,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use safetensors::{Dtype, SafeTensors};
use ternoss_backends::mapped::MappedFile;

use crate::config::GptOssConfig;

/// Name of the configuration, which makes a folder a model.
pub const CONFIG_FILE: &str = "config.json";
/// Name of the list of shards.
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";
/// Name of the weights when there is one file.
const WEIGHTS_FILE: &str = "model.safetensors";

/// An open model folder: its configuration and its mapped tensors. Clones share it.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    folder: PathBuf,
    config: GptOssConfig,
    files: Vec<(PathBuf, MappedFile)>,
    tensors: BTreeMap<String, TensorEntry>,
}

/// Where a tensor is and what it looks like.
#[derive(Clone, Debug)]
pub struct TensorEntry {
    file: usize,
    /// Element type.
    pub dtype: Dtype,
    /// Shape, slowest dimension first.
    pub shape: Vec<usize>,
    /// Bytes within the file.
    range: Range<usize>,
}

/// Some bytes of one of the files.
#[derive(Clone, Debug)]
pub(crate) struct Extent {
    file: usize,
    range: Range<usize>,
}

impl Extent {
    /// Bytes in it.
    pub(crate) fn len(&self) -> usize {
        self.range.len()
    }

    /// One of `count` equal parts.
    pub(crate) fn part(&self, count: usize, index: usize) -> Self {
        let size = self.range.len() / count.max(1);
        let start = self.range.start + index * size;
        Self { file: self.file, range: start..start + size }
    }
}

impl TensorEntry {
    /// Bytes in the file.
    pub fn bytes(&self) -> usize {
        self.range.len()
    }
}

impl Checkpoint {
    /// Opens a model folder: reads its configuration, maps its files and reads their headers, nothing more.
    ///
    /// # Errors
    /// [`CheckpointError`] for a missing or damaged file, a shard that the index names and the folder lacks, a tensor
    /// that stands in two files.
    pub fn open(folder: &Path) -> Result<Self, CheckpointError> {
        let config_path = folder.join(CONFIG_FILE);
        if !config_path.is_file() {
            return Err(CheckpointError::NotAModel { folder: folder.into() });
        }
        Self::of_files(folder, GptOssConfig::from_file(&config_path)?, weight_files(folder)?)
    }

    /// Some weight files as a model of that configuration.
    fn of_files(folder: &Path, config: GptOssConfig, paths: Vec<PathBuf>) -> Result<Self, CheckpointError> {
        let mut files = Vec::new();
        let mut tensors = BTreeMap::new();
        for path in paths {
            let map = MappedFile::open(&path).map_err(|source| CheckpointError::io(&path, source))?;
            for (name, entry) in read_header(&path, &map, files.len())? {
                if tensors.insert(name.clone(), entry).is_some() {
                    return Err(CheckpointError::Duplicate { path, tensor: name });
                }
            }
            files.push((path, map));
        }
        Ok(Self { inner: Arc::new(Inner { folder: folder.into(), config, files, tensors }) })
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.inner.folder
    }

    /// Sizes and switches of the model.
    pub fn config(&self) -> &GptOssConfig {
        &self.inner.config
    }

    /// What tells this checkpoint from another version of it without reading its weights.
    pub fn stamp(&self) -> serde_json::Value {
        let files = self.inner.files.iter().map(|(path, _)| path.as_path());
        resume::stamp(&self.inner.folder.join(CONFIG_FILE), files)
    }

    /// All tensors by name.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &TensorEntry)> {
        self.inner.tensors.iter().map(|(name, entry)| (name.as_str(), entry))
    }

    /// The entry of a tensor, if there is one of that name.
    pub fn entry(&self, name: &str) -> Option<&TensorEntry> {
        self.inner.tensors.get(name)
    }

    /// A tensor's bytes as they stand in its file.
    ///
    /// # Errors
    /// [`CheckpointError::MissingTensor`]
    pub fn bytes(&self, name: &str) -> Result<&[u8], CheckpointError> {
        let entry = self.require(name)?;
        let (path, map) = self.file(entry);
        map.bytes(entry.range.clone()).ok_or_else(|| CheckpointError::Truncated { path: path.into() })
    }

    fn require(&self, name: &str) -> Result<&TensorEntry, CheckpointError> {
        let folder = &self.inner.folder;
        self.entry(name).ok_or_else(|| CheckpointError::MissingTensor { folder: folder.clone(), tensor: name.into() })
    }

    fn file(&self, entry: &TensorEntry) -> (&Path, &MappedFile) {
        let (path, map) = &self.inner.files[entry.file];
        (path, map)
    }

    /// Tells the system that a part of a file will be read soon.
    pub(crate) fn fetch(&self, extent: &Extent) {
        self.inner.files[extent.file].1.fetch(extent.range.clone());
    }

    /// Tells the system that rows here and there of a part of a file will be read.
    pub(crate) fn scatter(&self, extent: &Extent) {
        self.inner.files[extent.file].1.scatter(extent.range.clone());
    }

    /// Takes a part of a file out of resident memory until it is read again.
    pub(crate) fn release(&self, extent: &Extent) {
        self.inner.files[extent.file].1.release(extent.range.clone());
    }

    /// Where the tensors stand whose names one of the prefixes begins.
    pub(crate) fn extents(&self, prefixes: &[String]) -> Vec<Extent> {
        let named = |name: &str| prefixes.iter().any(|prefix| name.starts_with(prefix));
        let of = |(_, entry): (&str, &TensorEntry)| Extent { file: entry.file, range: entry.range.clone() };
        self.tensors().filter(|(name, _)| named(name)).map(of).collect()
    }

    /// The file a tensor stands in, for messages.
    fn path_of(&self, name: &str) -> PathBuf {
        self.entry(name).map_or(self.inner.folder.clone(), |entry| self.file(entry).0.into())
    }
}

/// A number that other bytes would not have (FNV-1a): the same for all time and on every machine.
pub fn fingerprint(bytes: impl IntoIterator<Item = u8>) -> u64 {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    bytes.into_iter().fold(0xcbf2_9ce4_8422_2325, step)
}

/// The safetensors files of a folder: those the index names, or the only one.
fn weight_files(folder: &Path) -> Result<Vec<PathBuf>, CheckpointError> {
    let index_path = folder.join(INDEX_FILE);
    if !index_path.is_file() {
        let single = folder.join(WEIGHTS_FILE);
        return match single.is_file() {
            true => Ok(vec![single]),
            false => Err(CheckpointError::NoWeights { folder: folder.into() }),
        };
    }
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = std::fs::read_to_string(&index_path).map_err(|source| CheckpointError::io(&index_path, source))?;
    let index: Index =
        serde_json::from_str(&text).map_err(|source| CheckpointError::Index { path: index_path.clone(), source })?;
    let mut shards: Vec<String> = index.weight_map.into_values().collect();
    shards.sort();
    shards.dedup();
    shards.into_iter().map(|shard| shard_path(folder, &index_path, shard)).collect()
}

fn shard_path(folder: &Path, index: &Path, shard: String) -> Result<PathBuf, CheckpointError> {
    let mut components = Path::new(&shard).components();
    let plain = matches!((components.next(), components.next()), (Some(Component::Normal(_)), None));
    let path = folder.join(&shard);
    match plain && path.is_file() {
        true => Ok(path),
        false => Err(CheckpointError::MissingShard { index: index.into(), shard }),
    }
}

fn read_header(path: &Path, map: &MappedFile, file: usize) -> Result<Vec<(String, TensorEntry)>, CheckpointError> {
    let (header, metadata) = SafeTensors::read_metadata(map.as_slice())
        .map_err(|source| CheckpointError::Header { path: path.into(), source })?;
    let start = 8 + header;
    let entry = |(name, info): (String, &safetensors::tensor::TensorInfo)| {
        let (first, last) = info.data_offsets;
        let range = start + first..start + last;
        (name, TensorEntry { file, dtype: info.dtype, shape: info.shape.clone(), range })
    };
    Ok(metadata.tensors().into_iter().map(entry).collect())
}
