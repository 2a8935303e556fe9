//! `ternoss generate`

use std::{
    io::{self, Write},
    ops::ControlFlow,
    time::Instant,
};

use anyhow::{Result, bail};
use burn::tensor::Device;
use clap::Args;
use serde_json::{Value, json};
use ternoss::{
    backends::{KvFormat, TernaryBackend},
    model::{
        Checkpoint, LanguageModel, StopRules,
        harmony::{Effort, Harmony},
        language_model::SequenceCache,
        sampling::{Sampler, SamplingConfig},
        table::Screening,
        tokenizer::Tokenizer,
    },
};

use super::{ModelArgs, chat, stop_tokens, token_ids, tokenizer};

/// Continue a prompt
#[derive(Args)]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Text to continue
    #[arg(long, required_unless_present = "tokens", conflicts_with = "tokens")]
    prompt: Option<String>,
    /// Token ids to continue, as 1,2,3: needs no tokenizer
    #[arg(long, value_name = "IDS", value_parser = TokenIds::parse)]
    tokens: Option<TokenIds>,
    /// Take the prompt as a user's message, in gpt-oss's notation for conversations, and print the answer; what the model
    /// thinks goes to stderr
    #[arg(long, requires = "prompt", conflicts_with_all = ["tokens", "ignore_eos"])]
    chat: bool,
    /// How long the model thinks before it answers: low, medium or high
    #[arg(long, value_name = "EFFORT", default_value = "medium", value_parser = chat::effort, requires = "chat")]
    reasoning: Effort,
    /// New tokens at most
    #[arg(long, default_value_t = 128)]
    max_tokens: usize,
    /// Go on past the model's stop tokens
    #[arg(long)]
    ignore_eos: bool,
    /// Print one JSON object with the new tokens, and their text where there is a tokenizer
    #[arg(long)]
    json: bool,
    /// Compute the logits of all tokens, instead of those alone that a compact copy of the output layer cannot rule out
    #[arg(long, conflicts_with = "memory_budget")]
    exact_output: bool,
    /// Guess up to N next tokens from the text so far and check them in one batch (ternary models; 0 is off); the text stays
    /// the same
    #[arg(long, value_name = "N", default_value_t = 8)]
    speculate: usize,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// Token ids given on the command line.
#[derive(Clone)]
struct TokenIds(Vec<u32>);

impl TokenIds {
    fn parse(text: &str) -> Result<Self, String> {
        token_ids(text).map(Self)
    }
}

/// How the next token is chosen.
#[derive(Args)]
pub(crate) struct SamplingArgs {
    /// Always the likeliest token
    #[arg(long)]
    greedy: bool,
    /// Flattens (above 1) or sharpens (below 1) the distribution
    #[arg(long, default_value_t = 1.0)]
    temperature: f32,
    /// Only the K likeliest tokens
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Only the likeliest tokens that together reach probability P
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,
    /// Only tokens at least P times as likely as the likeliest
    #[arg(long, value_name = "P")]
    min_p: Option<f32>,
    /// Divides the logits of tokens that occurred already (1 is off)
    #[arg(long, default_value_t = 1.0)]
    repetition_penalty: f32,
    /// The same seed gives the same text
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

impl SamplingArgs {
    fn config(&self) -> SamplingConfig {
        SamplingConfig {
            temperature: if self.greedy { 0.0 } else { self.temperature },
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            seed: self.seed,
        }
    }
}

pub(crate) fn run(args: GenerateArgs) -> Result<()> {
    on_backend!(args.model.backend(), go_on(&args))
}

fn go_on<B: TernaryBackend>(args: &GenerateArgs, device: &Device<B>) -> Result<()> {
    // Settings that make no sense are refused before anything is loaded.
    args.sampling.config().validate()?;
    let checkpoint = args.model.checkpoint()?;
    match args.model.layers_on_device(&checkpoint)? {
        None => write(args, &checkpoint, || args.model.load_writer::<B>(&checkpoint, device)),
        Some(layers) => {
            write(args, &checkpoint, || args.model.load_split::<B>(&checkpoint, KvFormat::F16, layers, device))
        }
    }
}

/// Writes with the model that `load` makes, once everything else is known to be right.
fn write<M: LanguageModel>(
    args: &GenerateArgs,
    checkpoint: &Checkpoint,
    load: impl FnOnce() -> Result<M>,
) -> Result<()> {
    let mut sampler = Sampler::new(args.sampling.config())?;
    let tokenizer = match &args.tokens {
        None => Some(tokenizer(checkpoint)?),
        // Ids need no tokenizer, but one that is there gives their text.
        Some(_) => Tokenizer::from_folder(checkpoint.folder()).ok(),
    };
    if let (Some(question), Some(tokenizer), true) = (&args.prompt, &tokenizer, args.chat) {
        return answer(args, checkpoint, &Harmony::new(tokenizer)?, question, &mut sampler, load);
    }
    let prompt = match (&args.prompt, &args.tokens, &tokenizer) {
        (Some(text), _, Some(tokenizer)) => tokenizer.encode(text, true)?,
        (_, Some(TokenIds(ids)), _) => ids.clone(),
        _ => bail!("there is neither a prompt nor tokens"),
    };
    let model = args.screened(load()?);
    let stop_tokens = if args.ignore_eos { Vec::new() } else { stop_tokens(checkpoint)? };
    let rules = StopRules { max_tokens: args.max_tokens, stop_tokens };
    let started = Instant::now();
    let mut printer = Printer { stream: tokenizer.as_ref().map(Tokenizer::stream), quiet: args.json, error: None };
    if let (Some(text), false) = (&args.prompt, args.json) {
        printer.write(text);
    }
    let new = model.generate(&prompt, &mut args.cache(&model), &mut sampler, &rules, |token| printer.token(token))?;
    printer.finish()?;
    if args.json {
        let mut object = json!({ "tokens": new });
        if let Some(tokenizer) = &tokenizer {
            object["text"] = json!(tokenizer.decode(&new, true)?);
        }
        add_computed(&mut object, &sampler);
        print_line!("{object}")?;
    }
    log_speed(prompt.len(), new.len(), started, &sampler);
    Ok(())
}

impl GenerateArgs {
    /// The model, with its output layer screened unless everything is to be read.
    fn screened<M: LanguageModel>(&self, mut model: M) -> M {
        if self.exact_output {
            let last = model.last_part_mut();
            last.lm_head = last.lm_head.clone().with_screening(Screening::Never);
        }
        model
    }

    fn cache<M: LanguageModel>(&self, model: &M) -> M::Cache {
        model.new_cache().with_spare(self.speculate)
    }
}

/// Prints what the model answers to a question.
fn answer<M: LanguageModel>(
    args: &GenerateArgs,
    checkpoint: &Checkpoint,
    harmony: &Harmony,
    question: &str,
    sampler: &mut Sampler,
    load: impl FnOnce() -> Result<M>,
) -> Result<()> {
    let prompt = chat::prompt(harmony, question, args.reasoning)?;
    let stop_tokens = [stop_tokens(checkpoint)?.as_slice(), &harmony.stop_tokens()].concat();
    let rules = StopRules { max_tokens: args.max_tokens, stop_tokens };
    let model = args.screened(load()?);
    let started = Instant::now();
    let mut printer = chat::Printer::new(harmony, args.json);
    let new = model.generate(&prompt, &mut args.cache(&model), sampler, &rules, |token| printer.token(token))?;
    printer.finish(&new, sampler)?;
    log_speed(prompt.len(), new.len(), started, sampler);
    Ok(())
}

fn log_speed(prompt: usize, new: usize, started: Instant, sampler: &Sampler) {
    let rate = (prompt + new) as f64 / started.elapsed().as_secs_f64();
    tracing::info!("{prompt} prompt tokens, {new} new, {rate:.1} tokens/s");
    if let Some(mean) = sampler.computed().mean() {
        tracing::info!("output layer screened: {mean:.1} logits computed for a token");
    }
}

/// How many logits were computed for a token, where the output layer was screened.
pub(super) fn add_computed(object: &mut Value, sampler: &Sampler) {
    if let Some(mean) = sampler.computed().mean() {
        object["computed_logits"] = json!(mean);
    }
}

/// Writes tokens to stdout as they come: as text, or as ids where there is no tokenizer.
struct Printer<'a> {
    stream: Option<ternoss::model::tokenizer::TextStream<'a>>,
    quiet: bool,
    error: Option<anyhow::Error>,
}

impl Printer<'_> {
    fn token(&mut self, token: u32) -> ControlFlow<()> {
        if self.quiet {
            return ControlFlow::Continue(());
        }
        let text = match &mut self.stream {
            Some(stream) => stream.push(token).map_err(anyhow::Error::from),
            None => Ok(Some(format!("{token} "))),
        };
        match text {
            Ok(Some(text)) => self.write(&text),
            Ok(None) => {}
            Err(error) => self.error = Some(error),
        }
        if self.error.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn write(&mut self, text: &str) {
        let mut out = io::stdout().lock();
        if let Err(error) = out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            self.error = Some(error.into());
        }
    }

    fn finish(mut self) -> Result<()> {
        if !self.quiet {
            let rest = self.stream.take().map(|stream| stream.finish()).transpose()?.flatten();
            self.write(&rest.unwrap_or_default());
            self.write("\n");
        }
        self.error.map_or(Ok(()), Err)
    }
}
