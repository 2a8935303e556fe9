//! The files of a repository: which are needed, and whether what is here is them.

use std::{fs, io, io::Read as _, path::Path};

use ring::digest;
use serde::Deserialize;

use super::CONFIG;

/// What the hub says of a repository.
#[derive(Debug, Deserialize)]
pub(super) struct Listing {
    pub(super) sha: String,
    pub(super) siblings: Vec<RemoteFile>,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct RemoteFile {
    #[serde(rename = "rfilename")]
    pub(super) name: String,
    pub(super) size: Option<u64>,
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
    pub(super) fn oid(&self) -> Option<&str> {
        self.lfs.as_ref().map(|large| large.sha256.as_str()).or(self.blob.as_deref())
    }

    /// What differs between a local file and this one, if anything does.
    pub(super) fn difference(&self, path: &Path, on_bytes: &mut dyn FnMut(u64)) -> io::Result<Option<&'static str>> {
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

/// Whether a file of a repository is part of the model: gpt-oss's other copies, in `original/` and `metal/`, are not.
pub(super) fn is_needed(name: &str) -> bool {
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
pub(super) fn is_whole(folder: &Path) -> bool {
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
