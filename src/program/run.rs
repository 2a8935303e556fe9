//! The command line.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use super::{
    commands::{ablation, bench, demo, devices, download, generate, inspect, logits, perplexity, quantize, synthesize},
    error,
};

/// gpt-oss made ternary after training, and run on an ordinary CPU.
#[derive(Parser)]
#[command(version, about, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Demo(demo::DemoArgs),
    Download(download::DownloadArgs),
    Synthesize(synthesize::SynthesizeArgs),
    Inspect(inspect::InspectArgs),
    Devices(devices::DevicesArgs),
    Quantize(quantize::QuantizeArgs),
    Generate(generate::GenerateArgs),
    Perplexity(perplexity::PerplexityArgs),
    Logits(logits::LogitsArgs),
    Bench(bench::BenchArgs),
    Ablation(ablation::AblationArgs),
}

/// Does what the command line says.
pub fn run() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env();
    let filter = filter.unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_env_filter(filter).init();
    let result = match Arguments::parse().command {
        Command::Demo(args) => demo::run(args),
        Command::Download(args) => download::run(args),
        Command::Synthesize(args) => synthesize::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Devices(args) => devices::run(args),
        Command::Quantize(args) => quantize::run(args),
        Command::Generate(args) => generate::run(args),
        Command::Perplexity(args) => perplexity::run(args),
        Command::Logits(args) => logits::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Ablation(args) => ablation::run(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => error::report(&error),
    }
}
