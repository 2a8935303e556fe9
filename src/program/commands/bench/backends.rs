//! `ternoss bench --backends`: the same model on everything this machine has.

use std::{
    env, fs,
    io::{self, Read},
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use serde::Serialize;
use serde_json::json;
use ternoss::backends::cpu::Isa;

use super::{
    super::bytes,
    BenchArgs, comparison_picture,
    results::figure,
    row::{Figures, Operations},
};
use crate::program::backend::{Backend, Found};

/// How long one backend may take.
const LIMIT: Duration = Duration::from_secs(600);

/// What is compared, the reference first.
const ROWS: [(Backend, Operations); 10] = [
    (Backend::Ndarray, Operations::Burn),
    (Backend::Flex, Operations::Burn),
    (Backend::Ndarray, Operations::Quantized),
    (Backend::Flex, Operations::Quantized),
    (Backend::Ndarray, Operations::Kernels),
    (Backend::Flex, Operations::Kernels),
    (Backend::Wgpu, Operations::Quantized),
    (Backend::Wgpu, Operations::Kernels),
    (Backend::Cuda, Operations::Quantized),
    (Backend::Cuda, Operations::Kernels),
];

/// A row of the table.
#[derive(Serialize)]
pub(super) struct Row {
    pub(super) backend: String,
    pub(super) operations: Operations,
    /// What it ran on.
    pub(super) device: Option<String>,
    #[serde(flatten)]
    pub(super) figures: Option<Figures>,
    /// The largest distance of a logit to the one that Burn's operations on NdArray give, in float32.
    pub(super) logit_difference: Option<f64>,
    /// Why there are no figures.
    pub(super) missing: Option<String>,
}

impl Row {
    /// What a reader calls it.
    pub(super) fn name(&self) -> String {
        let operations = match self.operations {
            Operations::Burn => "Burn's operations",
            Operations::Quantized => "Burn's 8-bit linears",
            Operations::Kernels => "ternoss",
        };
        format!("{}, {operations}", self.backend)
    }
}

/// Measures all rows, each in a process of its own, and prints them.
pub(super) fn compare(args: &BenchArgs) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut reference: Option<Vec<f32>> = None;
    let mut rows = Vec::new();
    for (backend, operations) in ROWS {
        let file = folder.path().join(format!("{}.logits", rows.len()));
        let mut row = Row {
            backend: backend.to_string(),
            operations,
            device: None,
            figures: None,
            logit_difference: None,
            missing: None,
        };
        match backend.found() {
            Ok(devices) => {
                row.device = devices.into_iter().next().map(Found::into_name);
                eprintln!("measuring {}", row.name());
                match measure(args, backend, operations, &file) {
                    Ok((figures, logits)) => {
                        row.figures = Some(figures);
                        row.logit_difference = Some(difference(&logits, reference.get_or_insert(logits.clone())));
                    }
                    Err(error) => row.missing = Some(error.to_string()),
                }
            }
            Err(unavailable) => row.missing = Some(unavailable.reason.to_string()),
        }
        rows.push(row);
    }
    if let (None, Some(missing)) = (&reference, rows.first().and_then(|row| row.missing.as_ref())) {
        bail!("nothing could be measured: {missing}");
    }
    if let Some(file) = &args.picture {
        fs::write(file, comparison_picture::picture(&args.model.model, &rows))
            .with_context(|| file.display().to_string())?;
    }
    let print = if args.json { print_json } else { print_table };
    Ok(print(args, &rows)?)
}

/// Measures one row: its figures, and the logits of the first tokens.
fn measure(args: &BenchArgs, backend: Backend, operations: Operations, file: &Path) -> Result<(Figures, Vec<f32>)> {
    let operations = operations.to_possible_value().map_or_else(String::new, |value| value.get_name().into());
    let numbers = |values: &[usize]| values.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let mut command = Command::new(env::current_exe()?);
    command.args(["bench", "--model", &args.model.model, "--backend", &backend.to_string(), "--row", &operations]);
    command.arg("--logits").arg(file);
    command.args(["--decode", &args.decode.to_string(), "--runs", &args.runs.to_string()]);
    command.args(["--seed", &args.seed.to_string(), "--prefill", &numbers(&args.prefill), "--context", "0"]);
    if !args.threads.is_empty() {
        command.args(["--threads", &numbers(&args.threads)]);
    }
    let [printed, said] = finish(command)?;
    let figures = serde_json::from_str(&printed).with_context(|| said)?;
    let logits = fs::read(file)?.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    Ok((figures, logits))
}

/// Runs a command that must succeed within the [`LIMIT`]: what it printed, and what it said on stderr.
fn finish(mut command: Command) -> Result<[String; 2]> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let readers = (child.stdout.take().map(reader), child.stderr.take().map(reader));
    let started = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if started.elapsed() > LIMIT {
            child.kill()?;
            child.wait()?;
            bail!("not finished within {} minutes", LIMIT.as_secs() / 60);
        }
        thread::sleep(Duration::from_millis(20));
    };
    let text = |reader: Option<thread::JoinHandle<String>>| reader.and_then(|reader| reader.join().ok());
    let (printed, said) = (text(readers.0).unwrap_or_default(), text(readers.1).unwrap_or_default());
    // Drivers may have said something before.
    let error = said.lines().rev().find_map(|line| line.strip_prefix("error: "));
    ensure!(status.success(), "{}", error.map_or_else(|| status.to_string(), Into::into));
    Ok([printed, said])
}

/// Reads to the end meanwhile, so that the writer never waits.
fn reader(mut from: impl Read + Send + 'static) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        // A pipe that breaks off has said what it had to say.
        let _ = from.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

fn difference(found: &[f32], expected: &[f32]) -> f64 {
    if found.len() != expected.len() {
        return f64::NAN;
    }
    let distances = found.iter().zip(expected).map(|(a, b)| f64::from((a - b).abs()));
    distances.fold(0.0, |most, distance| if most >= distance { most } else { distance })
}

fn print_json(args: &BenchArgs, rows: &[Row]) -> io::Result<()> {
    let object = json!({ "model": args.model.model, "instruction_set": Isa::detect().to_string(), "backends": rows });
    print_line!("{object}")
}

fn print_table(args: &BenchArgs, rows: &[Row]) -> io::Result<()> {
    print_line!("{} ({})", args.model.model, Isa::detect())?;
    let titles = ["decode", "prefill", "calibration", "load", "memory", "logits"];
    let units = ["tokens/s", "tokens/s", "s/layer", "s", "at most", "off by"];
    for [a, b, c, d, e, f] in [titles, units] {
        print_line!("{:<30} {a:>9} {b:>9} {c:>12} {d:>7} {e:>10} {f:>9}", "")?;
    }
    for row in rows {
        let name = row.name();
        let Some(figures) = &row.figures else {
            print_line!("{name:<30} {}", row.missing.as_deref().unwrap_or("-"))?;
            continue;
        };
        let or_none = |value: Option<String>| value.unwrap_or_else(|| "-".into());
        print_line!(
            "{name:<30} {:>9} {:>9} {:>12} {:>7.2} {:>10} {:>9}",
            figure(figures.decode_tokens_per_second),
            figure(figures.prefill_tokens_per_second),
            or_none(figures.calibration_seconds.map(|seconds| format!("{seconds:.2}"))),
            figures.load_seconds,
            or_none(figures.peak_bytes.map(|size| bytes(size as usize))),
            or_none(row.logit_difference.map(|most| format!("{most:.1e}"))),
        )?;
    }
    let gpus = rows.iter().filter(|row| ["wgpu", "cuda"].contains(&row.backend.as_str()) && row.figures.is_some());
    for row in gpus.filter(|row| row.operations == Operations::Kernels) {
        print_line!(
            "{} is {}; memory is that of the process",
            row.backend,
            row.device.as_deref().unwrap_or("unknown")
        )?;
    }
    Ok(())
}
