//! `ternoss quantize`

use std::{fs, path::PathBuf, sync::OnceLock};

use anyhow::{Result, ensure};
use burn::tensor::Device;
use clap::Args;
use ternoss::{
    backends::{CodeFormat, TernaryBackend},
    calib::{self, ACTIVATION_MEMORY, DISTILLATION_RATE, Method, QuantizeOptions, Steps, check, quantize},
    model::{Checkpoint, GptOssConfig},
    quant::{Granularity, TernaryConfig},
};

use super::{
    ModelArgs,
    calibration::{self, CalibrationArgs},
};
use crate::program::{
    byte_size::byte_size,
    progress::{Progress, Unit},
};

/// [`ACTIVATION_MEMORY`] as people write it.
const ACTIVATION_MEMORY_TEXT: &str = "2GB";
const _: () = assert!(ACTIVATION_MEMORY == 2_000_000_000);

/// Make a model ternary and write it to a folder
///
/// Streams the checkpoint layer by layer. Without a calibration text (absmean) peak memory for gpt-oss-20b is 0.8 GB; with one,
/// statistics of what the layers see come on top, and --activation-memory for the text's activations.
#[derive(Args)]
pub(crate) struct QuantizeArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Folder to write
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Quantization method: absmean, pt-bitnet or ternoss
    #[arg(long, default_value_t = Method::Ternoss)]
    method: Method,
    /// Steps of the method to leave out: rotation, regression, residual, compensation, sweeps, bias, reconstruction
    #[arg(long, value_name = "STEP,..", value_delimiter = ',')]
    without: Vec<String>,
    #[command(flatten)]
    calibration: CalibrationArgs,
    /// Trits a weight is the sum of: 1, 2 or 3
    #[arg(long, default_value_t = 1)]
    planes: usize,
    /// Most bits a weight may cost on average, scales included: matrices that need it most get a second or third plane
    #[arg(long, value_name = "BITS", conflicts_with = "planes")]
    bits_per_weight: Option<f64>,
    /// Tune every layer by gradients on its own output, for so many steps; kept only where that helps
    #[arg(long, value_name = "STEPS", num_args = 0..=1, default_missing_value = "40")]
    reconstruction: Option<usize>,
    /// Afterwards tune scales, norms, biases, sinks and router on the full-precision model's predictions, for so many steps
    #[arg(long, value_name = "STEPS", num_args = 0..=1, default_value_t = 0, default_missing_value = "100")]
    distill: usize,
    /// Highest learning rate of distillation: the share of itself by which a scale moves in a step; small models take more
    #[arg(long, alias = "learning-rate", value_name = "RATE", default_value_t = DISTILLATION_RATE, value_parser = rate)]
    distill_rate: f64,
    /// Inputs per scale (a multiple of 64), "row" for one scale a row, "tensor" for one a matrix
    #[arg(long, default_value = "64", value_parser = granularity)]
    group_size: Granularity,
    /// Packing of the trits: t2 (2 bits, fastest) or t5 (1.6 bits, smallest)
    #[arg(long, default_value_t = CodeFormat::T2)]
    format: CodeFormat,
    /// Planes of a ternary embedding and output layer: 1, 2 or 3; without it they stay as they are
    #[arg(long, value_name = "PLANES")]
    table_planes: Option<usize>,
    /// Experts that each layer keeps: those that matter most for the calibration text; without it, all
    #[arg(long, value_name = "N")]
    keep_experts: Option<usize>,
    /// Size of the whole folder, such as 1.5GB: makes embedding and output layer ternary and drops experts until it fits
    #[arg(long, value_name = "SIZE", value_parser = byte_size)]
    target_size: Option<u64>,
    /// Memory for what is kept of the calibration text, such as 500MB; the rest goes to disk, in the unfinished output. The
    /// result is the same
    #[arg(long, value_name = "SIZE", default_value = ACTIVATION_MEMORY_TEXT, value_parser = byte_size)]
    activation_memory: u64,
    /// Replace the output folder if it exists
    #[arg(long)]
    overwrite: bool,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

fn rate(text: &str) -> Result<f64, String> {
    let positive = |rate: &f64| rate.is_finite() && *rate > 0.0;
    text.parse().ok().filter(positive).ok_or_else(|| "expected a number above 0".into())
}

fn granularity(text: &str) -> Result<Granularity, String> {
    match text {
        "row" => Ok(Granularity::Row),
        "tensor" => Ok(Granularity::Tensor),
        number => match number.parse() {
            Ok(size) if size > 0 && size % 64 == 0 => Ok(Granularity::Group(size)),
            _ => Err("expected a multiple of 64, \"row\" or \"tensor\"".into()),
        },
    }
}

pub(crate) fn run(args: QuantizeArgs) -> Result<()> {
    on_backend!(args.model.backend(), compute(&args))
}

fn compute<B: TernaryBackend>(args: &QuantizeArgs, device: &Device<B>) -> Result<()> {
    let checkpoint = args.model.checkpoint()?;
    let steps = args.without.iter().try_fold(args.method.steps(), |steps, step| steps.without(step));
    let steps = steps.map_err(anyhow::Error::msg)?;
    let options = QuantizeOptions {
        method: args.method,
        steps: Steps { reconstruction: args.reconstruction.unwrap_or(steps.reconstruction), ..steps },
        ternary: TernaryConfig { granularity: args.group_size, format: args.format, rotation: None },
        planes: args.planes,
        bits_per_weight: args.bits_per_weight,
        distill: args.distill,
        distillation_rate: args.distill_rate,
        table_planes: args.table_planes,
        keep_experts: args.keep_experts,
        target_size: args.target_size,
        activation_memory: args.activation_memory,
        overwrite: args.overwrite,
    };
    let options = options.resolved(&checkpoint)?;
    let looks_at_text = options.look_at_text();
    ensure!(
        looks_at_text || !args.calibration.is_given(),
        "{} with these steps looks at no calibration text",
        args.method
    );
    check(&checkpoint, &args.output, &options)?;
    if options.target_size.is_some() {
        eprintln!("{}", chosen(&options, checkpoint.config()));
    }
    let traces = calibration::traces_file(&args.output);
    let calibration = match looks_at_text {
        true => {
            Some(args.calibration.windows::<B>(&args.model, &checkpoint, Some(&traces), options.distill, device)?)
        }
        false => None,
    };
    let report = with_progress("quantize", &checkpoint, &options, |progress| {
        quantize::<B>(&checkpoint, &args.output, &options, calibration.as_ref(), device, progress)
    })?;
    if args.calibration.is_own() {
        // It is kept only as long as a run may have to go on, and one that stays only takes space.
        let _ = fs::remove_file(&traces);
    }
    match args.json {
        true => print_line!("{}", serde_json::to_string_pretty(&report)?)?,
        false => print_line!("{report}")?,
    }
    Ok(())
}

/// Runs a quantization with options that are [resolved](QuantizeOptions::resolved), and shows how far it has come.
pub(super) fn with_progress<T>(
    name: &str,
    checkpoint: &Checkpoint,
    options: &QuantizeOptions,
    run: impl FnOnce(&(dyn Fn(calib::Progress) + Sync)) -> T,
) -> T {
    let weights = Progress::new(name, options.weights(checkpoint) as u64, Unit::Count("weights"));
    let layers = OnceLock::new();
    let steps = OnceLock::new();
    run(&|event| match event {
        calib::Progress::Measured => {
            let total = checkpoint.config().num_hidden_layers() as u64;
            layers.get_or_init(|| Progress::new("sensitivity", total, Unit::Count("layers"))).advance(1);
        }
        calib::Progress::Weights(count) => weights.advance(count as u64),
        calib::Progress::Distilled { steps: done, divergence } => {
            if let Some(divergence) = divergence {
                tracing::info!("divergence {divergence:.4}");
            }
            let progress = || Progress::new("distill", options.distill as u64, Unit::Count("steps"));
            steps.get_or_init(progress).advance(done as u64);
        }
    })
}

/// What a target size comes down to.
fn chosen(options: &QuantizeOptions, config: &GptOssConfig) -> String {
    let tables = match options.table_planes {
        Some(planes) => format!("ternary (planes: {planes})"),
        None => "as they are".into(),
    };
    let all = config.num_local_experts;
    let kept = options.keep_experts.unwrap_or(all);
    format!("to fit that size: embedding and output layer {tables}, {kept} of {all} experts a layer")
}
