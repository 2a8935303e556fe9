//! Packed weights to a file and back, by burn-store.

use std::{env, error::Error, fs, process};

use burn_store::{ModuleSnapshot, SafetensorsStore};
use ternoss::backends::TernaryBackend;

use crate::{genre::Genre, training::Samples};

/// Saves the model, loads it into a fresh one, and gives that one back.
///
/// safetensors keeps the codes (u32) and the scales of groups (u8) as they are; Burn's recorders would convert them.
///
/// # Errors
/// When the file cannot be written or read, or what came back computes something else.
pub fn through_a_file<B: TernaryBackend>(packed: &Genre<B>, samples: &Samples<B>) -> Result<Genre<B>, Box<dyn Error>> {
    let path = env::temp_dir().join(format!("burn-app-{}.safetensors", process::id()));
    packed.save_into(&mut SafetensorsStore::from_file(&path))?;

    // Any packed model of these sizes: its weights are those of the file afterwards.
    let mut loaded = Genre::<B>::new(samples.x.dims()[1], &samples.x.device()).pack()?;
    let result = loaded.load_from(&mut SafetensorsStore::from_file(&path))?;
    println!("saved and loaded {} tensors, {} bytes", result.applied.len(), fs::metadata(&path)?.len());
    fs::remove_file(&path)?;

    let [before, after] = [packed, &loaded].map(|genre| genre.forward(samples.x.clone()).into_data());
    if before == after { Ok(loaded) } else { Err("the loaded model computes something else".into()) }
}
