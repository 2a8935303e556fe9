//! A ternary language model as a field of a module.

use std::{error::Error, ops::ControlFlow};

use burn::{
    module::Module,
    tensor::{Device, Tensor, activation::softmax, backend::Backend},
};
use ternoss::{
    backends::TernaryBackend,
    model::{
        Checkpoint, GptOss, LoadOptions, StopRules, TokenOutOfRange,
        sampling::{Sampler, SamplingConfig},
        tokenizer::Tokenizer,
    },
    quant::TernaryConfig,
};

use crate::genre::{GENRES, Genre};

/// A language model, and what judges texts by what goes on inside it, once that was trained.
#[derive(Module, Debug)]
pub struct Writer<B: Backend> {
    pub model: GptOss<B>,
    pub genre: Option<Genre<B>>,
}

impl<B: TernaryBackend> Writer<B> {
    /// A folder that `ternoss quantize` wrote is ternary already; any other becomes so here, by rounding.
    pub fn load(checkpoint: &Checkpoint, device: &Device<B>) -> Result<Self, Box<dyn Error>> {
        let model = GptOss::load(checkpoint, LoadOptions::default(), device)?.to_ternary(&TernaryConfig::default())?;
        Ok(Self { model, genre: None })
    }

    /// What the model adds to a prompt.
    pub fn write(&self, tokenizer: &Tokenizer, prompt: &str, max_tokens: usize) -> Result<String, Box<dyn Error>> {
        let mut sampler = Sampler::new(SamplingConfig { temperature: 0.7, seed: 1, ..Default::default() })?;
        let rules = StopRules { max_tokens, stop_tokens: self.model.config().eos_token_id.clone() };
        let (prompt, mut cache) = (tokenizer.encode(prompt, true)?, self.model.new_cache());
        let tokens = self.model.generate(&prompt, &mut cache, &mut sampler, &rules, |_| ControlFlow::Continue(()))?;
        Ok(tokenizer.decode(&tokens, true)?)
    }

    /// What the model's output layer sees, averaged over a text: `[1, hidden]`.
    pub fn impression(&self, tokens: &[u32]) -> Result<Tensor<B, 2>, TokenOutOfRange> {
        let tokens = self.model.tokens(tokens)?;
        Ok(self.model.hidden(tokens, &mut self.model.new_cache()).mean_dim(0))
    }

    /// How likely each genre is, from 0 to 1.
    pub fn judge(&self, tokens: &[u32]) -> Result<[f32; GENRES], Box<dyn Error>> {
        let genre = self.genre.as_ref().ok_or("nothing was trained yet")?;
        let shares = softmax(genre.forward(self.impression(tokens)?), 1);
        let shares: Vec<f32> = shares.into_data().iter::<f32>().collect();
        Ok(shares.try_into().map_err(|_| "a genre too many")?)
    }
}
