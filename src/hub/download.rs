//! The transfer of a model's files, going on where an earlier one broke off.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::Duration,
};

use hf_hub::{
    Cache, Repo, RepoType,
    api::{
        Progress,
        sync::{Api, ApiError},
    },
};

use super::{
    CONFIG, Hub, HubError, ModelId, STAGING, STALL,
    files::{RemoteFile, is_needed},
    references, repo,
};

/// Tries in a row that may bring no byte.
const FRUITLESS_TRIES: u32 = 3;

/// A model found on the hub, to be fetched.
#[derive(Debug)]
pub struct Download {
    pub(super) hub: Hub,
    pub(super) api: Api,
    pub(super) cache: Cache,
    pub(super) id: ModelId,
    pub(super) commit: String,
    pub(super) files: Vec<RemoteFile>,
    pub(super) output: Option<PathBuf>,
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
    pub(super) fn check_output(&self) -> Result<(), HubError> {
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
