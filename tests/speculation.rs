//! Guessed tokens change the time that a text takes, never the text.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod support;

use std::ops::ControlFlow;

use support::example;
use ternoss::{
    Cpu,
    model::{
        Checkpoint, GptOss, KvCache, LoadOptions, StopRules,
        sampling::{Sampler, SamplingConfig},
    },
    quant::TernaryConfig,
};

fn model() -> GptOss<Cpu> {
    let checkpoint = Checkpoint::open(&example("tiny-gpt-oss")).unwrap();
    let dense = GptOss::<Cpu>::load(&checkpoint, LoadOptions::default(), &Default::default()).unwrap();
    dense.to_ternary(&TernaryConfig::default()).unwrap()
}

fn written(
    model: &GptOss<Cpu>,
    cache: &mut KvCache<Cpu>,
    prompt: &[u32],
    config: SamplingConfig,
    rules: &StopRules,
) -> Vec<u32> {
    let mut sampler = Sampler::new(config).unwrap();
    model.generate(prompt, cache, &mut sampler, rules, |_| ControlFlow::Continue(())).unwrap()
}

/// A text that repeats itself, longer than the model's window of 64.
fn repetitive() -> Vec<u32> {
    (0..120).map(|i| [301, 17, 256, 88, 402, 19, 77][i % 7]).collect()
}

#[test]
fn the_text_is_the_same_greedy_or_sampled() {
    let model = model();
    let rules = StopRules { max_tokens: 200, stop_tokens: Vec::new() };
    let sampled =
        SamplingConfig { temperature: 0.7, top_k: Some(5), repetition_penalty: 1.1, seed: 3, ..Default::default() };
    for prompt in [repetitive(), vec![5, 9, 13]] {
        for config in [SamplingConfig::greedy(), sampled] {
            let expected = written(&model, &mut model.new_cache(), &prompt, config, &rules);
            for spare in [1, 4, 16] {
                let mut cache = model.new_cache().with_spare(spare);
                assert_eq!(written(&model, &mut cache, &prompt, config, &rules), expected, "up to {spare} guessed");
                // All but the last token, as without guesses.
                assert_eq!(cache.position(), prompt.len() + expected.len() - 1);
            }
        }
    }
}

#[test]
fn a_text_can_be_gone_on_with_wherever_it_ended() {
    let model = model();
    let prompt = repetitive();
    let rules = |max_tokens| StopRules { max_tokens, stop_tokens: Vec::new() };
    let whole = written(&model, &mut model.new_cache(), &prompt, SamplingConfig::greedy(), &rules(60));
    for first in 0..12 {
        let mut cache = model.new_cache().with_spare(8);
        let mut found = written(&model, &mut cache, &prompt, SamplingConfig::greedy(), &rules(first));
        assert_eq!(found, whole[..first]);
        let last = [*prompt.iter().chain(&found).last().unwrap()];
        if first == 0 {
            // Nothing was written: the whole prompt is in the cache, and its last token is to be read again.
            cache.truncate(prompt.len() - 1);
        }
        found.extend(written(&model, &mut cache, &last, SamplingConfig::greedy(), &rules(60 - first)));
        assert_eq!(found, whole, "after {first}");
    }
}

#[test]
fn stop_tokens_and_a_reader_that_leaves_end_it_at_once() {
    let model = model();
    let prompt = repetitive();
    let all = written(
        &model,
        &mut model.new_cache(),
        &prompt,
        SamplingConfig::greedy(),
        &StopRules { max_tokens: 40, stop_tokens: Vec::new() },
    );
    for place in [0, 3, 7, 20] {
        let rules = StopRules { max_tokens: 40, stop_tokens: vec![all[place]] };
        let expected = written(&model, &mut model.new_cache(), &prompt, SamplingConfig::greedy(), &rules);
        let mut cache = model.new_cache().with_spare(8);
        assert_eq!(written(&model, &mut cache, &prompt, SamplingConfig::greedy(), &rules), expected);
        assert_eq!(cache.position(), prompt.len() + expected.len());

        let mut seen = Vec::new();
        let mut sampler = Sampler::new(SamplingConfig::greedy()).unwrap();
        let rules = StopRules { max_tokens: 40, stop_tokens: Vec::new() };
        let leave = |token| {
            seen.push(token);
            if seen.len() > place { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let mut cache = model.new_cache().with_spare(8);
        let found = model.generate(&prompt, &mut cache, &mut sampler, &rules, leave).unwrap();
        assert_eq!(found, all[..=place]);
        assert_eq!(seen, found);
    }
}
