//! A report as a picture, `calibration_report.svg`: the SVG is written by hand and needs nothing outside itself.
//!
//! From top to bottom: what was made and its size, the held-out comparison, bytes by part, the error of each layer, and how
//! the text spread over the experts. The picture has its own light background, so it reads the same on a dark page.

use std::fmt::Write;

use ternoss_model::checkpoint::{Part, readable_size};

use crate::{
    ExpertLoads, Report, Steps,
    report::{HeldOut, KINDS},
};

/// Name of the picture in the ternary folder.
pub(crate) const PICTURE_FILE: &str = "calibration_report.svg";

const WIDTH: f64 = 900.0;
const MARGIN: f64 = 36.0;
/// Left edge of plots, beside the labels of their rows.
const PLOT_LEFT: f64 = MARGIN + 52.0;
const PLOT_WIDTH: f64 = WIDTH - MARGIN - PLOT_LEFT;
/// Height of the plot of errors.
const ERRORS_HEIGHT: f64 = 220.0;
/// What the rows of the heat map share, if that leaves each of them at least [`LEAST_ROW`].
const LOADS_HEIGHT: f64 = 360.0;
const LEAST_ROW: f64 = 3.0;
/// Largest cell of the heat map.
const CELL: [f64; 2] = [48.0, 22.0];

const INK: &str = "#1f2328";
const MUTED: &str = "#59636e";
const LINE: &str = "#d1d9e0";

/// Colours of lines that people with any colour vision tell apart (Okabe and Ito, 2008), one for each of [`KINDS`].
const KIND_COLOURS: [&str; KINDS.len()] = ["#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7"];

/// Colours of experts: no token, a quarter of what is wanted, less than wanted, and up to 2, 4, 8 times and more.
const LOAD_COLOURS: [&str; 7] = ["#b2182b", "#ef8a62", "#fddbc7", "#d1e5f0", "#92c5de", "#4393c3", "#2166ac"];

/// Draws a report.
pub(crate) fn picture(report: &Report) -> String {
    let mut canvas = Canvas { body: String::new(), bottom: MARGIN };
    headline(&mut canvas, report);
    if let Some(held_out) = &report.held_out {
        compare(&mut canvas, held_out);
    }
    parts(&mut canvas, report);
    errors(&mut canvas, report);
    if let Some(loads) = &report.expert_loads {
        experts(&mut canvas, report, loads);
    }
    canvas.finish(&report.recipe())
}

fn headline(canvas: &mut Canvas, report: &Report) {
    canvas.bottom += 22.0;
    canvas.text(MARGIN, canvas.bottom, Font::TITLE, "Calibration report");
    let mut about = format!("{} of {} weights are ternary", report.ternary_weights, report.parameters);
    if report.calibration_tokens > 0 {
        let _ = write!(about, ", calibrated on {} tokens", report.calibration_tokens);
    }
    for line in [report.recipe() + &left_out(report), about] {
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
    for (path, colour) in paths.iter().zip(LOAD_COLOURS).filter(|(path, _)| !path.is_empty()) {
        let _ = writeln!(canvas.body, r#"<path d="{path}" fill="{colour}"/>"#);
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

/// How a text is set.
#[derive(Clone, Copy)]
struct Font {
    size: f64,
    bold: bool,
    colour: &'static str,
    /// `text-anchor`
    anchor: &'static str,
}

impl Font {
    const BODY: Self = Self { size: 14.0, bold: false, colour: INK, anchor: "start" };
    const TITLE: Self = Self { size: 24.0, bold: true, ..Self::BODY };
    const HEADING: Self = Self { size: 17.0, bold: true, ..Self::BODY };
    const NUMBER: Self = Self { size: 25.0, bold: true, ..Self::BODY };
    const LABEL: Self = Self { size: 13.0, ..Self::BODY };
    const NOTE: Self = Self { size: 13.0, colour: MUTED, ..Self::BODY };
    const SMALL: Self = Self { size: 12.0, colour: MUTED, ..Self::BODY };

    /// Ends where it is put.
    fn to_the_left(self) -> Self {
        Self { anchor: "end", ..self }
    }

    fn centred(self) -> Self {
        Self { anchor: "middle", ..self }
    }
}

/// A drawing that grows downward.
struct Canvas {
    body: String,
    /// Where the next thing may start.
    bottom: f64,
}

impl Canvas {
    fn text(&mut self, x: f64, y: f64, font: Font, text: &str) {
        let Font { size, bold, colour, anchor } = font;
        let weight = if bold { 600 } else { 400 };
        let text = escape(text);
        let _ = writeln!(
            self.body,
            r#"<text x="{x:.1}" y="{y:.1}" font-size="{size}" font-weight="{weight}" fill="{colour}" text-anchor="{anchor}">{text}</text>"#
        );
    }

    fn rect(&mut self, [x, y, width, height]: [f64; 4], colour: &str) {
        let _ = writeln!(
            self.body,
            r#"<rect x="{x:.2}" y="{y:.1}" width="{width:.2}" height="{height:.1}" fill="{colour}"/>"#
        );
    }

    fn path(&mut self, path: &str, colour: &str, width: f64) {
        let _ = writeln!(
            self.body,
            r#"<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width:.1}" stroke-linecap="round" stroke-linejoin="round"/>"#
        );
    }

    /// A colour and what it stands for, on the line `y`.
    fn swatch(&mut self, x: f64, y: f64, colour: &str, name: &str) {
        self.rect([x, y - 11.0, 12.0, 12.0], colour);
        self.text(x + 18.0, y, Font::LABEL, name);
    }

    /// Starts a section.
    fn heading(&mut self, name: &str, about: &str) {
        self.bottom += 30.0;
        self.path(&format!("M{MARGIN} {:.1}H{:.1}", self.bottom, WIDTH - MARGIN), LINE, 1.0);
        self.bottom += 30.0;
        self.text(MARGIN, self.bottom, Font::HEADING, name);
        self.bottom += 21.0;
        self.text(MARGIN, self.bottom, Font::NOTE, about);
    }

    /// Four figures beside each other.
    fn tiles(&mut self, tiles: [(String, &str); 4]) {
        for (i, (number, name)) in tiles.iter().enumerate() {
            let x = MARGIN + i as f64 * (WIDTH - 2.0 * MARGIN) / 4.0;
            self.text(x, self.bottom + 40.0, Font::NUMBER, number);
            self.text(x, self.bottom + 61.0, Font::NOTE, name);
        }
        self.bottom += 61.0;
    }

    /// The numbers of columns that are `column` wide; as many are left out as have no room.
    fn numbers(&mut self, count: usize, column: f64, at: impl Fn(usize) -> f64) {
        let every = (28.0 / column).ceil().max(1.0) as usize;
        for number in (0..count).step_by(every) {
            self.text(at(number), self.bottom, Font::SMALL.centred(), &number.to_string());
        }
    }

    /// The name of what [`numbers`](Self::numbers) count.
    fn axis(&mut self, name: &str) {
        self.bottom += 18.0;
        self.text(PLOT_LEFT, self.bottom, Font::SMALL, name);
    }

    fn finish(self, title: &str) -> String {
        let height = self.bottom + MARGIN;
        let (title, body) = (escape(title), self.body);
        format!(
            r##"<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0}" viewBox="0 0 {WIDTH} {height:.0}" font-family="system-ui, 'Segoe UI', Helvetica, Arial, sans-serif" role="img">
<title>Calibration report: {title}</title>
<rect x="0.5" y="0.5" width="{:.1}" height="{:.1}" rx="8" fill="#ffffff" stroke="{LINE}"/>
{body}</svg>
"##,
            WIDTH - 1.0,
            height.round() - 1.0
        )
    }
}

/// A text as it may stand between tags or in an attribute; what XML has no character for is left out.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&apos;"),
            '\u{fffe}' | '\u{ffff}' => {}
            c if c.is_control() => escaped.push(' '),
            c => escaped.push(c),
        }
    }
    escaped
}
