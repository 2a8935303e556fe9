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

use std::{
    env, fmt, fs, io,
    io::Read as _,
    path::{Path, PathBuf},
    str::FromStr,
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::Duration,
};

use hf_hub::{
    Cache, Repo, RepoType,
    api::{
        Progress,
        sync::{Api, ApiBuilder, ApiError},
    },
};
use ring::digest;
use serde::Deserialize;
use thiserror::Error;

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
/// Tries in a row that may bring no byte.
const FRUITLESS_TRIES: u32 = 3;

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

    fn io(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull { path: path.into() },
            _ => Self::Io { path: path.into(), source },
        }
    }
}

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

/// What the hub says of a repository.
#[derive(Debug, Deserialize)]
struct Listing {
    sha: String,
    siblings: Vec<RemoteFile>,
}

#[derive(Debug, Clone, Deserialize)]
struct RemoteFile {
    #[serde(rename = "rfilename")]
    name: String,
    size: Option<u64>,
    /// Git's hash of the file, or of the pointer that stands for it in git.
    #[serde(rename = "blobId")]
    blob: Option<String>,
    lfs: Option<LargeFile>,
}

#[derive(Debug, Clone, Deserialize)]
struct LargeFile {
    sha256: String,
}

impl RemoteFile {
    /// The hash under which the cache stores the file.
    fn oid(&self) -> Option<&str> {
        self.lfs.as_ref().map(|large| large.sha256.as_str()).or(self.blob.as_deref())
    }

    /// What differs between a local file and this one, if anything does.
    fn difference(&self, path: &Path, on_bytes: &mut dyn FnMut(u64)) -> io::Result<Option<&'static str>> {
        let mut file = fs::File::open(path)?;
        let size = file.metadata()?.len();
        if self.size.is_some_and(|expected| expected != size) {
            return Ok(Some("size"));
        }
        let Some(oid) = self.oid() else {
            return Ok(None);
        };
        let mut hash = match self.lfs {
            Some(_) => digest::Context::new(&digest::SHA256),
            None => digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY),
        };
        if self.lfs.is_none() {
            hash.update(format!("blob {size}\0").as_bytes());
        }
        let mut buffer = vec![0; 1 << 20];
        loop {
            match file.read(&mut buffer)? {
                0 => break,
                read => {
                    hash.update(&buffer[..read]);
                    on_bytes(read as u64);
                }
            }
        }
        let hash: String = hash.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        Ok((!hash.eq_ignore_ascii_case(oid)).then_some("checksum"))
    }
}

/// A model found on the hub, to be fetched.
#[derive(Debug)]
pub struct Download {
    hub: Hub,
    api: Api,
    cache: Cache,
    id: ModelId,
    commit: String,
    files: Vec<RemoteFile>,
    output: Option<PathBuf>,
}

impl Download {
    /// How many files there are.
    #[must_use]
    pub fn files(&self) -> usize {
        self.files.len()
    }

    /// The size of all files.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.files.iter().filter_map(|file| file.size).sum()
    }

    /// The size of the files that are here already.
    #[must_use]
    pub fn present(&self) -> u64 {
        let here = self.files.iter().filter(|file| self.find(file).is_some());
        here.filter_map(|file| file.size).sum()
    }

    /// What is left to fetch.
    #[must_use]
    pub fn missing(&self) -> u64 {
        let missing = self.files.iter().filter(|file| self.find(file).is_none());
        missing.map(|file| file.size.unwrap_or(0).saturating_sub(self.partial(file).1)).sum()
    }

    /// Compares the files that are here with the hub's sizes and checksums, and removes those that differ.
    ///
    /// # Errors
    /// When a file cannot be read or removed.
    pub fn verify(&self, on_bytes: &mut dyn FnMut(u64)) -> Result<(), HubError> {
        for file in &self.files {
            let Some(path) = self.find(file) else {
                continue;
            };
            if file.difference(&path, on_bytes).map_err(HubError::io(&path))?.is_some() {
                remove(&path)?;
            }
        }
        Ok(())
    }

    /// Fetches what is missing, and returns the model's folder once it is whole.
    ///
    /// # Errors
    /// When the transfer fails for good or there is no room; what has arrived stays, and the next run goes on from there.
    pub fn fetch(&self, on_bytes: &mut dyn FnMut(u64)) -> Result<PathBuf, HubError> {
        for file in &self.files {
            if self.find(file).is_some() {
                continue;
            }
            self.fetch_file(file, on_bytes)?;
            let path = self.snapshot().join(&file.name);
            if let Some(what) = file.difference(&path, &mut |_| ()).map_err(HubError::io(&path))? {
                remove(&path)?;
                return Err(HubError::Damaged { file: file.name.clone(), what });
            }
        }
        match &self.output {
            Some(folder) => self.move_into(folder),
            None => self.reference(),
        }
    }

    /// Fetches a file, going on with what an earlier try left.
    fn fetch_file(&self, file: &RemoteFile, on_bytes: &mut dyn FnMut(u64)) -> Result<(), HubError> {
        let mut fruitless = 0;
        loop {
            let (part, mut skip) = self.partial(file);
            // hf-hub asks for the bytes from the part's end on, and there is no such range when all are there.
            if let (Some(part), Some(size)) = (part.filter(|_| skip > 0), file.size)
                && skip >= size
            {
                let open = fs::OpenOptions::new().write(true).open(&part);
                skip = if skip == size { size - 1 } else { 0 };
                open.and_then(|open| open.set_len(skip)).map_err(HubError::io(&part))?;
            }
            let mut got = 0;
            let result = self.attempt(file, skip, &mut |bytes| {
                got += bytes;
                on_bytes(bytes);
            })?;
            let Err(error) = result else { return Ok(()) };
            fruitless = if got == 0 { fruitless + 1 } else { 1 };
            let error = self.diagnose(error, file);
            if fruitless >= FRUITLESS_TRIES || !matches!(error, HubError::Broken { .. }) {
                return Err(error);
            }
            thread::sleep(Duration::from_millis(500) * fruitless);
        }
    }

    /// One transfer, on a thread of its own so that a silent connection can be given up.
    fn attempt(
        &self,
        file: &RemoteFile,
        skip: u64,
        on_bytes: &mut dyn FnMut(u64),
    ) -> Result<Result<(), ApiError>, HubError> {
        enum News {
            Bytes(u64),
            End(Result<(), ApiError>),
        }
        struct Meter {
            skip: u64,
            news: mpsc::Sender<News>,
        }
        impl Progress for Meter {
            fn init(&mut self, _size: usize, _filename: &str) {}
            /// The first bytes reported are those that an earlier try had left.
            fn update(&mut self, size: usize) {
                let skipped = self.skip.min(size as u64);
                self.skip -= skipped;
                // A receiver that gave up needs no more news.
                let _ = self.news.send(News::Bytes(size as u64 - skipped));
            }
            fn finish(&mut self) {}
        }

        let (sender, news) = mpsc::channel();
        let pinned = self.api.repo(Repo::with_revision(self.id.repo.clone(), RepoType::Model, self.commit.clone()));
        let name = file.name.clone();
        let meter = Meter { skip, news: sender.clone() };
        thread::spawn(move || {
            let result = pinned.download_with_progress(&name, meter).map(drop);
            let _ = sender.send(News::End(result));
        });
        loop {
            match news.recv_timeout(STALL) {
                Ok(News::Bytes(bytes)) => on_bytes(bytes),
                Ok(News::End(result)) => return Ok(result),
                Err(RecvTimeoutError::Timeout) => {
                    return Err(HubError::Stalled { file: file.name.clone() });
                }
                // The thread panicked inside hf-hub, which does so when its cache changes under it.
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(HubError::Busy { file: file.name.clone() });
                }
            }
        }
    }

    fn diagnose(&self, error: ApiError, file: &RemoteFile) -> HubError {
        let name = file.name.clone();
        match error {
            ApiError::LockAcquisition(_) => HubError::Busy { file: name },
            ApiError::RequestError(error) => match *error {
                ureq::Error::StatusCode(status @ (408 | 429 | 500..)) => {
                    let source = Box::new(ApiError::RequestError(Box::new(ureq::Error::StatusCode(status))));
                    HubError::Broken { file: name, source }
                }
                ureq::Error::StatusCode(404) => {
                    HubError::Answer { endpoint: self.hub.endpoint.clone(), status: 404, what: name }
                }
                ureq::Error::StatusCode(status) => self.hub.refusal(status, &self.id, &name),
                error => HubError::Broken { file: name, source: Box::new(ApiError::RequestError(Box::new(error))) },
            },
            ApiError::IoError(error) if is_local(&error) => HubError::io(self.cache.path())(error),
            error => HubError::Broken { file: name, source: Box::new(error) },
        }
    }

    /// Where a file is, if it is here with the right size: in the snapshot, or in its final place.
    fn find(&self, file: &RemoteFile) -> Option<PathBuf> {
        let fits = |path: &PathBuf| {
            fs::metadata(path).is_ok_and(|meta| meta.is_file() && file.size.is_none_or(|size| size == meta.len()))
        };
        let staged = Some(self.snapshot().join(&file.name)).filter(fits);
        staged.or_else(|| self.output.as_ref().map(|folder| folder.join(&file.name)).filter(fits))
    }

    /// The unfinished file that an earlier try left, and its length.
    fn partial(&self, file: &RemoteFile) -> (Option<PathBuf>, u64) {
        let part = file.oid().map(|oid| self.cache.repo(repo(&self.id)).blob_path(oid).with_extension("part"));
        let length = part.as_ref().and_then(|path| fs::metadata(path).ok()).map_or(0, |meta| meta.len());
        (part, length)
    }

    fn snapshot(&self) -> PathBuf {
        self.cache.repo(repo(&self.id)).pointer_path(&self.commit)
    }

    /// Declares the snapshot whole.
    fn reference(&self) -> Result<PathBuf, HubError> {
        let snapshot = self.snapshot();
        // hf-hub made one for the commit, by which the files were asked for.
        let refs = references(&self.cache, &self.id);
        let _ = fs::remove_file(refs.join(&self.commit));
        if self.id.revision != self.commit {
            self.cache.repo(repo(&self.id)).create_ref(&self.commit).map_err(HubError::io(&refs))?;
        }
        Ok(snapshot)
    }

    /// Moves the staged files to their place.
    fn move_into(&self, folder: &Path) -> Result<PathBuf, HubError> {
        let staging = folder.join(STAGING);
        let staged = |file: &RemoteFile| fs::canonicalize(self.snapshot().join(&file.name)).ok();
        // Without its config.json a folder is no model: that goes first and comes back last.
        let (config, set_aside) = (folder.join(CONFIG), staging.join(CONFIG));
        if config.exists() && self.files.iter().any(|file| staged(file).is_some()) {
            fs::rename(&config, &set_aside).map_err(HubError::io(&config))?;
        }
        let (last, first): (Vec<_>, Vec<_>) = self.files.iter().partition(|file| file.name == CONFIG);
        for file in first.into_iter().chain(last) {
            let set_aside = Some(set_aside.clone()).filter(|path| file.name == CONFIG && path.exists());
            let Some(source) = staged(file).or(set_aside) else {
                continue;
            };
            let place = folder.join(&file.name);
            let shared =
                self.files.iter().filter(|other| other.oid().is_some() && other.oid() == file.oid()).count() > 1;
            let placed = match shared {
                // Files with the same contents are one in the cache.
                true => fs::copy(&source, &place).map(drop),
                false => fs::rename(&source, &place),
            };
            let synced = placed.and_then(|()| fs::File::open(&place)).and_then(|file| file.sync_all());
            synced.map_err(HubError::io(&place))?;
        }
        if staging.exists() {
            fs::remove_dir_all(&staging).map_err(HubError::io(&staging))?;
        }
        Ok(folder.into())
    }

    /// Refuses a folder with files that would be taken for parts of this model.
    fn check_output(&self) -> Result<(), HubError> {
        let Some(folder) = &self.output else {
            return Ok(());
        };
        fs::create_dir_all(folder).map_err(HubError::io(folder))?;
        for entry in fs::read_dir(folder).map_err(HubError::io(folder))? {
            let name = entry.map_err(HubError::io(folder))?.file_name();
            let name = name.to_string_lossy();
            let foreign = is_needed(&name) && !self.files.iter().any(|file| file.name == name);
            if foreign && (name.ends_with(".safetensors") || name.ends_with(".json")) {
                let folder = folder.clone();
                return Err(HubError::OtherModel { folder, file: name.into(), id: self.id.clone() });
            }
        }
        Ok(())
    }
}

fn repo(id: &ModelId) -> Repo {
    Repo::with_revision(id.repo.clone(), RepoType::Model, id.revision.clone())
}

/// Where the cache notes which commit a revision is.
fn references(cache: &Cache, id: &ModelId) -> PathBuf {
    cache.path().join(repo(id).folder_name()).join("refs")
}

/// Whether a file of a repository is part of the model: gpt-oss's other copies, in `original/` and `metal/`, are not.
fn is_needed(name: &str) -> bool {
    let exact = ["generation_config.json", "special_tokens_map.json", "calibration_report.json", CONFIG];
    let prefixes = ["chat_template", "LICENSE", "NOTICE", "README", "USAGE_POLICY"];
    !name.contains(['/', '\\'])
        && (exact.contains(&name)
            || prefixes.iter().any(|prefix| name.starts_with(prefix))
            || name.starts_with("tokenizer") && name.ends_with(".json")
            || name.ends_with(".safetensors")
            || name.ends_with(".safetensors.index.json"))
}

/// Whether a folder has a configuration and all the weights it speaks of.
fn is_whole(folder: &Path) -> bool {
    #[derive(Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, String>,
    }
    if !folder.join(CONFIG).is_file() {
        return false;
    }
    match fs::read(folder.join("model.safetensors.index.json")) {
        Ok(index) => serde_json::from_slice::<Index>(&index)
            .is_ok_and(|index| index.weight_map.values().all(|shard| folder.join(shard).is_file())),
        Err(_) => folder.join("model.safetensors").is_file(),
    }
}

/// Whether an error is about this machine and not about the connection.
fn is_local(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    matches!(
        error.kind(),
        Kind::StorageFull
            | Kind::QuotaExceeded
            | Kind::FileTooLarge
            | Kind::PermissionDenied
            | Kind::ReadOnlyFilesystem
            | Kind::NotADirectory
            | Kind::NotFound
            | Kind::AlreadyExists
    )
}

/// Removes a file, and what it links to: in the cache, a name is a link to the data.
fn remove(path: &Path) -> Result<(), HubError> {
    let data = fs::canonicalize(path).map_err(HubError::io(path))?;
    fs::remove_file(&data).map_err(HubError::io(&data))?;
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(HubError::io(path)(error)),
        _ => Ok(()),
    }
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
