//! `ternoss bench`

mod backends;
mod comparison_picture;
mod machine;
mod measure;
mod picture;
mod quantized;
mod results;
mod row;

use std::{fs, path::PathBuf, thread};

use anyhow::{Context, Result, ensure};
use burn::tensor::Device;
use clap::{Args, builder::RangedU64ValueParser};
use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};
use rayon::{ThreadPool, ThreadPoolBuilder};
use ternoss::{
    backends::{TernaryBackend, cpu::Isa, read_bandwidth},
    model::GptOssConfig,
};

use super::ModelArgs;
use crate::program::{
    backend::guarded,
    progress::{Progress, Unit},
};
use machine::Memory;
use measure::{Bench, bytes_a_token, load};
use results::{Bandwidth, Results};
use row::print_row;

/// Tokens that bring the model's pages into memory.
const WARM_UP: usize = 512;

/// Measure speed, bytes read and memory
///
/// Decodes and reads random tokens, several times each, and tells the median. What a token reads of the model is computed
/// from its parts, and compared with the bandwidth at which this machine reads memory.
#[derive(Args)]
pub(crate) struct BenchArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Lengths of the prompts that are timed
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "128,512,2048", value_parser = from(1))]
    prefill: Vec<usize>,
    /// Tokens that are decoded in one measurement
    #[arg(long, value_name = "N", default_value = "32", value_parser = from(1))]
    decode: usize,
    /// How many tokens come before those that are decoded
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "0,512,4096", value_parser = from(0))]
    context: Vec<usize>,
    /// How many sequences are decoded side by side, up to 1024
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "1", value_parser = between(1, 1024))]
    sequences: Vec<usize>,
    /// Numbers of threads; one for each core unless given
    #[arg(long, value_name = "N,..", value_delimiter = ',', value_parser = from(1))]
    threads: Vec<usize>,
    /// How often everything is measured
    #[arg(long, value_name = "N", default_value = "3", value_parser = from(1))]
    runs: usize,
    /// The same seed gives the same tokens
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Compare Burn's own operations, Burn's own 8-bit linears and this project's on every backend there is, each in a process
    /// of its own; takes the shortest --prefill, no context, the fewest --sequences and the most --threads
    #[arg(long)]
    backends: bool,
    #[command(flatten)]
    row: row::RowArgs,
    /// Also draw the results
    #[arg(long, value_name = "FILE.svg")]
    picture: Option<PathBuf>,
}

/// Counts of at least `least`, and few enough to be added up.
fn from(least: u64) -> RangedU64ValueParser<usize> {
    between(least, 1 << 24)
}

fn between(least: u64, most: u64) -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(least..=most)
}

pub(crate) fn run(args: BenchArgs) -> Result<()> {
    if args.backends {
        return backends::compare(&args);
    }
    if let (Some(operations), Some(logits)) = (args.row.row, &args.row.logits) {
        let backend = args.model.backend();
        return guarded(backend, || on_backend!(backend, print_row(&args, operations, logits)));
    }
    on_backend!(args.model.backend(), measure(&args))
}

fn measure<B: TernaryBackend>(args: &BenchArgs, device: &Device<B>) -> Result<()> {
    let checkpoint = args.model.checkpoint()?;
    let plan = Plan::new(args, checkpoint.config())?;
    drop(checkpoint);
    let (model, times) = load::<B>(&args.model, &plan, device)?;
    let progress = Progress::new("bench", plan.work(), Unit::Count("tokens"));
    let bench = Bench { model: &model, plan: &plan, progress: &progress };
    let visits = bench.warm_up()?;
    let (decode, caches) = bench.decode()?;
    let prefill = bench.prefill()?;
    let memory = Memory::now();
    drop((caches, progress));
    let read = read_bandwidth(&plan.pools);
    let threads = plan.pools.iter().map(ThreadPool::current_num_threads);
    let results = Results {
        model: args.model.model.clone(),
        instruction_set: Isa::detect().to_string(),
        decode,
        prefill,
        bandwidth: threads.zip(read).map(|(threads, read)| Bandwidth { threads, gigabytes_per_second: read }).collect(),
        memory,
        load_seconds: times.load,
        first_token_seconds: times.first_token,
        traffic: model.decode_traffic(0),
        batches: plan.batches().map(|tokens| (tokens, bytes_a_token(&model, tokens))).collect(),
        visits,
    };
    if let Some(file) = &args.picture {
        fs::write(file, picture::picture(&results)).with_context(|| file.display().to_string())?;
    }
    if args.json {
        results.print_json()?
    } else {
        results.print_table()?
    }
    Ok(())
}

/// The counts in order, each once.
fn ascending(counts: &[usize]) -> Vec<usize> {
    let mut counts = counts.to_vec();
    counts.sort_unstable();
    counts.dedup();
    counts
}

/// What is measured.
struct Plan {
    /// Ascending.
    contexts: Vec<usize>,
    prefill: Vec<usize>,
    decode: usize,
    /// Ascending.
    sequences: Vec<usize>,
    runs: usize,
    /// One for each number of threads, ascending.
    pools: Vec<ThreadPool>,
    /// As many as the longest measurement needs.
    ids: Vec<u32>,
}

impl Plan {
    fn new(args: &BenchArgs, config: &GptOssConfig) -> Result<Self> {
        let most = config.max_position_embeddings;
        let sorted = |values: &[usize], option: &str, more: usize| {
            let mut values = ascending(values);
            let fitting = values.partition_point(|value| value + more <= most);
            for value in values.drain(fitting..) {
                eprintln!("skipped {option} {value}: {} tokens are more than the model's {most}", value + more);
            }
            values
        };
        let contexts = sorted(&args.context, "--context", args.decode);
        let prefill = sorted(&args.prefill, "--prefill", 0);
        ensure!(contexts.len() + prefill.len() > 0, "nothing to measure: the model is made for {most} tokens at most");
        let mut threads = args.threads.clone();
        if threads.is_empty() {
            threads.push(thread::available_parallelism().map_or(1, Into::into));
        }
        let pool = |threads: usize| {
            let pool = ThreadPoolBuilder::new().num_threads(threads).build();
            pool.with_context(|| format!("{threads} threads cannot be started"))
        };
        let sequences = ascending(&args.sequences);
        let decoded = args.decode * sequences.last().copied().unwrap_or(1);
        let longest = [prefill.last().copied(), contexts.last().map(|context| context + decoded)];
        let mut random = ChaCha8Rng::seed_from_u64(args.seed);
        let vocabulary = config.vocab_size as u32;
        let ids = (0..longest.into_iter().flatten().max().unwrap_or(1)).map(|_| random.random_range(0..vocabulary));
        Ok(Self {
            contexts,
            prefill,
            decode: args.decode,
            sequences,
            runs: args.runs,
            pools: ascending(&threads).into_iter().map(pool).collect::<Result<_>>()?,
            ids: ids.collect(),
        })
    }

    /// The shortest prompt, no context, the fewest sequences, the most threads.
    fn shortest(self) -> Self {
        let pools = self.pools.into_iter().next_back().into_iter().collect();
        let prefill = self.prefill.into_iter().take(1).collect();
        let contexts = self.contexts.into_iter().take(1).collect();
        let sequences = self.sequences.into_iter().take(1).collect();
        Self { contexts, prefill, sequences, pools, ..self }
    }

    /// Tokens that go through the model at first, so that its pages are in memory.
    fn warm_up(&self) -> &[u32] {
        &self.ids[..self.ids.len().min(WARM_UP)]
    }

    /// The pool with the most threads.
    fn widest(&self) -> &ThreadPool {
        &self.pools[self.pools.len() - 1]
    }

    /// Powers of two up to the longest prompt, and that.
    fn batches(&self) -> impl Iterator<Item = usize> {
        let longest = self.prefill.last().copied().unwrap_or(1);
        (0..).map(|power| 1 << power).take_while(move |tokens| *tokens < longest).chain([longest])
    }

    /// Tokens that go through the model once it is loaded.
    fn work(&self) -> u64 {
        let decoded = self.contexts.len() * self.decode * self.sequences.iter().sum::<usize>();
        let timed = decoded + self.prefill.iter().sum::<usize>();
        let filled = self.contexts.last().copied().unwrap_or(0);
        (self.warm_up().len() + filled + timed * self.runs * self.pools.len()) as u64
    }
}
