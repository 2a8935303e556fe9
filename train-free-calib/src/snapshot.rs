//! Files that a run which was killed goes on from: whole or not there.

use std::{
    fs::{self, File},
    io::{self, BufReader, BufWriter, Read, Write},
    path::{Path, PathBuf},
};

use ternoss_model::CheckpointError;

use crate::{CalibError, folder::with_suffix};

/// A file that is being written. Numbers are little-endian, as in memory.
pub(crate) struct SnapshotWriter {
    path: PathBuf,
    temporary: PathBuf,
    file: BufWriter<File>,
}

impl SnapshotWriter {
    /// Starts a file that takes the place of `path` once it is [done](Self::finish).
    pub(crate) fn create(path: &Path) -> Result<Self, CalibError> {
        let temporary = with_suffix(path, ".tmp");
        let file = File::create(&temporary).map_err(|source| failed(&temporary, source))?;
        Ok(Self { path: path.into(), temporary, file: BufWriter::new(file) })
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> Result<(), CalibError> {
        self.file.write_all(bytes).map_err(|source| failed(&self.temporary, source))
    }

    pub(crate) fn number(&mut self, number: u64) -> Result<(), CalibError> {
        self.bytes(&number.to_le_bytes())
    }

    pub(crate) fn floats(&mut self, floats: &[f32]) -> Result<(), CalibError> {
        self.bytes(bytemuck::cast_slice(floats))
    }

    /// Brings the file to disk and gives it its name.
    pub(crate) fn finish(self) -> Result<(), CalibError> {
        let Self { path, temporary, mut file } = self;
        let written =
            file.flush().and_then(|()| file.get_ref().sync_all()).and_then(|()| fs::rename(&temporary, &path));
        written.map_err(|source| failed(&temporary, source))?;
        let folder = path.parent().unwrap_or(Path::new("."));
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(|source| failed(folder, source))
    }
}

/// A file that an earlier run wrote.
pub(crate) struct SnapshotReader {
    path: PathBuf,
    file: BufReader<File>,
    left: u64,
}

impl SnapshotReader {
    pub(crate) fn open(path: &Path) -> Result<Self, CalibError> {
        let file = File::open(path).and_then(|file| Ok((file.metadata()?.len(), file)));
        let (left, file) = file.map_err(|source| failed(path, source))?;
        Ok(Self { path: path.into(), file: BufReader::new(file), left })
    }

    /// The next `count` bytes.
    pub(crate) fn bytes(&mut self, count: u64) -> Result<Vec<u8>, CalibError> {
        self.take(count)?;
        let mut bytes = vec![0; count as usize];
        self.file.read_exact(&mut bytes).map_err(|source| failed(&self.path, source))?;
        Ok(bytes)
    }

    pub(crate) fn number(&mut self) -> Result<u64, CalibError> {
        self.take(size_of::<u64>() as u64)?;
        let mut bytes = [0; size_of::<u64>()];
        self.file.read_exact(&mut bytes).map_err(|source| failed(&self.path, source))?;
        Ok(u64::from_le_bytes(bytes))
    }

    pub(crate) fn floats(&mut self, count: usize) -> Result<Vec<f32>, CalibError> {
        self.take((count * size_of::<f32>()) as u64)?;
        let mut floats = vec![0.0; count];
        let bytes = bytemuck::cast_slice_mut(&mut floats);
        self.file.read_exact(bytes).map_err(|source| failed(&self.path, source))?;
        Ok(floats)
    }

    /// Refuses a file that has more.
    pub(crate) fn end(self) -> Result<(), CalibError> {
        if self.left == 0 { Ok(()) } else { Err(self.damaged()) }
    }

    /// The error for a file that does not hold what was written.
    pub(crate) fn damaged(&self) -> CalibError {
        let name = self.path.file_name().unwrap_or(self.path.as_os_str());
        CalibError::Damaged { name: name.to_string_lossy().into_owned() }
    }

    /// Counts bytes before there is memory for them.
    fn take(&mut self, bytes: u64) -> Result<(), CalibError> {
        self.left = self.left.checked_sub(bytes).ok_or_else(|| self.damaged())?;
        Ok(())
    }
}

fn failed(path: &Path, source: io::Error) -> CalibError {
    CheckpointError::Io { path: path.into(), source }.into()
}
