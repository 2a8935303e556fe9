//! `ternoss perplexity`

use std::{fs, path::PathBuf};

use anyhow::{Context, Result};
use burn::tensor::Device;
use clap::Args;
use serde_json::json;
use ternoss::{
    backends::{KvFormat, TernaryBackend},
    model::{Agreement, Checkpoint, LanguageModel},
};

use super::{ModelArgs, tokenizer};
use crate::program::progress::{Progress, Unit};

/// Measure perplexity on a text
///
/// The text is tokenized once, cut into windows that do not overlap, the tail is dropped; the result is exp of the mean
/// cross-entropy over all predicted tokens.
#[derive(Args)]
pub(crate) struct PerplexityArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// UTF-8 text file
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Tokens per window
    #[arg(long, default_value_t = 512)]
    context: usize,
    /// Only the first tokens of the text
    #[arg(long)]
    max_tokens: Option<usize>,
    /// Also compare with this model, the one it was made from: mean KL divergence, and share of equal likeliest tokens
    #[arg(long, value_name = "DIR")]
    against: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: PerplexityArgs) -> Result<()> {
    on_backend!(args.model.backend(), measure(&args))
}

fn measure<B: TernaryBackend>(args: &PerplexityArgs, device: &Device<B>) -> Result<()> {
    let checkpoint = args.model.checkpoint()?;
    match args.model.layers_on_device(&checkpoint)? {
        None => compare(args, &checkpoint, |args, checkpoint| args.load::<B>(checkpoint, device)),
        Some(layers) => compare(args, &checkpoint, |args, checkpoint| {
            args.load_split::<B>(checkpoint, KvFormat::F32, layers, device)
        }),
    }
}

/// Measures the model that `load` makes of a folder, beside the one it was made from if there is such a one.
fn compare<M: LanguageModel>(
    args: &PerplexityArgs,
    checkpoint: &Checkpoint,
    load: impl Fn(&ModelArgs, &Checkpoint) -> Result<M>,
) -> Result<()> {
    let tokenizer = tokenizer(checkpoint)?;
    let text = fs::read_to_string(&args.text).with_context(|| args.text.display().to_string())?;
    let mut tokens = tokenizer.encode(&text, true)?;
    tokens.truncate(args.max_tokens.unwrap_or(usize::MAX));
    let model = load(&args.model, checkpoint)?;
    let whole = tokens.len() / args.context.max(1) * args.context;
    let progress = Progress::new("perplexity", whole as u64, Unit::Count("tokens"));
    let result = model.perplexity(&tokens, args.context, |_| progress.advance(args.context as u64))?;
    drop(progress);
    let agreement = match &args.against {
        Some(teacher) => {
            let teacher = ModelArgs::new(teacher);
            let teacher = load(&teacher, &teacher.checkpoint()?)?;
            let progress = Progress::new("comparison", whole as u64, Unit::Count("tokens"));
            Some(model.agreement(&teacher, &tokens, args.context, || progress.advance(args.context as u64))?)
        }
        None => None,
    };
    if args.json {
        let (perplexity, tokens, windows) = (result.value(), result.tokens, result.windows);
        let mut object = json!({ "perplexity": perplexity, "tokens": tokens, "windows": windows });
        if let Some(Agreement { kl_divergence, top_1 }) = agreement {
            object["kl_divergence"] = json!(kl_divergence);
            object["top_1"] = json!(top_1);
        }
        print_line!("{object}")?;
    } else {
        print_line!("perplexity {:.4}", result.value())?;
        print_line!("{} tokens predicted in {} windows of {}", result.tokens, result.windows, args.context)?;
        if let Some(Agreement { kl_divergence, top_1 }) = agreement {
            print_line!("KL divergence {kl_divergence:.4} nats, likeliest token equal in {:.1} %", 100.0 * top_1)?;
        }
    }
    Ok(())
}
