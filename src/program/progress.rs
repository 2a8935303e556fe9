//! Progress on stderr: a bar on a terminal, a plain line every few seconds elsewhere.

use std::{
    io::IsTerminal,
    sync::Mutex,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

/// Seconds between two lines where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// What is being counted, which decides how numbers are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Bytes.
    Bytes,
    /// Plain counts, of tokens or weights.
    Count(&'static str),
}

/// A job of known size under way; safe to advance from several threads.
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
    plain: Mutex<Plain>,
    unit: Unit,
}

struct Plain {
    name: String,
    total: u64,
    done: u64,
    started: Instant,
    printed: Instant,
}

impl Progress {
    /// Starts a job of `total` units called `name`.
    pub(crate) fn new(name: &str, total: u64, unit: Unit) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let numbers = match unit {
                Unit::Bytes => "{bytes}/{total_bytes} {bytes_per_sec}".to_string(),
                Unit::Count(what) => format!("{{human_pos}}/{{human_len}} {what} {{per_sec}}"),
            };
            let template = format!("{{prefix:>12}} {{wide_bar}} {numbers} eta {{eta}}");
            let style = ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new(total).with_style(style).with_prefix(name.to_string())
        });
        let now = Instant::now();
        let plain = Mutex::new(Plain { name: name.into(), total, done: 0, started: now, printed: now });
        Self { bar, plain, unit }
    }

    /// Counts `units` more as done.
    pub(crate) fn advance(&self, units: u64) {
        if let Some(bar) = &self.bar {
            return bar.inc(units);
        }
        let Ok(mut plain) = self.plain.lock() else {
            return;
        };
        plain.done += units;
        if plain.printed.elapsed() >= LINE_INTERVAL {
            plain.printed = Instant::now();
            eprintln!("{}", plain.line(self.unit));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl Plain {
    fn line(&self, unit: Unit) -> String {
        let seconds = self.started.elapsed().as_secs_f64();
        let rate = self.done as f64 / seconds.max(1e-9);
        let left = (self.total.saturating_sub(self.done)) as f64 / rate.max(1e-9);
        let (scale, what) = match unit {
            Unit::Bytes => (1e6, "MB"),
            Unit::Count(what) => (1.0, what),
        };
        format!(
            "{}: {:.0}/{:.0} {what}, {:.0} {what}/s, {left:.0} s left",
            self.name,
            self.done as f64 / scale,
            self.total as f64 / scale,
            rate / scale,
        )
    }
}
