//! What was measured: as a table, and as JSON.

use std::io;

use serde::Serialize;
use serde_json::json;
use ternoss::model::Traffic;

use super::{super::bytes, machine::Memory};

/// Everything that was measured on a model.
pub(super) struct Results {
    pub(super) model: String,
    pub(super) instruction_set: String,
    pub(super) decode: Vec<Decode>,
    pub(super) prefill: Vec<Prefill>,
    pub(super) bandwidth: Vec<Bandwidth>,
    pub(super) memory: Option<Memory>,
    pub(super) load_seconds: f64,
    pub(super) first_token_seconds: f64,
    /// Of a token without context.
    pub(super) traffic: Traffic,
    /// Lengths of prompts, and the bytes each of their tokens reads.
    pub(super) batches: Vec<(usize, f64)>,
    /// Tokens of each expert while warming up: `[layers][experts]`.
    pub(super) visits: Vec<Vec<usize>>,
}

/// Decoding after a context.
#[derive(Serialize)]
pub(super) struct Decode {
    /// Of each sequence.
    pub(super) context: usize,
    /// Side by side.
    pub(super) sequences: usize,
    pub(super) threads: usize,
    /// Of all sequences together.
    pub(super) tokens_per_second: f64,
    /// The mean of the tokens decoded.
    pub(super) bytes_per_token: f64,
    pub(super) gigabytes_per_second: f64,
    /// Share of the time.
    pub(super) outside_kernels: f64,
    /// Tokens per second of each run.
    pub(super) runs: Vec<f64>,
}

/// Reading a prompt.
#[derive(Serialize)]
pub(super) struct Prefill {
    pub(super) tokens: usize,
    pub(super) threads: usize,
    pub(super) tokens_per_second: f64,
    pub(super) bytes_per_token: f64,
    /// Share of the time.
    pub(super) outside_kernels: f64,
    /// Tokens per second of each run.
    pub(super) runs: Vec<f64>,
}

/// What some threads together read from memory.
#[derive(Serialize)]
pub(super) struct Bandwidth {
    pub(super) threads: usize,
    pub(super) gigabytes_per_second: f64,
}

impl Results {
    /// Bytes a second that so many threads read from memory.
    pub(super) fn bandwidth(&self, threads: usize) -> f64 {
        let found = self.bandwidth.iter().find(|bandwidth| bandwidth.threads == threads);
        found.map_or(f64::NAN, |bandwidth| 1e9 * bandwidth.gigabytes_per_second)
    }

    /// By how much the runs of one measurement differ at most: the fastest over the slowest.
    fn noise(&self) -> f64 {
        let runs =
            self.decode.iter().map(|decode| &decode.runs).chain(self.prefill.iter().map(|prefill| &prefill.runs));
        let ratios = runs.map(|runs| {
            let (least, most) =
                runs.iter().fold((f64::INFINITY, 0.0), |(least, most), run| (run.min(least), run.max(most)));
            most / least
        });
        ratios.fold(1.0, f64::max)
    }

    /// Experts of each layer.
    fn experts(&self) -> usize {
        self.visits.first().map_or(0, Vec::len)
    }

    /// Experts that some token went to, in the layer where they are fewest.
    fn experts_touched(&self) -> usize {
        let touched = |counts: &Vec<usize>| counts.iter().filter(|count| **count > 0).count();
        self.visits.iter().map(touched).min().unwrap_or(0)
    }

    pub(super) fn print_json(&self) -> io::Result<()> {
        let Traffic { embedding, attention, cache, router, experts, norms, output } = self.traffic;
        let object = json!({
            "model": self.model,
            "instruction_set": self.instruction_set,
            "decode": self.decode,
            "prefill": self.prefill,
            "bandwidth": self.bandwidth,
            "bytes_without_context": {
                "embedding": embedding, "attention": attention, "cache": cache, "router": router,
                "experts": experts, "norms": norms, "output": output,
            },
            "memory": self.memory,
            "load_seconds": self.load_seconds,
            "first_token_seconds": self.first_token_seconds,
            "experts": self.experts(),
            "experts_touched": self.experts_touched(),
            "expert_visits": self.visits,
        });
        print_line!("{object}")
    }

    pub(super) fn print_table(&self) -> io::Result<()> {
        print_line!("{} ({})", self.model, self.instruction_set)?;
        self.print_decode()?;
        self.print_prefill()?;
        print_line!("")?;
        for Bandwidth { threads, gigabytes_per_second } in &self.bandwidth {
            print_line!("memory is read at {gigabytes_per_second:.1} GB/s by {}", counted(*threads, "thread"))?;
        }
        let differ = 100.0 * (self.noise() - 1.0);
        print_line!("runs of one measurement differ by up to {differ:.0} %: the less, the quieter the machine")?;
        print_line!("loaded in {:.2} s, first token after {:.2} s", self.load_seconds, self.first_token_seconds)?;
        match self.memory {
            Some(Memory { peak_resident_bytes: peak, mapped_bytes: mapped, anonymous_bytes: anonymous }) => {
                let [peak, mapped, anonymous] = [peak, mapped, anonymous].map(|size| bytes(size as usize));
                print_line!("resident memory: {peak} at the peak; at the end {mapped} of files and {anonymous} else")?;
            }
            None => print_line!("resident memory: not known, as this system has no /proc/self/status")?,
        }
        let Traffic { experts, output, .. } = self.traffic;
        let total = self.traffic.total();
        let [total, experts, output] = [total, experts, output].map(bytes);
        print_line!("a token without context reads {total}: {experts} of experts, {output} of the output layer")?;
        let counts = || self.visits.iter().flatten();
        let (least, most) = (counts().min().copied().unwrap_or(0), counts().max().copied().unwrap_or(0));
        let tokens = self.visits.first().map_or(0, |counts| counts.iter().sum::<usize>());
        let touched = format!("experts touched: {} of {}", self.experts_touched(), self.experts());
        print_line!("{touched} (each by {least} to {most} of {tokens} choices in a layer)")
    }

    fn print_decode(&self) -> io::Result<()> {
        if self.decode.is_empty() {
            return Ok(());
        }
        print_line!("")?;
        print_line!(
            "decode {:>8} {:>10} {:>8} {:>10} {:>10} {:>8} {:>13} {:>16}",
            "context",
            "sequences",
            "threads",
            "tokens/s",
            "MB/token",
            "GB/s",
            "of bandwidth",
            "outside kernels"
        )?;
        for decode in &self.decode {
            let Decode { context, sequences, threads, tokens_per_second: speed, bytes_per_token, .. } = decode;
            let (read, outside) = (decode.gigabytes_per_second, 100.0 * decode.outside_kernels);
            let (size, share) = (bytes_per_token / 1e6, 100.0 * 1e9 * read / self.bandwidth(*threads));
            let (speed, size, read) = (figure(*speed), figure(size), figure(read));
            print_line!(
                "{context:>15} {sequences:>10} {threads:>8} {speed:>10} {size:>10} {read:>8} {share:>11.0} % {outside:>14.1} %"
            )?;
        }
        Ok(())
    }

    fn print_prefill(&self) -> io::Result<()> {
        if self.prefill.is_empty() {
            return Ok(());
        }
        print_line!("")?;
        print_line!(
            "prefill {:>7} {:>19} {:>10} {:>10} {:>39}",
            "tokens",
            "threads",
            "tokens/s",
            "MB/token",
            "outside kernels"
        )?;
        for prefill in &self.prefill {
            let Prefill { tokens, threads, tokens_per_second, bytes_per_token, outside_kernels, .. } = prefill;
            let (speed, size) = (figure(*tokens_per_second), figure(bytes_per_token / 1e6));
            print_line!("{tokens:>15} {threads:>19} {speed:>10} {size:>10} {:>37.1} %", 100.0 * outside_kernels)?;
        }
        Ok(())
    }
}

/// `1 thread`, `2 threads`.
pub(super) fn counted(count: usize, what: &str) -> String {
    if count == 1 { format!("1 {what}") } else { format!("{count} {what}s") }
}

/// A number with three digits that matter.
pub(super) fn figure(number: f64) -> String {
    let decimals = if number < 10.0 { 2 } else { usize::from(number < 100.0) };
    format!("{number:.decimals$}")
}
