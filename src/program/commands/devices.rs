//! `ternoss devices`

use std::{io, thread};

use anyhow::Result;
use clap::Args;
use serde_json::{Value, json};
use ternoss::backends::{cpu::Isa, mapped::machine_memory};

use super::bytes;
use crate::program::backend::{Backend, Found, Unavailable};

/// List what can compute on this machine, and why the rest cannot
#[derive(Args)]
pub(crate) struct DevicesArgs {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: DevicesArgs) -> Result<()> {
    let backends = Backend::ALL.map(|backend| (backend, backend.found()));
    let chosen = Backend::Auto.choose()?.backend();
    let print = if args.json { print_json } else { print_list };
    Ok(print(&backends, chosen)?)
}

/// What is known of a backend.
type Line = (Backend, Result<Vec<Found>, Unavailable>);

fn threads() -> usize {
    thread::available_parallelism().map_or(1, Into::into)
}

fn print_list(backends: &[Line], chosen: Backend) -> io::Result<()> {
    for (backend, found) in backends {
        match found {
            Ok(devices) => {
                for device in devices {
                    print_line!("{:<8} {}", backend.to_string(), describe(device))?;
                }
            }
            Err(missing) => {
                print_line!("{:<8} not usable: {}", backend.to_string(), missing.reason)?;
                print_line!("{:<8} {}", "", missing.hint())?;
            }
        }
    }
    print_line!("auto     takes {chosen}")
}

fn describe(device: &Found) -> String {
    let memory = |size: Option<u64>| size.map_or_else(|| "memory not known".into(), |size| bytes(size as usize));
    match device {
        Found::Processor => {
            format!("processor, {} kernels, {} threads, {}", Isa::detect(), threads(), memory(machine_memory()))
        }
        Found::Gpu { name, api, driver, memory: size, software, .. } => {
            let software = if *software { ", software: the processor does its work" } else { "" };
            format!("{name}, {api}, {driver}, {}{software}", memory(*size))
        }
    }
}

fn print_json(backends: &[Line], chosen: Backend) -> io::Result<()> {
    let list = backends.iter().map(|(backend, found)| match found {
        Ok(devices) => json!({ "backend": backend.to_string(), "devices": devices.iter().map(object).collect::<Vec<_>>() }),
        Err(missing) => json!({
            "backend": backend.to_string(), "devices": [], "missing": missing.reason.to_string(), "hint": missing.hint(),
        }),
    });
    let object = json!({ "auto": chosen.to_string(), "backends": list.collect::<Vec<_>>() });
    print_line!("{object}")
}

fn object(device: &Found) -> Value {
    match device {
        Found::Processor => json!({
            "name": "processor", "instruction_set": Isa::detect().to_string(), "threads": threads(),
            "memory": machine_memory(), "software": false,
        }),
        Found::Gpu { name, api, driver, memory, largest_tensor, software } => json!({
            "name": name, "api": api, "driver": driver, "memory": memory, "largest_tensor": largest_tensor,
            "software": software,
        }),
    }
}
