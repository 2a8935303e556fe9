//! The same calibration on every backend.
#![cfg(all(feature = "calib", feature = "tokenizer"))]
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod support;

use std::{fs, path::Path};

use burn_flex::Flex;
use burn_ndarray::NdArray;
use support::example;
use ternoss::{
    backends::TernaryBackend,
    calib::{Calibration, Method, QuantizeOptions, Report, Steps, quantize},
    model::{Checkpoint, GptOss, LoadOptions, tokenizer::Tokenizer},
};

const CONTEXT: usize = 128;

/// Tokens that are calibrated on, and tokens that are measured on.
const TOKENS: usize = 8192;

/// Quantizes the shipped model with everything that looks at a text; the report, and the perplexity on another text.
fn calibrated<B: TernaryBackend>(output: &Path) -> (Report, f64) {
    let checkpoint = Checkpoint::open(&example("tiny-gpt-oss")).unwrap();
    let tokenizer = Tokenizer::from_folder(checkpoint.folder()).unwrap();
    let tokens = |name: &str| tokenizer.encode(&fs::read_to_string(example(name)).unwrap(), true).unwrap();
    let text = tokens("text/calibration.txt");
    let calibration = Calibration::new(&text, CONTEXT, TOKENS, checkpoint.config()).unwrap().with_fresh(&text, 4);
    let options = QuantizeOptions::new(Method::Ternoss);
    let steps = Steps { reconstruction: 6, ..options.steps };
    // With a second plane in most matrices, a trit here or there, which the last bits of a sum decide, weighs a third of a percent;
    // with one it weighs one to two.
    let options = QuantizeOptions { steps, distill: 4, bits_per_weight: Some(4.0), ..options };
    let device = B::Device::default();
    let report = quantize::<B>(&checkpoint, output, &options, Some(&calibration), &device, &|_| ()).unwrap();
    // Measured on one backend, so that only the calibration differs.
    let model = Checkpoint::open(output).unwrap();
    let model = GptOss::<Flex>::load(&model, LoadOptions::default(), &Default::default()).unwrap();
    let text = tokens("text/prose_test.txt");
    (report, model.perplexity(&text[..TOKENS.min(text.len())], CONTEXT, |_| ()).unwrap().value())
}

#[test]
fn flex_and_ndarray_calibrate_to_within_one_percent() {
    let folder = tempfile::tempdir().unwrap();
    let (flex, flex_perplexity) = calibrated::<Flex>(&folder.path().join("flex"));
    let (ndarray, ndarray_perplexity) = calibrated::<NdArray>(&folder.path().join("ndarray"));
    let close = |a: f64, b: f64, share: f64| assert!((a / b - 1.0).abs() < share, "{a} {b}");
    close(flex_perplexity, ndarray_perplexity, 0.01);
    close(flex.mean_relative_error(), ndarray.mean_relative_error(), 0.01);
    assert_eq!(flex.layers[0].expert_tokens, ndarray.layers[0].expert_tokens);
    assert_eq!(flex.bits_per_weight, ndarray.bits_per_weight);
}
