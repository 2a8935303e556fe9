//! `ternoss synthesize`

use std::{borrow::Cow, path::PathBuf};

use anyhow::Result;
use clap::{Args, ValueEnum};
use half::bf16;
use rand::{Rng, RngExt, SeedableRng, rngs::ChaCha8Rng};
use rayon::prelude::*;
use safetensors::Dtype;
use serde_json::{Value, json};
use ternoss::{
    backends::{CodeFormat, Rotation, TernaryLayout},
    model::{
        GptOssConfig,
        checkpoint::{ExpertMatrix, FolderWriter, LinearName, OutputTensor, TernaryPath, fingerprint},
        config::{FORMAT_VERSION, TERNOSS, TernaryQuantization},
    },
    quant::{PackedTernary, mxfp4},
};

use crate::program::progress::{Progress, Unit};

/// Write a model with random weights in the real layout, for tests of size and speed
#[derive(Args)]
pub(crate) struct SynthesizeArgs {
    /// Sizes of the model
    #[arg(long, value_enum)]
    shape: Shape,
    /// How the weights are stored
    #[arg(long, value_enum)]
    format: Storage,
    /// Folder to write
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Packing of the trits when the format is ternary: t2 or t5
    #[arg(long, default_value_t = CodeFormat::T2)]
    code_format: CodeFormat,
    /// The same seed gives the same bytes
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Replace the output folder if it exists
    #[arg(long)]
    overwrite: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Shape {
    #[value(name = "gpt-oss-20b")]
    GptOss20b,
    #[value(name = "gpt-oss-120b")]
    GptOss120b,
    /// Two layers of 128, 8 experts, for quick tests
    Tiny,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Storage {
    /// 4-bit experts, the rest bf16: as OpenAI publishes gpt-oss
    Mxfp4,
    /// All bf16
    Bf16,
    /// Ternary attention and experts, as `ternoss quantize` writes them
    Ternary,
}

/// Inputs per scale of the ternary format.
const GROUP_SIZE: usize = 64;

pub(crate) fn run(args: SynthesizeArgs) -> Result<()> {
    let mut json = architecture(args.shape);
    let config = GptOssConfig::from_json(json.clone(), &args.output)?;
    let layers = config.num_hidden_layers();
    let mut writer = FolderWriter::create(&args.output, layers + 1, args.overwrite)?;
    let progress = Progress::new("synthesize", layers as u64 + 1, Unit::Count("files"));
    let random = Random { seed: args.seed, config: &config };
    writer.shard(0, random.tables())?;
    progress.advance(1);
    let mut bits_per_weight = 0.0;
    for layer in 0..layers {
        let packed = match args.format {
            Storage::Ternary => random.ternary_layer(layer, args.code_format)?,
            _ => Vec::new(),
        };
        let mut tensors = random.small_tensors(layer);
        match args.format {
            Storage::Mxfp4 => tensors.extend(random.attention(layer).chain(random.mxfp4_experts(layer))),
            Storage::Bf16 => tensors.extend(random.attention(layer).chain(random.bf16_experts(layer))),
            Storage::Ternary => {
                tensors.extend(packed.iter().flat_map(|(path, packed)| OutputTensor::ternary(path, packed)));
            }
        }
        bits_per_weight = bits(&packed);
        writer.shard(layer + 1, tensors)?;
        progress.advance(1);
    }
    if let Some(quantization) = quantization(&args, bits_per_weight) {
        json["quantization_config"] = quantization;
    }
    writer.finish(&json)?;
    Ok(())
}

/// `config.json` of a shape, keys and values as in the published models.
fn architecture(shape: Shape) -> Value {
    let (layers, experts, hidden, intermediate, heads, kv_heads, vocabulary, window, chosen) = match shape {
        Shape::GptOss20b => (24, 32, 2880, 2880, 64, 8, 201_088, 128, 4),
        Shape::GptOss120b => (36, 128, 2880, 2880, 64, 8, 201_088, 128, 4),
        Shape::Tiny => (2, 8, 128, 96, 4, 2, 512, 16, 2),
    };
    let kinds = ["sliding_attention", "full_attention"];
    json!({
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": true,
        "head_dim": 64,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "layer_types": kinds.iter().cycle().take(layers).collect::<Vec<_>>(),
        "max_position_embeddings": 131_072,
        "num_attention_heads": heads,
        "num_experts_per_tok": chosen,
        "experts_per_token": chosen,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "num_local_experts": experts,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
            "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": false
        },
        "rope_theta": 150_000,
        "sliding_window": window,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": false,
        "torch_dtype": "bfloat16",
        "vocab_size": vocabulary,
    })
}

fn quantization(args: &SynthesizeArgs, bits_per_weight: f64) -> Option<Value> {
    match args.format {
        Storage::Bf16 => None,
        Storage::Mxfp4 => Some(json!({
            "quant_method": "mxfp4",
            "modules_to_not_convert":
                ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
        })),
        Storage::Ternary => Some(json!(TernaryQuantization {
            quant_method: TERNOSS.into(),
            version: FORMAT_VERSION,
            method: "random".into(),
            format: args.code_format,
            group_size: Some(GROUP_SIZE),
            rotation: Some(Rotation::default()),
            planes: 1,
            activation_bits: 8,
            bits_per_weight,
        })),
    }
}

fn bits(packed: &[(TernaryPath, PackedTernary)]) -> f64 {
    let bytes: usize = packed.iter().map(|(_, packed)| packed.layout.bytes()).sum();
    let weights: usize = packed.iter().map(|(_, packed)| packed.layout.weights()).sum();
    8.0 * bytes as f64 / weights.max(1) as f64
}

/// Random weights that depend on the seed and the tensor's name alone.
struct Random<'a> {
    seed: u64,
    config: &'a GptOssConfig,
}

/// Bytes filled from one stream of random numbers.
const CHUNK: usize = 1 << 20;

type Named<'t> = (String, OutputTensor<'t>);

impl Random<'_> {
    /// Embedding, output layer and last norm.
    fn tables<'t>(&self) -> Vec<Named<'t>> {
        let shape = [self.config.vocab_size, self.config.hidden_size];
        vec![
            self.floats("model.embed_tokens.weight", &shape, 0.0, 1.0),
            self.floats("lm_head.weight", &shape, 0.0, spread(self.config.hidden_size)),
            self.floats("model.norm.weight", &[self.config.hidden_size], 1.0, 0.1),
        ]
    }

    /// Norms, router, biases and sinks of a layer.
    fn small_tensors<'t>(&self, layer: usize) -> Vec<Named<'t>> {
        let config = self.config;
        let (hidden, experts) = (config.hidden_size, config.num_local_experts);
        let path = format!("model.layers.{layer}");
        let mut tensors = vec![
            self.floats(&format!("{path}.input_layernorm.weight"), &[hidden], 1.0, 0.1),
            self.floats(&format!("{path}.post_attention_layernorm.weight"), &[hidden], 1.0, 0.1),
            self.floats(&format!("{path}.self_attn.sinks"), &[config.num_attention_heads], 0.0, 1.0),
            self.floats(&format!("{path}.mlp.router.weight"), &[experts, hidden], 0.0, spread(hidden)),
            self.floats(&format!("{path}.mlp.router.bias"), &[experts], 0.0, 0.1),
        ];
        for linear in LinearName::ALL {
            let [_, outputs] = linear.shape(config);
            let deviation = 0.1 * linear_gain(linear);
            tensors.push(self.floats(&format!("{}.bias", linear.path(layer)), &[outputs], 0.0, deviation));
        }
        for matrix in ExpertMatrix::ALL {
            let [_, outputs] = matrix.shape(config);
            let deviation = 0.1 * expert_gain(matrix);
            tensors.push(self.floats(&format!("{}_bias", matrix.path(layer)), &[experts, outputs], 0.0, deviation));
        }
        tensors
    }

    fn attention<'t>(&self, layer: usize) -> impl Iterator<Item = Named<'t>> {
        LinearName::ALL.into_iter().map(move |linear| {
            let [inputs, outputs] = linear.shape(self.config);
            let deviation = spread(inputs) * linear_gain(linear);
            self.floats(&format!("{}.weight", linear.path(layer)), &[outputs, inputs], 0.0, deviation)
        })
    }

    fn bf16_experts<'t>(&self, layer: usize) -> impl Iterator<Item = Named<'t>> {
        ExpertMatrix::ALL.into_iter().map(move |matrix| {
            let [inputs, outputs] = matrix.shape(self.config);
            let shape = [self.config.num_local_experts, inputs, outputs];
            self.floats(&matrix.path(layer), &shape, 0.0, spread(inputs) * expert_gain(matrix))
        })
    }

    fn mxfp4_experts<'t>(&self, layer: usize) -> impl Iterator<Item = Named<'t>> {
        ExpertMatrix::ALL.into_iter().flat_map(move |matrix| {
            let [inputs, outputs] = matrix.shape(self.config);
            let scales = [self.config.num_local_experts, outputs, inputs / mxfp4::BLOCK];
            let blocks = [&scales[..], &[mxfp4::BLOCK_BYTES]].concat();
            let path = matrix.path(layer);
            // Around 2^-7, which brings the codes to the spread of trained weights, times the matrix's gain.
            let scale = match matrix {
                ExpertMatrix::GateUp => |byte| 118 + byte % 4,
                ExpertMatrix::Down => |byte| 115 + byte % 4,
            };
            [
                self.bytes(&format!("{path}_blocks"), &blocks, |byte| byte),
                self.bytes(&format!("{path}_scales"), &scales, scale),
            ]
        })
    }

    /// All ternary matrices of a layer.
    fn ternary_layer(&self, layer: usize, format: CodeFormat) -> Result<Vec<(TernaryPath, PackedTernary)>> {
        let mut all = Vec::new();
        for linear in LinearName::ALL {
            let path = TernaryPath::Linear(linear.path(layer));
            let deviation = spread(linear.shape(self.config)[0]) * linear_gain(linear);
            all.push((path, self.ternary(&linear.path(layer), 1, linear.shape(self.config), format, deviation)?));
        }
        for matrix in ExpertMatrix::ALL {
            let experts = self.config.num_local_experts;
            let shape = matrix.shape(self.config);
            let deviation = spread(shape[0]) * expert_gain(matrix);
            let packed = self.ternary(&matrix.path(layer), experts, shape, format, deviation)?;
            all.push((TernaryPath::Experts(matrix.path(layer)), packed));
        }
        Ok(all)
    }

    fn ternary(
        &self,
        name: &str,
        matrices: usize,
        [in_features, rows]: [usize; 2],
        format: CodeFormat,
        deviation: f32,
    ) -> Result<PackedTernary> {
        let layout = TernaryLayout {
            format,
            matrices,
            planes: 1,
            rows,
            in_features,
            group_size: Some(GROUP_SIZE),
            rotation: Some(Rotation::default()),
        };
        layout.validate()?;
        let words = layout.words_per_row();
        let mut codes = vec![0u32; matrices * rows * words];
        codes.par_chunks_mut(words).enumerate().for_each_init(
            || vec![0u8; in_features],
            |random, (row, words)| {
                stream(self.seed, name, row).fill_bytes(random);
                let trits: Vec<i8> = random.iter().map(|byte| ((u16::from(*byte) * 3) >> 8) as i8 - 1).collect();
                format.pack_row(&trits, words);
            },
        );
        // The group scales average 192, so that a weight has the spread of a trained one.
        let row_scales = vec![deviation / 157.0; matrices * rows];
        let mut group_scales = vec![0u8; matrices * rows * layout.groups()];
        fill(self.seed, &format!("{name} scales"), &mut group_scales, |byte| 128 | byte);
        Ok(PackedTernary { layout, codes, row_scales, group_scales })
    }

    /// Uniform bf16 numbers of a mean and standard deviation.
    fn floats<'t>(&self, name: &str, shape: &[usize], mean: f32, deviation: f32) -> Named<'t> {
        let count: usize = shape.iter().product();
        let (seed, owned) = (self.seed, name.to_string());
        let make = move || {
            let mut values = vec![bf16::ZERO; count];
            values.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, values)| {
                let mut stream = stream(seed, &owned, chunk);
                let width = deviation * 12f32.sqrt();
                for value in values {
                    *value = bf16::from_f32(mean + (stream.random::<f32>() - 0.5) * width);
                }
            });
            Cow::Owned(bytemuck::cast_slice(&values).to_vec())
        };
        (name.into(), OutputTensor::lazy(Dtype::BF16, shape.into(), make))
    }

    /// Random bytes, each passed through `map`.
    fn bytes<'t>(&self, name: &str, shape: &[usize], map: fn(u8) -> u8) -> Named<'t> {
        let count: usize = shape.iter().product();
        let (seed, owned) = (self.seed, name.to_string());
        let make = move || {
            let mut values = vec![0u8; count];
            fill(seed, &owned, &mut values, map);
            Cow::Owned(values)
        };
        (name.into(), OutputTensor::lazy(Dtype::U8, shape.into(), make))
    }
}

/// Standard deviation that keeps the magnitude of activations: `1 / sqrt(inputs)`.
fn spread(inputs: usize) -> f32 {
    (inputs as f32).sqrt().recip()
}

/// What a layer adds to the residual stream is kept this small beside it. Otherwise what all tokens get in common would
/// outweigh what tells them apart, layer by layer, until they all went to the same experts.
const RESIDUAL_GAIN: f32 = 0.125;

fn linear_gain(linear: LinearName) -> f32 {
    if linear == LinearName::O { RESIDUAL_GAIN } else { 1.0 }
}

fn expert_gain(matrix: ExpertMatrix) -> f32 {
    if matrix == ExpertMatrix::Down { RESIDUAL_GAIN } else { 1.0 }
}

/// Random bytes, each passed through `map`.
fn fill(seed: u64, name: &str, values: &mut [u8], map: fn(u8) -> u8) {
    values.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, values)| {
        stream(seed, name, chunk).fill_bytes(values);
        values.iter_mut().for_each(|value| *value = map(*value));
    });
}

/// Random numbers of one part of one tensor.
fn stream(seed: u64, name: &str, part: usize) -> ChaCha8Rng {
    let mut random = ChaCha8Rng::seed_from_u64(seed ^ fingerprint(name.bytes()));
    random.set_stream(part as u64);
    random
}
