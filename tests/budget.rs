//! What `--bits-per-weight` promises.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod support;

use std::{collections::BTreeSet, path::Path};

use support::{example, folder::Folder, ternoss_err, ternoss_ok};
use ternoss::calib::Report;

/// Quantizes the shipped model on a little text.
fn arguments<'a>(model: &'a Path, output: &'a Path, options: &[&'a str]) -> Vec<&'a str> {
    let utf8 = |path: &'a Path| path.to_str().unwrap();
    let args = ["quantize", "--model", utf8(model), "--output", utf8(output), "--format", "t5"];
    [&args[..], &["--calibration-tokens", "2560", "--calibration-context", "128"], options].concat()
}

fn report(output: &Path, options: &[&str]) -> Report {
    ternoss_ok(&arguments(&example("tiny-gpt-oss"), output, options));
    Report::read(output).unwrap()
}

#[test]
fn planes_go_to_some_matrices_within_the_bits_and_help() {
    let folder = tempfile::tempdir().unwrap();
    let one = report(&folder.path().join("one"), &[]);
    let output = folder.path().join("more");
    let more = report(&output, &["--bits-per-weight", "3"]);
    let bits = more.bits_per_weight;
    assert!(bits <= 3.0 && bits > 2.9, "{bits}");
    let planes: BTreeSet<usize> =
        more.layers.iter().flat_map(|layer| &layer.matrices).map(|matrix| matrix.planes).collect();
    assert!(planes.len() > 1 && planes.is_subset(&[1, 2, 3].into()), "{planes:?}");
    assert_eq!(more.planes, *planes.last().unwrap());
    let divergence = |report: &Report| report.held_out.unwrap().kl_divergence;
    assert!(divergence(&more) < divergence(&one), "{} {}", divergence(&more), divergence(&one));
    // All experts of a layer share a tensor, so they have the same planes.
    for layer in &more.layers {
        let of = |kind: &str| -> BTreeSet<usize> {
            let matrices = layer.matrices.iter().filter(|matrix| matrix.name.contains(kind));
            matrices.map(|matrix| matrix.planes).collect()
        };
        assert!(of("gate_up_proj").len() == 1 && of("down_proj").len() == 1);
    }
    assert_eq!(Folder::read(&output).config["quantization_config"]["planes"], more.planes);
    ternoss_ok(&["generate", "--model", output.to_str().unwrap(), "--tokens", "1,2,3", "--max-tokens", "4"]);
}

#[test]
fn matrices_that_no_text_is_fitted_to_get_planes_too() {
    let folder = tempfile::tempdir().unwrap();
    let without = ["--without", "rotation,regression,residual,compensation,sweeps,bias", "--bits-per-weight", "3"];
    let report = report(&folder.path().join("fitted"), &without);
    assert!(report.bits_per_weight <= 3.0 && report.bits_per_weight > 2.9, "{}", report.bits_per_weight);
    assert!(report.planes > 1 && report.held_out.is_none());
}

#[test]
fn enough_bits_for_three_planes_everywhere_give_three_planes() {
    let folder = tempfile::tempdir().unwrap();
    let most = report(&folder.path().join("most"), &["--bits-per-weight", "16"]);
    assert!(most.layers.iter().flat_map(|layer| &layer.matrices).all(|matrix| matrix.planes == 3));
}

#[test]
fn bits_that_nothing_fits_are_refused_with_what_would() {
    let folder = tempfile::tempdir().unwrap();
    let (model, output) = (example("tiny-gpt-oss"), folder.path().join("none"));
    for bits in ["1.5", "0", "-3", "NaN"] {
        let bits = format!("--bits-per-weight={bits}");
        let error = ternoss_err(&arguments(&model, &output, &[&bits]));
        assert!(error.contains("one plane everywhere takes 2.263"), "{error}");
        assert!(!output.exists());
    }
    let error = ternoss_err(&arguments(&model, &output, &["--bits-per-weight", "3", "--method", "pt-bitnet"]));
    assert!(error.contains("bits per weight are for ternoss only"), "{error}");
    let error = ternoss_err(&arguments(&model, &output, &["--bits-per-weight", "3", "--target-size", "1MB"]));
    assert!(error.contains("cannot be combined"), "{error}");
}
