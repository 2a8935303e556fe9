//! The measurements.

use std::{ops::ControlFlow, time::Instant};

use anyhow::Result;
use burn::tensor::{Device, Tensor};
use ternoss::{
    backends::{TernaryBackend, ops::time_in_operations},
    model::{
        GptOss, KvCache, StopRules,
        sampling::{Choice, Sampler, SamplingConfig},
    },
};

use super::{
    ModelArgs, Plan,
    results::{Decode, Prefill},
};
use crate::program::progress::Progress;

/// Seconds, as medians.
pub(super) struct LoadTimes {
    /// From nothing to a model.
    pub(super) load: f64,
    /// From nothing to the logits after the first prompt token.
    pub(super) first_token: f64,
}

/// Loads the model and runs a token, once for warm pages and then as often as the plan says.
pub(super) fn load<B: TernaryBackend>(
    args: &ModelArgs,
    plan: &Plan,
    device: &Device<B>,
) -> Result<(GptOss<B>, LoadTimes)> {
    let first = &plan.ids[..1];
    let once = || -> Result<(GptOss<B>, [f64; 2])> {
        let started = Instant::now();
        let model = args.load_writer::<B>(&args.checkpoint()?, device)?;
        let loaded = started.elapsed().as_secs_f64();
        wait_for(&model.prefill(first, &mut model.new_cache())?)?;
        Ok((model, [loaded, started.elapsed().as_secs_f64()]))
    };
    let mut model = plan.widest().install(once)?.0;
    let (mut load, mut first_token) = (Vec::new(), Vec::new());
    for _ in 0..plan.runs {
        // One model at a time: full-precision ones are large.
        drop(model);
        let seconds;
        (model, seconds) = plan.widest().install(once)?;
        load.push(seconds[0]);
        first_token.push(seconds[1]);
    }
    Ok((
        model,
        LoadTimes { load: median(load, |seconds| *seconds), first_token: median(first_token, |seconds| *seconds) },
    ))
}

/// Until a tensor is computed: GPUs work on while the program goes on.
fn wait_for<B: TernaryBackend>(tensor: &Tensor<B, 2>) -> Result<()> {
    Ok(B::sync(&tensor.device())?)
}

/// One measurement.
#[derive(Clone, Copy)]
struct Sample {
    seconds: f64,
    /// Share of them outside ternoss's own operations.
    outside: f64,
}

impl Sample {
    fn of<T>(work: impl FnOnce() -> T) -> (Self, T) {
        let (started, inside) = (Instant::now(), time_in_operations());
        let result = work();
        let seconds = started.elapsed().as_secs_f64();
        let inside = (time_in_operations() - inside).as_secs_f64();
        (Self { seconds, outside: (1.0 - inside / seconds.max(1e-9)).max(0.0) }, result)
    }
}

/// The middle one; the slower one of two.
fn median<T: Copy>(mut all: Vec<T>, seconds: impl Fn(&T) -> f64) -> T {
    all.sort_by(|a, b| seconds(a).total_cmp(&seconds(b)));
    all[all.len() / 2]
}

/// A model and what is measured on it.
pub(super) struct Bench<'a, B: TernaryBackend> {
    pub(super) model: &'a GptOss<B>,
    pub(super) plan: &'a Plan,
    pub(super) progress: &'a Progress,
}

impl<B: TernaryBackend> Bench<'_, B> {
    /// Brings the pages that tokens read into memory, and counts the tokens of each expert: `[layers][experts]`.
    pub(super) fn warm_up(&self) -> Result<Vec<Vec<usize>>> {
        let ids = self.plan.warm_up();
        let tokens = self.model.tokens(ids)?;
        let visits = self.plan.widest().install(|| self.model.expert_visits(tokens, &mut self.model.new_cache()));
        self.progress.advance(ids.len() as u64);
        Ok(visits)
    }

    /// Decoding after each context, so many sequences at a time, by each number of threads; and the cache of the longest
    /// context.
    pub(super) fn decode(&self) -> Result<(Vec<Decode>, KvCache<B>)> {
        let mut cache = self.model.new_cache();
        let mut results = Vec::new();
        for context in &self.plan.contexts {
            self.fill(&mut cache, *context)?;
            for sequences in &self.plan.sequences {
                results.extend(self.decode_side_by_side(&cache, *sequences)?);
            }
        }
        Ok((results, cache))
    }

    /// Decoding of `sequences` sequences that begin alike.
    fn decode_side_by_side(&self, cache: &KvCache<B>, sequences: usize) -> Result<Vec<Decode>> {
        let (context, steps) = (cache.position(), self.plan.decode);
        let tokens = sequences * steps;
        let next = &self.plan.ids[context..][..tokens];
        let samples = match sequences {
            1 => self.sample(tokens, || cache.clone(), |cache| self.decode_once(next, cache))?,
            _ => self.sample(tokens, || vec![cache.clone(); sequences], |caches| self.decode_batch(next, caches))?,
        };
        let bytes = (0..steps).map(|more| self.model.batch_traffic(context + more, sequences).total()).sum::<usize>();
        let bytes_per_token = bytes as f64 / tokens as f64;
        let results = self.plan.pools.iter().zip(samples).map(|(pool, (sample, runs))| {
            let tokens_per_second = tokens as f64 / sample.seconds;
            Decode {
                context,
                sequences,
                threads: pool.current_num_threads(),
                tokens_per_second,
                bytes_per_token,
                gigabytes_per_second: tokens_per_second * bytes_per_token / 1e9,
                outside_kernels: sample.outside,
                runs,
            }
        });
        Ok(results.collect())
    }

    /// Reading prompts of each length, by each number of threads.
    pub(super) fn prefill(&self) -> Result<Vec<Prefill>> {
        let mut results = Vec::new();
        for tokens in &self.plan.prefill {
            let prompt = &self.plan.ids[..*tokens];
            let read = |mut cache| wait_for(&self.model.prefill(prompt, &mut cache)?);
            let samples = self.sample(*tokens, || self.model.new_cache(), read)?;
            results.extend(self.plan.pools.iter().zip(samples).map(|(pool, (sample, runs))| Prefill {
                tokens: *tokens,
                threads: pool.current_num_threads(),
                tokens_per_second: *tokens as f64 / sample.seconds,
                bytes_per_token: bytes_a_token(self.model, *tokens),
                outside_kernels: sample.outside,
                runs,
            }));
        }
        Ok(results)
    }

    /// Some work on `tokens` tokens for each pool, each time with a cache of its own: the median, and the speed of every
    /// run. Pools take turns, so that a noisy minute hits all of them.
    fn sample<C: Send>(
        &self,
        tokens: usize,
        cache: impl Fn() -> C,
        work: impl Fn(C) -> Result<()> + Sync,
    ) -> Result<Vec<(Sample, Vec<f64>)>> {
        let mut samples = vec![Vec::new(); self.plan.pools.len()];
        for _ in 0..self.plan.runs {
            for (pool, samples) in self.plan.pools.iter().zip(&mut samples) {
                let cache = cache();
                let (sample, result) = pool.install(|| Sample::of(|| work(cache)));
                result?;
                samples.push(sample);
                self.progress.advance(tokens as u64);
            }
        }
        let summary = |samples: Vec<Sample>| {
            let runs = samples.iter().map(|sample| tokens as f64 / sample.seconds).collect();
            (median(samples, |sample| sample.seconds), runs)
        };
        Ok(samples.into_iter().map(summary).collect())
    }

    /// Brings the cache to `context` tokens.
    fn fill(&self, cache: &mut KvCache<B>, context: usize) -> Result<()> {
        let new = &self.plan.ids[cache.position()..context];
        if !new.is_empty() {
            self.plan.widest().install(|| self.model.prefill(new, cache))?;
            self.progress.advance(new.len() as u64);
        }
        Ok(())
    }

    /// Decodes one token after the other, the choice of the next one included; but random ones come next, so that they go
    /// to all experts whatever the model would say.
    fn decode_once(&self, ids: &[u32], mut cache: KvCache<B>) -> Result<()> {
        let mut sampler = Sampler::new(SamplingConfig::greedy())?;
        let rules = StopRules { max_tokens: 1, stop_tokens: Vec::new() };
        B::session(|| {
            for id in ids {
                self.model.generate(&[*id], &mut cache, &mut sampler, &rules, |_| ControlFlow::Continue(()))?;
            }
            Ok(())
        })
    }

    /// Decodes sequences side by side, the choice of the next tokens included; each goes on with random ones of its own.
    fn decode_batch(&self, ids: &[u32], mut caches: Vec<KvCache<B>>) -> Result<()> {
        let sequences: Vec<&[u32]> = ids.chunks(ids.len() / caches.len()).collect();
        let mut samplers =
            caches.iter().map(|_| Sampler::new(SamplingConfig::greedy())).collect::<Result<Vec<_>, _>>()?;
        let mut caches: Vec<_> = caches.iter_mut().collect();
        B::session(|| {
            for step in 0..self.plan.decode {
                let next: Vec<u32> = sequences.iter().map(|ids| ids[step]).collect();
                let hidden = self.model.hidden_batch(self.model.tokens(&next)?, &mut caches);
                let choices = samplers.iter_mut().map(|sampler| Choice { sampler, history: &[] });
                self.model.next_tokens(hidden, &mut choices.collect::<Vec<_>>())?;
            }
            Ok(())
        })
    }
}

/// Bytes that a token of a prompt of `tokens` reads.
pub(super) fn bytes_a_token<B: TernaryBackend>(model: &GptOss<B>, tokens: usize) -> f64 {
    model.prefill_traffic(tokens).total() as f64 / tokens as f64
}
