//! `ternoss inspect`

use std::io;

use anyhow::Result;
use clap::Args;
use serde_json::json;
use ternoss::{
    backends::{CodeFormat, TernaryLayout},
    calib::ternary_weights,
    model::{
        Checkpoint, GptOssConfig,
        checkpoint::{ExpertMatrix, LinearName, Part, TableName},
        config::{LayerType, Quantization},
    },
};

use super::{bytes, download::resolve_model};

/// Show what a model folder holds, without loading it
#[derive(Args)]
pub(crate) struct InspectArgs {
    /// Model folder, or hub id such as openai/gpt-oss-20b
    #[arg(long, value_name = "DIR")]
    model: String,
    /// List every tensor
    #[arg(long)]
    tensors: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Tensors of the roles that are shown together.
#[derive(Default)]
struct Group {
    tensors: usize,
    bytes: usize,
}

/// Roles of tensors, in the order they are printed.
const PARTS: [&str; 4] = ["attention", "experts", "embedding and output", "router, norms, biases, sinks"];

pub(crate) fn run(args: InspectArgs) -> Result<()> {
    let checkpoint = Checkpoint::open(&resolve_model(&args.model)?)?;
    let mut parts: [Group; 4] = Default::default();
    for (name, entry) in checkpoint.tensors() {
        let part = &mut parts[group_of(name)];
        part.tensors += 1;
        part.bytes += entry.bytes();
    }
    if args.json {
        return Ok(print_json(&checkpoint, &parts)?);
    }
    print_architecture(checkpoint.config())?;
    print_line!("")?;
    print_line!("{:<30} {:>8} {:>12}", "part", "tensors", "size")?;
    for (name, part) in PARTS.iter().zip(&parts) {
        print_line!("{name:<30} {:>8} {:>12}", part.tensors, bytes(part.bytes))?;
    }
    print_line!("{:<30} {:>8} {:>12}", "total", "", bytes(parts.iter().map(|part| part.bytes).sum()))?;
    print_line!("")?;
    print_ternary(&checkpoint)?;
    if args.tensors {
        print_line!("")?;
        for (name, entry) in checkpoint.tensors() {
            print_line!("{name:<60} {:?} {:?} {}", entry.dtype, entry.shape, bytes(entry.bytes()))?;
        }
    }
    Ok(())
}

fn group_of(name: &str) -> usize {
    match Part::of(name) {
        Part::AttentionCodes | Part::AttentionScales => 0,
        Part::ExpertCodes | Part::ExpertScales => 1,
        Part::Embedding | Part::OutputLayer => 2,
        _ => 3,
    }
}

fn print_architecture(config: &GptOssConfig) -> io::Result<()> {
    let sliding = config.layer_types.iter().filter(|kind| **kind == LayerType::SlidingAttention).count();
    print_line!("gpt-oss, {} layers ({sliding} sliding over {})", config.num_hidden_layers(), config.sliding_window)?;
    print_line!("hidden size {}, vocabulary {}", config.hidden_size, config.vocab_size)?;
    print_line!(
        "{} query heads on {} key-value heads of {}",
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim
    )?;
    print_line!(
        "{} experts of {} neurons, {} per token, SwiGLU limit {}",
        config.num_local_experts,
        config.intermediate_size,
        config.experts_per_token,
        config.swiglu_limit
    )?;
    let stored = match &config.quantization {
        Quantization::None => "plain floats".into(),
        Quantization::Mxfp4 => "experts in MXFP4".into(),
        Quantization::Ternary(t) => {
            format!("ternary ({}, {}, {:.3} bits per weight)", t.method, t.format, t.bits_per_weight)
        }
    };
    print_line!("stored as {stored}")
}

fn print_ternary(checkpoint: &Checkpoint) -> io::Result<()> {
    let weights = ternary_weights(checkpoint);
    if let Quantization::Ternary(_) = checkpoint.config().quantization {
        print_line!("{weights} weights of attention and experts are ternary")?;
        for (table, name) in TableName::ALL.into_iter().zip(["embedding", "output layer"]) {
            if let Some((planes, bits)) = ternary_table(checkpoint, table) {
                print_line!("the {name} is ternary: planes {planes}, {bits:.3} bits per weight")?;
            }
        }
        return Ok(());
    }
    print_line!("{weights} weights would become ternary (groups of 64):")?;
    for format in CodeFormat::ALL {
        let (size, bits) = ternary_size(checkpoint, format);
        print_line!("  {format}  {:>10}  {bits:.3} bits per weight", bytes(size))?;
    }
    Ok(())
}

/// Planes and bits per weight of a table, if it is ternary.
fn ternary_table(checkpoint: &Checkpoint, table: TableName) -> Option<(usize, f64)> {
    let planes = checkpoint.table_planes(table)?;
    let parts = checkpoint.tensors().filter(|(name, _)| {
        let part = name.strip_prefix(table.path()).and_then(|rest| rest.strip_prefix('.'));
        part.is_some_and(|part| part != "weight")
    });
    let bytes: usize = parts.map(|(_, entry)| entry.bytes()).sum();
    let weights: usize = table.shape(checkpoint.config()).iter().product();
    Some((planes, 8.0 * bytes as f64 / weights as f64))
}

/// Bytes and bits per weight of all ternary matrices in groups of 64.
fn ternary_size(checkpoint: &Checkpoint, format: CodeFormat) -> (usize, f64) {
    let config = checkpoint.config();
    let size = |matrices: usize, [in_features, rows]: [usize; 2]| {
        TernaryLayout { format, matrices, planes: 1, rows, in_features, group_size: Some(64), rotation: None }.bytes()
    };
    let attention: usize = LinearName::ALL.iter().map(|linear| size(1, linear.shape(config))).sum();
    let experts = ExpertMatrix::ALL.map(|matrix| size(config.num_local_experts, matrix.shape(config)));
    let total = config.num_hidden_layers() * (attention + experts.iter().sum::<usize>());
    (total, 8.0 * total as f64 / ternary_weights(checkpoint) as f64)
}

fn print_json(checkpoint: &Checkpoint, parts: &[Group]) -> io::Result<()> {
    let config = checkpoint.config();
    let parts: serde_json::Map<_, _> = PARTS
        .iter()
        .zip(parts)
        .map(|(name, part)| (name.to_string(), json!({ "tensors": part.tensors, "bytes": part.bytes })))
        .collect();
    let (ternary_bytes, bits_per_weight) = match &config.quantization {
        Quantization::Ternary(ternary) => (None, ternary.bits_per_weight),
        _ => {
            let (size, bits) = ternary_size(checkpoint, CodeFormat::T2);
            (Some(size), bits)
        }
    };
    let object = json!({
        "num_hidden_layers": config.num_hidden_layers(),
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "num_local_experts": config.num_local_experts,
        "experts_per_token": config.experts_per_token,
        "parts": parts,
        "ternary_weights": ternary_weights(checkpoint),
        "ternary_bytes": ternary_bytes,
        "bits_per_weight": bits_per_weight,
        "table_planes": checkpoint.table_planes(TableName::Embedding),
    });
    print_line!("{object:#}")
}
