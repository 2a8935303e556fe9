//! `ternoss quantize`

use std::{fs, io, path::PathBuf};

use anyhow::{Result, ensure};
use clap::Args;
use ternoss::{
    Cpu,
    backends::CodeFormat,
    calib::{Method, QuantizeOptions, Report, check, quantize, ternary_weights},
    quant::{Granularity, TernaryConfig},
};

use super::{
    Device, ModelArgs, bytes,
    calibration::{self, CalibrationArgs},
};
use crate::progress::{Progress, Unit};

/// Make a model ternary and write it to a folder
///
/// Streams the checkpoint layer by layer. Without a calibration text (absmean) peak memory for gpt-oss-20b is 0.8 GB; with one,
/// the text's activations come on top: about 100 kB a token for gpt-oss-20b.
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
    /// Steps of the method to leave out: rotation, regression, compensation, sweeps, bias
    #[arg(long, value_name = "STEP,..", value_delimiter = ',')]
    without: Vec<String>,
    #[command(flatten)]
    calibration: CalibrationArgs,
    /// Trits a weight is the sum of: 1, 2 or 3
    #[arg(long, default_value_t = 1)]
    planes: usize,
    /// Inputs per scale (a multiple of 64), "row" for one scale a row, "tensor" for one a matrix
    #[arg(long, default_value = "64", value_parser = granularity)]
    group_size: Granularity,
    /// Packing of the trits: t2 (2 bits, fastest) or t5 (1.6 bits, smallest)
    #[arg(long, default_value_t = CodeFormat::T2)]
    format: CodeFormat,
    /// Replace the output folder if it exists
    #[arg(long)]
    overwrite: bool,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
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
    let checkpoint = args.model.checkpoint()?;
    let steps = args.without.iter().try_fold(args.method.steps(), |steps, step| steps.without(step));
    let options = QuantizeOptions {
        method: args.method,
        steps: steps.map_err(anyhow::Error::msg)?,
        ternary: TernaryConfig { granularity: args.group_size, format: args.format, rotation: None },
        planes: args.planes,
        overwrite: args.overwrite,
    };
    let looks_at_text = options.steps.look_at_text();
    ensure!(
        looks_at_text || !args.calibration.is_given(),
        "{} with these steps looks at no calibration text",
        args.method
    );
    check(&checkpoint, &args.output, &options)?;
    let traces = calibration::traces_file(&args.output);
    let calibration = match looks_at_text {
        true => Some(args.calibration.windows(&args.model, &checkpoint, Some(&traces))?),
        false => None,
    };
    let progress = Progress::new("quantize", ternary_weights(&checkpoint) as u64, Unit::Count("weights"));
    let device = Device::default();
    let advance = |weights: usize| progress.advance(weights as u64);
    let report = quantize::<Cpu>(&checkpoint, &args.output, &options, calibration.as_ref(), &device, &advance)?;
    drop(progress);
    if args.calibration.is_own() {
        // It is kept only as long as a run may have to go on, and one that stays only takes space.
        let _ = fs::remove_file(&traces);
    }
    match args.json {
        true => print_line!("{}", serde_json::to_string_pretty(&report)?)?,
        false => print_report(&report)?,
    }
    Ok(())
}

fn print_report(report: &Report) -> io::Result<()> {
    print_line!("ternary weights     {:>12}  {}", report.ternary_weights, bytes(report.ternary_bytes))?;
    print_line!("bits per weight     {:>12.3}", report.bits_per_weight)?;
    print_line!("full precision      {:>12}  {}", "", bytes(report.full_precision_bytes))?;
    let what = if report.calibration_tokens > 0 { "outputs" } else { "weights" };
    print_line!("relative error      {:>12.4}  (squared, of the {what}, mean)", report.mean_relative_error())
}
