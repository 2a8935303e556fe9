//! What this process takes of the machine.

use serde::Serialize;
use ternoss::backends::mapped::process_memory;

/// Memory of this process, in bytes.
#[derive(Clone, Copy, Serialize)]
pub(super) struct Memory {
    /// The most that was ever resident, mapped files included.
    pub(super) peak_resident_bytes: u64,
    /// What is resident of mapped files.
    pub(super) mapped_bytes: u64,
    /// What is resident and no file: everything that was allocated.
    pub(super) anonymous_bytes: u64,
}

impl Memory {
    /// As the system tells it, where it does (Linux).
    pub(super) fn now() -> Option<Self> {
        Some(Self {
            peak_resident_bytes: process_memory("VmHWM")?,
            mapped_bytes: process_memory("RssFile")?,
            anonymous_bytes: process_memory("RssAnon")?,
        })
    }
}
