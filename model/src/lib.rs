//! GPT-OSS as Burn modules.
//!
//! In the order data flows: [`config`] (what `config.json` says), [`rope`], [`attention`], [`router`], [`experts`],
//! [`layer`], [`gpt_oss`]; then what surrounds the model: [`checkpoint`] (files), `tokenizer`, `harmony`
//! (conversations), [`sampling`], [`screening`], [`generate`], [`batch`], [`perplexity`] and [`traffic`] (bytes a token reads).
//!
//! ```no_run
//! use ternoss_model::{Checkpoint, GptOss, LoadOptions, StopRules, sampling::{Sampler, SamplingConfig}};
//! type B = burn_flex::Flex;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let checkpoint = Checkpoint::open("gpt-oss-20b".as_ref())?;
//! let model = GptOss::<B>::load(&checkpoint, LoadOptions::default(), &Default::default())?;
//! let mut sampler = Sampler::new(SamplingConfig::greedy())?;
//! let rules = StopRules { max_tokens: 32, stop_tokens: vec![] };
//! let tokens = model.generate(&[1, 2, 3], &mut model.new_cache(), &mut sampler, &rules, |token| {
//!     println!("{token}");
//!     std::ops::ControlFlow::Continue(())
//! })?;
//! # Ok(()) }
//! ```
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic))]

pub mod attention;
pub mod batch;
pub mod cache;
pub mod checkpoint;
pub mod config;
mod draft;
pub mod experts;
pub mod generate;
pub mod gpt_oss;
#[cfg(feature = "tokenizer")]
pub mod harmony;
pub mod language_model;
pub mod layer;
mod pager;
pub mod perplexity;
pub mod rope;
pub mod router;
pub mod sampling;
pub mod screening;
pub mod split;
pub mod table;
#[cfg(feature = "tokenizer")]
pub mod tokenizer;
pub mod traffic;

pub use cache::KvCache;
pub use checkpoint::{Checkpoint, CheckpointError, ExpertPlacement, LoadOptions};
pub use config::{ConfigError, GptOssConfig};
pub use generate::{GenerateError, StopRules};
pub use gpt_oss::{GptOss, TokenOutOfRange};
pub use language_model::LanguageModel;
pub use perplexity::{Agreement, Perplexity, PerplexityError};
pub use split::SplitModel;
pub use traffic::Traffic;
