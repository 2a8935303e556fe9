//! What the report of a quantization promises: it counts what was written, and says what the text did not reach.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod support;

use std::{fs, path::Path};

use support::{example, fixture, folder::Folder, ternoss_ok};
use ternoss::{
    calib::{HeldOut, Report},
    model::{Checkpoint, checkpoint::Part},
};

fn utf8(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Quantizes a model; what was printed, and the report in the folder.
fn quantized(model: &Path, output: &Path, options: &[&str]) -> (String, Report) {
    let args = [&["quantize", "--model", utf8(model), "--output", utf8(output)], options].concat();
    let printed = ternoss_ok(&args);
    let report = fs::read(output.join("calibration_report.json")).unwrap();
    (printed, serde_json::from_slice(&report).unwrap())
}

const FEW: [&str; 4] = ["--calibration-tokens", "2048", "--calibration-context", "128"];

#[test]
fn bytes_by_part_are_those_of_the_tensors_that_were_written() {
    let folder = tempfile::tempdir().unwrap();
    let absmean = ["--method", "absmean"];
    let mut with_more = Folder::read(&fixture("tiny-bf16"));
    let value_head = with_more.tensor("lm_head.weight").clone();
    with_more.tensors.insert("value_head.weight".into(), value_head);
    let more = folder.path().join("more");
    with_more.write(&more);
    for (name, model, options) in [
        ("calibrated", example("tiny-gpt-oss"), &FEW[..]),
        ("row", example("tiny-gpt-oss"), &[&absmean[..], &["--group-size", "row", "--format", "t5"]].concat()),
        ("mxfp4", fixture("tiny-mxfp4"), &absmean),
        ("more", more, &absmean),
    ] {
        let output = folder.path().join(format!("{name}-ternary"));
        let (_, report) = quantized(&model, &output, options);
        let (before, written) = (Checkpoint::open(&model).unwrap(), Checkpoint::open(&output).unwrap());
        let size = |is: &dyn Fn(&str) -> bool| -> usize {
            written.tensors().filter(|(name, _)| is(name)).map(|(_, entry)| entry.bytes()).sum()
        };
        let all = |_: &str| true;
        assert_eq!(report.parts.values().sum::<usize>(), report.ternary_bytes + report.full_precision_bytes, "{name}");
        assert_eq!(report.bytes(), size(&all), "{name}");
        let part = |part: Part| report.parts.get(&part).copied().unwrap_or(0);
        let of =
            |path: &'static str, end: &'static str| size(&move |name: &str| name.contains(path) && name.ends_with(end));
        for (found, expected) in [
            (part(Part::AttentionCodes), of(".self_attn.", ".codes")),
            (part(Part::AttentionScales), of(".self_attn.", "_scales")),
            (part(Part::ExpertCodes), of(".mlp.experts.", ".codes")),
            (part(Part::ExpertScales), of(".mlp.experts.", "_scales")),
            (part(Part::Embedding), of("model.embed_tokens.", "weight")),
            (part(Part::OutputLayer), of("lm_head.", "weight")),
            (part(Part::Router), of(".mlp.router.", "")),
            (part(Part::Norms), of("norm.", "weight")),
            (part(Part::Other), of("value_head.", "")),
        ] {
            assert_eq!(found, expected, "{name}");
        }
        let ternary: usize = report.parts.iter().filter(|(part, _)| part.is_ternary()).map(|(_, bytes)| bytes).sum();
        assert_eq!(ternary, report.ternary_bytes, "{name}");
        assert_eq!(report.bits_per_weight, 8.0 * ternary as f64 / report.ternary_weights as f64);
        // A byte of blocks holds two weights; its scales hold none.
        let weights = |(name, entry): (&str, &ternoss::model::checkpoint::TensorEntry)| match name {
            _ if name.ends_with("_blocks") => 2 * entry.bytes(),
            _ if name.ends_with("_scales") => 0,
            _ => entry.shape.iter().product(),
        };
        assert_eq!(report.parameters, before.tensors().map(weights).sum::<usize>(), "{name}");
        assert_eq!(report.bits_per_parameter, 8.0 * report.bytes() as f64 / report.parameters as f64);
    }
}

#[test]
fn experts_that_the_text_does_not_reach_are_made_and_told() {
    let folder = tempfile::tempdir().unwrap();
    let (model, output) = (folder.path().join("model"), folder.path().join("output"));
    let mut lonely = Folder::read(&example("tiny-gpt-oss"));
    lonely.tensor("model.layers.1.mlp.router.bias").set(3, -1e4);
    lonely.write(&model);
    let (printed, report) = quantized(&model, &output, &FEW);
    let loads = report.expert_loads.unwrap();
    assert_eq!(report.layers[1].expert_tokens[3], 0);
    // Five tokens for each of 128 inputs.
    assert_eq!((loads.experts, loads.tokens_wanted), (32, 640));
    let experts = || report.layers.iter().flat_map(|layer| &layer.expert_tokens);
    let share = |below: usize| experts().filter(|tokens| **tokens < below).count() as f64 / 32.0;
    assert_eq!((loads.too_few, loads.none), (share(640), share(1)));
    assert!(loads.none >= 1.0 / 32.0 && loads.too_few > loads.none, "{loads:?}");
    assert!(report.layers.iter().all(|layer| layer.expert_tokens.iter().sum::<usize>() == 2 * 2048));
    let none = format!("saw fewer than 640 tokens, {:.1} % none", 100.0 * loads.none);
    assert!(printed.contains(&none), "{printed}");
    let matrices = report.layers.iter().flat_map(|layer| &layer.matrices);
    assert!(matrices.clone().all(|matrix| matrix.relative_error.is_finite()), "{report:?}");
    ternoss_ok(&["generate", "--model", utf8(&output), "--tokens", "1,2,3", "--max-tokens", "2"]);
    let (_, report) = quantized(&model, &folder.path().join("rounded"), &["--method", "absmean"]);
    assert_eq!(report.expert_loads, None);
}

#[test]
fn a_report_is_printed_and_drawn_with_what_it_has() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("output");
    let (printed, mut report) = quantized(&example("tiny-gpt-oss"), &output, &FEW);
    assert_eq!(printed, format!("{report}\n"));
    for (part, bytes) in &report.parts {
        assert!(printed.contains(&part.to_string()) && *bytes > 0, "{printed} lacks {part}");
    }
    for shown in ["gate_up", "down", "in layer", "squared, of the outputs", "weights, scales included"] {
        assert!(printed.contains(shown), "{printed} lacks {shown:?}");
    }
    let svg = fs::read_to_string(output.join("calibration_report.svg")).unwrap();
    let document = roxmltree::Document::parse(&svg).unwrap();
    let texts: Vec<&str> = document.descendants().filter_map(|node| node.text()).collect();
    for shown in [format!("{:.3}", report.bits_per_weight), "ternoss, 1 plane, t2".into(), "< 640".into()] {
        assert!(texts.iter().any(|text| text.starts_with(&shown)), "{texts:?} lack {shown:?}");
    }
    let rounded = folder.path().join("rounded");
    let (printed, _) = quantized(&example("tiny-gpt-oss"), &rounded, &["--method", "absmean"]);
    let svg = fs::read_to_string(rounded.join("calibration_report.svg")).unwrap();
    assert!(!svg.contains("Load of the experts") && !printed.contains("saw fewer"), "{printed}");
    assert!(printed.contains("squared, of the weights") && !printed.contains("held out"), "{printed}");
    assert!(report.held_out.is_some() && report.to_string().contains("held out"));
    report.held_out = None;
    assert!(!report.to_string().contains("held out"));
    let figures =
        HeldOut { tokens: 512, teacher_perplexity: 33.73, perplexity: 39.6, kl_divergence: 0.25, top_1: 0.712 };
    report.held_out = Some(figures);
    let printed = report.to_string();
    for shown in ["512  tokens", "39.60  full precision: 33.73", "0.2500", "71.2 %"] {
        assert!(printed.contains(shown), "{printed} lacks {shown:?}");
    }
    let again: Report = serde_json::from_str(&serde_json::to_string(&report).unwrap()).unwrap();
    assert_eq!(again, report);
}
