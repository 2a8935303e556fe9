//! A report as a picture, `calibration_report.svg`, which needs nothing outside itself.
//!
//! From top to bottom: what was made and its size, the held-out comparison, bytes by part, the error of each layer, and how
//! the text spread over the experts. The picture has its own light background, so it reads the same on a dark page.

use std::fmt::Write;

use ternoss_model::checkpoint::{Part, readable_size};

use crate::{
    ExpertLoads, Report, Steps,
    canvas::{Canvas, Font, LINE, MARGIN, PLOT_LEFT, WIDTH},
    report::{HeldOut, KINDS},
};

/// Name of the picture in the ternary folder.
pub(crate) const PICTURE_FILE: &str = "calibration_report.svg";

const PLOT_WIDTH: f64 = WIDTH - MARGIN - PLOT_LEFT;
/// Height of the plot of errors.
const ERRORS_HEIGHT: f64 = 220.0;
/// What the rows of the heat map share, if that leaves each of them at least [`LEAST_ROW`].
const LOADS_HEIGHT: f64 = 360.0;
const LEAST_ROW: f64 = 3.0;
/// Largest cell of the heat map.
const CELL: [f64; 2] = [48.0, 22.0];

/// Colours of lines that people with any colour vision tell apart (Okabe and Ito, 2008), one for each of [`KINDS`].
const KIND_COLOURS: [&str; KINDS.len()] = ["#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7"];

/// Colours of experts: no token, a quarter of what is wanted, less than wanted, and up to 2, 4, 8 times and more.
const LOAD_COLOURS: [&str; 7] = ["#b2182b", "#ef8a62", "#fddbc7", "#d1e5f0", "#92c5de", "#4393c3", "#2166ac"];

/// Draws a report.
pub(crate) fn picture(report: &Report) -> String {
    let mut canvas = Canvas::new();
    headline(&mut canvas, report);
    if let Some(held_out) = &report.held_out {
        compare(&mut canvas, held_out);
    }
    parts(&mut canvas, report);
    errors(&mut canvas, report);
    if let Some(loads) = &report.expert_loads {
        experts(&mut canvas, report, loads);
    }
    canvas.finish(&format!("Calibration report: {}", report.recipe()))
}

fn headline(canvas: &mut Canvas, report: &Report) {
    canvas.bottom += 22.0;
    canvas.text(MARGIN, canvas.bottom, Font::TITLE, "Calibration report");
    let mut about = format!("{} of {} weights are ternary", report.ternary_weights, report.parameters);
    if report.calibration_tokens > 0 {
        let _ = write!(about, ", calibrated on {} tokens", report.calibration_tokens);
    }
    let lines = [report.recipe() + &left_out(report), about];
    for line in lines.into_iter().chain(given_up(report)) {
        canvas.bottom += 24.0;
        canvas.text(MARGIN, canvas.bottom, Font::BODY, &line);
    }
    canvas.tiles([
        (format!("{:.3}", report.bits_per_weight), "bits per ternary weight"),
        (format!("{:.3}", report.bits_per_parameter), "bits per weight overall"),
        (readable_size(report.bytes()), "size of all weights"),
        (format!("{:.4}", report.mean_relative_error()), "mean error of the layers"),
    ]);
}

/// What was given up for size, if anything.
fn given_up(report: &Report) -> Option<String> {
    let reduction = report.reduction.as_ref()?;
    let kept = format!("{} of {} experts a layer", reduction.experts_kept, reduction.experts_before);
    let tables = reduction.table_planes.map(|planes| format!("ternary embedding and output layer, planes: {planes}"));
    let experts = (reduction.experts_kept < reduction.experts_before).then_some(kept);
    let what: Vec<String> = experts.into_iter().chain(tables).collect();
    (!what.is_empty()).then(|| what.join("; "))
}

/// The method's steps that this report went without.
fn left_out(report: &Report) -> String {
    let whole = report.method.steps();
    let missing = |step: &&&str| {
        let without = |steps: Steps| steps.without(step).is_ok_and(|rest| rest == steps);
        without(report.steps) && !without(whole)
    };
    let missing: Vec<&str> = Steps::NAMES.iter().filter(missing).copied().collect();
    if missing.is_empty() { String::new() } else { format!(", without {}", missing.join(", ")) }
}

fn compare(canvas: &mut Canvas, held_out: &HeldOut) {
    let perplexity = |x: f64| if x < 1e5 { format!("{x:.2}") } else { format!("{x:.1e}") };
    let about = format!("Both models on {} tokens that nothing was fitted to.", held_out.tokens);
    canvas.heading("Held-out text", &about);
    canvas.tiles([
        (perplexity(held_out.teacher_perplexity), "perplexity before"),
        (perplexity(held_out.perplexity), "perplexity, ternary"),
        (format!("{:.4}", held_out.kl_divergence), "KL divergence, nats"),
        (format!("{:.1} %", 100.0 * held_out.top_1), "same likeliest token"),
    ]);
}

fn part_colour(part: Part) -> &'static str {
    match part {
        Part::AttentionCodes => "#0072b2",
        Part::AttentionScales => "#8ec5e6",
        Part::ExpertCodes => "#00795a",
        Part::ExpertScales => "#7fd1b9",
        Part::Embedding => "#e69f00",
        Part::OutputLayer => "#d55e00",
        Part::Router => "#cc79a7",
        Part::Norms => "#f0e442",
        Part::BiasesAndSinks => "#7b5aa6",
        Part::Other => "#59636e",
    }
}

/// One bar of all bytes, and what each colour is.
fn parts(canvas: &mut Canvas, report: &Report) {
    const BAR: f64 = 34.0;
    const COLUMN: f64 = (WIDTH - 2.0 * MARGIN) / 2.0;
    const ROW: f64 = 22.0;
    canvas.heading("Bytes", "All tensors that were written. Codes and scales are the ternary weights.");
    let total = report.bytes().max(1) as f64;
    let (top, mut x) = (canvas.bottom + 12.0, MARGIN);
    let rows = report.parts.len().div_ceil(2);
    for (i, (part, bytes)) in report.parts.iter().enumerate() {
        let share = *bytes as f64 / total;
        let width = share * (WIDTH - 2.0 * MARGIN);
        canvas.rect([x, top, width, BAR], part_colour(*part));
        x += width;
        let (left, line) = (MARGIN + (i / rows) as f64 * COLUMN, top + BAR + 26.0 + (i % rows) as f64 * ROW);
        canvas.swatch(left, line, part_colour(*part), &part.to_string());
        canvas.text(left + 270.0, line, Font::LABEL.to_the_left(), &readable_size(*bytes));
        canvas.text(left + 350.0, line, Font::LABEL.to_the_left(), &format!("{:.1} %", 100.0 * share));
    }
    canvas.bottom = top + BAR + 26.0 + rows as f64 * ROW - 16.0;
}

/// A line for each kind of matrix over the layers.
fn errors(canvas: &mut Canvas, report: &Report) {
    let about =
        format!("Squared error of the {} over their square: 0 is exact. Experts are averaged.", report.error_of());
    canvas.heading("Error of each layer", &about);
    let layers = report.layers.len();
    let lines = KINDS.map(|kind| -> Vec<(usize, f64)> {
        let error = |(i, layer): (usize, &crate::LayerReport)| Some((i, layer.relative_error(kind)?));
        report.layers.iter().enumerate().filter_map(error).filter(|(_, error)| error.is_finite()).collect()
    });
    canvas.bottom += 26.0;
    for (i, (kind, colour)) in KINDS.iter().zip(KIND_COLOURS).enumerate() {
        canvas.swatch(MARGIN + i as f64 * 100.0, canvas.bottom, colour, kind);
    }
    let bottom = canvas.bottom + 18.0 + ERRORS_HEIGHT;
    let largest = lines.iter().flatten().map(|(_, error)| *error).fold(0.0, f64::max);
    let step = tick(largest);
    let highest = step * (largest / step).ceil().max(1.0);
    let height = |error: f64| bottom - error / highest * ERRORS_HEIGHT;
    for i in 0..=(highest / step).round() as usize {
        let y = height(i as f64 * step);
        canvas.path(&format!("M{PLOT_LEFT:.1} {y:.1}h{PLOT_WIDTH:.1}"), LINE, 1.0);
        canvas.text(PLOT_LEFT - 8.0, y + 4.0, Font::SMALL.to_the_left(), &decimal(i as f64 * step, step));
    }
    let column = PLOT_WIDTH / layers.max(1) as f64;
    let at = |layer: usize| PLOT_LEFT + (layer as f64 + 0.5) * column;
    let dot = (column / 3.0).clamp(2.0, 7.0);
    for (line, colour) in lines.iter().zip(KIND_COLOURS) {
        let points = || line.iter().map(|(layer, error)| format!("{:.1} {:.1}", at(*layer), height(*error)));
        if line.len() > 1 {
            canvas.path(&format!("M{}", points().collect::<Vec<_>>().join("L")), colour, 1.5);
        }
        // A dot is a line of no length with round ends.
        let dots: String = points().map(|point| format!("M{point}h0.01")).collect();
        canvas.path(&dots, colour, dot);
    }
    canvas.bottom = bottom + 18.0;
    canvas.numbers(layers, column, at);
    canvas.axis("layer");
}

/// A cell for each expert of each layer.
fn experts(canvas: &mut Canvas, report: &Report, loads: &ExpertLoads) {
    let wanted = loads.tokens_wanted;
    let about = format!(
        "Tokens that reached each expert. {:.1} % saw fewer than {wanted} (warm colours), {:.1} % none.",
        100.0 * loads.too_few,
        100.0 * loads.none
    );
    canvas.heading("Load of the experts", &about);
    let bounds = [1, wanted.div_ceil(4), wanted, 2 * wanted, 4 * wanted, 8 * wanted];
    let level = |tokens: usize| bounds.iter().filter(|bound| tokens >= **bound).count();
    canvas.bottom += 26.0;
    for (i, colour) in LOAD_COLOURS.iter().enumerate() {
        let name = match i {
            0 => "none".into(),
            _ => bounds.get(i).map_or_else(|| format!("\u{2265} {}", 8 * wanted), |bound| format!("< {bound}")),
        };
        canvas.swatch(MARGIN + i as f64 * 118.0, canvas.bottom, colour, &name);
    }
    let layers = report.layers.len().max(1) as f64;
    let most = report.layers.iter().map(|layer| layer.expert_tokens.len()).max().unwrap_or(1);
    let width = (PLOT_WIDTH / most as f64).min(CELL[0]);
    let height = (LOADS_HEIGHT / layers).clamp(LEAST_ROW, CELL[1]);
    let gap = |side: f64| if side >= 8.0 { 1.0 } else { 0.0 };
    let top = canvas.bottom + 16.0;
    // All cells of a colour are one path, neighbours of a colour one rectangle where there is no gap between them.
    let mut paths = [const { String::new() }; LOAD_COLOURS.len()];
    let every = (14.0 / height).ceil() as usize;
    for (i, layer) in report.layers.iter().enumerate() {
        let y = top + i as f64 * height;
        if i % every == 0 {
            canvas.text(PLOT_LEFT - 8.0, y + height / 2.0 + 4.0, Font::SMALL.to_the_left(), &i.to_string());
        }
        let mut first = 0;
        for run in layer.expert_tokens.chunk_by(|a, b| gap(width) == 0.0 && level(*a) == level(*b)) {
            let (x, w, h) = (PLOT_LEFT + first as f64 * width, run.len() as f64 * width, height - gap(height));
            let _ = write!(paths[level(run[0])], "M{x:.1} {y:.1}h{:.1}v{h:.1}H{x:.1}z", w - gap(width));
            first += run.len();
        }
    }
    for (path, colour) in paths.iter().zip(LOAD_COLOURS) {
        canvas.area(path, colour);
    }
    canvas.bottom = top + layers * height + 16.0;
    canvas.numbers(most, width, |expert| PLOT_LEFT + (expert as f64 + 0.5) * width);
    canvas.axis("expert (rows are layers)");
}

/// A round distance between ticks, so that there are two to five of them up to `largest`.
fn tick(largest: f64) -> f64 {
    if largest <= 0.0 {
        return 1.0;
    }
    let power = 10f64.powf((largest / 2.5).log10().floor());
    let times = largest / 2.5 / power;
    power
        * if times >= 5.0 {
            5.0
        } else if times >= 2.0 {
            2.0
        } else {
            1.0
        }
}

/// A number with as many decimals as the distance between ticks asks for.
fn decimal(value: f64, step: f64) -> String {
    match step {
        step if !(1e-4..1e6).contains(&step) => format!("{value:.0e}"),
        _ => format!("{value:.*}", (-step.log10().floor()).max(0.0) as usize),
    }
}

#[cfg(test)]
mod tests {
    use roxmltree::{Document, Node};

    use super::*;
    use crate::{LayerReport, MatrixReport, Method, PartBytes, Reduction};

    fn report(layers: usize, experts: usize, held_out: bool) -> Report {
        let matrix =
            |name: String, relative_error| MatrixReport { name, relative_error, planes: 1, zeros: 0.3, tokens: 7 };
        let layer = |i: usize| {
            let attention = ["q", "k", "v", "o"].iter().enumerate().map(|(at, kind)| {
                matrix(format!("model.layers.{i}.self_attn.{kind}_proj"), 0.01 * (at + i % 5) as f64)
            });
            let experts_of = |kind| (0..experts).map(move |expert| (kind, expert));
            let experts_all = experts_of("gate_up").chain(experts_of("down")).map(|(kind, expert)| {
                matrix(format!("model.layers.{i}.mlp.experts.{kind}_proj.{expert}"), 0.001 * (expert % 90) as f64)
            });
            let matrices = attention.chain(experts_all).collect();
            let expert_tokens = (0..experts).map(|expert| expert * i * 40).collect();
            LayerReport { matrices, expert_tokens, ..LayerReport::default() }
        };
        let layers: Vec<_> = (0..layers).map(layer).collect();
        let parts: PartBytes = Part::ALL.iter().enumerate().map(|(i, part)| (*part, i * i * 987_654_321)).collect();
        let ternary_bytes = parts.iter().filter(|(part, _)| part.is_ternary()).map(|(_, bytes)| *bytes).sum::<usize>();
        let figures = HeldOut {
            tokens: 123_456,
            teacher_perplexity: 99_999.99,
            perplexity: 2.0e7,
            kl_divergence: 10.123_45,
            top_1: 1.0,
        };
        let method = Method::Ternoss;
        let reduction = Reduction {
            target_bytes: None,
            table_planes: Some(2),
            table_bytes: 0,
            tables: Vec::new(),
            experts_kept: experts,
            experts_before: 2 * experts,
            importance_tokens: 12_345_678,
            warning: None,
        };
        Report {
            method,
            steps: crate::Steps { rotation: false, sweeps: 0, bias: false, ..method.steps() },
            ternary: ternoss_quant::TernaryConfig::default(),
            planes: 2,
            calibration_tokens: 12_345_678,
            run: String::new(),
            distillation: None,
            ternary_weights: 116_829_156_672,
            parameters: 116_829_156_672,
            ternary_bytes,
            full_precision_bytes: parts.values().sum::<usize>() - ternary_bytes,
            parts,
            bits_per_weight: 2.136,
            bits_per_parameter: 11.125,
            expert_loads: ExpertLoads::of(&layers, 14_400),
            held_out: held_out.then_some(figures),
            reduction: held_out.then_some(reduction),
            layers,
        }
    }

    fn number(node: &Node<'_, '_>, name: &str) -> f64 {
        node.attribute(name).unwrap().parse().unwrap()
    }

    /// Left, right, top and bottom of a text, with letters as wide as wide fonts have them on average.
    fn extent(node: &Node<'_, '_>) -> [f64; 4] {
        let (x, y, size) = (number(node, "x"), number(node, "y"), number(node, "font-size"));
        let width = 0.6 * size * node.text().unwrap_or_default().chars().count() as f64;
        let left = match node.attribute("text-anchor").unwrap() {
            "end" => x - width,
            "middle" => x - width / 2.0,
            _ => x,
        };
        [left, left + width, y - 0.8 * size, y + 0.2 * size]
    }

    #[test]
    fn texts_stay_inside_and_apart_whatever_the_size_of_the_model() {
        for (layers, experts) in [(1, 1), (1, 128), (128, 1), (2, 3), (4, 8), (24, 32), (36, 128), (128, 128)] {
            let svg = picture(&report(layers, experts, layers % 3 != 0));
            let document = Document::parse(&svg).unwrap();
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{layers} {experts}");
            let height = number(&document.root_element(), "height");
            let texts: Vec<_> = document.descendants().filter(|node| node.has_tag_name("text")).collect();
            for (i, text) in texts.iter().enumerate() {
                let [left, right, top, bottom] = extent(text);
                let what = format!("{layers} layers, {experts} experts: {:?}", text.text());
                assert!(left >= 0.0 && right <= WIDTH && top >= 0.0 && bottom <= height, "{what} sticks out");
                for other in &texts[..i] {
                    let [l, r, t, b] = extent(other);
                    let apart = right <= l || r <= left || bottom <= t || b <= top;
                    assert!(apart, "{what} overlaps {:?}", other.text());
                }
            }
        }
    }

    #[test]
    fn a_picture_shows_what_the_report_has_and_nothing_else() {
        let mut report = report(3, 4, true);
        let with = picture(&report);
        let shown =
            ["Held-out text", "2.0e7", "Load of the experts", "without rotation, sweeps, bias", "< 3600", "biases"];
        let escaped = |text: &&str| with.contains(&text.replace('<', "&lt;"));
        assert!(shown.iter().all(escaped), "{with}");
        report.held_out = None;
        report.expert_loads = None;
        let without = picture(&report);
        assert!(!without.contains("Held-out") && !without.contains("experts</text>"), "{without}");
        report.layers.clear();
        report.parts.clear();
        Document::parse(&picture(&report)).unwrap();
    }

    #[test]
    fn a_picture_of_the_largest_model_is_small() {
        let svg = picture(&report(36, 128, true));
        assert!(svg.len() < 200_000, "{} bytes", svg.len());
    }

    #[test]
    fn ticks_are_round_and_few() {
        for largest in [1e-9, 0.003, 0.07, 0.1, 0.99, 1.0, 7.0, 1e9] {
            let step = tick(largest);
            assert!((1.0..=7.0).contains(&(largest / step)), "{largest}: {step}");
        }
        assert_eq!(decimal(0.05, 0.05), "0.05");
        assert_eq!(decimal(0.1, 0.05), "0.10");
        assert_eq!(decimal(200.0, 100.0), "200");
        assert_eq!(decimal(0.0, 1e-9), "0e0");
    }
}
