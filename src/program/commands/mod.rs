//! The program's commands: each file is one, with its arguments, its run function and its printing.

/// `println!` to a reader that may go away: an error then, and no panic.
macro_rules! print_line {
    ($($text:tt)*) => {
        std::io::Write::write_fmt(&mut std::io::stdout().lock(), format_args!("{}\n", format_args!($($text)*)))
    };
}

pub(crate) mod ablation;
pub(crate) mod bench;
mod calibration;
mod chat;
pub(crate) mod demo;
pub(crate) mod devices;
pub(crate) mod download;
pub(crate) mod generate;
pub(crate) mod inspect;
pub(crate) mod logits;
pub(crate) mod perplexity;
pub(crate) mod quantize;
pub(crate) mod synthesize;

use std::path::PathBuf;

use anyhow::{Context, Result};
use burn::tensor::{Device, backend::Backend};
use clap::Args;
use ternoss::{
    Cpu,
    backends::{KvFormat, TernaryBackend},
    model::{
        Checkpoint, ExpertPlacement, GptOss, LoadOptions, SplitModel, checkpoint::readable_size as bytes,
        config::GenerationConfig, split::fitting_layers, tokenizer::Tokenizer,
    },
};

use crate::program::{backend::BackendArgs, byte_size::byte_size};

/// The text to calibrate on unless another is given: the openings of "Emma" and of some encyclopedia articles.
const CALIBRATION: &str = include_str!("../../../examples/text/calibration.txt");

/// Which model, and how it is held in memory.
#[derive(Args)]
pub(crate) struct ModelArgs {
    /// Model folder, or hub id such as openai/gpt-oss-20b
    #[arg(long, value_name = "DIR")]
    model: String,
    /// Decode full-precision experts whenever they are chosen instead of holding them in memory
    #[arg(long)]
    stream_experts: bool,
    /// Resident memory at most, such as 1.5GiB: ternary experts are read from disk when they are chosen. Choosing from the
    /// whole vocabulary (no --greedy, --top-k, --top-p or --min-p) takes the output layer's size more
    #[arg(long, value_name = "SIZE", value_parser = byte_size)]
    memory_budget: Option<u64>,
    /// Rewrite t5 weights as t2 in memory: faster, but they are no longer shared with the file
    #[arg(long, conflicts_with = "memory_budget")]
    unpack: bool,
    /// How keys and values are kept: f32, f16 or int8; f16 where text is written, f32 where a model is measured
    #[arg(long, value_name = "FORMAT", value_parser = kv_format)]
    kv_cache: Option<KvFormat>,
    #[command(flatten)]
    compute: BackendArgs,
    /// Layers that --backend computes, the first N of the model; the processor computes the rest (generate, perplexity, logits).
    /// Chosen automatically where a GPU's memory is known and too small
    #[arg(long, value_name = "N")]
    gpu_layers: Option<usize>,
}

fn kv_format(text: &str) -> Result<KvFormat, String> {
    let known = KvFormat::ALL.into_iter().find(|format| format.to_string() == text);
    known.ok_or_else(|| "expected f32, f16 or int8".into())
}

impl ModelArgs {
    fn new(model: &str) -> Self {
        Self {
            model: model.into(),
            stream_experts: false,
            memory_budget: None,
            unpack: false,
            kv_cache: None,
            compute: BackendArgs::default(),
            gpu_layers: None,
        }
    }

    /// What computes.
    fn backend(&self) -> crate::program::backend::Backend {
        self.compute.backend
    }

    /// The model's folder, downloaded when it is a hub id.
    fn folder(&self) -> Result<PathBuf> {
        download::resolve_model(&self.model)
    }

    fn checkpoint(&self) -> Result<Checkpoint> {
        Ok(Checkpoint::open(&self.folder()?)?)
    }

    fn load<B: Backend>(&self, checkpoint: &Checkpoint, device: &Device<B>) -> Result<GptOss<B>> {
        self.load_with(checkpoint, KvFormat::F32, device)
    }

    /// For writing text, where speed counts.
    fn load_writer<B: Backend>(&self, checkpoint: &Checkpoint, device: &Device<B>) -> Result<GptOss<B>> {
        self.load_with(checkpoint, KvFormat::F16, device)
    }

    fn load_with<B: Backend>(
        &self,
        checkpoint: &Checkpoint,
        kv_format: KvFormat,
        device: &Device<B>,
    ) -> Result<GptOss<B>> {
        Ok(GptOss::load(checkpoint, self.options(kv_format), device)?)
    }

    /// The first layers on a device, the rest on the processor.
    fn load_split<B: TernaryBackend>(
        &self,
        checkpoint: &Checkpoint,
        kv_format: KvFormat,
        layers: usize,
        device: &Device<B>,
    ) -> Result<SplitModel<B, Cpu>> {
        Ok(SplitModel::load(checkpoint, self.options(kv_format), layers, (device, &Default::default()))?)
    }

    fn options(&self, kv_format: KvFormat) -> LoadOptions {
        let kv_format = self.kv_cache.unwrap_or(kv_format);
        let experts = if self.stream_experts { ExpertPlacement::Streamed } else { ExpertPlacement::Auto };
        LoadOptions { experts, memory_budget: self.memory_budget, unpack: self.unpack, kv_format }
    }

    /// How many layers go to the device; `None` if the whole model does.
    fn layers_on_device(&self, checkpoint: &Checkpoint) -> Result<Option<usize>> {
        if self.gpu_layers.is_some() {
            return Ok(self.gpu_layers);
        }
        let Some(memory) = self.backend().device_memory() else { return Ok(None) };
        let fitting = fitting_layers(checkpoint, memory);
        if let Some(layers) = fitting {
            let all = checkpoint.config().num_hidden_layers();
            eprintln!(
                "the device's {} hold {layers} of {all} layers; the processor computes the rest",
                bytes(memory as usize)
            );
        }
        Ok(fitting)
    }
}

/// The tokenizer in a model's folder.
fn tokenizer(checkpoint: &Checkpoint) -> Result<Tokenizer> {
    Tokenizer::from_folder(checkpoint.folder()).context("this command needs the model's tokenizer")
}

/// The tokens that end a text: those of `generation_config.json`, or of `config.json` where it names none.
fn stop_tokens(checkpoint: &Checkpoint) -> Result<Vec<u32>> {
    let generation = GenerationConfig::from_folder(checkpoint.folder())?;
    Ok(match generation.eos_token_id.is_empty() {
        true => checkpoint.config().eos_token_id.clone(),
        false => generation.eos_token_id,
    })
}

/// Parses `1,2,3`.
fn token_ids(text: &str) -> Result<Vec<u32>, String> {
    let parse = |part: &str| part.trim().parse().map_err(|_| format!("{part:?} is not a token id"));
    match text.trim() {
        "" => Ok(Vec::new()),
        ids => ids.split(',').map(parse).collect(),
    }
}
