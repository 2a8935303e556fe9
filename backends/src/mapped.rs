//! Files mapped into memory, and tensors whose bytes stay in them: the only door to `mmap`.
//!
//! A tensor made from [`MappedFile::tensor_data`] is read from the page cache when a kernel first touches it, and shares
//! its pages with every other process that maps the same file. Nothing is copied until a built-in Burn operation works
//! on it, so give such tensors to the operations of this crate only.
//!
//! ```
//! use burn::tensor::DType;
//! use ternoss_backends::MappedFile;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let path = std::env::temp_dir().join(format!("ternoss-mapped-{}", std::process::id()));
//! std::fs::write(&path, [1, 0, 0, 0, 2, 0, 0, 0])?;
//! let words = MappedFile::open(&path)?.tensor_data(0..8, vec![2], DType::U32)?;
//! assert_eq!(words.to_vec::<u32>()?, [1, 2]);
//! # std::fs::remove_file(path)?;
//! # Ok(()) }
//! ```
#![allow(unsafe_code)]

use std::{fs::File, io, ops::Range, path::Path, sync::Arc};

use burn::tensor::{AllocationProperty, Bytes, DType, TensorData};
use memmap2::Mmap;

/// A read-only file in memory. Cloning shares the mapping; it ends with the last clone and the last tensor made from it.
#[derive(Debug, Clone)]
pub struct MappedFile {
    map: Arc<Mmap>,
}

/// Why a range of a file is not a tensor.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MappedError {
    /// The range ends past the end of the file, or before its own start.
    #[error("bytes {start}..{end} of a file of {len} bytes")]
    OutOfFile {
        /// First byte of the range.
        start: usize,
        /// The byte after its last.
        end: usize,
        /// Bytes in the file.
        len: usize,
    },
    /// The range does not hold what the shape asks for.
    #[error("shape {shape:?} of {dtype} needs {expected} bytes, the range has {found}")]
    Size {
        /// The shape asked for.
        shape: Vec<usize>,
        /// The element type asked for.
        dtype: &'static str,
        /// Bytes that makes; `usize::MAX` stands for more than can be counted.
        expected: usize,
        /// Bytes in the range.
        found: usize,
    },
}

impl MappedFile {
    /// Maps a whole file for reading. An empty file is allowed.
    ///
    /// The file must not be cut short while it is mapped: reading past its new end kills the process, as with every
    /// memory-mapped file. Replace model files by renaming, never by writing into them.
    ///
    /// # Errors
    /// Whatever opening or mapping the file returns.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        let file = File::open(path)?;
        // SAFETY: the mapping is read-only and private to this type, which hands out shared slices only. That nobody
        // changes the file meanwhile is the caller's part, documented above; every bit pattern is valid for the element
        // types that are read from it (unsigned integers and floats).
        let map = unsafe { Mmap::map(&file)? };
        Ok(Self { map: Arc::new(map) })
    }

    /// Bytes in the file.
    #[must_use]
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether the file has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// The whole file.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &self.map
    }

    /// A part of the file, or `None` if it does not lie inside.
    #[must_use]
    pub fn bytes(&self, range: Range<usize>) -> Option<&[u8]> {
        self.map.get(range)
    }

    /// Tells the system that a part of the file will be read soon, so that it starts now. Without effect outside the file.
    pub fn fetch(&self, range: Range<usize>) {
        #[cfg(unix)]
        if !range.is_empty() && self.bytes(range.clone()).is_some() {
            // Advice only: what cannot be followed changes nothing.
            let _ = self.map.advise_range(memmap2::Advice::WillNeed, range.start, range.len());
        }
    }

    /// Tells the system that a part of the file will be read here and there, so that a read brings little more than itself
    /// into memory. Without effect outside the file.
    pub fn scatter(&self, range: Range<usize>) {
        #[cfg(target_os = "linux")]
        if !range.is_empty() && self.bytes(range.clone()).is_some() {
            for advice in [memmap2::Advice::Random, memmap2::Advice::NoHugePage] {
                let _ = self.map.advise_range(advice, range.start, range.len());
            }
        }
    }

    /// Takes a part of the file out of this process's resident memory; reading it again brings it back. Without effect
    /// outside the file, or where the system has no such call.
    pub fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        if !range.is_empty() && self.bytes(range.clone()).is_some() {
            // SAFETY: the pages are a read-only mapping of a file and were never written to, so the next read finds the
            // file's bytes again, as the first one did; that the file does not change is promised to `open`.
            let _ = unsafe {
                self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len())
            };
        }
    }

    /// A part of the file as the data of a tensor, without copying it if its first byte is aligned to the element type
    /// (and copied otherwise). Pass it to `Tensor::from_data(data, (&device, dtype))` with the same `dtype`.
    ///
    /// # Errors
    /// [`MappedError::OutOfFile`] for a range that is not inside the file, [`MappedError::Size`] for one that does not
    /// have exactly the bytes of `shape`.
    pub fn tensor_data(&self, range: Range<usize>, shape: Vec<usize>, dtype: DType) -> Result<TensorData, MappedError> {
        let Range { start, end } = range;
        let bytes = self.bytes(range).ok_or(MappedError::OutOfFile { start, end, len: self.len() })?;
        let expected = shape.iter().try_fold(dtype.size(), |size, &dim| size.checked_mul(dim));
        if expected != Some(bytes.len()) {
            let expected = expected.unwrap_or(usize::MAX);
            return Err(MappedError::Size { shape, dtype: dtype.name(), expected, found: bytes.len() });
        }
        let aligned = bytes.as_ptr().addr().is_multiple_of(dtype.size().max(1));
        let bytes = if aligned && !bytes.is_empty() {
            let owner = bytes::Bytes::from_owner(MapOwner(Arc::clone(&self.map)));
            Bytes::from_shared(owner.slice(start..end), AllocationProperty::File)
        } else {
            Bytes::from_bytes_vec(bytes.to_vec())
        };
        Ok(TensorData::from_bytes(bytes, shape, dtype))
    }
}

/// Bytes of memory of this process by the name that Linux gives them in `/proc/self/status`: `VmRSS` what is resident, mapped
/// files included, `VmHWM` the most that ever was, `RssFile` and `RssAnon` the mapped and the allocated part. `None`
/// where there is no such file or name.
#[must_use]
pub fn process_memory(name: &str) -> Option<u64> {
    status_bytes(&std::fs::read_to_string("/proc/self/status").ok()?, name)
}

/// Bytes of memory that this machine has; `None` where no `/proc/meminfo` says so.
#[must_use]
pub fn machine_memory() -> Option<u64> {
    status_bytes(&std::fs::read_to_string("/proc/meminfo").ok()?, "MemTotal")
}

fn status_bytes(status: &str, name: &str) -> Option<u64> {
    let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// Keeps the mapping alive for as long as a tensor points into it.
struct MapOwner(Arc<Mmap>);

impl AsRef<[u8]> for MapOwner {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_as_linux_writes_it() {
        let status = "Name:\tternoss\nVmHWM:\t  7813728 kB\nVmRSS:\t      40 kB\nRssAnon:\t      16 kB\nThreads:\t3\n";
        assert_eq!(status_bytes(status, "VmHWM"), Some(7_813_728 * 1024));
        assert_eq!(status_bytes(status, "RssAnon"), Some(16 * 1024));
        assert_eq!(status_bytes(status, "RssFile"), None);
        assert_eq!(status_bytes(status, "Threads"), None, "no memory");
    }
}
