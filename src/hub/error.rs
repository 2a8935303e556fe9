//! Why a download fails, and what to do about it.

use std::{
    io,
    path::{Path, PathBuf},
};

use hf_hub::api::sync::ApiError;
use thiserror::Error;

use super::{ModelId, STALL};

/// Why a model could not be had from the hub.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum HubError {
    /// The text is no hub id.
    #[error("{0:?} is neither a folder here nor a hub id such as openai/gpt-oss-20b")]
    Id(String),
    /// No such repository.
    #[error("no model {id} at {endpoint}")]
    NotFound {
        /// The model asked for.
        id: ModelId,
        /// Where.
        endpoint: String,
    },
    /// The repository has no such branch, tag or commit.
    #[error("{} has no revision {:?}", id.repo, id.revision)]
    Revision {
        /// The model asked for.
        id: ModelId,
    },
    /// Not to be had without a token.
    #[error("{id} does not exist or needs a token")]
    NeedsToken {
        /// The model asked for.
        id: ModelId,
    },
    /// A token was sent and was not enough.
    #[error("the token gives no access to {id}")]
    TokenRefused {
        /// The model asked for.
        id: ModelId,
    },
    /// The hub did not answer at all.
    #[error("cannot reach {endpoint}")]
    Unreachable {
        /// The address.
        endpoint: String,
        /// What the connection said.
        #[source]
        source: Box<ureq::Error>,
    },
    /// The hub answered with something else than the file asked for.
    #[error("{endpoint} answered {status} for {what}")]
    Answer {
        /// The address.
        endpoint: String,
        /// The HTTP status.
        status: u16,
        /// The model or file.
        what: String,
    },
    /// The environment forbids the network.
    #[error("{id} is not in the cache, and HF_HUB_OFFLINE is set")]
    Offline {
        /// The model asked for.
        id: ModelId,
    },
    /// The repository holds no model this program could read.
    #[error("{id} has no {missing}")]
    NoModel {
        /// The model asked for.
        id: ModelId,
        /// What it lacks.
        missing: &'static str,
    },
    /// The connection ended too early, several times.
    #[error("the download of {file} broke off")]
    Broken {
        /// The file.
        file: String,
        /// What the connection said.
        #[source]
        source: Box<ApiError>,
    },
    /// The connection went silent.
    #[error("the download of {file} stalled: nothing arrived for {} s", STALL.as_secs())]
    Stalled {
        /// The file.
        file: String,
    },
    /// The file that arrived is not the one the hub announced.
    #[error("{file} arrived damaged: its {what} differs from the hub's")]
    Damaged {
        /// The file.
        file: String,
        /// What differs.
        what: &'static str,
    },
    /// Another process is fetching the same file.
    #[error("{file} is being downloaded by another process")]
    Busy {
        /// The file.
        file: String,
    },
    /// The output folder holds parts of something else.
    #[error("{} already holds {file}, which is not part of {id}", folder.display())]
    OtherModel {
        /// The output folder.
        folder: PathBuf,
        /// The file in the way.
        file: String,
        /// The model asked for.
        id: ModelId,
    },
    /// No room left.
    #[error("the disk is full: {}", path.display())]
    DiskFull {
        /// Where there is no room.
        path: PathBuf,
    },
    /// Reading or writing here failed.
    #[error("{}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

impl HubError {
    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::Id(_) | Self::NotFound { .. } => "check the spelling; a folder is found relative to where you are",
            Self::Revision { .. } => "a revision is a branch, a tag or a full commit hash",
            Self::NeedsToken { .. } => "set HF_TOKEN to a token that may read it",
            Self::TokenRefused { .. } => "accept the model's terms on its page, or set HF_TOKEN to another token",
            Self::Unreachable { .. } => "check the network, or set HF_ENDPOINT to a mirror",
            Self::Answer { .. } | Self::Busy { .. } => "try again later: the same command continues the download",
            Self::Offline { .. } => "unset HF_HUB_OFFLINE, or give a folder",
            Self::Broken { .. } | Self::Stalled { .. } => "run the same command again: it continues the download",
            Self::Damaged { .. } => "it was removed; run the same command again to fetch it anew",
            Self::OtherModel { .. } => "choose another folder",
            Self::DiskFull { .. } => "free some space and run the same command again: it continues the download",
            Self::NoModel { .. } | Self::Io { .. } => return None,
        })
    }

    pub(super) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull { path: path.into() },
            _ => Self::Io { path: path.into(), source },
        }
    }
}
