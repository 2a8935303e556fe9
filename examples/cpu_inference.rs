//! Loads a gpt-oss model folder, makes it ternary in memory, and continues a prompt on the CPU.
//!
//! ```text
//! cargo run --release --example cpu_inference -- [FOLDER] [PROMPT]
//! ```
//!
//! Without arguments it takes the small model of this repository. A folder that `ternoss quantize` wrote works too: its
//! layers are ternary already and stay as they are. Full-precision experts larger than 4 GiB are read one by one.

use std::{
    env,
    error::Error,
    io::{self, Write},
    ops::ControlFlow,
    path::Path,
};

use burn::tensor::Device;
use ternoss::{
    Cpu,
    model::{
        Checkpoint, GptOss, LoadOptions, StopRules,
        sampling::{Sampler, SamplingConfig},
        tokenizer::Tokenizer,
    },
    quant::TernaryConfig,
};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = env::args().skip(1);
    let folder = arguments.next().unwrap_or_else(|| "examples/tiny-gpt-oss".into());
    let prompt = arguments.next().unwrap_or_else(|| "She was quite surprised to find that".into());

    // Opening maps the files and reads their headers. Loading decodes what is not used in place.
    let checkpoint = Checkpoint::open(Path::new(&folder))?;
    let tokenizer = Tokenizer::from_folder(checkpoint.folder())?;
    let dense = GptOss::<Cpu>::load(&checkpoint, LoadOptions::default(), &Device::<Cpu>::default())?;

    // One scale per 64 inputs, 2 bits a code: what `ternoss quantize` does by default, without writing a folder.
    let model = dense.to_ternary(&TernaryConfig::default())?;

    // The same seed gives the same text, whatever the number of threads.
    let mut sampler =
        Sampler::new(SamplingConfig { temperature: 0.7, top_p: Some(0.9), seed: 1, ..Default::default() })?;
    let rules = StopRules { max_tokens: 48, stop_tokens: model.config().eos_token_id.clone() };
    let tokens = tokenizer.encode(&prompt, true)?;
    let mut text = tokenizer.stream();
    let mut failed = None;
    print!("{prompt}");
    let new = model.generate(&tokens, &mut model.new_cache(), &mut sampler, &rules, |token| {
        match text.push(token) {
            Ok(piece) => print!("{}", piece.unwrap_or_default()),
            Err(error) => failed = Some(error),
        }
        // Text that cannot be shown now is shown with the next piece.
        let _ = io::stdout().flush();
        if failed.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    if let Some(error) = failed {
        return Err(error.into());
    }
    println!("{}", text.finish()?.unwrap_or_default());
    println!("[{} prompt tokens, {} new]", tokens.len(), new.len());
    Ok(())
}
