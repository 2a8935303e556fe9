//! Models on the Hugging Face hub: which files of a repository are needed, and how they get here.
//!
//! Transfers, the cache's layout and the token file are `hf-hub`'s, so what Python's `huggingface_hub` has fetched is
//! found, and the other way round. This module adds what a download of many gigabytes needs: the choice of files, sizes
//! and checksums, going on where a download broke off, and errors a person can act on.
//!
//! Environment: `HF_TOKEN`, `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_CACHE` and `HF_HUB_OFFLINE`, as everywhere on the hub.
//!
//! Wholeness: in the cache, the reference from the revision's name to the commit is written last; in a folder of one's
//! own everything is collected in [`STAGING`] first and moved into place at the end, config.json last.
//!
//! ```
//! use ternoss::hub::{Hub, ModelId};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let id: ModelId = "openai/gpt-oss-20b".parse()?;
//! match Hub::from_env().cached(&id) {
//!     Some(folder) => println!("{id} is in {}", folder.display()),
//!     None => println!("{id} is not on this machine: `find` asks the hub for it"),
//! }
//! # Ok(()) }
//! ```

mod download;
mod error;
mod files;

use std::{
    env, fmt, fs,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use hf_hub::{
    Cache, Repo, RepoType,
    api::sync::{Api, ApiBuilder},
};

pub use download::Download;
pub use error::HubError;
use files::{Listing, is_needed, is_whole};

/// Folder inside an output folder that holds a download until it is whole.
pub const STAGING: &str = ".download";

/// Where models come from unless `HF_ENDPOINT` says otherwise.
const ENDPOINT: &str = "https://huggingface.co";
/// The revision meant when none is named.
const MAIN: &str = "main";
/// Written last, so a folder that has it is whole.
const CONFIG: &str = "config.json";
/// A connection that delivers nothing for so long is given up.
const STALL: Duration = Duration::from_secs(60);

/// A model on the hub: `owner/name` or `owner/name@revision`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelId {
    repo: String,
    revision: String,
}

impl ModelId {
    /// The same model at another branch, tag or commit.
    ///
    /// # Errors
    /// When that is no name of a revision.
    pub fn at(&self, revision: &str) -> Result<Self, HubError> {
        let good = revision.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
            && revision.bytes().all(|byte| byte.is_ascii_graphic() && !b"\\?#%".contains(&byte));
        let id = Self { repo: self.repo.clone(), revision: revision.into() };
        if good { Ok(id) } else { Err(HubError::Revision { id }) }
    }
}

impl FromStr for ModelId {
    type Err = HubError;

    fn from_str(text: &str) -> Result<Self, HubError> {
        let (repo, revision) = text.split_once('@').unwrap_or((text, MAIN));
        let part = |part: &str| {
            !part.is_empty()
                && !part.starts_with(['.', '-'])
                && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
        };
        match repo.split_once('/') {
            Some((owner, name)) if part(owner) && part(name) => {
                Self { repo: repo.into(), revision: MAIN.into() }.at(revision)
            }
            _ => Err(HubError::Id(text.into())),
        }
    }
}

impl fmt::Display for ModelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repo)?;
        if self.revision == MAIN { Ok(()) } else { write!(f, "@{}", self.revision) }
    }
}

/// The hub and the local cache of what came from it.
#[derive(Debug, Clone)]
pub struct Hub {
    endpoint: String,
    token: Option<String>,
    cache: Cache,
    offline: bool,
}

impl Hub {
    /// As the environment says.
    #[must_use]
    pub fn from_env() -> Self {
        let set = |name| env::var(name).ok().filter(|value| !value.trim().is_empty());
        let endpoint = set("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.into());
        let home = || Cache::from_env();
        Self {
            endpoint: endpoint.trim().trim_end_matches('/').into(),
            token: set("HF_TOKEN").map(|token| token.trim().into()).or_else(|| home().token()),
            cache: set("HF_HUB_CACHE").map_or_else(home, |folder| Cache::new(folder.into())),
            offline: set("HF_HUB_OFFLINE").is_some_and(|value| value != "0"),
        }
    }

    /// The folder of a model that is wholly in the cache.
    #[must_use]
    pub fn cached(&self, id: &ModelId) -> Option<PathBuf> {
        let reference = references(&self.cache, id).join(&id.revision);
        let commit = fs::read_to_string(reference).unwrap_or_else(|_| id.revision.clone());
        let folder = self.cache.repo(repo(id)).pointer_path(commit.trim());
        is_whole(&folder).then_some(folder)
    }

    /// Asks the hub what `id` consists of. The files go into `output`, or else into the cache.
    ///
    /// # Errors
    /// When the hub cannot be reached or does not have the model, or when `output` holds another one.
    pub fn find(&self, id: &ModelId, output: Option<&Path>) -> Result<Download, HubError> {
        if self.offline {
            return Err(HubError::Offline { id: id.clone() });
        }
        let cache = output.map_or_else(|| self.cache.clone(), |folder| Cache::new(folder.join(STAGING)));
        let api = ApiBuilder::from_cache(cache.clone())
            .with_endpoint(self.endpoint.clone())
            .with_token(self.token.clone())
            .with_user_agent(env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"))
            .build()
            .map_err(|source| HubError::Broken { file: id.to_string(), source: Box::new(source) })?;
        let listing = self.list(&api, id)?;
        let mut files = listing.siblings;
        // hf-hub asks for a file's first byte to learn its size, which an empty file does not have.
        files.retain(|file| is_needed(&file.name) && file.size != Some(0));
        // The weights last: a folder of weights without the small files would look whole.
        files.sort_by_key(|file| (file.name.ends_with(".safetensors"), file.name.clone()));
        for (ending, missing) in [(CONFIG, CONFIG), (".safetensors", "safetensors weights")] {
            if !files.iter().any(|file| file.name.ends_with(ending)) {
                return Err(HubError::NoModel { id: id.clone(), missing });
            }
        }
        let output = output.map(Path::to_path_buf);
        let download = Download { hub: self.clone(), api, cache, id: id.clone(), commit: listing.sha, files, output };
        download.check_output()?;
        Ok(download)
    }

    fn list(&self, api: &Api, id: &ModelId) -> Result<Listing, HubError> {
        let unreachable = |source| HubError::Unreachable { endpoint: self.endpoint.clone(), source: Box::new(source) };
        let request = api.repo(repo(id)).info_request().query("blobs", "true").config();
        let request = request.http_status_as_error(false).timeout_global(Some(STALL)).build();
        let mut response = request.call().map_err(unreachable)?;
        let reason = response.headers().get("x-error-code").and_then(|value| value.to_str().ok());
        match (response.status().as_u16(), reason) {
            (200, _) => {}
            (404, Some("RevisionNotFound")) => return Err(HubError::Revision { id: id.clone() }),
            (status, _) => return Err(self.refusal(status, id, &id.to_string())),
        }
        let listing: Listing = response.body_mut().read_json().map_err(unreachable)?;
        if listing.sha.is_empty() || !listing.sha.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return Err(self.refusal(200, id, &id.to_string()));
        }
        Ok(listing)
    }

    fn refusal(&self, status: u16, id: &ModelId, what: &str) -> HubError {
        let id = id.clone();
        match (status, &self.token) {
            (401 | 403, None) => HubError::NeedsToken { id },
            (401 | 403, Some(_)) => HubError::TokenRefused { id },
            (404, _) => HubError::NotFound { id, endpoint: self.endpoint.clone() },
            _ => HubError::Answer { endpoint: self.endpoint.clone(), status, what: what.into() },
        }
    }
}

fn repo(id: &ModelId) -> Repo {
    Repo::with_revision(id.repo.clone(), RepoType::Model, id.revision.clone())
}

/// Where the cache notes which commit a revision is.
fn references(cache: &Cache, id: &ModelId) -> PathBuf {
    cache.path().join(repo(id).folder_name()).join("refs")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hub_id_is_owner_and_name_and_perhaps_a_revision() {
        let id: ModelId = "openai/gpt-oss-20b".parse().unwrap();
        assert_eq!((id.repo.as_str(), id.revision.as_str()), ("openai/gpt-oss-20b", "main"));
        assert_eq!(id.to_string(), "openai/gpt-oss-20b");
        let id: ModelId = "openai/gpt-oss-20b@refs/pr/7".parse().unwrap();
        assert_eq!(id.revision, "refs/pr/7");
        assert_eq!(id.to_string(), "openai/gpt-oss-20b@refs/pr/7");
        for bad in [
            "",
            "gpt2",
            "a/b/c",
            "/tmp/model",
            "./model",
            "../x",
            "a/..",
            "a b/c",
            "a/b@",
            "a/b@../x",
            "a/b@x?y",
            "-a/b",
        ] {
            assert!(bad.parse::<ModelId>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn only_the_model_itself_is_fetched() {
        for name in
            ["config.json", "model-00000-of-00002.safetensors", "model.safetensors.index.json", "tokenizer_config.json"]
        {
            assert!(is_needed(name), "{name}");
        }
        for name in
            ["original/model.safetensors", "metal/model.bin", "pytorch_model.bin", ".gitattributes", "x\\config.json"]
        {
            assert!(!is_needed(name), "{name}");
        }
    }

    #[test]
    fn a_folder_is_whole_when_every_shard_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        write("config.json", "{}");
        assert!(!is_whole(folder.path()));
        write("model.safetensors.index.json", r#"{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}"#);
        write("a.safetensors", "");
        assert!(!is_whole(folder.path()));
        write("b.safetensors", "");
        assert!(is_whole(folder.path()));
    }
}
