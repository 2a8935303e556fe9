//! `bench --backends` as a picture.

use ternoss::calib::canvas::{Canvas, Font, LINE, MARGIN, WIDTH};

use super::{
    backends::Row,
    results::figure,
    row::{Figures, Operations},
};

const ROW: f64 = 26.0;
const BAR: f64 = 16.0;
/// Left edge of bars, beside the names of their rows.
const LEFT: f64 = MARGIN + 210.0;
/// Their greatest length, which leaves room for a number.
const BARS: f64 = WIDTH - MARGIN - 90.0 - LEFT;

/// Draws the speeds of all rows that have any.
pub(super) fn picture(model: &str, rows: &[Row]) -> String {
    let mut canvas = Canvas::new();
    canvas.bottom += 22.0;
    canvas.text(MARGIN, canvas.bottom, Font::TITLE, "The same model on every backend");
    canvas.bottom += 24.0;
    canvas.text(MARGIN, canvas.bottom, Font::BODY, model);
    let about = "Tokens per second. Bars are logarithmic: each line upwards is ten times faster.";
    section(&mut canvas, rows, ["Decoding, one token after the other", about], |row| row.decode_tokens_per_second);
    let about = "Tokens per second of a prompt, logarithmic as well.";
    section(&mut canvas, rows, ["Reading a prompt", about], |row| row.prefill_tokens_per_second);
    missing(&mut canvas, rows);
    canvas.finish(&format!("Backends compared on {model}"))
}

/// A bar for each row.
fn section(canvas: &mut Canvas, rows: &[Row], [name, about]: [&str; 2], speed: impl Fn(&Figures) -> f64) {
    canvas.heading(name, about);
    let speeds: Vec<(&Row, f64)> = rows.iter().filter_map(|row| Some((row, speed(row.figures.as_ref()?)))).collect();
    let finite = || speeds.iter().map(|(_, speed)| *speed).filter(|speed| speed.is_finite() && *speed > 0.0);
    let least = finite().fold(f64::INFINITY, f64::min).log10().floor();
    let decades = (finite().fold(0.0, f64::max).log10() - least).max(1.0);
    if !(least.is_finite() && decades.is_finite()) {
        return;
    }
    canvas.bottom += 18.0;
    let height = ROW * speeds.len() as f64;
    for decade in 0..=decades as i32 {
        let x = LEFT + f64::from(decade) / decades * BARS;
        canvas.path(&format!("M{x:.1} {:.1}v{height:.1}", canvas.bottom - 5.0), LINE, 1.0);
    }
    for (row, speed) in speeds {
        let y = canvas.bottom + BAR / 2.0 + 5.0;
        canvas.text(LEFT - 10.0, y, Font::LABEL.to_the_left(), &row.name());
        let length = ((speed.log10() - least) / decades * BARS).max(1.0);
        if length.is_finite() {
            canvas.rect([LEFT, canvas.bottom, length, BAR], colour(row.operations));
            canvas.text(LEFT + length + 10.0, y, Font::LABEL, &figure(speed));
        }
        canvas.bottom += ROW;
    }
    canvas.bottom -= ROW - BAR;
}

/// Okabe and Ito (2008), as in the other picture.
fn colour(operations: Operations) -> &'static str {
    match operations {
        Operations::Burn => "#d55e00",
        Operations::Quantized => "#e69f00",
        Operations::Kernels => "#0072b2",
    }
}

/// What was not measured, and why.
fn missing(canvas: &mut Canvas, rows: &[Row]) {
    let missing: Vec<_> = rows.iter().filter_map(|row| Some((row.name(), row.missing.as_ref()?))).collect();
    if missing.is_empty() {
        return;
    }
    canvas.heading("Not measured", "");
    for (name, reason) in missing {
        let text: String = format!("{name}: {reason}").chars().take(110).collect();
        canvas.text(MARGIN, canvas.bottom, Font::LABEL, &text);
        canvas.bottom += 20.0;
    }
    canvas.bottom -= 20.0;
}
