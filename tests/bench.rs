//! What `ternoss bench` promises: every figure that was asked for, and figures that fit each other.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod support;

use std::path::{Path, PathBuf};

use roxmltree::Document;
use serde_json::{Value, json};
use support::{example, fixture, folder::Folder, ternoss, ternoss_err, ternoss_ok};
use ternoss::{
    Cpu,
    backends::KvFormat,
    model::{Checkpoint, ExpertPlacement, GptOss, LoadOptions, Traffic},
};

fn utf8(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn bench_json(model: &Path, options: &[&str]) -> Value {
    let printed = ternoss_ok(&[&["bench", "--model", utf8(model), "--json"], options].concat());
    serde_json::from_str(&printed).unwrap()
}

/// The smallest random model, ternary.
fn ternary(folder: &Path) -> PathBuf {
    let output = folder.join("ternary");
    ternoss_ok(&["synthesize", "--shape", "tiny", "--format", "ternary", "--output", utf8(&output)]);
    output
}

fn load(folder: &Path, experts: ExpertPlacement) -> GptOss<Cpu> {
    // As the program does for writing text.
    let options = LoadOptions { experts, kv_format: KvFormat::F16, ..LoadOptions::default() };
    GptOss::load(&Checkpoint::open(folder).unwrap(), options, &Default::default()).unwrap()
}

/// The values of one key in a list of objects.
fn column(list: &Value, key: &str) -> Vec<u64> {
    list.as_array().unwrap().iter().map(|row| row[key].as_u64().unwrap()).collect()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

#[track_caller]
fn assert_equal(found: f64, expected: f64) {
    assert!((found / expected - 1.0).abs() < 1e-9, "{found}, expected {expected}");
}

const SHORT: [&str; 8] = ["--prefill", "8,40", "--decode", "3", "--context", "20,0", "--runs", "1"];

#[test]
fn every_measurement_is_there_once_and_its_figures_fit_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let model = ternary(folder.path());
    let loaded = load(&model, ExpertPlacement::Auto);
    let found = bench_json(&model, &[&SHORT[..], &["--threads", "2,1,2"]].concat());
    assert_eq!(found["model"], utf8(&model));
    assert_eq!(column(&found["decode"], "context"), [0, 0, 20, 20]);
    assert_eq!(column(&found["decode"], "threads"), [1, 2, 1, 2]);
    assert_eq!(column(&found["prefill"], "tokens"), [8, 8, 40, 40]);
    assert_eq!(column(&found["prefill"], "threads"), [1, 2, 1, 2]);
    assert_eq!(column(&found["bandwidth"], "threads"), [1, 2]);
    for decode in found["decode"].as_array().unwrap() {
        let (speed, bytes) = (number(&decode["tokens_per_second"]), number(&decode["bytes_per_token"]));
        let context = decode["context"].as_u64().unwrap() as usize;
        let total: usize = (context..context + 3).map(|context| loaded.decode_traffic(context).total()).sum();
        assert_equal(bytes, total as f64 / 3.0);
        assert_equal(number(&decode["gigabytes_per_second"]), speed * bytes / 1e9);
    }
    for prefill in found["prefill"].as_array().unwrap() {
        let tokens = prefill["tokens"].as_u64().unwrap() as usize;
        assert!(number(&prefill["tokens_per_second"]) > 0.0);
        assert_equal(
            number(&prefill["bytes_per_token"]),
            loaded.prefill_traffic(tokens).total() as f64 / tokens as f64,
        );
    }
    for row in ["decode", "prefill"].iter().flat_map(|list| found[list].as_array().unwrap()) {
        assert_eq!(row["runs"], json!([row["tokens_per_second"]]), "the median of one run");
        assert!((0.0..=1.0).contains(&number(&row["outside_kernels"])), "{row}");
    }
    assert!(found["bandwidth"].as_array().unwrap().iter().all(|row| number(&row["gigabytes_per_second"]) > 0.0));
    assert!(number(&found["load_seconds"]) < number(&found["first_token_seconds"]));
    let parts: u64 =
        found["bytes_without_context"].as_object().unwrap().values().map(|part| part.as_u64().unwrap()).sum();
    assert_eq!(parts as usize, loaded.decode_traffic(0).total());
}

#[test]
fn sequences_side_by_side_are_measured_beside_one() {
    let folder = tempfile::tempdir().unwrap();
    let model = ternary(folder.path());
    let loaded = load(&model, ExpertPlacement::Auto);
    let found = bench_json(&model, &[&SHORT[..], &["--threads", "2", "--sequences", "5,1"]].concat());
    assert_eq!(column(&found["decode"], "context"), [0, 0, 20, 20]);
    assert_eq!(column(&found["decode"], "sequences"), [1, 5, 1, 5]);
    for decode in found["decode"].as_array().unwrap() {
        let [context, sequences] = ["context", "sequences"].map(|key| decode[key].as_u64().unwrap() as usize);
        let (one, together) = (loaded.decode_traffic(context), loaded.batch_traffic(context, sequences));
        assert_eq!((together.cache, together.attention), (sequences * one.cache, one.attention));
        // Two of eight experts a token: five tokens read all of them.
        assert_eq!(together.experts, if sequences == 1 { one.experts } else { 4 * one.experts });
        let total: usize = (0..3).map(|more| loaded.batch_traffic(context + more, sequences).total()).sum();
        assert_equal(number(&decode["bytes_per_token"]), total as f64 / (3 * sequences) as f64);
        assert!(number(&decode["tokens_per_second"]) > 0.0);
    }
    assert_eq!(loaded.batch_traffic(9, 1), loaded.decode_traffic(9));
}

#[test]
fn choices_of_experts_are_counted() {
    let folder = tempfile::tempdir().unwrap();
    let model = ternary(folder.path());
    let found = bench_json(&model, &SHORT);
    let visits: Vec<Vec<usize>> = serde_json::from_value(found["expert_visits"].clone()).unwrap();
    // 40 tokens are the most at once, and each goes to two experts.
    assert!(visits.len() == 2 && visits.iter().all(|counts| counts.len() == 8 && counts.iter().sum::<usize>() == 80));
    let touched = visits.iter().map(|counts| counts.iter().filter(|count| **count > 0).count()).min();
    assert_eq!((&found["experts"], &found["experts_touched"]), (&json!(8), &json!(touched)));
    assert_eq!(touched, Some(8), "a random model leaves no expert out");
    let one = bench_json(&model, &["--prefill", "1", "--decode", "1", "--context", "0", "--runs", "1"]);
    assert_eq!(one["experts_touched"], 2);
    let again = bench_json(&model, &SHORT);
    assert_eq!(again["expert_visits"], found["expert_visits"]);
    let other = bench_json(&model, &[&SHORT[..], &["--seed", "1"]].concat());
    assert_ne!(other["expert_visits"], found["expert_visits"]);
}

#[test]
#[cfg(target_os = "linux")]
fn memory_is_told_by_kind() {
    let folder = tempfile::tempdir().unwrap();
    let memory = bench_json(&ternary(folder.path()), &SHORT)["memory"].clone();
    let bytes = |key: &str| memory[key].as_u64().unwrap();
    assert!(bytes("mapped_bytes") > 0 && bytes("anonymous_bytes") > 0, "{memory}");
    assert!(bytes("peak_resident_bytes") >= bytes("mapped_bytes").max(bytes("anonymous_bytes")), "{memory}");
    // What the bandwidth is measured on does not count.
    assert!(bytes("peak_resident_bytes") < 400 << 20, "{memory}");
}

#[test]
fn the_table_has_all_figures() {
    let printed = ternoss_ok(&[&["bench", "--model", utf8(&example("tiny-gpt-oss"))], &SHORT[..]].concat());
    let expected = ["decode", "prefill", "MB/token", "of bandwidth", "outside kernels", "memory is read at"];
    let more = ["loaded in", "first token after", "resident memory", "experts touched: 8 of 8"];
    assert!(expected.iter().chain(&more).all(|part| printed.contains(part)), "{printed}");
}

#[test]
fn full_precision_models_are_measured_as_they_are_held() {
    for name in ["tiny-bf16", "tiny-mxfp4"] {
        let model = fixture(name);
        for (experts, option) in
            [(ExpertPlacement::Resident, None), (ExpertPlacement::Streamed, Some("--stream-experts"))]
        {
            let options: Vec<&str> = SHORT.into_iter().chain(option).collect();
            let found = bench_json(&model, &options);
            let traffic = load(&model, experts).decode_traffic(0);
            assert_eq!(found["bytes_without_context"]["experts"], traffic.experts, "{name} {option:?}");
        }
    }
}

#[test]
fn a_picture_shows_every_measurement() {
    let folder = tempfile::tempdir().unwrap();
    let (model, file) = (ternary(folder.path()), folder.path().join("speed.svg"));
    let options = [&SHORT[..], &["--threads", "1,2", "--picture", utf8(&file)]].concat();
    let found = bench_json(&model, &options);
    let svg = std::fs::read_to_string(&file).unwrap();
    let document = Document::parse(&svg).unwrap();
    assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    let texts: Vec<&str> =
        document.descendants().filter(|node| node.has_tag_name("text")).filter_map(|n| n.text()).collect();
    for decode in found["decode"].as_array().unwrap() {
        let threads = if decode["threads"] == 1 { "1 thread" } else { "2 threads" };
        let label = format!("context {}, {threads}", decode["context"]);
        assert!(texts.contains(&label.as_str()), "{label} is not among {texts:?}");
    }
    // One dot for each measurement, each a line of no length.
    assert_eq!(svg.matches("h0.01").count(), 8);
    let failed = ternoss_err(
        &[&["bench", "--model", utf8(&model)], &SHORT[..], &["--picture", utf8(&folder.path().join("none/speed.svg"))]]
            .concat(),
    );
    assert!(failed.contains("none/speed.svg"), "{failed}");
}

#[test]
fn what_is_longer_than_the_model_is_made_for_is_skipped_and_said() {
    let folder = tempfile::tempdir().unwrap();
    let mut short = Folder::read(&fixture("tiny-bf16"));
    short.config["max_position_embeddings"] = json!(32);
    short.write(folder.path());
    let model = utf8(folder.path());
    let output = ternoss(&[
        "bench",
        "--model",
        model,
        "--json",
        "--prefill",
        "32,33",
        "--context",
        "29,30",
        "--decode",
        "3",
        "--runs",
        "1",
    ]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains("skipped --prefill 33") && stderr.contains("skipped --context 30"), "{stderr}");
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(column(&found["prefill"], "tokens"), [32]);
    assert_eq!(column(&found["decode"], "context"), [29]);
    let output = ternoss(&["bench", "--model", model, "--prefill", "64", "--context", "64"]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr.ends_with("error: nothing to measure: the model is made for 32 tokens at most\n"), "{stderr}");
}

#[test]
fn measurements_that_make_no_sense_are_refused() {
    let model = fixture("tiny-bf16");
    for [option, value] in [
        ["--prefill", "0"],
        ["--prefill", "128;512"],
        ["--decode", "0"],
        ["--context", "-1"],
        ["--context", "many"],
        ["--threads", "0"],
        ["--threads", "1,,2"],
        ["--runs", "0"],
        ["--sequences", "0"],
        ["--sequences", "1025"],
    ] {
        let output = ternoss(&["bench", "--model", utf8(&model), &format!("{option}={value}")]);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{option} {value}: {stderr}");
        assert!(stderr.starts_with("error: ") && stderr.contains(option), "{stderr}");
        assert!(output.stdout.is_empty());
    }
    let missing = fixture("absent");
    assert!(ternoss_err(&["bench", "--model", utf8(&missing)]).contains("absent"));
}

#[test]
fn bytes_of_a_token_are_those_counted_by_hand() {
    let folder = tempfile::tempdir().unwrap();
    let model = load(&ternary(folder.path()), ExpertPlacement::Auto);
    // A row of 65 to 128 inputs: 32 bytes of codes, 4 of its scale, 2 of its groups. A row of 256: 64, 4 and 4.
    let (row, wide_row) = (32 + 4 + 2, 64 + 4 + 4);
    let [q, kv, o] = [256 * (row + 4), 128 * (row + 4), 128 * (wide_row + 4)];
    let expert = 2 * 96 * (row + 4) + 128 * (row + 4);
    let entry = 2 * 2 * 64 * 2;
    let expected = Traffic {
        embedding: 128 * 2,
        attention: 2 * (q + 2 * kv + o + 4 * 4),
        // The sliding layer sees 16 tokens, the other one 21.
        cache: (16 + 21) * entry,
        router: 2 * (128 * 8 + 8) * 4,
        experts: 2 * 2 * expert,
        norms: (2 * 2 + 1) * 128 * 4,
        output: 512 * 128 * 2,
    };
    assert_eq!(model.decode_traffic(20), expected);
    let alone = Traffic { cache: 2 * entry, ..expected };
    assert_eq!(model.decode_traffic(0), alone);
    assert_eq!(model.prefill_traffic(1), alone);
    let all_experts = Traffic { embedding: 40 * 256, cache: 2 * 40 * entry, experts: 2 * 8 * expert, ..expected };
    assert_eq!(model.prefill_traffic(40), all_experts);
    // Two chunks read everything twice, the output layer once; the second one sees the sliding layer's last 15 before it.
    let chunks = Traffic {
        embedding: 600 * 256,
        attention: 2 * expected.attention,
        cache: (512 + 512 + (15 + 88) + 600) * entry,
        router: 2 * expected.router,
        experts: 2 * 2 * 8 * expert,
        norms: 2 * expected.norms,
        output: expected.output,
    };
    assert_eq!(model.prefill_traffic(600), chunks);
}

#[test]
fn full_precision_bytes_are_those_counted_by_hand() {
    let model = fixture("tiny-bf16");
    let dense = load(&model, ExpertPlacement::Resident).decode_traffic(8);
    let weights = 64 * 96 + 96 + 48 * 64 + 64;
    let attention = 64 * 128 + 128 + 2 * (64 * 32 + 32) + 128 * 64 + 64 + 8;
    let expected = Traffic {
        embedding: 64 * 2,
        attention: 4 * attention * 4,
        cache: 2 * (8 + 9) * 2 * 2 * 16 * 2,
        router: 4 * (64 * 8 + 8) * 4,
        experts: 4 * 2 * weights * 4,
        norms: (4 * 2 + 1) * 64 * 4,
        output: 512 * 64 * 2,
    };
    assert_eq!(dense, expected);
    // bf16 in the file, biases as f32 in memory.
    let streamed = load(&model, ExpertPlacement::Streamed).decode_traffic(8);
    let stored = (64 * 96 + 48 * 64) * 2 + (96 + 64) * 4;
    assert_eq!(streamed, Traffic { experts: 4 * 2 * stored, ..expected });
}
