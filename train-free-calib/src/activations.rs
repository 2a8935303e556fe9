//! What calibration computes with: the residual streams of both models.

use burn::tensor::{Tensor, TensorData};
use ternoss_backends::TernaryBackend;
use ternoss_model::{Checkpoint, table::Table};

use crate::{CalibError, Calibration, distill::embed, solution::host};

/// The residual stream of every window of the calibration text, `[tokens, hidden]` each: as the full-precision model has
/// it, and as the model has it whose layers so far are ternary.
pub(crate) struct Activations<B: TernaryBackend> {
    pub(crate) teacher: Vec<Tensor<B, 2>>,
    pub(crate) student: Vec<Tensor<B, 2>>,
    /// How many of the windows are calibrated on; the others come after them and are held out.
    pub(crate) calibrated: usize,
}

impl<B: TernaryBackend> Activations<B> {
    /// The residual stream before the first layer, both from the checkpoint's embedding.
    pub(crate) fn embed(
        checkpoint: &Checkpoint,
        calibration: &Calibration,
        device: &B::Device,
    ) -> Result<Self, CalibError> {
        let table = Table::<B>::embedding(checkpoint, device)?;
        let embed = |window: &Vec<u32>| embed(&table, window, device);
        let teacher: Vec<_> = calibration.windows().iter().map(embed).collect();
        Ok(Self { student: teacher.clone(), teacher, calibrated: calibration.calibrated() })
    }

    /// Starts the ternary model's stream from its own embedding.
    pub(crate) fn embed_student(&mut self, embedding: &Table<B>, calibration: &Calibration, device: &B::Device) {
        self.student = calibration.windows().iter().map(|window| embed(embedding, window, device)).collect();
    }

    /// Leaves the full-precision stream of what is calibrated on: enough where only that model is looked at.
    pub(crate) fn without_student(mut self) -> Self {
        self.student.clear();
        self.teacher.truncate(self.calibrated);
        self
    }

    /// Both streams as bytes, to go on from after an interruption.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let windows = self.teacher.iter().chain(&self.student);
        windows.flat_map(|window| host(window.clone())).flat_map(f32::to_le_bytes).collect()
    }

    /// Takes over what [`to_bytes`](Self::to_bytes) gave; `false` if it is not of this size.
    pub(crate) fn set_bytes(&mut self, bytes: &[u8]) -> bool {
        let (floats, rest) = bytes.as_chunks::<4>();
        let sizes = self.teacher.iter().chain(&self.student).map(|window| window.dims());
        if !rest.is_empty() || floats.len() != sizes.map(|[tokens, hidden]| tokens * hidden).sum::<usize>() {
            return false;
        }
        let mut left = floats;
        for window in self.teacher.iter_mut().chain(&mut self.student) {
            let shape = window.dims();
            let (own, after) = left.split_at(shape[0] * shape[1]);
            let values: Vec<f32> = own.iter().map(|float| f32::from_le_bytes(*float)).collect();
            *window = Tensor::from_data(TensorData::new(values, shape), &window.device());
            left = after;
        }
        true
    }

    /// Tokens a window.
    pub(crate) fn context(&self) -> usize {
        self.teacher.first().map_or(0, |window| window.dims()[0])
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
