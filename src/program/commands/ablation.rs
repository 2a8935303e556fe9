//! `ternoss ablation`

use std::{fs, path::PathBuf, time::Instant};

use anyhow::{Context, Result};
use burn::tensor::Device;
use clap::Args;
use serde_json::json;
use ternoss::{
    backends::TernaryBackend,
    calib::{Method, QuantizeOptions, Steps, quantize},
    model::Checkpoint,
};

use super::{ModelArgs, calibration::CalibrationArgs, quantize::with_progress, tokenizer};

/// Measure what each step of the quantization is worth
///
/// Quantizes the model in several ways, measures each on the same text, and prints a table: the methods, the default method
/// with one step left out at a time, tuned by gradients, and with two planes. Nothing is kept.
#[derive(Args)]
pub(crate) struct AblationArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// UTF-8 text to measure on: not the one that is calibrated on
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Tokens per window of that text
    #[arg(long, default_value_t = 512)]
    context: usize,
    /// Only its first tokens
    #[arg(long, default_value_t = 16_384)]
    max_tokens: usize,
    #[command(flatten)]
    calibration: CalibrationArgs,
    /// Steps of reconstruction and of distillation
    #[arg(long, default_value_t = 40)]
    gradient_steps: usize,
    /// Print one JSON object a line
    #[arg(long)]
    json: bool,
}

/// A way to quantize.
struct Variant {
    name: String,
    options: QuantizeOptions,
}

fn variants(gradient_steps: usize) -> Result<Vec<Variant>> {
    let method = |name: &str, options| Variant { name: name.into(), options };
    let default = QuantizeOptions::new(Method::Ternoss);
    let mut variants = vec![
        method("absmean", QuantizeOptions::new(Method::Absmean)),
        method("fitted scales only", QuantizeOptions { steps: Steps::NONE, ..default }),
        method("pt-bitnet", QuantizeOptions::new(Method::PtBitnet)),
    ];
    for step in Steps::NAMES {
        let steps = default.steps.without(step).map_err(anyhow::Error::msg)?;
        // What is not among the steps cannot be left out.
        if steps != default.steps {
            let options = QuantizeOptions { steps, ..default };
            variants.push(Variant { name: format!("ternoss without {step}"), options });
        }
    }
    let reconstructed = Steps { reconstruction: gradient_steps, ..default.steps };
    variants.extend([
        method("ternoss", default),
        method("ternoss, reconstruction", QuantizeOptions { steps: reconstructed, ..default }),
        method("ternoss, distilled", QuantizeOptions { distill: gradient_steps, ..default }),
        method("ternoss, 2 planes", QuantizeOptions { planes: 2, ..default }),
    ]);
    Ok(variants)
}

pub(crate) fn run(args: AblationArgs) -> Result<()> {
    on_backend!(args.model.backend(), compare(&args))
}

fn compare<B: TernaryBackend>(args: &AblationArgs, device: &Device<B>) -> Result<()> {
    let checkpoint = args.model.checkpoint()?;
    let tokenizer = tokenizer(&checkpoint)?;
    let text = fs::read_to_string(&args.text).with_context(|| args.text.display().to_string())?;
    let mut tokens = tokenizer.encode(&text, true)?;
    tokens.truncate(args.max_tokens);
    let calibration = args.calibration.windows::<B>(&args.model, &checkpoint, None, args.gradient_steps, device)?;
    if !args.json {
        print_line!("{:<28} {:>12} {:>14} {:>8}", "", "bits/weight", "perplexity", "seconds")?;
    }
    print_row(args, "full precision", None, measure::<B>(args, &checkpoint, &tokens, device)?, 0.0)?;
    for Variant { name, options } in variants(args.gradient_steps)? {
        let folder = tempfile::tempdir()?;
        let output = folder.path().join("ternary");
        let started = Instant::now();
        let report = with_progress(&name, &checkpoint, &options, |progress| {
            quantize::<B>(&checkpoint, &output, &options, Some(&calibration), device, progress)
        })?;
        let seconds = started.elapsed().as_secs_f64();
        let perplexity = measure::<B>(args, &Checkpoint::open(&output)?, &tokens, device)?;
        print_row(args, &name, Some(report.bits_per_weight), perplexity, seconds)?;
    }
    Ok(())
}

fn measure<B: TernaryBackend>(
    args: &AblationArgs,
    checkpoint: &Checkpoint,
    tokens: &[u32],
    device: &Device<B>,
) -> Result<f64> {
    Ok(args.model.load::<B>(checkpoint, device)?.perplexity(tokens, args.context, |_| ())?.value())
}

fn print_row(args: &AblationArgs, name: &str, bits: Option<f64>, perplexity: f64, seconds: f64) -> Result<()> {
    if args.json {
        let row = json!({ "name": name, "bits_per_weight": bits, "perplexity": perplexity, "seconds": seconds });
        return Ok(print_line!("{row}")?);
    }
    let bits = bits.map_or_else(|| "-".into(), |bits| format!("{bits:.3}"));
    let perplexity = if perplexity < 1e5 { format!("{perplexity:.2}") } else { format!("{perplexity:.1e}") };
    Ok(print_line!("{name:<28} {bits:>12} {perplexity:>14} {seconds:>8.0}")?)
}
