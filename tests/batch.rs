//! Texts that are written side by side are those that each would be alone.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod support;

use std::ops::ControlFlow;

use burn::tensor::{Tensor, backend::Backend};
use burn_flex::Flex;
use burn_ndarray::NdArray;
use support::example;
use ternoss::{
    backends::TernaryBackend,
    model::{
        Checkpoint, GenerateError, GptOss, KvCache, LoadOptions, StopRules,
        batch::Text,
        sampling::{Sampler, SamplingConfig},
        table::Screening,
    },
    quant::TernaryConfig,
};

/// What a backend that is not batch-invariant may make of the same token in other company.
const TOLERANCE: f32 = 1e-3;

fn model<B: TernaryBackend>() -> GptOss<B> {
    let checkpoint = Checkpoint::open(&example("tiny-gpt-oss")).unwrap();
    let dense = GptOss::<B>::load(&checkpoint, LoadOptions::default(), &Default::default()).unwrap();
    dense.to_ternary(&TernaryConfig::default()).unwrap()
}

fn sampled() -> SamplingConfig {
    SamplingConfig { temperature: 0.8, top_k: Some(7), repetition_penalty: 1.1, seed: 5, ..Default::default() }
}

fn rules(max_tokens: usize) -> StopRules {
    StopRules { max_tokens, stop_tokens: Vec::new() }
}

/// Prompts of different lengths, one longer than the window of 64; different ways to choose, and ends.
fn cases() -> Vec<(Vec<u32>, SamplingConfig, StopRules)> {
    let long = (0..100).map(|i| (i * 37 + 11) % 500).collect();
    vec![
        (vec![5, 9, 13], SamplingConfig::greedy(), rules(40)),
        (long, sampled(), rules(25)),
        (vec![301], SamplingConfig { top_k: Some(3), ..SamplingConfig::default() }, rules(1)),
        (vec![17, 17, 4], SamplingConfig { top_p: Some(0.9), seed: 8, ..SamplingConfig::default() }, rules(33)),
        (vec![8, 1], SamplingConfig::greedy(), rules(0)),
    ]
}

fn alone<B: TernaryBackend>(model: &GptOss<B>, prompt: &[u32], config: SamplingConfig, rules: &StopRules) -> Vec<u32> {
    let mut sampler = Sampler::new(config).unwrap();
    let go_on = |_| ControlFlow::Continue(());
    model.generate(prompt, &mut model.new_cache(), &mut sampler, rules, go_on).unwrap()
}

fn texts_are_those_of_each_alone<B: TernaryBackend>(model: &GptOss<B>) {
    let mut cases = cases();
    // The token that would come eleventh ends the first text.
    let stop = alone(model, &cases[0].0, cases[0].1, &cases[0].2)[10];
    cases[0].2.stop_tokens.push(stop);
    let text = |(prompt, config, rules): &(Vec<u32>, SamplingConfig, StopRules)| {
        Text::new(prompt.clone(), model.new_cache(), Sampler::new(*config).unwrap(), rules.clone())
    };
    let texts = model.generate_batch(cases.iter().map(text).collect()).unwrap();
    for (text, (prompt, config, rules)) in texts.iter().zip(&cases) {
        assert_eq!(text.written(), alone(model, prompt, *config, rules), "after {prompt:?}");
    }
    assert!(texts[0].written().len() <= 10 && texts[1].written().len() == 25);
}

/// Several tokens of each of three sequences that are at different positions.
fn states_are_those_of_each_alone<B: TernaryBackend>() {
    let model = model::<B>();
    let prompts: [&[u32]; 3] = [&[1, 2, 3], &[40; 70], &[9]];
    let next = [[7, 8], [100, 101], [3, 3]];
    let caches = || {
        prompts.map(|prompt| {
            let mut cache = model.new_cache();
            model.forward(model.tokens(prompt).unwrap(), &mut cache);
            cache
        })
    };
    let apart = caches().into_iter().zip(next).map(|(mut cache, next)| {
        let hidden = model.hidden(model.tokens(&next).unwrap(), &mut cache);
        (hidden, cache.position())
    });
    let (apart, positions): (Vec<_>, Vec<_>) = apart.unzip();
    let mut caches = caches();
    let mut refs: Vec<_> = caches.iter_mut().collect();
    let together = model.hidden_batch(model.tokens(next.as_flattened()).unwrap(), &mut refs);
    assert_eq!(caches.each_ref().map(|cache| cache.position()).as_slice(), positions);
    let [together, apart] = [together, Tensor::cat(apart, 0)].map(host);
    if B::BATCH_INVARIANT {
        assert_eq!(together, apart);
    } else {
        let most = together.iter().zip(&apart).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(most <= TOLERANCE, "{most}");
    }
}

fn host<B: Backend>(x: Tensor<B, 2>) -> Vec<f32> {
    x.into_data().iter::<f32>().collect()
}

#[test]
fn texts_on_flex() {
    texts_are_those_of_each_alone(&model::<Flex>());
}

#[test]
fn texts_on_ndarray() {
    texts_are_those_of_each_alone(&model::<NdArray>());
}

#[test]
fn states_on_flex() {
    states_are_those_of_each_alone::<Flex>();
}

#[test]
fn states_on_ndarray() {
    states_are_those_of_each_alone::<NdArray>();
}

#[test]
#[cfg(feature = "wgpu")]
fn states_on_wgpu() {
    if support::gpu() {
        states_are_those_of_each_alone::<ternoss::backends::cube::Wgpu>();
    }
}

#[test]
fn a_screened_output_layer_chooses_the_same() {
    let mut model = model::<Flex>();
    model.lm_head = model.lm_head.with_screening(Screening::Always);
    assert!(model.lm_head.prepare_screen());
    texts_are_those_of_each_alone(&model);
}

#[test]
fn a_text_goes_on_from_its_cache() {
    let model = model::<Flex>();
    let mut cache = model.new_cache();
    let mut sampler = Sampler::new(SamplingConfig::greedy()).unwrap();
    let first = model.generate(&[5, 9], &mut cache, &mut sampler, &rules(6), |_| ControlFlow::Continue(())).unwrap();
    let greedy = || Sampler::new(SamplingConfig::greedy()).unwrap();
    let texts = vec![
        Text::new(vec![first[5]], cache, greedy(), rules(4)),
        Text::new(vec![1], model.new_cache(), greedy(), rules(9)),
    ];
    let texts = model.generate_batch(texts).unwrap();
    let whole = alone(&model, &[5, 9], SamplingConfig::greedy(), &rules(10));
    assert_eq!([&first, texts[0].written()].concat(), whole);
}

#[test]
fn what_cannot_be_gone_on_with_is_refused() {
    let model = model::<Flex>();
    let text = |prompt: &[u32]| {
        Text::new(prompt.to_vec(), model.new_cache(), Sampler::new(SamplingConfig::greedy()).unwrap(), rules(3))
    };
    assert!(model.generate_batch(Vec::new()).unwrap().is_empty());
    let empty = model.generate_batch(vec![text(&[1]), text(&[])]).unwrap_err();
    assert!(matches!(empty, GenerateError::EmptyPrompt), "{empty}");
    let unknown = model.generate_batch(vec![text(&[1]), text(&[1, 99_999])]).unwrap_err();
    assert!(unknown.to_string().starts_with("token 99999 at position 1"), "{unknown}");
}

#[test]
#[should_panic(expected = "a cache of 4 layers, as the model has")]
fn a_cache_of_fewer_layers_is_refused() {
    let model = model::<Flex>();
    let mut config = model.config().clone();
    config.layer_types.truncate(2);
    model.hidden(model.tokens(&[1]).unwrap(), &mut KvCache::new(&config));
}
