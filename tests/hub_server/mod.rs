//! A hub on this machine: the requests a download makes, answered from memory, with the faults a network has.
#![allow(dead_code, reason = "each test file uses its part")]

use std::{
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use ring::digest;

/// The model there is, unless the server was started with another name for it.
pub(crate) const MODEL: &str = "org/tiny";
/// A model that takes [`TOKEN`].
pub(crate) const GATED: &str = "org/gated";
/// The commit that `main` is.
pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// The token that opens [`GATED`].
pub(crate) const TOKEN: &str = "hf_test";

const CHUNK: usize = 64 << 10;

/// A file of the repository.
#[derive(Clone)]
pub(crate) struct RepoFile {
    /// Its path in the repository.
    pub(crate) name: String,
    /// What it holds.
    pub(crate) data: Vec<u8>,
    oid: String,
    large: bool,
}

impl RepoFile {
    /// A file stored in git itself.
    pub(crate) fn small(name: &str, data: impl Into<Vec<u8>>) -> Self {
        let data = data.into();
        let blob = [format!("blob {}\0", data.len()).as_bytes(), &data].concat();
        Self { name: name.into(), oid: hex(&digest::SHA1_FOR_LEGACY_USE_ONLY, &blob), data, large: false }
    }

    /// A file stored outside git, to which the hub redirects.
    pub(crate) fn large(name: &str, data: impl Into<Vec<u8>>) -> Self {
        let data = data.into();
        Self { name: name.into(), oid: hex(&digest::SHA256, &data), data, large: true }
    }

    /// The same announcement, for a file with one byte wrong.
    pub(crate) fn damaged(mut self) -> Self {
        self.data[0] ^= 1;
        self
    }
}

fn hex(algorithm: &'static digest::Algorithm, data: &[u8]) -> String {
    digest::digest(algorithm, data).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What goes wrong.
#[derive(Clone, Default)]
pub(crate) struct Faults {
    /// Connections end at this byte of the file, so many times.
    pub(crate) cut: Option<(String, usize, usize)>,
    /// Pause after each chunk of 64 KiB.
    pub(crate) pause: Duration,
}

/// The server; it ends with the test's process.
pub(crate) struct HubServer {
    address: String,
    shared: Arc<Shared>,
}

struct Shared {
    model: String,
    files: Mutex<Vec<RepoFile>>,
    faults: Mutex<Faults>,
    fetched: Mutex<Vec<(String, usize)>>,
}

impl HubServer {
    /// Serves `files` as [`MODEL`] and as [`GATED`].
    pub(crate) fn start(files: Vec<RepoFile>) -> Self {
        Self::start_as(MODEL, files)
    }

    /// Serves `files` as `model` and as [`GATED`].
    pub(crate) fn start_as(model: &str, files: Vec<RepoFile>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let shared = Arc::new(Shared {
            model: model.into(),
            files: Mutex::new(files),
            faults: Mutex::default(),
            fetched: Mutex::default(),
        });
        let server = Self { address: address.clone(), shared: shared.clone() };
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (shared, address) = (shared.clone(), address.clone());
                // A client that hangs up in the middle is part of the tests.
                thread::spawn(move || {
                    let _ = shared.answer(stream, &address);
                });
            }
        });
        server
    }

    /// Its address, for `HF_ENDPOINT`.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// Changes what goes wrong.
    pub(crate) fn set_faults(&self, faults: Faults) {
        *self.shared.faults.lock().unwrap() = faults;
    }

    /// Changes what is served.
    pub(crate) fn set_files(&self, files: Vec<RepoFile>) {
        *self.shared.files.lock().unwrap() = files;
    }

    /// The contents asked for so far: file and first byte. Questions for a size are not counted.
    pub(crate) fn fetched(&self) -> Vec<(String, usize)> {
        self.shared.fetched.lock().unwrap().clone()
    }
}

struct Request {
    path: String,
    range: Option<(usize, Option<usize>)>,
    token: Option<String>,
}

impl Request {
    fn read(stream: &TcpStream) -> Option<Self> {
        let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
        let path = lines.next()?.split(' ').nth(1)?.to_string();
        let mut request = Self { path, range: None, token: None };
        for line in lines.take_while(|line| !line.is_empty()) {
            let Some((name, value)) = line.split_once(": ") else {
                continue;
            };
            match name.to_ascii_lowercase().as_str() {
                "range" => {
                    let (first, last) = value.strip_prefix("bytes=")?.split_once('-')?;
                    request.range = Some((first.parse().ok()?, last.parse().ok()));
                }
                "authorization" => request.token = value.strip_prefix("Bearer ").map(String::from),
                _ => {}
            }
        }
        Some(request)
    }
}

impl Shared {
    fn answer(&self, stream: TcpStream, address: &str) -> Option<()> {
        let request = Request::read(&stream)?;
        let path = request.path.split('?').next()?.to_string();
        let gated = path.contains(GATED) && request.token.as_deref() != Some(TOKEN);
        let files = self.files.lock().unwrap().clone();
        if let Some(oid) = path.strip_prefix("/cdn/") {
            let file = files.iter().find(|file| file.oid == oid)?;
            return self.content(stream, &request, file, "");
        }
        if let Some(rest) = path.strip_prefix("/api/models/") {
            let (repo, revision) = rest.split_once("/revision/")?;
            return match (self.serves(repo), revision == "main" || revision == COMMIT) {
                (true, true) => {
                    head(&stream, "200 OK", "Content-Type: application/json\r\n", listing(repo, &files).as_bytes())
                }
                (true, false) => refuse(&stream, "404 Not Found", "RevisionNotFound"),
                (false, _) if repo == "org/private" => refuse(&stream, "401 Unauthorized", "RepoNotFound"),
                (false, _) => refuse(&stream, "404 Not Found", "RepoNotFound"),
            };
        }
        let (repo, rest) = path.trim_start_matches('/').split_once("/resolve/")?;
        let (_, name) = rest.split_once('/')?;
        let file = files.iter().find(|file| file.name == name);
        match file {
            _ if gated => refuse(&stream, "401 Unauthorized", "GatedRepo"),
            None => refuse(&stream, "404 Not Found", "EntryNotFound"),
            Some(_) if !self.serves(repo) => refuse(&stream, "404 Not Found", "RepoNotFound"),
            Some(file) if file.large => {
                let (oid, size) = (&file.oid, file.data.len());
                let headers = format!(
                    "Location: {address}/cdn/{oid}\r\nX-Repo-Commit: {COMMIT}\r\nX-Linked-Etag: \"{oid}\"\r\nX-Linked-Size: {size}\r\n"
                );
                head(&stream, "302 Found", &headers, b"")
            }
            Some(file) => {
                let headers = format!("X-Repo-Commit: {COMMIT}\r\nETag: \"{}\"\r\n", file.oid);
                self.content(stream, &request, file, &headers)
            }
        }
    }

    fn serves(&self, repo: &str) -> bool {
        repo == self.model || repo == GATED
    }

    fn content(&self, mut stream: TcpStream, request: &Request, file: &RepoFile, headers: &str) -> Option<()> {
        let size = file.data.len();
        let (first, last) = request.range.unwrap_or((0, None));
        if first >= size {
            return head(&stream, "416 Range Not Satisfiable", &format!("Content-Range: bytes */{size}\r\n"), b"");
        }
        let end = last.map_or(size, |last| (last + 1).min(size));
        let mut cut = size;
        if end - first > 1 {
            self.fetched.lock().unwrap().push((file.name.clone(), first));
            if let Some((name, at, times)) = &mut self.faults.lock().unwrap().cut
                && *name == file.name
                && *times > 0
            {
                (cut, *times) = (*at, *times - 1);
            }
        }
        write!(
            stream,
            "HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\nContent-Range: bytes {first}-{}/{size}\r\n{headers}Connection: close\r\n\r\n",
            end - first,
            end - 1,
        )
        .ok()?;
        for chunk in file.data[first..end.min(cut.max(first))].chunks(CHUNK) {
            stream.write_all(chunk).ok()?;
            let pause = self.faults.lock().unwrap().pause;
            thread::sleep(pause);
        }
        Some(())
    }
}

fn listing(repo: &str, files: &[RepoFile]) -> String {
    let sibling = |file: &RepoFile| {
        let (name, size, oid) = (&file.name, file.data.len(), &file.oid);
        match file.large {
            true => format!(
                r#"{{"rfilename": "{name}", "size": {size}, "blobId": "{COMMIT}", "lfs": {{"sha256": "{oid}", "size": {size}, "pointerSize": 135}}}}"#
            ),
            false => format!(r#"{{"rfilename": "{name}", "size": {size}, "blobId": "{oid}"}}"#),
        }
    };
    let siblings: Vec<_> = files.iter().map(sibling).collect();
    format!(r#"{{"id": "{repo}", "sha": "{COMMIT}", "siblings": [{}]}}"#, siblings.join(", "))
}

fn refuse(stream: &TcpStream, status: &str, code: &str) -> Option<()> {
    head(stream, status, &format!("X-Error-Code: {code}\r\n"), b"{}")
}

fn head(mut stream: &TcpStream, status: &str, headers: &str, body: &[u8]) -> Option<()> {
    let length = body.len();
    write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {length}\r\n{headers}Connection: close\r\n\r\n").ok()?;
    stream.write_all(body).ok()
}
