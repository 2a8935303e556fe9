//! `ternoss download`

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use ternoss::hub::{Hub, ModelId};

use super::bytes;
use crate::program::progress::{Progress, Unit};

/// Fetch a model from the Hugging Face hub, and print its folder
///
/// Only what is needed: configuration, tokenizer, licence and safetensors weights. Run again after an interruption, it
/// continues; run on a finished download, it checks every file. HF_TOKEN, HF_ENDPOINT, HF_HOME, HF_HUB_CACHE and
/// HF_HUB_OFFLINE mean what they mean to other programs.
#[derive(Args)]
pub(crate) struct DownloadArgs {
    /// Hub id such as openai/gpt-oss-20b, or openai/gpt-oss-20b@REVISION
    #[arg(value_name = "REPO")]
    model: ModelId,
    /// Branch, tag or commit
    #[arg(long)]
    revision: Option<String>,
    /// Folder to write; without it the files go into the hub's cache, where --model finds them by their id
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
}

pub(crate) fn run(args: DownloadArgs) -> Result<()> {
    let model = match args.revision {
        Some(revision) => args.model.at(&revision)?,
        None => args.model,
    };
    let folder = fetch(&Hub::from_env(), &model, args.output.as_deref())?;
    print_line!("{}", folder.display())?;
    Ok(())
}

/// The folder meant by `--model`: a folder, or a hub id whose files are in the cache or come there now.
pub(crate) fn resolve_model(model: &str) -> Result<PathBuf> {
    if Path::new(model).is_dir() {
        return Ok(model.into());
    }
    let id: ModelId = model.parse()?;
    let hub = Hub::from_env();
    match hub.cached(&id) {
        Some(folder) => Ok(folder),
        None => fetch(&hub, &id, None),
    }
}

fn fetch(hub: &Hub, id: &ModelId, output: Option<&Path>) -> Result<PathBuf> {
    let download = hub.find(id, output)?;
    eprintln!("{id}: {} files, {}", download.files(), bytes(download.bytes() as usize));
    if download.present() > 0 {
        let progress = Progress::new("verify", download.present(), Unit::Bytes);
        download.verify(&mut |bytes| progress.advance(bytes))?;
    }
    let progress = Progress::new("download", download.missing(), Unit::Bytes);
    Ok(download.fetch(&mut |bytes| progress.advance(bytes))?)
}
