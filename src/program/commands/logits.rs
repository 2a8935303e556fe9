//! `ternoss logits`

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use burn::tensor::Device;
use clap::Args;
use safetensors::{Dtype, tensor::TensorView};
use ternoss::{
    backends::{KvFormat, TernaryBackend},
    model::LanguageModel,
};

use super::{ModelArgs, token_ids};

/// Write the logits of every token of a sequence to a safetensors file
///
/// One float32 tensor `logits`, [tokens, vocabulary]. Dense linears compute in float32, ternary ones on 8-bit activations.
#[derive(Args)]
pub(crate) struct LogitsArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Token ids, as 1,2,3
    #[arg(long, value_name = "IDS")]
    tokens: String,
    /// File to write
    #[arg(long, value_name = "FILE.safetensors")]
    output: PathBuf,
}

pub(crate) fn run(args: LogitsArgs) -> Result<()> {
    let tokens = token_ids(&args.tokens).map_err(anyhow::Error::msg)?;
    ensure!(!tokens.is_empty(), "there are no tokens: at least one is needed");
    on_backend!(args.model.backend(), write(&args, &tokens))
}

fn write<B: TernaryBackend>(args: &LogitsArgs, tokens: &[u32], device: &Device<B>) -> Result<()> {
    let checkpoint = args.model.checkpoint()?;
    match args.model.layers_on_device(&checkpoint)? {
        None => write_logits(args, tokens, &args.model.load::<B>(&checkpoint, device)?),
        Some(layers) => {
            write_logits(args, tokens, &args.model.load_split::<B>(&checkpoint, KvFormat::F32, layers, device)?)
        }
    }
}

fn write_logits<M: LanguageModel>(args: &LogitsArgs, tokens: &[u32], model: &M) -> Result<()> {
    let logits = model.logits_of(tokens, &mut model.new_cache())?;
    let shape = logits.dims().to_vec();
    let bytes: Vec<u8> = logits.into_data().iter::<f32>().flat_map(f32::to_le_bytes).collect();
    let view = TensorView::new(Dtype::F32, shape, &bytes)?;
    let mut partial = args.output.clone().into_os_string();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let failed = || args.output.display().to_string();
    let written = safetensors::serialize_to_file([("logits", view)], None, &partial)
        .map_err(anyhow::Error::from)
        .and_then(|()| Ok(std::fs::File::open(&partial)?.sync_all()?))
        .and_then(|()| Ok(std::fs::rename(&partial, &args.output)?));
    if written.is_err() {
        // Half a file is of no use, and whether it can be removed changes nothing about the error.
        let _ = std::fs::remove_file(&partial);
    }
    written.with_context(failed)
}
