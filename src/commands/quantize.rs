//! `ternoss quantize`

use std::{fs, io, path::PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Args;
use ternoss::{
    Cpu,
    backends::CodeFormat,
    calib::{Calibration, Method, QuantizeOptions, Report, quantize},
    model::{Checkpoint, GptOssConfig},
    quant::{Granularity, TernaryConfig},
};

use super::{CALIBRATION, Device, ModelArgs, byte_size, bytes, tokenizer};
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
    /// UTF-8 text to calibrate on, the more like the text the model is for, the better; without it, some novels and
    /// encyclopedia articles that are part of this program
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
    /// Tokens of the text to use at most
    #[arg(long, default_value_t = 32_768)]
    calibration_tokens: usize,
    /// Tokens the model sees at a time while it is calibrated
    #[arg(long, default_value_t = 1024)]
    calibration_context: usize,
    /// Trits a weight is the sum of: 1, 2 or 3
    #[arg(long, default_value_t = 1)]
    planes: usize,
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
        table_planes: args.table_planes,
        keep_experts: args.keep_experts,
        target_size: args.target_size,
        overwrite: args.overwrite,
    };
    let options = options.resolved(&checkpoint)?;
    if options.target_size.is_some() {
        eprintln!("{}", chosen(&options, checkpoint.config()));
    }
    let looks_at_text = options.look_at_text();
    ensure!(
        looks_at_text || args.calibration.is_none(),
        "{} with these steps looks at no calibration text",
        args.method
    );
    let calibration = match looks_at_text {
        true => Some(calibration(&args, &checkpoint)?),
        false => None,
    };
    let progress = Progress::new("quantize", options.weights(&checkpoint) as u64, Unit::Count("weights"));
    let device = Device::default();
    let advance = |weights: usize| progress.advance(weights as u64);
    let report = quantize::<Cpu>(&checkpoint, &args.output, &options, calibration.as_ref(), &device, &advance)?;
    drop(progress);
    match args.json {
        true => print_line!("{}", serde_json::to_string_pretty(&report)?)?,
        false => print_report(&report)?,
    }
    Ok(())
}

/// The calibration text as windows of tokens.
fn calibration(args: &QuantizeArgs, checkpoint: &Checkpoint) -> Result<Calibration> {
    let text = match &args.calibration {
        Some(path) => fs::read_to_string(path).with_context(|| path.display().to_string())?,
        None => CALIBRATION.into(),
    };
    let tokens = tokenizer(checkpoint)?.encode(&text, true)?;
    let config = checkpoint.config();
    let calibration = Calibration::new(&tokens, args.calibration_context, args.calibration_tokens, config)?;
    let (found, wanted) = (calibration.tokens(), Calibration::tokens_wanted(config));
    if found < wanted && args.method.steps().look_at_text() {
        eprintln!("warning: {found} calibration tokens are few for this model: {wanted} or more give a better result");
    }
    Ok(calibration)
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

fn print_report(report: &Report) -> io::Result<()> {
    print_line!("ternary weights     {:>12}  {}", report.ternary_weights, bytes(report.ternary_bytes))?;
    print_line!("bits per weight     {:>12.3}", report.bits_per_weight)?;
    print_line!("full precision      {:>12}  {}", "", bytes(report.full_precision_bytes))?;
    if let Some(reduction) = &report.reduction {
        if let Some(planes) = reduction.table_planes {
            let planes = format!("planes: {planes}");
            print_line!("embedding, output   {planes:>12}  {}", bytes(reduction.table_bytes))?;
        }
        let (kept, before) = (reduction.experts_kept, reduction.experts_before);
        print_line!("experts a layer     {:>12}", format!("{kept} of {before}"))?;
    }
    let what = if report.calibration_tokens > 0 { "outputs" } else { "weights" };
    print_line!("relative error      {:>12.4}  (squared, of the {what}, mean)", report.mean_relative_error())?;
    match report.reduction.as_ref().and_then(|reduction| reduction.warning.as_ref()) {
        Some(warning) => print_line!("warning: {warning}"),
        None => Ok(()),
    }
}
