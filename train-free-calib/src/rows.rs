//! What is kept for every token while a layer is calibrated: in memory up to a limit, on disk past it.
//!
//! Where a value is says nothing about the value: a float comes back from a file as it went there.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use burn::tensor::{Int, Tensor, TensorData, backend::Backend};
use rayon::prelude::*;
use ternoss_backends::TernaryBackend;

use crate::{
    CalibError,
    snapshot::{SnapshotReader, SnapshotWriter},
    solution::host,
};

/// Rows at a time in sums over tokens. Their order follows from it, so it does not depend on the limit.
pub(crate) const ROWS_AT_ONCE: usize = 2048;

/// Names of the files that hold what memory does not.
const SPILL: &str = "spill-";

/// Memory that several [`Rows`] share, and the folder they go to when it is used up.
#[derive(Debug)]
pub(crate) struct ActivationMemory {
    folder: PathBuf,
    limit: u64,
    used: AtomicU64,
    files: AtomicU64,
}

impl ActivationMemory {
    /// `limit` bytes in memory, the rest in `folder`; files that a killed run left there are removed.
    pub(crate) fn new(folder: &Path, limit: u64) -> Arc<Self> {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(SPILL) {
                // A file that stays only takes space.
                let _ = fs::remove_file(entry.path());
            }
        }
        Arc::new(Self { folder: folder.into(), limit, used: AtomicU64::new(0), files: AtomicU64::new(0) })
    }

    /// Whether so many more bytes are within the limit; they count from now on.
    fn reserve(&self, bytes: u64) -> bool {
        let more = |used: u64| used.checked_add(bytes).filter(|used| *used <= self.limit);
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }
}

/// Rows of floats in blocks of the same number of rows, the last one perhaps shorter: the windows of a text, or the tokens
/// of an expert. The first blocks are in memory, the others may be in a file.
pub(crate) struct Rows<B: TernaryBackend> {
    memory: Arc<ActivationMemory>,
    count: usize,
    /// Rows of a block, floats of a row.
    shape: [usize; 2],
    resident: Vec<Tensor<B, 2>>,
    spilled: Option<Spill>,
    device: B::Device,
}

impl<B: TernaryBackend> Rows<B> {
    /// No rows yet: blocks of `shape` will come.
    pub(crate) fn new(memory: &Arc<ActivationMemory>, shape: [usize; 2], device: &B::Device) -> Self {
        let memory = Arc::clone(memory);
        Self { memory, count: 0, shape, resident: Vec::new(), spilled: None, device: device.clone() }
    }

    /// How many blocks there are.
    pub(crate) fn blocks(&self) -> usize {
        self.count.div_ceil(self.shape[0])
    }

    /// Rows of a block, floats of a row.
    pub(crate) fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// The memory that they share with others.
    pub(crate) fn memory(&self) -> &Arc<ActivationMemory> {
        &self.memory
    }

    /// Adds a block, after a shorter one none.
    pub(crate) fn push(&mut self, block: Tensor<B, 2>) -> Result<(), CalibError> {
        let number = self.blocks();
        self.count += block.dims()[0];
        let bytes = block.dims().iter().product::<usize>() * size_of::<f32>();
        if self.spilled.is_none() && self.memory.reserve(bytes as u64) {
            self.resident.push(block);
            return Ok(());
        }
        if self.spilled.is_none() {
            self.spilled = Some(Spill::create(&self.memory)?);
        }
        self.set(number, block)
    }

    /// A block.
    pub(crate) fn get(&self, number: usize) -> Result<Tensor<B, 2>, CalibError> {
        match self.resident.get(number) {
            Some(block) => Ok(block.clone()),
            None => self.read(number, 0..self.shape[0].min(self.count - number * self.shape[0])),
        }
    }

    /// Puts a block of the same shape in the place of one.
    pub(crate) fn set(&mut self, number: usize, block: Tensor<B, 2>) -> Result<(), CalibError> {
        match (self.resident.get_mut(number), &self.spilled) {
            (Some(before), _) => *before = block,
            (None, Some(spill)) => spill.write(self.offset(number, 0), &host(block))?,
            (None, None) => {}
        }
        Ok(())
    }

    /// The rows with these numbers, which ascend: `[rows.len(), width]`.
    pub(crate) fn rows(&self, rows: &[usize]) -> Result<Tensor<B, 2>, CalibError> {
        let size = self.shape[0];
        let parts = rows.chunk_by(|a, b| a / size == b / size).map(|rows| {
            let number = rows[0] / size;
            let within = rows.iter().map(|row| row % size).collect::<Vec<_>>();
            match self.resident.get(number) {
                Some(block) => Ok(block.clone().select(0, indices(&within, &self.device))),
                None => self.read(number, within.into_iter()),
            }
        });
        let mut parts = parts.collect::<Result<Vec<_>, CalibError>>()?;
        if parts.len() == 1 {
            return Ok(parts.remove(0));
        }
        if parts.is_empty() {
            return Ok(Tensor::zeros([0, self.shape[1]], &self.device));
        }
        Ok(Tensor::cat(parts, 0))
    }

    /// Shows `look` every block, several at a time.
    pub(crate) fn for_each(
        &self,
        look: impl Fn(usize, Tensor<B, 2>) -> Result<(), CalibError> + Sync,
    ) -> Result<(), CalibError> {
        (0..self.blocks()).into_par_iter().try_for_each(|number| look(number, self.get(number)?))
    }

    /// What `make` makes of every block, several at a time: rows of `width` floats.
    pub(crate) fn map(
        &self,
        width: usize,
        make: impl Fn(usize, Tensor<B, 2>) -> Result<Tensor<B, 2>, CalibError> + Sync,
    ) -> Result<Self, CalibError> {
        let mut made = Self::new(&self.memory, [self.shape[0], width], &self.device);
        for first in (0..self.blocks()).step_by(rayon::current_num_threads()) {
            self.batch(first, &make)?.into_iter().try_for_each(|block| made.push(block))?;
        }
        Ok(made)
    }

    /// Puts what `make` makes of every block in its place, several at a time.
    pub(crate) fn update(
        &mut self,
        make: impl Fn(usize, Tensor<B, 2>) -> Result<Tensor<B, 2>, CalibError> + Sync,
    ) -> Result<(), CalibError> {
        for first in (0..self.blocks()).step_by(rayon::current_num_threads()) {
            for (number, block) in (first..).zip(self.batch(first, &make)?) {
                self.set(number, block)?;
            }
        }
        Ok(())
    }

    /// As many blocks as there are threads, made into something else.
    fn batch(
        &self,
        first: usize,
        make: &(impl Fn(usize, Tensor<B, 2>) -> Result<Tensor<B, 2>, CalibError> + Sync),
    ) -> Result<Vec<Tensor<B, 2>>, CalibError> {
        let numbers = first..(first + rayon::current_num_threads()).min(self.blocks());
        numbers.into_par_iter().map(|number| make(number, self.get(number)?)).collect()
    }

    /// Writes all rows to a file to go on from.
    pub(crate) fn save(&self, file: &mut SnapshotWriter) -> Result<(), CalibError> {
        (0..self.blocks()).try_for_each(|number| file.floats(&host(self.get(number)?)))
    }

    /// Takes `blocks` whole blocks more from such a file.
    pub(crate) fn load(&mut self, file: &mut SnapshotReader, blocks: usize) -> Result<(), CalibError> {
        let [rows, width] = self.shape;
        (0..blocks).try_for_each(|_| {
            let values = file.floats(rows * width)?;
            self.push(Tensor::from_data(TensorData::new(values, self.shape), &self.device))
        })
    }

    /// Rows of a block that is in the file.
    fn read(&self, number: usize, rows: impl ExactSizeIterator<Item = usize>) -> Result<Tensor<B, 2>, CalibError> {
        let (width, mut next) = (self.shape[1], 0);
        let shape = [rows.len(), width];
        let mut values = vec![0.0; shape[0] * width];
        let rows: Vec<usize> = rows.collect();
        for run in rows.chunk_by(|a, b| a + 1 == *b) {
            let of_run = &mut values[next..next + run.len() * width];
            if let Some(spill) = &self.spilled {
                spill.read(self.offset(number, run[0]), of_run)?;
            }
            next += of_run.len();
        }
        Ok(Tensor::from_data(TensorData::new(values, shape), &self.device))
    }

    /// Where a row stands in the file.
    fn offset(&self, number: usize, row: usize) -> u64 {
        let [rows, width] = self.shape;
        let before = (number - self.resident.len()) * rows + row;
        (before * width * size_of::<f32>()) as u64
    }
}

impl<B: TernaryBackend> Drop for Rows<B> {
    fn drop(&mut self) {
        let floats: usize = self.resident.iter().map(|block| block.dims().iter().product::<usize>()).sum();
        self.memory.used.fetch_sub((floats * size_of::<f32>()) as u64, Ordering::Relaxed);
    }
}

/// Row numbers as a backend wants them.
pub(crate) fn indices<B: Backend>(rows: &[usize], device: &B::Device) -> Tensor<B, 1, Int> {
    let rows: Vec<i64> = rows.iter().map(|row| *row as i64).collect();
    let count = rows.len();
    Tensor::from_data(TensorData::new(rows, [count]), device)
}

/// A file with what memory does not hold, removed when it is not needed any more.
struct Spill {
    path: PathBuf,
    file: Mutex<File>,
}

impl Spill {
    fn create(memory: &ActivationMemory) -> Result<Self, CalibError> {
        let path = memory.folder.join(format!("{SPILL}{:05}.bin", memory.files.fetch_add(1, Ordering::Relaxed)));
        let file = OpenOptions::new().create(true).truncate(true).read(true).write(true).open(&path);
        let file = file.map_err(|source| CalibError::Spill { path: path.clone(), source })?;
        Ok(Self { path, file: Mutex::new(file) })
    }

    fn write(&self, offset: u64, values: &[f32]) -> Result<(), CalibError> {
        self.at(offset, |file| file.write_all(bytemuck::cast_slice(values)))
    }

    fn read(&self, offset: u64, values: &mut [f32]) -> Result<(), CalibError> {
        self.at(offset, |file| file.read_exact(bytemuck::cast_slice_mut(values)))
    }

    fn at(&self, offset: u64, action: impl FnOnce(&mut File) -> io::Result<()>) -> Result<(), CalibError> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let done = file.seek(SeekFrom::Start(offset)).and_then(|_| action(&mut file));
        done.map_err(|source| CalibError::Spill { path: self.path.clone(), source })
    }
}

impl Drop for Spill {
    fn drop(&mut self) {
        // A file that stays only takes space; the next run removes it.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use burn_flex::Flex;

    use super::*;

    /// Blocks of four rows of three floats, the last one shorter.
    fn rows(memory: &Arc<ActivationMemory>) -> Rows<Flex> {
        let mut rows = Rows::new(memory, [4, 3], &Default::default());
        for first in [0, 4, 8] {
            let count = (11 - first).min(4);
            let values: Vec<f32> = (first * 3..(first + count) * 3).map(|i| (i as f32).sin()).collect();
            rows.push(Tensor::from_data(TensorData::new(values, [count, 3]), &Default::default())).unwrap();
        }
        rows
    }

    fn all(rows: &Rows<Flex>) -> Vec<f32> {
        (0..rows.blocks()).flat_map(|number| host(rows.get(number).unwrap())).collect()
    }

    #[test]
    fn rows_are_the_same_in_memory_and_on_disk_and_nothing_is_left_of_them() {
        let folder = tempfile::tempdir().unwrap();
        let spilled = || fs::read_dir(folder.path()).unwrap().count();
        // All in memory, two blocks, one, none.
        for (limit, files) in [(u64::MAX, 0), (96, 1), (95, 1), (0, 1)] {
            let memory = ActivationMemory::new(folder.path(), limit);
            let mut rows = rows(&memory);
            assert_eq!((rows.blocks(), spilled()), (3, files), "{limit}");
            let expected: Vec<f32> = (0..33).map(|i| (i as f32).sin()).collect();
            assert_eq!(all(&rows), expected, "{limit}");
            let picked = host(rows.rows(&[1, 2, 4, 7, 10]).unwrap());
            let of = |row: usize| expected[row * 3..row * 3 + 3].to_vec();
            assert_eq!(picked, [of(1), of(2), of(4), of(7), of(10)].concat(), "{limit}");
            assert_eq!(rows.rows(&[]).unwrap().dims(), [0, 3]);

            let wider = rows.map(6, |_, x| Ok(Tensor::cat(vec![x.clone(), x], 1))).unwrap();
            assert_eq!(host(wider.rows(&[9]).unwrap()), [of(9), of(9)].concat(), "{limit}");
            rows.update(|number, x| Ok(x + number as f32)).unwrap();
            let moved: Vec<f32> = expected.iter().enumerate().map(|(i, x)| x + (i / 12) as f32).collect();
            assert_eq!(all(&rows), moved, "{limit}");
            drop((rows, wider));
            assert_eq!((spilled(), memory.used.load(Ordering::Relaxed)), (0, 0), "{limit}");
        }
    }

    #[test]
    fn saved_rows_come_back_whole_or_are_called_damaged() {
        let folder = tempfile::tempdir().unwrap();
        let memory = ActivationMemory::new(folder.path(), 48);
        let (rows, path) = (rows(&memory), folder.path().join("rows.bin"));
        let mut file = SnapshotWriter::create(&path).unwrap();
        rows.save(&mut file).unwrap();
        assert!(!path.exists(), "half written");
        file.finish().unwrap();
        let load = |blocks| {
            let mut loaded = Rows::<Flex>::new(&memory, [1, 3], &Default::default());
            let mut file = SnapshotReader::open(&path).unwrap();
            loaded.load(&mut file, blocks).and_then(|()| file.end()).map(|()| all(&loaded))
        };
        assert_eq!(load(11).unwrap(), all(&rows));
        for blocks in [10, 12] {
            assert!(matches!(load(blocks), Err(CalibError::Damaged { name }) if name == "rows.bin"), "{blocks}");
        }
    }

    #[test]
    fn what_a_killed_run_left_is_removed_and_other_files_are_not() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["spill-00000.bin", "spill-00007.bin", "step-00000.json"] {
            fs::write(folder.path().join(name), "left").unwrap();
        }
        ActivationMemory::new(folder.path(), 0);
        let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["step-00000.json"]);
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_an_error_with_the_files_name() {
        let memory = ActivationMemory::new(Path::new("/nowhere"), 0);
        let mut rows = Rows::<Flex>::new(&memory, [1, 1], &Default::default());
        let error = rows.push(Tensor::zeros([1, 1], &Default::default())).unwrap_err();
        assert!(matches!(&error, CalibError::Spill { .. }) && error.to_string().contains("spill-00000.bin"), "{error}");
    }
}
