//! `ternoss demo`

use std::{fs, io, ops::ControlFlow, path::Path, time::Instant};

use anyhow::Result;
use burn::tensor::Device;
use clap::Args;
use ternoss::{
    backends::TernaryBackend,
    calib::{Calibration, Method, QuantizeOptions, Report, quantize},
    model::{
        Checkpoint, GptOss, LoadOptions, StopRules,
        sampling::{Sampler, SamplingConfig},
        tokenizer::Tokenizer,
    },
};

use super::{CALIBRATION, bytes, quantize::with_progress};
use crate::program::{
    backend::BackendArgs,
    progress::{Progress, Unit},
};

/// Quantize the small model inside this program and compare it before and after
///
/// Needs no network and no files: the model, its tokenizer and the text it is measured on are part of the program.
#[derive(Args)]
pub(crate) struct DemoArgs {
    /// Tokens of the text that perplexity is measured on
    #[arg(long, default_value_t = 16_384)]
    max_tokens: usize,
    /// Text to continue
    #[arg(long, default_value = "She was quite surprised to find that")]
    prompt: String,
    #[command(flatten)]
    compute: BackendArgs,
}

macro_rules! shipped {
    ($file:literal) => {
        ($file, include_bytes!(concat!("../../../examples/tiny-gpt-oss/", $file)).as_slice())
    };
}

/// The model folder, as it stands in `examples/tiny-gpt-oss`.
const MODEL: [(&str, &[u8]); 5] = [
    shipped!("config.json"),
    shipped!("generation_config.json"),
    shipped!("model.safetensors"),
    shipped!("tokenizer.json"),
    shipped!("tokenizer_config.json"),
];

/// The opening of "Persuasion", which the model was not trained on.
const TEXT: &str = include_str!("../../../examples/text/prose_test.txt");

/// Tokens of text that the ternary model is calibrated on.
const CALIBRATION_TOKENS: usize = 65_536;

/// Tokens per window, as in the reference figures.
const CONTEXT: usize = 256;

/// New tokens in a sample, and in each run of the speed measurement.
const NEW_TOKENS: usize = 64;

/// What is measured of a model.
struct Measured {
    bytes: u64,
    bits_per_weight: f64,
    perplexity: f64,
    tokens_per_second: f64,
    sample: String,
}

pub(crate) fn run(args: DemoArgs) -> Result<()> {
    on_backend!(args.compute.backend, compare(&args))
}

fn compare<B: TernaryBackend>(args: &DemoArgs, device: &Device<B>) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (dense, ternary) = (folder.path().join("dense"), folder.path().join("ternary"));
    write_model(&dense)?;
    let report = quantize_shipped::<B>(&dense, &ternary, device)?;
    let dense_bits = 16.0;
    let before = measure::<B>("full precision", &dense, dense_bits, args, device)?;
    let after = measure::<B>("ternary", &ternary, report.bits_per_weight, args, device)?;
    print_table(&before, &after)?;
    print_line!("\nThe same prompt, continued by both:\n")?;
    print_line!("full precision | {}{}\n", args.prompt, before.sample.trim_end())?;
    print_line!("ternary        | {}{}", args.prompt, after.sample.trim_end())?;
    Ok(())
}

/// Writes the model inside this program to a new folder.
pub(super) fn write_model(folder: &Path) -> io::Result<()> {
    fs::create_dir(folder)?;
    MODEL.into_iter().try_for_each(|(name, contents)| fs::write(folder.join(name), contents))
}

fn quantize_shipped<B: TernaryBackend>(dense: &Path, ternary: &Path, device: &Device<B>) -> Result<Report> {
    let checkpoint = Checkpoint::open(dense)?;
    let options = QuantizeOptions::new(Method::Ternoss);
    let tokens = Tokenizer::from_folder(dense)?.encode(CALIBRATION, true)?;
    let calibration = Calibration::new(&tokens, CONTEXT, CALIBRATION_TOKENS, checkpoint.config())?;
    let report = with_progress("quantize", &checkpoint, &options, |progress| {
        quantize::<B>(&checkpoint, ternary, &options, Some(&calibration), device, progress)
    })?;
    Ok(report)
}

fn measure<B: TernaryBackend>(
    name: &str,
    folder: &Path,
    bits_per_weight: f64,
    args: &DemoArgs,
    device: &Device<B>,
) -> Result<Measured> {
    let checkpoint = Checkpoint::open(folder)?;
    let model = GptOss::<B>::load(&checkpoint, LoadOptions::default(), device)?;
    let tokenizer = Tokenizer::from_folder(folder)?;
    let mut tokens = tokenizer.encode(TEXT, true)?;
    tokens.truncate(args.max_tokens);
    let progress = Progress::new(name, tokens.len() as u64, Unit::Count("tokens"));
    let perplexity = model.perplexity(&tokens, CONTEXT, |_| progress.advance(CONTEXT as u64))?;
    drop(progress);
    let prompt = tokenizer.encode(&args.prompt, true)?;
    let new = sample(&model, &prompt)?;
    Ok(Measured {
        bytes: checkpoint.tensors().map(|(_, entry)| entry.bytes() as u64).sum(),
        bits_per_weight,
        perplexity: perplexity.value(),
        tokens_per_second: decode_speed(&model, &prompt)?,
        sample: tokenizer.decode(&new, true)?,
    })
}

fn sample<B: TernaryBackend>(model: &GptOss<B>, prompt: &[u32]) -> Result<Vec<u32>> {
    let mut sampler = Sampler::new(SamplingConfig { temperature: 0.7, top_p: Some(0.9), ..Default::default() })?;
    let rules = StopRules { max_tokens: NEW_TOKENS, stop_tokens: model.config().eos_token_id.clone() };
    let go_on = |_| ControlFlow::Continue(());
    Ok(model.generate(prompt, &mut model.new_cache(), &mut sampler, &rules, go_on)?)
}

/// Tokens per second of greedy decoding after the prompt: the median of five runs.
fn decode_speed<B: TernaryBackend>(model: &GptOss<B>, prompt: &[u32]) -> Result<f64> {
    let rules = StopRules { max_tokens: NEW_TOKENS, stop_tokens: Vec::new() };
    let mut rates = Vec::new();
    for _ in 0..5 {
        let mut sampler = Sampler::new(SamplingConfig::greedy())?;
        let mut first = None;
        model.generate(prompt, &mut model.new_cache(), &mut sampler, &rules, |_| {
            first.get_or_insert_with(Instant::now);
            ControlFlow::Continue(())
        })?;
        let seconds = first.map_or(f64::NAN, |first: Instant| first.elapsed().as_secs_f64());
        rates.push((NEW_TOKENS - 1) as f64 / seconds);
    }
    rates.sort_by(f64::total_cmp);
    Ok(rates[rates.len() / 2])
}

fn print_table(before: &Measured, after: &Measured) -> io::Result<()> {
    let row = |name: &str, before: String, after: String| print_line!("{name:<36} {before:>16} {after:>16}");
    row("", "full precision".into(), "ternary".into())?;
    row("size of the weights", bytes(before.bytes as usize), bytes(after.bytes as usize))?;
    row(
        "bits per weight (attention, experts)",
        format!("{:.3}", before.bits_per_weight),
        format!("{:.3}", after.bits_per_weight),
    )?;
    row("perplexity", format!("{:.2}", before.perplexity), format!("{:.2}", after.perplexity))?;
    row("tokens per second", format!("{:.0}", before.tokens_per_second), format!("{:.0}", after.tokens_per_second))
}
