//! One row of `bench --backends`: a backend measured in a process of its own, so that its peak of memory is its own too.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result};
use burn::tensor::Device;
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use ternoss::{
    backends::{KvFormat, TernaryBackend, mapped::process_memory, switch_kernels_off},
    calib::{Calibration, Method, QuantizeOptions, quantize},
    model::{Checkpoint, GptOss, tokenizer::Tokenizer},
};

use super::{
    super::{CALIBRATION, demo},
    BenchArgs, Plan,
    measure::{Bench, load},
    quantized::with_burns_linears,
};
use crate::program::progress::{Progress, Unit};

/// Tokens whose logits are compared.
const COMPARED: usize = 16;

/// Tokens that one layer of the small model is calibrated on, and those of a window.
const CALIBRATION_TOKENS: usize = 512;
const CALIBRATION_CONTEXT: usize = 256;

/// What computes a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Operations {
    /// Burn's own operations on the packed weights.
    Burn,
    /// Burn's own quantized linears, 8 bits a weight.
    Quantized,
    /// This project's kernels.
    Kernels,
}

/// What makes a process measure one row.
#[derive(Args)]
pub(super) struct RowArgs {
    #[arg(long, hide = true, value_enum, requires = "logits")]
    pub(super) row: Option<Operations>,
    /// File for the logits of the first tokens, as bytes of f32
    #[arg(long, hide = true, value_name = "FILE")]
    pub(super) logits: Option<PathBuf>,
}

/// What was measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Figures {
    pub(super) decode_tokens_per_second: f64,
    pub(super) prefill_tokens_per_second: f64,
    pub(super) prefill_tokens: usize,
    pub(super) load_seconds: f64,
    /// Of this process, before anything was calibrated.
    pub(super) peak_bytes: Option<u64>,
    /// One layer of the small model in this program; not where linears are Burn's quantized ones.
    pub(super) calibration_seconds: Option<f64>,
}

/// Measures a row and prints it.
pub(super) fn print_row<B: TernaryBackend>(
    args: &BenchArgs,
    operations: Operations,
    logits: &Path,
    device: &Device<B>,
) -> Result<()> {
    if operations == Operations::Burn {
        switch_kernels_off();
    }
    let plan = Plan::new(args, args.model.checkpoint()?.config())?.shortest();
    let (mut model, times) = load::<B>(&args.model, &plan, device)?;
    if operations == Operations::Quantized {
        model = with_burns_linears(model);
    }
    write_logits(&model, &plan.ids, logits)?;
    let progress = Progress::new("bench", plan.work(), Unit::Count("tokens"));
    let bench = Bench { model: &model, plan: &plan, progress: &progress };
    let decode = bench.decode()?.0;
    let prefill = bench.prefill()?;
    drop(progress);
    let peak_bytes = process_memory("VmHWM");
    let calibration_seconds = match operations {
        Operations::Quantized => None,
        Operations::Burn | Operations::Kernels => Some(calibrate_layer::<B>(device)?),
    };
    let figures = Figures {
        decode_tokens_per_second: decode.first().map_or(f64::NAN, |decode| decode.tokens_per_second),
        prefill_tokens_per_second: prefill.first().map_or(f64::NAN, |prefill| prefill.tokens_per_second),
        prefill_tokens: plan.prefill.first().copied().unwrap_or(0),
        load_seconds: times.load,
        peak_bytes,
        calibration_seconds,
    };
    Ok(print_line!("{}", serde_json::to_string(&figures)?)?)
}

fn write_logits<B: TernaryBackend>(model: &GptOss<B>, ids: &[u32], file: &Path) -> Result<()> {
    let tokens = model.tokens(&ids[..ids.len().min(COMPARED)])?;
    // Numbers of the operations, not of how keys and values are kept.
    let mut cache = model.new_cache().with_format(KvFormat::F32);
    let logits = model.forward(tokens, &mut cache).into_data();
    let bytes: Vec<u8> = logits.iter::<f32>().flat_map(f32::to_le_bytes).collect();
    fs::write(file, bytes).with_context(|| file.display().to_string())
}

/// Seconds that calibrating a layer of the small model inside this program takes, on average over its layers.
fn calibrate_layer<B: TernaryBackend>(device: &Device<B>) -> Result<f64> {
    let folder = tempfile::tempdir()?;
    let dense = folder.path().join("dense");
    demo::write_model(&dense)?;
    let checkpoint = Checkpoint::open(&dense)?;
    let tokens = Tokenizer::from_folder(&dense)?.encode(CALIBRATION, true)?;
    let calibration = Calibration::new(&tokens, CALIBRATION_CONTEXT, CALIBRATION_TOKENS, checkpoint.config())?;
    let options = QuantizeOptions::new(Method::Ternoss);
    let output = folder.path().join("ternary");
    let started = Instant::now();
    quantize::<B>(&checkpoint, &output, &options, Some(&calibration), device, &|_| ())?;
    Ok(started.elapsed().as_secs_f64() / checkpoint.config().num_hidden_layers() as f64)
}
