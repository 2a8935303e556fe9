//! What calibration computes with: the residual streams of both models.

use std::{path::Path, sync::Arc};

use burn::{
    nn::RmsNorm,
    tensor::{Tensor, TensorData},
};
use ternoss_backends::TernaryBackend;
use ternoss_model::{layer::apply_norm, table::Table};

use crate::{
    CalibError, Calibration,
    rows::{ActivationMemory, Rows},
    snapshot::{SnapshotReader, SnapshotWriter},
};

/// The residual stream of every window of the calibration text, `[tokens, hidden]` each: as the full-precision model has
/// it, and as the model has it whose layers so far are ternary.
pub(crate) struct Activations<B: TernaryBackend> {
    pub(crate) teacher: Rows<B>,
    /// Without rows where only the full-precision model is looked at.
    pub(crate) student: Rows<B>,
    /// How many of the windows are calibrated on; the others come after them and are held out.
    pub(crate) calibrated: usize,
}

/// Which residual streams there are.
pub(crate) struct Streams<'a, B: TernaryBackend> {
    pub(crate) memory: Arc<ActivationMemory>,
    pub(crate) calibration: &'a Calibration,
    pub(crate) hidden: usize,
    /// Whether the ternary model is looked at: otherwise the full-precision one is, on what is calibrated on.
    pub(crate) student: bool,
    pub(crate) device: &'a B::Device,
}

impl<B: TernaryBackend> Streams<'_, B> {
    /// The streams before the first layer, from the embeddings of both models.
    pub(crate) fn embed(&self, teacher: &Table<B>, student: &Table<B>) -> Result<Activations<B>, CalibError> {
        let rows = |table: &Table<B>, windows: &[Vec<u32>]| {
            let mut rows = self.rows();
            windows.iter().try_for_each(|window| rows.push(embed(table, window, self.device)))?;
            Ok::<_, CalibError>(rows)
        };
        let windows = self.calibration.windows();
        let [teacher_windows, student_windows] = self.windows();
        Ok(Activations {
            teacher: rows(teacher, &windows[..teacher_windows])?,
            student: rows(student, &windows[..student_windows])?,
            calibrated: self.calibration.calibrated(),
        })
    }

    /// The streams that [`Activations::save`] wrote.
    pub(crate) fn load(&self, path: &Path) -> Result<Activations<B>, CalibError> {
        let mut file = SnapshotReader::open(path)?;
        let (mut teacher, mut student) = (self.rows(), self.rows());
        let [teacher_windows, student_windows] = self.windows();
        teacher.load(&mut file, teacher_windows)?;
        student.load(&mut file, student_windows)?;
        file.end()?;
        Ok(Activations { teacher, student, calibrated: self.calibration.calibrated() })
    }

    fn rows(&self) -> Rows<B> {
        Rows::new(&self.memory, [self.calibration.context(), self.hidden], self.device)
    }

    /// Windows of teacher and student.
    fn windows(&self) -> [usize; 2] {
        let all = self.calibration.windows().len();
        if self.student { [all; 2] } else { [self.calibration.calibrated(), 0] }
    }
}

impl<B: TernaryBackend> Activations<B> {
    /// Writes both streams to a file, to go on from after an interruption.
    pub(crate) fn save(&self, path: &Path) -> Result<(), CalibError> {
        let mut file = SnapshotWriter::create(path)?;
        self.teacher.save(&mut file)?;
        self.student.save(&mut file)?;
        file.finish()
    }

    /// Tokens a window.
    pub(crate) fn context(&self) -> usize {
        self.teacher.shape()[0]
    }
}

/// The residual stream of a window before the first layer.
pub(crate) fn embed<B: TernaryBackend>(table: &Table<B>, window: &[u32], device: &B::Device) -> Tensor<B, 2> {
    let ids: Vec<i64> = window.iter().map(|id| i64::from(*id)).collect();
    let shape = [ids.len()];
    table.embed(Tensor::from_data(TensorData::new(ids, shape), device))
}

/// Residual streams as what stands behind a norm sees them.
pub(crate) struct Normed<'a, B: TernaryBackend> {
    pub(crate) streams: &'a Rows<B>,
    pub(crate) norm: &'a RmsNorm<B>,
}

impl<B: TernaryBackend> Normed<'_, B> {
    /// A block.
    pub(crate) fn get(&self, number: usize) -> Result<Tensor<B, 2>, CalibError> {
        Ok(apply_norm(self.norm, self.streams.get(number)?))
    }

    /// Rows by number, in ascending order.
    pub(crate) fn rows(&self, rows: &[usize]) -> Result<Tensor<B, 2>, CalibError> {
        Ok(apply_norm(self.norm, self.streams.rows(rows)?))
    }
}

/// Adds the rows of `output` to the windows, in order.
pub(crate) fn add_rows<B: TernaryBackend>(windows: &mut [Tensor<B, 2>], output: Tensor<B, 2>) {
    let mut first = 0;
    for window in windows {
        let tokens = window.dims()[0];
        *window = window.clone() + output.clone().slice_dim(0, first..first + tokens);
        first += tokens;
    }
}
