//! What a forward pass touches: the bytes it reads, and the experts it goes to.
//!
//! Decoding is bound by memory: tokens a second are at most the machine's read bandwidth over these bytes. They are those
//! of the algorithm, each counted once: temporaries, and what a backend copies, come on top.
//!
//! ```
//! use ternoss_model::{Checkpoint, GptOss, LoadOptions};
//! type B = burn_flex::Flex;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let checkpoint = Checkpoint::open("../examples/tiny-gpt-oss".as_ref())?;
//! let model = GptOss::<B>::load(&checkpoint, LoadOptions::default(), &Default::default())?;
//! // Here full precision is 32 bits a weight.
//! let ternary = model.to_ternary(&Default::default())?;
//! assert!(ternary.decode_traffic(16).experts < model.decode_traffic(16).experts / 8);
//! # Ok(()) }
//! ```

use std::{iter::Sum, ops::Add};

use burn::{
    module::Param,
    nn,
    tensor::{Int, Tensor, backend::Backend},
};
use ternoss_backends::TernaryBackend;
use ternoss_quant::{BitWeight, Linear, TernaryTensor};

use crate::{
    GptOss, KvCache,
    checkpoint::ExpertMatrix,
    experts::{Experts, StreamedExperts},
    layer::{Layer, apply_norm},
    table::Table,
};

/// Bytes read, by what they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Rows of the embedding.
    pub embedding: usize,
    /// Projections of the attention, with biases and sinks.
    pub attention: usize,
    /// Keys and values.
    pub cache: usize,
    /// Routers.
    pub router: usize,
    /// Experts that were chosen, with their biases.
    pub experts: usize,
    /// Norms.
    pub norms: usize,
    /// The output layer.
    pub output: usize,
}

impl Traffic {
    /// All of them.
    #[must_use]
    pub fn total(&self) -> usize {
        let Self { embedding, attention, cache, router, experts, norms, output } = self;
        embedding + attention + cache + router + experts + norms + output
    }
}

impl Add for Traffic {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            embedding: self.embedding + other.embedding,
            attention: self.attention + other.attention,
            cache: self.cache + other.cache,
            router: self.router + other.router,
            experts: self.experts + other.experts,
            norms: self.norms + other.norms,
            output: self.output + other.output,
        }
    }
}

impl Sum for Traffic {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), Add::add)
    }
}

impl<B: TernaryBackend> GptOss<B> {
    /// What [`generate`](Self::generate) reads for one new token after `context` others. Where the output layer is screened,
    /// that is what is read of its compact copy for every row; what is read of some rows alone is not counted.
    pub fn decode_traffic(&self, context: usize) -> Traffic {
        let output = self.lm_head.screen_bytes().unwrap_or_else(|| whole(&self.lm_head));
        Traffic { output, ..self.pass(context, 1) }
    }

    /// What the next token of each of several sequences reads together, after `context` others each.
    pub fn batch_traffic(&self, context: usize, sequences: usize) -> Traffic {
        let one = self.decode_traffic(context);
        Traffic { cache: sequences * one.cache, output: one.output, ..self.pass(context, sequences) }
    }

    /// What [`prefill`](Self::prefill) reads for a prompt of `tokens`: every weight once a chunk, the output layer once.
    pub fn prefill_traffic(&self, tokens: usize) -> Traffic {
        let chunks = (0..tokens).step_by(B::PROMPT_TOKENS);
        let passes = chunks.map(|first| self.pass(first, B::PROMPT_TOKENS.min(tokens - first)));
        passes.sum::<Traffic>() + Traffic { output: whole(&self.lm_head), ..Traffic::default() }
    }
}

impl<B: Backend> GptOss<B> {
    /// All but the output layer, for `tokens` that go through the model at once, `context` others before them.
    fn pass(&self, context: usize, tokens: usize) -> Traffic {
        let first = Traffic {
            embedding: tokens * row(&self.embed_tokens),
            norms: floats(&self.norm.gamma),
            ..Traffic::default()
        };
        let layers = self.layers.iter().enumerate().map(|(number, layer)| {
            let seen = self.config.window(number).map_or(context, |window| context.min(window - 1)) + tokens;
            let entry = 2 * self.config.num_key_value_heads * self.kv_format.bytes(self.config.head_dim);
            Traffic { cache: seen * entry, ..layer_weights(layer, tokens) }
        });
        first + layers.sum()
    }
}

/// The weights of a layer that `tokens` tokens read. No two go to the same expert before every expert has one.
fn layer_weights<B: Backend>(layer: &Layer<B>, tokens: usize) -> Traffic {
    let router = &layer.mlp.router;
    let count = router.linear.weight.dims()[1];
    let chosen = (tokens * router.experts_per_token).min(count);
    let projections = layer.self_attn.projections().map(linear);
    Traffic {
        attention: projections.iter().sum::<usize>() + floats(&layer.self_attn.sinks),
        router: dense(&router.linear),
        experts: chosen * expert(&layer.mlp.experts, count),
        norms: floats(&layer.input_layernorm.gamma) + floats(&layer.post_attention_layernorm.gamma),
        ..Traffic::default()
    }
}

/// One expert of `count`.
fn expert<B: Backend>(experts: &Experts<B>, count: usize) -> usize {
    match experts {
        Experts::Dense(dense) => dense.experts.first().map_or(0, |expert| {
            let (gate_up, down) = (&expert.gate_up_proj, &expert.down_proj);
            linear(gate_up) + linear(down)
        }),
        Experts::Streamed(streamed) => streamed_experts(streamed) / count,
        Experts::Ternary(packed) => {
            let weights = ternary(&packed.gate_up_proj) + ternary(&packed.down_proj);
            (weights + floats(&packed.gate_up_proj_bias) + floats(&packed.down_proj_bias)) / count
        }
    }
}

/// All experts of a layer as the checkpoint stores them, and their biases.
fn streamed_experts<B: Backend>(streamed: &StreamedExperts<B>) -> usize {
    let stored = |name: &String| streamed.checkpoint.entry(name).map_or(0, |entry| entry.bytes());
    let names = ExpertMatrix::ALL.map(|matrix| streamed.checkpoint.expert_tensors(streamed.layer, matrix));
    let weights: usize = names.iter().flatten().map(stored).sum();
    weights + floats(&streamed.gate_up_proj_bias) + floats(&streamed.down_proj_bias)
}

fn linear<B: Backend>(linear: &Linear<B>) -> usize {
    match linear {
        Linear::Dense(layer) => dense(layer),
        Linear::Ternary(layer) => {
            let weight = match &layer.weight {
                BitWeight::Latent(latent) => floats(&latent.weight),
                BitWeight::Packed(packed) => ternary(packed),
                BitWeight::Tuned(tuned) => ternary(&tuned.trits),
            };
            weight + layer.bias.as_ref().map_or(0, floats)
        }
    }
}

fn dense<B: Backend>(linear: &nn::Linear<B>) -> usize {
    floats(&linear.weight) + linear.bias.as_ref().map_or(0, floats)
}

fn ternary<B: Backend>(tensor: &TernaryTensor<B>) -> usize {
    tensor.layout().bytes()
}

fn floats<B: Backend, const D: usize>(tensor: &Param<Tensor<B, D>>) -> usize {
    tensor.dims().iter().product::<usize>() * tensor.dtype().size()
}

/// One row of a table.
fn row<B: Backend>(table: &Table<B>) -> usize {
    whole(table) / table.rows()
}

/// All rows of a table.
fn whole<B: Backend>(table: &Table<B>) -> usize {
    match table {
        Table::Stored(stored) => stored.words.dims().iter().product::<usize>() * size_of::<u32>(),
        Table::Ternary(table) => ternary(table),
    }
}

impl<B: TernaryBackend> GptOss<B> {
    /// Runs tokens through all layers and counts how many of them go to each expert: `[layers][experts]`.
    ///
    /// # Panics
    /// If the cache is not one of as many layers.
    pub fn expert_visits(&self, tokens: Tensor<B, 1, Int>, cache: &mut KvCache<B>) -> Vec<Vec<usize>> {
        assert_eq!(cache.layers(), self.layers.len(), "layers of the cache");
        let new = tokens.dims()[0];
        let mut x = self.embed_tokens.embed(tokens);
        let rope = self.rope.tables(cache.position()..cache.position() + new, &x.device());
        let mut visits = Vec::with_capacity(self.layers.len());
        for (layer, cache) in self.layers.iter().zip(cache.layers_mut()) {
            x = x.clone() + layer.self_attn.forward(apply_norm(&layer.input_layernorm, x), &rope, cache);
            let normed = apply_norm(&layer.post_attention_layernorm, x.clone());
            let routing = layer.mlp.router.forward(normed.clone());
            let mut counts = vec![0; self.config.num_local_experts];
            for expert in routing.indices.clone().into_data().iter::<i64>() {
                counts.get_mut(expert as usize).into_iter().for_each(|count| *count += 1);
            }
            visits.push(counts);
            x = x + layer.mlp.experts.forward(normed, routing);
        }
        visits
    }
}
