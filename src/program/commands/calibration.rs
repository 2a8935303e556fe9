//! The text that `quantize` and `ablation` calibrate on.

use std::path::{Path, PathBuf};

use anyhow::Result;
use burn::tensor::Device;
use clap::Args;
use ternoss::{
    backends::TernaryBackend,
    calib::{CalibError, Calibration, TraceOptions, Traces, WINDOWS_PER_STEP},
    model::{
        Checkpoint,
        harmony::{Analysis, Effort, Harmony, Message, System},
        tokenizer::Tokenizer,
    },
};

use super::{CALIBRATION, ModelArgs, stop_tokens, tokenizer};
use crate::program::progress::{Progress, Unit};

/// What the model is asked when it writes the text itself, a prompt a line.
const PROMPTS: &str = include_str!("../../../examples/text/seed_prompts.txt");

/// What stands for the model's own text in place of a file.
const OWN: &str = "self";

/// New tokens of one answer at most.
const LONGEST: usize = 1024;

/// Which text to calibrate on.
#[derive(Args)]
pub(crate) struct CalibrationArgs {
    /// UTF-8 text to calibrate on, the more like the text the model is for, the better; or "self": the model writes it,
    /// which takes as long as generating that many tokens. Without it, some novels and encyclopedia articles that are part of
    /// this program
    #[arg(long, value_name = "FILE|self")]
    calibration: Option<PathBuf>,
    /// Tokens of the text to use at most
    #[arg(long, default_value_t = 32_768)]
    calibration_tokens: usize,
    /// Tokens the model sees at a time while it is calibrated
    #[arg(long, default_value_t = 1024)]
    calibration_context: usize,
    /// Another seed makes the model write another text (with --calibration self)
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

impl CalibrationArgs {
    /// Whether a text was asked for.
    pub(crate) fn is_given(&self) -> bool {
        self.calibration.is_some()
    }

    /// Whether the model shall write the text itself.
    pub(crate) fn is_own(&self) -> bool {
        self.calibration.as_ref().is_some_and(|path| path.as_os_str() == OWN)
    }

    /// The text as windows of tokens, more of them for `distill` steps of distillation. What the model writes itself is kept in `traces`, so that it is written once.
    pub(crate) fn windows<B: TernaryBackend>(
        &self,
        model: &ModelArgs,
        checkpoint: &Checkpoint,
        traces: Option<&Path>,
        distill: usize,
        device: &Device<B>,
    ) -> Result<Calibration> {
        let tokenizer = tokenizer(checkpoint)?;
        let text = |text: &str| Ok(tokenizer.encode(text, true)?);
        let tokens = match &self.calibration {
            None => text(CALIBRATION),
            Some(_) if self.is_own() => self.own_text::<B>(model, checkpoint, &tokenizer, traces, device),
            Some(path) => text(&Calibration::read_text(path)?),
        };
        let config = checkpoint.config();
        let tokens = tokens?;
        let calibration = Calibration::new(&tokens, self.calibration_context, self.calibration_tokens, config)?
            .with_fresh(&tokens, distill * WINDOWS_PER_STEP);
        if let Some(shortage) = calibration.shortage(config) {
            eprintln!("warning: {shortage}");
        }
        Ok(calibration)
    }

    /// What the model makes of the prompts in this program.
    fn own_text<B: TernaryBackend>(
        &self,
        model: &ModelArgs,
        checkpoint: &Checkpoint,
        tokenizer: &Tokenizer,
        kept: Option<&Path>,
        device: &Device<B>,
    ) -> Result<Vec<u32>> {
        let context = self.calibration_context;
        // What is said of any text, but before hours of work.
        if context < 2 || self.calibration_tokens < context {
            let wanted = Calibration::tokens_wanted(checkpoint.config());
            return Err(CalibError::ShortText { tokens: self.calibration_tokens, context, wanted }.into());
        }
        let (prompts, ends) = prompts(tokenizer)?;
        let options = TraceOptions {
            tokens: self.calibration_tokens / context * context,
            longest: context.min(LONGEST),
            stop_tokens: [stop_tokens(checkpoint)?, ends].concat(),
            seed: self.seed,
        };
        let progress = Progress::new("own text", options.tokens as u64, Unit::Count("tokens"));
        let mut traces = Traces::new(prompts, options);
        if let Some(path) = kept {
            traces.keep_in(path, &checkpoint.stamp());
        }
        if !traces.are_enough() {
            traces.write(&model.load::<B>(checkpoint, device)?, &mut |tokens| progress.advance(tokens as u64))?;
        }
        Ok(traces.tokens())
    }
}

/// The prompts as tokens, and the tokens that end an answer: conversations for a model that knows gpt-oss's, plain text
/// to go on from for any other.
fn prompts(tokenizer: &Tokenizer) -> Result<(Vec<Vec<u32>>, Vec<u32>)> {
    let texts: Vec<&str> = PROMPTS.lines().filter(|line| !line.is_empty()).collect();
    let Ok(harmony) = Harmony::new(tokenizer) else {
        let prompts: Result<_, _> = texts.iter().map(|text| tokenizer.encode(text, true)).collect();
        return Ok((prompts?, Vec::new()));
    };
    // Every prompt with every effort, the efforts in turn.
    let efforts = [Effort::Low, Effort::Medium, Effort::High];
    let asked =
        (0..efforts.len()).flat_map(|round| texts.iter().enumerate().map(move |(at, text)| (at + round, *text)));
    let prompts = asked.map(|(turn, text)| {
        let system = System { reasoning_effort: Some(efforts[turn % efforts.len()]), ..System::default() };
        harmony.prompt(&[Message::system(system), Message::user(text)], Analysis::Drop)
    });
    Ok((prompts.collect::<Result<_, _>>()?, harmony.stop_tokens().to_vec()))
}

/// Where the model's own text is kept until the folder `output` is whole.
pub(crate) fn traces_file(output: &Path) -> PathBuf {
    let mut name = output.file_name().unwrap_or(output.as_os_str()).to_owned();
    name.push(".traces.jsonl");
    output.with_file_name(name)
}
