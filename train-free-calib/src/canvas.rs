//! SVG written by hand: texts, rectangles, paths, and the pieces that pictures of results are drawn with.
//!
//! ```
//! use ternoss_calib::canvas::{Canvas, Font, MARGIN};
//!
//! let mut canvas = Canvas::new();
//! canvas.heading("Speed", "tokens a second");
//! canvas.text(MARGIN, canvas.bottom + 20.0, Font::BODY, "17 < 24");
//! canvas.bottom += 40.0;
//! let svg = canvas.finish("Speed");
//! assert!(svg.starts_with("<svg") && svg.contains("17 &lt; 24"));
//! ```

use std::fmt::Write;

/// Width of the picture, in pixels.
pub const WIDTH: f64 = 900.0;
/// Free space at its edges.
pub const MARGIN: f64 = 36.0;
/// Left edge of plots, beside the labels of their rows.
pub const PLOT_LEFT: f64 = MARGIN + 52.0;

const INK: &str = "#1f2328";
const MUTED: &str = "#59636e";
/// Colour of thin lines.
pub const LINE: &str = "#d1d9e0";

/// How a text is set.
#[derive(Clone, Copy)]
pub struct Font {
    size: f64,
    bold: bool,
    colour: &'static str,
    /// `text-anchor`
    anchor: &'static str,
}

impl Font {
    /// Plain text.
    pub const BODY: Self = Self { size: 14.0, bold: false, colour: INK, anchor: "start" };
    /// The picture's title.
    pub const TITLE: Self = Self { size: 24.0, bold: true, ..Self::BODY };
    /// Title of a section.
    pub const HEADING: Self = Self { size: 17.0, bold: true, ..Self::BODY };
    /// A figure that stands out.
    pub const NUMBER: Self = Self { size: 25.0, bold: true, ..Self::BODY };
    /// What is beside a mark.
    pub const LABEL: Self = Self { size: 13.0, ..Self::BODY };
    /// An explanation.
    pub const NOTE: Self = Self { size: 13.0, colour: MUTED, ..Self::BODY };
    /// Labels of axes.
    pub const SMALL: Self = Self { size: 12.0, colour: MUTED, ..Self::BODY };

    /// Ends where it is put.
    #[must_use]
    pub fn to_the_left(self) -> Self {
        Self { anchor: "end", ..self }
    }

    /// Has its middle where it is put.
    #[must_use]
    pub fn centred(self) -> Self {
        Self { anchor: "middle", ..self }
    }
}

/// A drawing that grows downward.
pub struct Canvas {
    body: String,
    /// Where the next thing may start.
    pub bottom: f64,
}

impl Default for Canvas {
    fn default() -> Self {
        Self::new()
    }
}

impl Canvas {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self { body: String::new(), bottom: MARGIN }
    }

    /// A text on the line `y`, which it never leaves.
    pub fn text(&mut self, x: f64, y: f64, font: Font, text: &str) {
        let Font { size, bold, colour, anchor } = font;
        let weight = if bold { 600 } else { 400 };
        let text = escape(text);
        let _ = writeln!(
            self.body,
            r#"<text x="{x:.1}" y="{y:.1}" font-size="{size}" font-weight="{weight}" fill="{colour}" text-anchor="{anchor}">{text}</text>"#
        );
    }

    /// A rectangle: left, top, width, height.
    pub fn rect(&mut self, [x, y, width, height]: [f64; 4], colour: &str) {
        let _ = writeln!(
            self.body,
            r#"<rect x="{x:.2}" y="{y:.1}" width="{width:.2}" height="{height:.1}" fill="{colour}"/>"#
        );
    }

    /// What a path of rectangles covers.
    pub fn area(&mut self, path: &str, colour: &str) {
        if !path.is_empty() {
            let _ = writeln!(self.body, r#"<path d="{path}" fill="{colour}"/>"#);
        }
    }

    /// The line along a path.
    pub fn path(&mut self, path: &str, colour: &str, width: f64) {
        let _ = writeln!(
            self.body,
            r#"<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width:.1}" stroke-linecap="round" stroke-linejoin="round"/>"#
        );
    }

    /// A colour and what it stands for, on the line `y`.
    pub fn swatch(&mut self, x: f64, y: f64, colour: &str, name: &str) {
        self.rect([x, y - 11.0, 12.0, 12.0], colour);
        self.text(x + 18.0, y, Font::LABEL, name);
    }

    /// Starts a section.
    pub fn heading(&mut self, name: &str, about: &str) {
        self.bottom += 30.0;
        self.path(&format!("M{MARGIN} {:.1}H{:.1}", self.bottom, WIDTH - MARGIN), LINE, 1.0);
        self.bottom += 30.0;
        self.text(MARGIN, self.bottom, Font::HEADING, name);
        self.bottom += 21.0;
        self.text(MARGIN, self.bottom, Font::NOTE, about);
    }

    /// Four figures beside each other.
    pub fn tiles(&mut self, tiles: [(String, &str); 4]) {
        for (i, (number, name)) in tiles.iter().enumerate() {
            let x = MARGIN + i as f64 * (WIDTH - 2.0 * MARGIN) / 4.0;
            self.text(x, self.bottom + 40.0, Font::NUMBER, number);
            self.text(x, self.bottom + 61.0, Font::NOTE, name);
        }
        self.bottom += 61.0;
    }

    /// The numbers of columns that are `column` wide; as many are left out as have no room.
    pub fn numbers(&mut self, count: usize, column: f64, at: impl Fn(usize) -> f64) {
        let every = (28.0 / column).ceil().max(1.0) as usize;
        for number in (0..count).step_by(every) {
            self.text(at(number), self.bottom, Font::SMALL.centred(), &number.to_string());
        }
    }

    /// The name of what [`numbers`](Self::numbers) count.
    pub fn axis(&mut self, name: &str) {
        self.bottom += 18.0;
        self.text(PLOT_LEFT, self.bottom, Font::SMALL, name);
    }

    /// The whole picture, and its title for those who cannot see it.
    #[must_use]
    pub fn finish(self, title: &str) -> String {
        let height = self.bottom + MARGIN;
        let (title, body) = (escape(title), self.body);
        format!(
            r##"<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0}" viewBox="0 0 {WIDTH} {height:.0}" font-family="system-ui, 'Segoe UI', Helvetica, Arial, sans-serif" role="img">
<title>{title}</title>
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_text_is_drawn_as_it_is() {
        let odd = "a <b> & \"c\" 'd' ]]> <!-- \u{1}\u{ffff}\u{7f} é 漢 \u{1f600}";
        let mut canvas = Canvas::new();
        canvas.text(0.0, 0.0, Font::BODY, odd);
        canvas.swatch(0.0, 0.0, "#000000", odd);
        let svg = canvas.finish(odd);
        let document = roxmltree::Document::parse(&svg).unwrap();
        let texts: Vec<_> = document.descendants().filter(|node| node.has_tag_name("text")).collect();
        assert_eq!(texts.len(), 2);
        let expected = "a <b> & \"c\" 'd' ]]> <!-- \u{20}\u{20} é 漢 \u{1f600}";
        assert!(texts.iter().all(|node| node.text() == Some(expected)), "{svg}");
    }
}
