//! ternoss inside a Burn app: a ternary gpt-oss as a field of a module, and `BitLinear` where a small model had `Linear`.
//!
//! ```text
//! cargo run --release -- [--backend ndarray|wgpu] [--model FOLDER]
//! ```
//!
//! Everything below `main` is generic over the backend. The files, in the order in which they are used: `writer` (loads and
//! writes), `genre` (the small model), `training` (what it learns, and the loop), `storage` (packed weights to a file and
//! back).

mod genre;
mod storage;
mod training;
mod writer;

use std::{env, error::Error, path::Path};

use burn::{module::Module, tensor::Device};
use ternoss::{
    backends::TernaryBackend,
    model::{Checkpoint, tokenizer::Tokenizer},
};
use training::{Samples, train};
use writer::Writer;

/// The model and the texts of the ternoss repository.
const EXAMPLES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
const USAGE: &str = "usage: burn-app [--backend ndarray|wgpu] [--model FOLDER]";

fn main() -> Result<(), Box<dyn Error>> {
    let (mut backend, mut folder) = ("ndarray".to_string(), format!("{EXAMPLES}/tiny-gpt-oss"));
    let mut arguments = env::args().skip(1);
    while let Some(flag) = arguments.next() {
        let value = arguments.next().ok_or(USAGE)?;
        match flag.as_str() {
            "--backend" => backend = value,
            "--model" => folder = value,
            _ => return Err(USAGE.into()),
        }
    }
    match backend.as_str() {
        "ndarray" => run::<burn_ndarray::NdArray>(&folder),
        #[cfg(feature = "wgpu")]
        "wgpu" => run::<ternoss::backends::cube::Wgpu>(&folder),
        other => Err(format!("this build has no backend {other:?} (wgpu: build with --features wgpu)").into()),
    }
}

fn run<B: TernaryBackend>(folder: &str) -> Result<(), Box<dyn Error>> {
    let device = Device::<B>::default();
    B::seed(&device, 1);
    let checkpoint = Checkpoint::open(Path::new(folder))?;
    let tokenizer = Tokenizer::from_folder(checkpoint.folder())?;
    let mut writer = Writer::<B>::load(&checkpoint, &device)?;
    println!("backend {}, {} float parameters", B::name(&device), writer.num_params());

    let prompt = "She was quite surprised to find that";
    let written = prompt.to_string() + &writer.write(&tokenizer, prompt, 32)?;
    println!("{written}");

    let texts = ["prose", "wiki"].map(|name| format!("{EXAMPLES}/text/{name}_test.txt"));
    let (learned, held_out) = Samples::read(&writer, &tokenizer, &texts)?.split();
    let genre = train(&learned)?;
    let packed = genre.clone().pack()?;
    println!("held out: {:.0} % right, packed {:.0} %", held_out.right(&genre), held_out.right(&packed));

    writer.genre = Some(storage::through_a_file(&packed, &held_out)?);
    let [novel, encyclopedia] = writer.judge(&tokenizer.encode(&written, true)?)?;
    println!("what it wrote: novel {:.0} %, encyclopedia {:.0} %", 100.0 * novel, 100.0 * encyclopedia);
    Ok(())
}
