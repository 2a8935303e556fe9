//! `ternoss quantize`

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use ternoss::{
    Cpu,
    backends::CodeFormat,
    calib::{Method, QuantizeOptions, Report, quantize, ternary_weights},
    quant::{Granularity, TernaryConfig},
};

use super::{Device, ModelArgs, bytes};
use crate::progress::{Progress, Unit};

/// Make a model ternary and write it to a folder
///
/// Reads one matrix at a time: peak memory for gpt-oss-20b is about 1 GB, whatever the size of the checkpoint.
#[derive(Args)]
pub(crate) struct QuantizeArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Folder to write
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Quantization method: absmean
    #[arg(long, default_value_t = Method::Absmean)]
    method: Method,
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
    let options = QuantizeOptions {
        method: args.method,
        ternary: TernaryConfig { granularity: args.group_size, format: args.format, rotation: None },
        overwrite: args.overwrite,
    };
    let progress = Progress::new("quantize", ternary_weights(&checkpoint) as u64, Unit::Count("weights"));
    let device = Device::default();
    let advance = |weights: usize| progress.advance(weights as u64);
    let report = quantize::<Cpu>(&checkpoint, &args.output, &options, &device, &advance)?;
    drop(progress);
    match args.json {
        true => println!("{}", serde_json::to_string_pretty(&report)?),
        false => print_report(&report),
    }
    Ok(())
}

fn print_report(report: &Report) {
    let errors = report.layers.iter().map(|layer| layer.relative_squared_error);
    let mean_error = errors.sum::<f64>() / report.layers.len() as f64;
    println!("ternary weights     {:>12}  {}", report.ternary_weights, bytes(report.ternary_bytes));
    println!("bits per weight     {:>12.3}", report.bits_per_weight);
    println!("full precision      {:>12}  {}", "", bytes(report.full_precision_bytes));
    println!("relative error      {mean_error:>12.4}  (squared, mean over layers)");
}
