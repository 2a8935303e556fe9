//! A quantization with distillation: the ternary model before it, beside the output, then the output.

use std::path::Path;

use serde_json::{Value, json};
use ternoss_backends::TernaryBackend;
use ternoss_model::{Checkpoint, checkpoint::FolderWriter};

use crate::{
    CalibError, Calibration, Progress, QuantizeOptions, Report,
    distill::{Course, DISTILLATION_FILES, Distillation},
    folder::{finish, read_config, with_suffix},
    layer::TernaryLayer,
    pipeline::{calibrate, fingerprint_of, settings},
    report::{Distilled, PartBytes},
    rows::ActivationMemory,
    step::{Job, write_changed},
};

/// The model before distillation, made now or left of an earlier run, then distilled.
pub(crate) fn calibrate_and_distill<B: TernaryBackend>(
    job: &Job<'_, B>,
    output: &Path,
    options: &QuantizeOptions,
    calibration: Option<&Calibration>,
    progress: &dyn Fn(Progress),
) -> Result<Report, CalibError> {
    let judged = |calibration: &&Calibration| !calibration.held_out().is_empty();
    let calibration = calibration.filter(judged).ok_or(CalibError::NothingHeldOut)?;
    let undistilled = with_suffix(output, ".undistilled");
    let settings = settings(job.checkpoint, &job.recipe, options, Some(calibration));
    let run = fingerprint_of(&settings);
    // Opened first: what it would refuse is known before hours of work.
    let layers = job.checkpoint.config().num_hidden_layers();
    let settings = settings_of_distillation(settings, options, calibration);
    let (mut writer, _) = FolderWriter::resume::<Value>(output, layers + 1, options.overwrite, &settings)?;
    if DISTILLATION_FILES.iter().any(|name| writer.folder().join(name).exists()) {
        // What an earlier run has computed outlives an error of this one.
        writer.keep();
    }
    let report = match Report::read(&undistilled).filter(|report| report.run == run) {
        Some(report) => {
            (job.progress)(options.weights(job.checkpoint));
            report
        }
        None => calibrate(job, &undistilled, options, Some(calibration), progress)?,
    };
    let report = distill(job, &undistilled, writer, options, calibration, report, progress)?;
    // A model that stays only takes space.
    let _ = std::fs::remove_dir_all(&undistilled);
    Ok(report)
}

fn settings_of_distillation(mut settings: Value, options: &QuantizeOptions, calibration: &Calibration) -> Value {
    settings["steps of distillation"] = json!(options.distill);
    settings["learning rate"] = json!(options.distillation_rate);
    settings["text of distillation"] = json!(calibration.fingerprint_of_distilled());
    settings
}

/// Distills the ternary model in `undistilled` and writes the result.
fn distill<B: TernaryBackend>(
    job: &Job<'_, B>,
    undistilled: &Path,
    mut writer: FolderWriter,
    options: &QuantizeOptions,
    calibration: &Calibration,
    mut report: Report,
    progress: &dyn Fn(Progress),
) -> Result<Report, CalibError> {
    let student = Checkpoint::open(undistilled)?;
    let course = Course {
        steps: options.distill,
        peak: options.distillation_rate,
        folder: writer.folder(),
        memory: &ActivationMemory::new(writer.folder(), options.activation_memory),
        progress: &|steps, divergence| progress(Progress::Distilled { steps, divergence }),
    };
    let distilled = Distillation::<B>::new(job.checkpoint, &student, calibration, &course, job.device)?.run(&course)?;
    let kept = distilled.after.kl_divergence < distilled.before.kl_divergence;
    report.distillation = Some(Distilled { steps: options.distill, kept, before: distilled.before });
    report.held_out = Some(if kept { distilled.after } else { distilled.before });
    let mut parts = PartBytes::new();
    for step in 0..=student.config().num_hidden_layers() {
        let changed = match (kept, step.checked_sub(1)) {
            (false, _) => TernaryLayer::default(),
            (true, None) => distilled.outside(),
            (true, Some(layer)) => distilled.layers[layer].harden()?.written(layer),
        };
        let written = write_changed(&student, step, &changed, &mut writer)?;
        written.into_iter().for_each(|(part, bytes)| *parts.entry(part).or_default() += bytes);
    }
    report.set_parts(parts);
    DISTILLATION_FILES.iter().for_each(|name| writer.remove(name));
    finish(&student, read_config(&student)?, &report, writer)?;
    Ok(report)
}
