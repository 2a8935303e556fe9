//! The check that both models still compute numbers after each layer.

use std::fmt;

use ternoss_backends::TernaryBackend;

use crate::{CalibError, activations::Activations, solution::host};

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
        for (side, streams) in [(Side::Teacher, &self.teacher), (Side::Student, &self.student)] {
            streams.for_each(|_, window| match host(window).into_iter().all(f32::is_finite) {
                true => Ok(()),
                false => Err(CalibError::NotFinite { layer, side }),
            })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Tensor, TensorData};
    use burn_flex::Flex;

    use super::*;
    use crate::rows::{ActivationMemory, Rows};

    #[test]
    fn the_first_model_that_is_not_finite_is_named() {
        let (folder, device) = (tempfile::tempdir().unwrap(), Default::default());
        // One window in memory, the other on disk.
        let memory = ActivationMemory::new(folder.path(), 16);
        let window = |value: f32| {
            let values = TensorData::new(vec![0.0, f32::MAX, value, -1.0], [2, 2]);
            let mut rows = Rows::<Flex>::new(&memory, [2, 2], &device);
            rows.push(Tensor::zeros([2, 2], &device)).unwrap();
            rows.push(Tensor::from_data(values, &device)).unwrap();
            rows
        };
        let bad = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
        let check = |teacher, student| {
            Activations { teacher: window(teacher), student: window(student), calibrated: 1 }.expect_finite(7)
        };
        check(f32::MIN, 0.0).unwrap();
        for value in bad {
            for (teacher, student, expected) in [(value, 0.0, Side::Teacher), (0.0, value, Side::Student)] {
                let found = check(teacher, student);
                assert!(
                    matches!(found, Err(CalibError::NotFinite { layer: 7, side }) if side == expected),
                    "{found:?}"
                );
            }
            assert!(matches!(check(value, value), Err(CalibError::NotFinite { side: Side::Teacher, .. })));
        }
        let message = check(0.0, f32::NAN).unwrap_err().to_string();
        assert!(message.contains("ternary model") && message.contains("layer 7"), "{message}");
    }
}
