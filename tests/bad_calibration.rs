//! A calibration that cannot be done is refused with one line, and odd models that can be calibrated give finite weights.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod support;

use std::{fs, path::Path};

use support::{example, folder::Folder, listing, ternoss, ternoss_err, ternoss_ok};
use ternoss::{
    calib::{CalibError, Calibration, Report},
    model::Checkpoint,
};

fn utf8(path: &Path) -> &str {
    path.to_str().unwrap()
}

const FEW: [&str; 4] = ["--calibration-tokens", "768", "--calibration-context", "128"];

/// The shipped model, changed.
fn changed(change: impl FnOnce(&mut Folder)) -> tempfile::TempDir {
    let mut model = Folder::read(&example("tiny-gpt-oss"));
    change(&mut model);
    let folder = tempfile::tempdir().unwrap();
    model.write(folder.path());
    folder
}

/// That `quantize` refuses with all of `expected` in its message, and leaves nothing behind.
#[track_caller]
fn refused(model: &Path, options: &[&str], expected: &[&str]) {
    let parent = tempfile::tempdir().unwrap();
    let output = parent.path().join("output");
    let args = [&["quantize", "--model", utf8(model), "--output", utf8(&output)], options].concat();
    let finished = ternoss(&args);
    let stderr = String::from_utf8_lossy(&finished.stderr);
    let errors: Vec<&str> = stderr.lines().filter(|line| !line.starts_with("warning: ")).collect();
    assert_eq!((finished.status.code(), errors.len()), (Some(1), 1), "{stderr}");
    assert!(expected.iter().all(|part| errors[0].contains(part)), "{stderr} lacks one of {expected:?}");
    assert_eq!(listing(parent.path()), [] as [&str; 0], "{stderr}");
}

#[test]
fn a_text_that_is_none_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("text");
    let read = || Calibration::read_text(&text);
    let both = |expected: &str| {
        refused(&example("tiny-gpt-oss"), &["--calibration", utf8(&text)], &[utf8(&text), expected]);
        let (model, prose) = (example("tiny-gpt-oss"), example("text/prose_test.txt"));
        let ablation = ["ablation", "--model", utf8(&model), "--text", utf8(&prose), "--calibration", utf8(&text)];
        let error = ternoss_err(&ablation);
        assert!(error.contains(utf8(&text)) && error.contains(expected), "{error}");
    };
    assert!(matches!(read(), Err(CalibError::ReadText { .. })));
    both("No such file");
    for contents in ["", " \n\t\u{a0}"] {
        fs::write(&text, contents).unwrap();
        assert!(matches!(read(), Err(CalibError::EmptyText { .. })));
        both("empty");
    }
    fs::write(&text, [&b"caf\xc3\xa9 "[..], b"caf\xe9"].concat()).unwrap();
    assert!(matches!(read(), Err(CalibError::NotUtf8 { position: 9, .. })), "{:?}", read());
    both("not UTF-8 at byte 9");
    fs::write(&text, "good\n").unwrap();
    assert_eq!(read().unwrap(), "good\n");
}

#[test]
fn a_short_text_is_refused_below_a_window_and_warned_of_above() {
    let model = example("tiny-gpt-oss");
    let checkpoint = Checkpoint::open(&model).unwrap();
    let config = checkpoint.config();
    // Five tokens for each of 128 inputs of each of 8 experts, 2 of which see a token.
    let wanted = Calibration::tokens_wanted(config);
    assert_eq!((wanted, Calibration::expert_tokens_wanted(config)), (2560, 640));
    let tokens = vec![7; 5000];
    let of = |tokens: &[u32], most| Calibration::new(tokens, 64, most, config);
    for (count, most) in [(0, 5000), (63, 5000), (5000, 63), (5000, 0)] {
        let found = of(&tokens[..count], most);
        let short = matches!(found, Err(CalibError::ShortText { tokens, context: 64, wanted: 2560 })
            if tokens == count.min(most));
        assert!(short, "{found:?}");
    }
    // Of 2 windows one is held out, of 39 three are.
    for (count, used) in [(64, 64), (127, 64), (128, 64), (2559, 2304)] {
        let calibration = of(&tokens[..count], 5000).unwrap();
        let shortage = calibration.shortage(config).unwrap();
        assert_eq!((calibration.tokens(), shortage.found, shortage.wanted), (used, used, 2560));
    }
    assert_eq!(of(&tokens, 5000).unwrap().shortage(config), None);

    let folder = tempfile::tempdir().unwrap();
    let (text, output) = (folder.path().join("text"), folder.path().join("output"));
    fs::write(&text, "It is a truth universally acknowledged. ").unwrap();
    refused(&model, &["--calibration", utf8(&text)], &["one window of 1024 is needed", "2560 tokens or more"]);
    fs::write(&text, "It is a truth universally acknowledged. ".repeat(20)).unwrap();
    let options = ["--calibration", utf8(&text), "--calibration-context", "16"];
    let args = [&["quantize", "--model", utf8(&model), "--output", utf8(&output)], &options[..]].concat();
    let finished = ternoss(&args);
    let stderr = String::from_utf8_lossy(&finished.stderr);
    assert!(finished.status.success() && stderr.contains("warning: ") && stderr.contains("2560 or more"), "{stderr}");
}

#[test]
fn inputs_that_are_always_zero_leave_every_weight_finite() {
    let folder = tempfile::tempdir().unwrap();
    let dead = changed(|model| {
        let hidden = 128;
        let embedding = model.tensor("model.embed_tokens.weight");
        (0..embedding.shape[0]).for_each(|row| embedding.set(row * hidden + 5, 0.0));
        for (layer, norm) in [(0, "input_layernorm"), (1, "post_attention_layernorm"), (2, "input_layernorm")] {
            let gamma = model.tensor(&format!("model.layers.{layer}.{norm}.weight"));
            [0, 63, 64, 127].into_iter().for_each(|input| gamma.set(input, 0.0));
        }
        // Nothing at all reaches the attention of the last layer.
        let gamma = model.tensor("model.layers.3.input_layernorm.weight");
        (0..hidden).for_each(|input| gamma.set(input, 0.0));
    });
    for (name, options) in [
        ("rotated", &[][..]),
        ("plain", &["--without", "rotation"]),
        ("planes", &["--without", "rotation", "--planes", "2"]),
        ("pt-bitnet", &["--method", "pt-bitnet"]),
    ] {
        let output = folder.path().join(name);
        let args = ["quantize", "--model", utf8(dead.path()), "--output", utf8(&output), "--json"];
        let report: Report = serde_json::from_str(&ternoss_ok(&[&args[..], &FEW, options].concat())).unwrap();
        let matrices = report.layers.iter().flat_map(|layer| &layer.matrices);
        assert!(matrices.clone().all(|matrix| matrix.relative_error.is_finite()), "{name}: {report:?}");
        let written = Checkpoint::open(&output).unwrap();
        for (tensor, _) in written.tensors() {
            written.expect_finite_stored(tensor).unwrap();
        }
        ternoss_ok(&["generate", "--model", utf8(&output), "--tokens", "1,2,3", "--max-tokens", "2"]);
    }
}

#[test]
fn weights_that_overflow_are_told_with_the_layer_and_the_model() {
    for (layer, name) in [(0, "mlp.experts.down_proj"), (2, "self_attn.o_proj.weight"), (3, "input_layernorm.weight")] {
        let huge = changed(|model| {
            let tensor = model.tensor(&format!("model.layers.{layer}.{name}"));
            (0..tensor.shape.iter().product()).for_each(|i| tensor.set(i, 3e38));
        });
        for method in ["ternoss", "pt-bitnet"] {
            let options = [&FEW[..], &["--method", method]].concat();
            let expected = ["full-precision model", &format!("after layer {layer}"), "NaN or infinity"];
            refused(huge.path(), &options, &expected);
        }
    }
}
