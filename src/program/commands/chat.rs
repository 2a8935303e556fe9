//! One question and its answer, in gpt-oss's notation for conversations: what `generate --chat` adds.

use std::{
    io::{self, IsTerminal, Write},
    ops::ControlFlow,
};

use anyhow::Result;
use serde_json::{Value, json};
use ternoss::model::{
    harmony::{Analysis, Effort, Harmony, HarmonyError, Message, Parser, Piece, System},
    sampling::Sampler,
};

use super::generate::add_computed;

/// The channel of the answer.
const FINAL: &str = "final";

/// How dim text begins and ends on a terminal.
const DIM: [&str; 2] = ["\x1b[2m", "\x1b[0m"];

/// Parses `--reasoning`.
pub(super) fn effort(text: &str) -> Result<Effort, String> {
    match text {
        "low" => Ok(Effort::Low),
        "medium" => Ok(Effort::Medium),
        "high" => Ok(Effort::High),
        _ => Err("expected low, medium or high".into()),
    }
}

/// A user's message as tokens. No date is in it, so that the same seed gives the same answer on every day.
pub(super) fn prompt(harmony: &Harmony, question: &str, effort: Effort) -> Result<Vec<u32>, HarmonyError> {
    let system = System { reasoning_effort: Some(effort), ..System::default() };
    harmony.prompt(&[Message::system(system), Message::user(question)], Analysis::Drop)
}

/// Prints an answer as it comes: what is for the user to stdout, the rest to stderr.
pub(super) struct Printer<'a> {
    parser: Parser<'a>,
    quiet: bool,
    /// Whether stderr shows text dimmed.
    dims: bool,
    /// Whether anything was for the user.
    answered: bool,
    /// Whether stderr stands within a line.
    thinking: bool,
    error: Option<anyhow::Error>,
}

impl<'a> Printer<'a> {
    /// A printer; a `quiet` one prints a JSON object at the end.
    pub(super) fn new(harmony: &Harmony<'a>, quiet: bool) -> Self {
        let (parser, dims) = (harmony.parser(), io::stderr().is_terminal());
        Self { parser, quiet, dims, answered: false, thinking: false, error: None }
    }

    /// Takes the next token.
    pub(super) fn token(&mut self, token: u32) -> ControlFlow<()> {
        let piece = self.parser.push(token).map_err(anyhow::Error::from);
        match piece.and_then(|piece| self.print(piece)) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                self.error = Some(error);
                ControlFlow::Break(())
            }
        }
    }

    fn print(&mut self, piece: Option<Piece>) -> Result<()> {
        let Some(Piece { channel, text }) = piece.filter(|_| !self.quiet) else {
            return Ok(());
        };
        if is_answer(channel.as_deref()) {
            self.end_of_thinking()?;
            self.answered = true;
            let mut out = io::stdout().lock();
            out.write_all(text.as_bytes())?;
            return Ok(out.flush()?);
        }
        self.thinking = true;
        let [dim, bright] = if self.dims { DIM } else { [""; 2] };
        Ok(io::stderr().lock().write_all(format!("{dim}{text}{bright}").as_bytes())?)
    }

    fn end_of_thinking(&mut self) -> io::Result<()> {
        match std::mem::take(&mut self.thinking) {
            true => io::stderr().lock().write_all(b"\n"),
            false => Ok(()),
        }
    }

    /// Prints the rest; `tokens` are all that came, chosen by `sampler`.
    pub(super) fn finish(mut self, tokens: &[u32], sampler: &Sampler) -> Result<()> {
        if let Some(error) = self.error {
            return Err(error);
        }
        let rest = self.parser.finish()?;
        self.print(rest)?;
        if self.quiet {
            let mut object = answer(self.parser.messages(), tokens);
            add_computed(&mut object, sampler);
            return Ok(print_line!("{object}")?);
        }
        self.end_of_thinking()?;
        if !self.answered {
            eprintln!("note: no answer within {} tokens (--max-tokens)", tokens.len());
        }
        Ok(print_line!("")?)
    }
}

/// Whether a channel's text is for the user. Text on no channel is, for want of anything better.
fn is_answer(channel: Option<&str>) -> bool {
    channel.is_none_or(|channel| channel == FINAL)
}

fn answer(messages: &[Message], tokens: &[u32]) -> Value {
    let answers = messages.iter().filter(|message| is_answer(message.channel.as_deref()));
    let text: String = answers.map(Message::text).collect();
    let messages: Vec<Value> = messages
        .iter()
        .map(|message| json!({ "channel": message.channel, "recipient": message.recipient, "text": message.text() }))
        .collect();
    json!({ "tokens": tokens, "text": text, "messages": messages })
}
