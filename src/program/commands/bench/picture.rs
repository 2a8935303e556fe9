//! The results as a picture: what was reached beside what the memory's bandwidth allows.

use ternoss::calib::canvas::{Canvas, Font, LINE, MARGIN, PLOT_LEFT, WIDTH};

use super::results::{Results, counted, figure};

/// Colours that people with any colour vision tell apart (Okabe and Ito, 2008), one for each number of threads.
const COLOURS: [&str; 5] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"];

const ROW: f64 = 30.0;
const BAR: f64 = 18.0;
/// Left edge of bars, beside what they are of.
const BARS_LEFT: f64 = MARGIN + 190.0;
/// Their greatest length, which leaves room for the numbers.
const BARS_WIDTH: f64 = WIDTH - MARGIN - 170.0 - BARS_LEFT;

const PLOT_WIDTH: f64 = WIDTH - MARGIN - PLOT_LEFT;
const PLOT_HEIGHT: f64 = 320.0;

/// Draws the results.
pub(super) fn picture(results: &Results) -> String {
    let mut canvas = Canvas::new();
    headline(&mut canvas, results);
    if !results.decode.is_empty() {
        decoding(&mut canvas, results);
    }
    roofline(&mut canvas, results);
    canvas.finish(&format!("Speed of {}", results.model))
}

fn headline(canvas: &mut Canvas, results: &Results) {
    canvas.bottom += 22.0;
    canvas.text(MARGIN, canvas.bottom, Font::TITLE, "Speed on this machine");
    canvas.bottom += 24.0;
    let model: String = match results.model.char_indices().rev().nth(79) {
        Some((start, _)) if start > 0 => format!("\u{2026}{}", &results.model[start..]),
        _ => results.model.clone(),
    };
    canvas.text(MARGIN, canvas.bottom, Font::BODY, &format!("{model} ({})", results.instruction_set));
    let fastest = |speeds: &mut dyn Iterator<Item = f64>| {
        let most = speeds.fold(0.0, f64::max);
        if most > 0.0 { figure(most) } else { "\u{2013}".into() }
    };
    let read = results.bandwidth.iter().map(|bandwidth| bandwidth.gigabytes_per_second);
    canvas.tiles([
        (fastest(&mut results.decode.iter().map(|decode| decode.tokens_per_second)), "tokens/s decoded at most"),
        (fastest(&mut results.prefill.iter().map(|prefill| prefill.tokens_per_second)), "tokens/s of a prompt at most"),
        (format!("{} GB/s", figure(read.fold(0.0, f64::max))), "read from memory at most"),
        (format!("{:.2} s", results.first_token_seconds), "from start to first token"),
    ]);
}

/// A bar for each measurement, in front of a pale one: the bandwidth over the bytes of a token.
fn decoding(canvas: &mut Canvas, results: &Results) {
    let about = "Tokens per second. Pale: what reading a token's bytes from memory allows. Strong: reached.";
    canvas.heading("Decoding, one token of each sequence after the other", about);
    let limit = |threads: usize, bytes_per_token: f64| results.bandwidth(threads) / bytes_per_token;
    let limits = results.decode.iter().map(|decode| limit(decode.threads, decode.bytes_per_token));
    let reached = results.decode.iter().map(|decode| decode.tokens_per_second);
    let scale = BARS_WIDTH / limits.chain(reached).fold(1e-9, f64::max);
    canvas.bottom += 18.0;
    for decode in &results.decode {
        let limit = limit(decode.threads, decode.bytes_per_token);
        let (top, y) = (canvas.bottom, canvas.bottom + BAR / 2.0 + 5.0);
        let threads = counted(decode.threads, "thread");
        let what = match decode.sequences {
            1 => format!("context {}, {threads}", decode.context),
            sequences => format!("{sequences} of context {}, {threads}", decode.context),
        };
        canvas.text(BARS_LEFT - 10.0, y, Font::LABEL.to_the_left(), &what);
        canvas.rect([BARS_LEFT, top, limit * scale, BAR], LINE);
        canvas
            .rect([BARS_LEFT, top + 3.0, decode.tokens_per_second * scale, BAR - 6.0], colour(results, decode.threads));
        let numbers = format!("{} of {}", figure(decode.tokens_per_second), figure(limit));
        let end = BARS_LEFT + limit.max(decode.tokens_per_second) * scale;
        canvas.text(end + 10.0, y, Font::LABEL, &numbers);
        canvas.bottom += ROW;
    }
    canvas.bottom -= ROW - BAR;
}

fn colour(results: &Results, threads: usize) -> &'static str {
    let number = results.bandwidth.iter().position(|bandwidth| bandwidth.threads == threads);
    COLOURS[number.unwrap_or(0) % COLOURS.len()]
}

/// Tokens per second over the number of tokens that share one reading of the weights, both logarithmic.
fn roofline(canvas: &mut Canvas, results: &Results) {
    let about = "Lines: what the bandwidth allows. Dots: reached. Where they are far below, arithmetic is the limit.";
    canvas.heading("The more tokens share one reading of the weights, the more are possible", about);
    canvas.bottom += 26.0;
    for (i, bandwidth) in results.bandwidth.iter().enumerate() {
        let name = format!("{}, {} GB/s", counted(bandwidth.threads, "thread"), figure(bandwidth.gigabytes_per_second));
        let x = MARGIN + (i % 4) as f64 * 200.0;
        if i > 0 && i % 4 == 0 {
            canvas.bottom += 20.0;
        }
        canvas.swatch(x, canvas.bottom, colour(results, bandwidth.threads), &name);
    }
    let dots = results.decode.iter().map(|decode| (decode.threads, decode.sequences, decode.tokens_per_second));
    let prompts = results.prefill.iter().map(|prefill| (prefill.threads, prefill.tokens, prefill.tokens_per_second));
    let dots: Vec<_> = dots.chain(prompts).collect();
    let lines: Vec<(usize, Vec<(usize, f64)>)> = results
        .bandwidth
        .iter()
        .map(|bandwidth| {
            let limit = |(tokens, bytes): &(usize, f64)| (*tokens, 1e9 * bandwidth.gigabytes_per_second / bytes);
            (bandwidth.threads, results.batches.iter().map(limit).collect())
        })
        .collect();
    let speeds = || dots.iter().map(|dot| dot.2).chain(lines.iter().flat_map(|(_, line)| line).map(|point| point.1));
    let least = speeds().fold(f64::INFINITY, f64::min).log10().floor();
    let decades = (speeds().fold(0.0, f64::max).log10().ceil() - least).max(1.0);
    let batches = results.batches.iter().map(|batch| batch.0);
    let longest = batches.chain(dots.iter().map(|dot| dot.1)).fold(2, usize::max) as f64;
    let top = canvas.bottom + 20.0;
    let bottom = top + PLOT_HEIGHT;
    let across = |tokens: usize| PLOT_LEFT + 12.0 + (tokens as f64).log2() / longest.log2() * (PLOT_WIDTH - 40.0);
    let height = |speed: f64| bottom - (speed.log10() - least) / decades * PLOT_HEIGHT;
    for decade in 0..=decades as i32 {
        let speed = 10f64.powi(least as i32 + decade);
        canvas.path(&format!("M{PLOT_LEFT:.1} {:.1}h{PLOT_WIDTH:.1}", height(speed)), LINE, 1.0);
        canvas.text(PLOT_LEFT - 8.0, height(speed) + 4.0, Font::SMALL.to_the_left(), &speed.to_string());
    }
    for (threads, line) in &lines {
        let points = line.iter().map(|(tokens, limit)| format!("{:.1} {:.1}", across(*tokens), height(*limit)));
        canvas.path(&format!("M{}", points.collect::<Vec<_>>().join("L")), colour(results, *threads), 2.0);
    }
    for (threads, tokens, speed) in &dots {
        // A dot is a line of no length with round ends.
        canvas.path(&format!("M{:.1} {:.1}h0.01", across(*tokens), height(*speed)), colour(results, *threads), 9.0);
    }
    canvas.bottom = bottom + 20.0;
    let step = if longest <= 512.0 { 1 } else { 2 };
    for tokens in (0..).step_by(step).map(|power| 1usize << power).take_while(|tokens| *tokens as f64 <= longest) {
        canvas.text(across(tokens), canvas.bottom, Font::SMALL.centred(), &tokens.to_string());
    }
    canvas.axis("tokens at once: of a prompt, or one of each sequence. Upwards: tokens per second");
}
