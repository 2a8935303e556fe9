//! How the program tells of an error: one line, a hint where one helps, exit code 1.

use std::{io, process::ExitCode};

use ternoss::calib::CalibError;
use ternoss::hub::HubError;
use ternoss::model::{CheckpointError, harmony::HarmonyError};

use crate::program::backend::Unavailable;

/// Prints an error and its hint to stderr. A reader that went away (`ternoss generate | head`) is no error.
pub(crate) fn report(error: &anyhow::Error) -> ExitCode {
    // On the way to the hub, though, it is the download that broke off.
    let hub = error.chain().any(|cause| cause.is::<HubError>());
    if !hub && io_kind(error) == Some(io::ErrorKind::BrokenPipe) {
        return ExitCode::SUCCESS;
    }
    eprintln!("error: {}", line(error));
    if let Some(hint) = hint(error) {
        eprintln!("hint: {hint}");
    }
    ExitCode::FAILURE
}

/// What kind of input or output failed, if that is what went wrong.
fn io_kind(error: &anyhow::Error) -> Option<io::ErrorKind> {
    error.chain().find_map(|cause| cause.downcast_ref::<io::Error>()).map(io::Error::kind)
}

/// The chain of causes in one line; a cause whose text its predecessor repeats is left out.
fn line(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text.replace('\n', " ")
}

fn hint(error: &anyhow::Error) -> Option<&'static str> {
    if let Some(backend) = error.chain().find_map(|cause| cause.downcast_ref::<Unavailable>()) {
        return Some(backend.hint());
    }
    if let Some(hub) = error.chain().find_map(|cause| cause.downcast_ref::<HubError>()) {
        return hub.hint();
    }
    if error.chain().any(|cause| matches!(cause.downcast_ref(), Some(HarmonyError::NoMark { .. }))) {
        return Some("without --chat, the prompt is plain text to go on from");
    }
    match error.chain().find_map(|cause| cause.downcast_ref::<CalibError>()) {
        Some(CalibError::TargetSize { .. }) => {
            return Some("--format t5 --group-size row is the smallest packing, with one plane");
        }
        Some(CalibError::Spill { .. }) if io_kind(error) == Some(io::ErrorKind::StorageFull) => {
            return Some("free some space, or keep more in memory with --activation-memory");
        }
        _ => {}
    }
    let checkpoint = error.chain().find_map(|cause| {
        let inner = cause.downcast_ref::<CalibError>().and_then(|calib| match calib {
            CalibError::Checkpoint(inner) => Some(inner),
            _ => None,
        });
        inner.or_else(|| cause.downcast_ref::<CheckpointError>())
    });
    match checkpoint {
        Some(CheckpointError::MemoryBudget { .. }) => Some("allow more, or leave --memory-budget away"),
        Some(CheckpointError::OutputExists { .. }) => Some("pass --overwrite to replace it"),
        Some(CheckpointError::OtherSettings { .. }) => {
            Some("finish it with its own settings, or pass --overwrite to start anew")
        }
        Some(
            CheckpointError::MissingShard { .. } | CheckpointError::Truncated { .. } | CheckpointError::Header { .. },
        ) => Some("the download may be incomplete: `ternoss download` continues it"),
        _ => match io_kind(error)? {
            io::ErrorKind::StorageFull => Some("free some space; nothing half-written was left behind"),
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                Some("choose an output folder you may write to")
            }
            _ => None,
        },
    }
}
