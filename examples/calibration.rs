//! Quantizes the small model of this repository with everything that needs gradients: every layer is reconstructed, then the
//! whole model learns to predict what the full-precision model predicts.
//!
//! ```text
//! cargo run --release --example calibration -- [BACKEND]
//! ```
//!
//! The pipeline takes a plain backend, `flex` or `ndarray`, and puts `Autodiff` around it where it tunes by gradients. Few
//! tokens and few steps: it shows how, not how good.

use std::{env, error::Error, fs, path::Path};

use burn::tensor::Device;
use burn_flex::Flex;
use burn_ndarray::NdArray;
use ternoss::{
    backends::TernaryBackend,
    calib::{Calibration, Method, Progress, QuantizeOptions, Steps, quantize},
    model::{Checkpoint, GptOss, LoadOptions, tokenizer::Tokenizer},
};

/// Tokens that the model sees at once, and tokens in all.
const CONTEXT: usize = 64;
const TOKENS: usize = 1024;

fn main() -> Result<(), Box<dyn Error>> {
    match env::args().nth(1).as_deref() {
        None | Some("flex") => run::<Flex>(),
        Some("ndarray") => run::<NdArray>(),
        Some(other) => Err(format!("no backend {other:?}: flex or ndarray").into()),
    }
}

fn run<B: TernaryBackend>() -> Result<(), Box<dyn Error>> {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let output = env::temp_dir().join(format!("ternoss-calibration-{}", std::process::id()));
    let device = Device::<B>::default();
    let checkpoint = Checkpoint::open(&examples.join("tiny-gpt-oss"))?;
    let tokenizer = Tokenizer::from_folder(checkpoint.folder())?;
    let read = |name: &str| Calibration::read_text(&examples.join("text").join(name));

    // Windows of the text: some are calibrated on, some held out, and fresh ones are for distillation.
    let text = tokenizer.encode(&read("calibration.txt")?, true)?;
    let steps = 8;
    let calibration = Calibration::new(&text, CONTEXT, TOKENS, checkpoint.config())?.with_fresh(&text, 2 * steps);

    // All steps of the method, and gradients beside them. Large models take the default rate.
    let method = Method::Ternoss;
    let options = QuantizeOptions {
        steps: Steps { reconstruction: 8, ..method.steps() },
        distill: steps,
        distillation_rate: 2e-3,
        ..QuantizeOptions::new(method)
    };
    let heard = |progress| {
        if let Progress::Distilled { divergence: Some(nats), .. } = progress {
            println!("distillation: {nats:.4} nats apart");
        }
    };
    let report = quantize::<B>(&checkpoint, &output, &options, Some(&calibration), &device, &heard)?;
    for (number, layer) in report.layers.iter().enumerate() {
        if let Some(block) = layer.reconstruction {
            println!("layer {number}: relative error {:.4} to {:.4}, kept: {}", block.before, block.after, block.kept);
        }
    }

    // The folder is a model as any other.
    let ternary = GptOss::<B>::load(&Checkpoint::open(&output)?, LoadOptions::default(), &device)?;
    let test = &tokenizer.encode(&read("prose_test.txt")?, true)?[..1024];
    println!(
        "{:.3} bits a weight, perplexity {:.1}",
        report.bits_per_weight,
        ternary.perplexity(test, CONTEXT, |_| ())?.value()
    );
    drop(ternary);
    fs::remove_dir_all(&output)?;
    match (report.held_out, report.distillation) {
        (Some(after), Some(tuned)) => println!(
            "held out: {:.4} nats apart before distillation, {:.4} after it",
            tuned.before.kl_divergence, after.kl_divergence
        ),
        _ => return Err("nothing was held out".into()),
    }
    Ok(())
}
