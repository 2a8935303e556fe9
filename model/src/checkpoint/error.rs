//! What can be wrong with a model folder.

use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensorError};
use ternoss_backends::FormatError;

use crate::config::ConfigError;

/// A model folder that cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// There is no `config.json`.
    #[error("{} is not a model folder: it has no config.json", folder.display())]
    NotAModel {
        /// The folder.
        folder: PathBuf,
    },
    /// There is neither an index nor a single file.
    #[error("{} has neither model.safetensors nor model.safetensors.index.json", folder.display())]
    NoWeights {
        /// The folder.
        folder: PathBuf,
    },
    /// The memory allowed does not hold what every token needs.
    #[error(
        "{} cannot run in {budget} bytes of memory: {needed} are needed at once, and {paged} of its bytes are ternary experts \
         that can come from disk",
        folder.display()
    )]
    MemoryBudget {
        /// The model.
        folder: PathBuf,
        /// Bytes allowed.
        budget: u64,
        /// Bytes needed.
        needed: u64,
        /// Bytes of ternary experts, which are read when they are chosen.
        paged: u64,
    },
    /// The configuration is not usable.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A safetensors file is damaged.
    #[error("{}: not a whole safetensors file: {source}", path.display())]
    Header {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        source: SafeTensorError,
    },
    /// The index is not JSON of the expected form.
    #[error("{}: {source}", path.display())]
    Index {
        /// Which file.
        path: PathBuf,
        /// What is wrong, and where.
        source: serde_json::Error,
    },
    /// The index names a file that is not in the folder.
    #[error("{} names the shard {shard:?}, which is not in its folder", index.display())]
    MissingShard {
        /// The index.
        index: PathBuf,
        /// The shard.
        shard: String,
    },
    /// A file ends before its tensors do.
    #[error("{}: the file is shorter than its header says", path.display())]
    Truncated {
        /// Which file.
        path: PathBuf,
    },
    /// Two files hold a tensor of one name.
    #[error("{}: tensor {tensor} stands in another shard too", path.display())]
    Duplicate {
        /// The second file.
        path: PathBuf,
        /// Its name.
        tensor: String,
    },
    /// A tensor the model needs is in no file.
    #[error("{}: tensor {tensor} is missing", folder.display())]
    MissingTensor {
        /// The folder.
        folder: PathBuf,
        /// Its name.
        tensor: String,
    },
    /// A tensor has another shape than the configuration says.
    #[error("{}: tensor {tensor} has shape {found:?}, config.json says {expected:?}", path.display())]
    Shape {
        /// Its file.
        path: PathBuf,
        /// Its name.
        tensor: String,
        /// From the configuration.
        expected: Vec<usize>,
        /// In the file.
        found: Vec<usize>,
    },
    /// A tensor has a type that does not serve here.
    #[error("{}: tensor {tensor} is {found:?}, expected {expected}", path.display())]
    Dtype {
        /// Its file.
        path: PathBuf,
        /// Its name.
        tensor: String,
        /// What would serve.
        expected: &'static str,
        /// In the file.
        found: Dtype,
    },
    /// A weight is NaN or infinite.
    #[error("{}: tensor {tensor} holds {value} at position {position}", path.display())]
    NotFinite {
        /// Its file.
        path: PathBuf,
        /// Its name.
        tensor: String,
        /// Element index, row-major.
        position: usize,
        /// NaN or an infinity.
        value: f32,
    },
    /// A ternary tensor's layout makes no sense.
    #[error("{}: tensor {tensor}: {source}", path.display())]
    Format {
        /// Its file.
        path: PathBuf,
        /// Its name.
        tensor: String,
        /// What is wrong.
        source: FormatError,
    },
    /// The output exists and may not be replaced.
    #[error("{} exists already", path.display())]
    OutputExists {
        /// The output folder.
        path: PathBuf,
    },
    /// What would be replaced is not this program's to remove: as the output no model, as the unfinished output a model.
    #[error("{} exists and is not replaced: it may hold something else", path.display())]
    NotReplaceable {
        /// The output folder.
        path: PathBuf,
    },
    /// Another process is at it.
    #[error("{} is being written by another process", path.display())]
    Busy {
        /// The unfinished folder.
        path: PathBuf,
    },
    /// The unfinished output is another run's.
    #[error("{} is unfinished and was started with other settings: {setting} was {before}, now {now}", path.display())]
    OtherSettings {
        /// The unfinished folder.
        path: PathBuf,
        /// Which setting differs.
        setting: String,
        /// What it was.
        before: String,
        /// What it is now.
        now: String,
    },
    /// A file just written does not read back as it should.
    #[error("{}: what was written does not read back: {reason}", path.display())]
    Verify {
        /// Which file.
        path: PathBuf,
        /// What differs.
        reason: String,
    },
}

impl CheckpointError {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io { path: path.into(), source }
    }
}
