//! Text that the full-precision model writes itself, to be calibrated on.
//!
//! It has the model's own distribution, which no collected text has: on it the inputs of every layer are those that the
//! model will see when it is used. Source: LLM-QAT (Liu et al. 2023, arXiv 2305.17888), which trains on such text.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Seek, SeekFrom, Write},
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use ternoss_backends::TernaryBackend;
use ternoss_model::{
    CheckpointError, GenerateError, GptOss, StopRules,
    checkpoint::fingerprint,
    sampling::{Sampler, SamplingConfig},
};

use crate::CalibError;

/// How traces are written.
#[derive(Clone, Debug)]
pub struct TraceOptions {
    /// Tokens in all.
    pub tokens: usize,
    /// New tokens that follow a prompt at most.
    pub longest: usize,
    /// Tokens that end a trace; they are part of it.
    pub stop_tokens: Vec<u32>,
    /// Start of the random numbers.
    pub seed: u64,
}

/// Prompts, each with what the model makes of it at temperature 1, one after the other.
///
/// Trace `n` goes on from prompt `n`, counted round the prompts, with random numbers of its own, so it depends on the
/// model, its prompt, the seed and `n` alone.
#[derive(Debug)]
pub struct Traces {
    prompts: Vec<Vec<u32>>,
    options: TraceOptions,
    finished: Vec<Vec<u32>>,
    file: Option<Kept>,
}

/// A file of finished traces: a line with what they depend on, then a line of token ids for each.
#[derive(Debug)]
struct Kept {
    path: PathBuf,
    settings: Value,
    /// Its bytes up to the last line that is whole and of use.
    bytes: u64,
}

impl Traces {
    /// No traces yet.
    pub fn new(prompts: Vec<Vec<u32>>, options: TraceOptions) -> Self {
        Self { prompts, options, finished: Vec::new(), file: None }
    }

    /// Keeps every finished trace in a file, and starts with those that an earlier run has kept there, unless they are
    /// another model's ([`Checkpoint::stamp`](ternoss_model::Checkpoint::stamp)) or were written with other options.
    pub fn keep_in(&mut self, path: &Path, model: &Value) {
        let prompts = self.prompts.iter().flat_map(|prompt| [&[prompt.len() as u32], prompt.as_slice()].concat());
        let settings = json!({
            "program": env!("CARGO_PKG_VERSION"),
            "model": model,
            "prompts": fingerprint(prompts.flat_map(u32::to_le_bytes)),
            "longest": self.options.longest,
            "stop tokens": self.options.stop_tokens,
            "seed": self.options.seed,
        });
        let text = fs::read_to_string(path).unwrap_or_default();
        // A line without its end was being written when the run was killed.
        let mut lines = text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
        let mut bytes = 0;
        if lines.next().and_then(|line| serde_json::from_str::<Value>(line).ok()).is_some_and(|line| line == settings) {
            bytes = settings.to_string().len() + 1;
            for line in lines {
                let Ok(trace) = serde_json::from_str(line) else {
                    break;
                };
                bytes += line.len() + 1;
                self.finished.push(trace);
            }
        }
        self.file = Some(Kept { path: path.into(), settings, bytes: bytes as u64 });
    }

    /// Whether there are as many tokens as were asked for.
    pub fn are_enough(&self) -> bool {
        self.written() >= self.options.tokens
    }

    fn written(&self) -> usize {
        self.finished.iter().map(Vec::len).sum()
    }

    /// The tokens of all traces, as many as were asked for.
    pub fn tokens(&self) -> Vec<u32> {
        self.finished.iter().flatten().copied().take(self.options.tokens).collect()
    }

    /// Lets the model write until there are enough; `progress` hears how many tokens came since its last call.
    ///
    /// # Errors
    /// [`CalibError::Trace`] when the model cannot go on from a prompt, [`CalibError::Checkpoint`] when the file cannot be
    /// written.
    pub fn write<B: TernaryBackend>(
        &mut self,
        model: &GptOss<B>,
        progress: &mut dyn FnMut(usize),
    ) -> Result<(), CalibError> {
        let mut file = self.file.as_ref().map(|kept| Ok::<_, CalibError>((kept.open()?, kept))).transpose()?;
        let mut written = self.written();
        progress(written);
        while written < self.options.tokens && !self.prompts.is_empty() {
            let trace = self.trace(model, self.finished.len(), progress)?;
            if let Some((file, kept)) = &mut file {
                let line = format!("{}\n", json!(trace));
                file.write_all(line.as_bytes()).map_err(|source| kept.failed(source))?;
            }
            written += trace.len();
            self.finished.push(trace);
        }
        Ok(())
    }

    /// Trace `number`: a prompt, what follows it, and the token that ends it, if it came to an end.
    fn trace<B: TernaryBackend>(
        &self,
        model: &GptOss<B>,
        number: usize,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Vec<u32>, CalibError> {
        let prompt = &self.prompts[number % self.prompts.len()];
        // Mixed, so that neighbouring seeds share no trace.
        let seed = fingerprint([self.options.seed, number as u64].into_iter().flat_map(u64::to_le_bytes));
        let mut sampler =
            Sampler::new(SamplingConfig { seed, ..SamplingConfig::default() }).map_err(GenerateError::from)?;
        let rules = StopRules { max_tokens: self.options.longest, stop_tokens: Vec::new() };
        let new = model.generate(prompt, &mut model.new_cache(), &mut sampler, &rules, |token| {
            progress(1);
            // Not a rule, as the token that ends a trace belongs to it.
            match self.options.stop_tokens.contains(&token) {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        })?;
        progress(prompt.len());
        Ok([prompt.as_slice(), &new].concat())
    }
}

impl Kept {
    /// The file, cut to what is of use and held against other runs.
    fn open(&self) -> Result<File, CalibError> {
        let failed = |source| self.failed(source);
        let options = OpenOptions::new().create(true).truncate(false).write(true).open(&self.path);
        let mut file = options.map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(CheckpointError::Busy { path: self.path.clone() }.into()),
            Err(TryLockError::Error(source)) => return Err(self.failed(source)),
        }
        file.set_len(self.bytes).map_err(failed)?;
        file.seek(SeekFrom::End(0)).map_err(failed)?;
        if self.bytes == 0 {
            file.write_all(format!("{}\n", self.settings).as_bytes()).map_err(failed)?;
        }
        Ok(file)
    }

    fn failed(&self, source: io::Error) -> CalibError {
        CheckpointError::Io { path: self.path.clone(), source }.into()
    }
}
