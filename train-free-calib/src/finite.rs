//! The check that both models still compute numbers after each layer.

use std::fmt;

use rayon::prelude::*;
use ternoss_backends::TernaryBackend;

use crate::{CalibError, layer::Activations, solution::host};

/// One of the two models that run side by side in a calibration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The full-precision model.
    Teacher,
    /// The model whose layers so far are ternary.
    Student,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Teacher => "full-precision model",
            Self::Student => "ternary model",
        })
    }
}

impl<B: TernaryBackend> Activations<B> {
    /// Refuses residual streams that hold NaN or infinity after `layer`: everything fitted to them would be worthless.
    ///
    /// The full-precision model is looked at first, as the ternary one follows it.
    ///
    /// # Errors
    /// [`CalibError::NotFinite`]
    pub(crate) fn expect_finite(&self, layer: usize) -> Result<(), CalibError> {
        for (side, windows) in [(Side::Teacher, &self.teacher), (Side::Student, &self.student)] {
            let finite = |x: f32| x.is_finite();
            if !windows.par_iter().all(|window| host(window.clone()).into_iter().all(finite)) {
                return Err(CalibError::NotFinite { layer, side });
            }
        }
        Ok(())
    }
}
