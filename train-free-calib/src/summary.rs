//! A report as text, for people.

use std::fmt;

use ternoss_model::checkpoint::readable_size;

use crate::{
    Report,
    report::{KINDS, mean},
};

impl fmt::Display for Report {
    /// Sizes, errors and loads in some lines, without a newline at the end.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.recipe())?;
        writeln!(f)?;
        for (part, bytes) in &self.parts {
            let share = 100.0 * *bytes as f64 / self.bytes().max(1) as f64;
            writeln!(f, "{part:<24} {:>12} {share:>8.1} %", readable_size(*bytes))?;
        }
        writeln!(f, "{:<24} {:>12}", "all weights", readable_size(self.bytes()))?;
        if let Some(reduction) = &self.reduction {
            if let Some(planes) = reduction.table_planes {
                writeln!(f, "{:<24} {:>12}", "embedding, output layer", format!("planes: {planes}"))?;
            }
            let kept = format!("{} of {}", reduction.experts_kept, reduction.experts_before);
            writeln!(f, "{:<24} {kept:>12}", "experts a layer")?;
        }
        writeln!(f)?;
        let (ternary, all) = (self.ternary_weights, self.parameters);
        writeln!(
            f,
            "{:<24} {:>12.3}  of {ternary} ternary weights, scales included",
            "bits per weight", self.bits_per_weight
        )?;
        writeln!(f, "{:<24} {:>12.3}  of all {all} weights", "bits per weight overall", self.bits_per_parameter)?;
        writeln!(f)?;
        let error = self.mean_relative_error();
        write!(f, "{:<24} {error:>12.4}  squared, of the {}, mean", "relative error", self.error_of())?;
        for kind in KINDS {
            let layers =
                || self.layers.iter().enumerate().filter_map(|(i, layer)| Some((i, layer.relative_error(kind)?)));
            let worst = layers().max_by(|(_, a), (_, b)| a.total_cmp(b));
            if let (Some(mean), Some((layer, worst))) = (mean(layers().map(|(_, error)| error)), worst) {
                write!(f, "\n  {kind:<22} {mean:>12.4}  at most {worst:.4}, in layer {layer}")?;
            }
        }
        if let Some(loads) = &self.expert_loads {
            let (few, none) = (100.0 * loads.too_few, 100.0 * loads.none);
            let wanted = loads.tokens_wanted;
            writeln!(f, "\n")?;
            write!(f, "{:<24} {:>12}  {few:.1} % saw fewer than {wanted} tokens", "experts", loads.experts)?;
            write!(f, ", {none:.1} % none")?;
        }
        if let Some(held_out) = &self.held_out {
            let (before, after) = (held_out.teacher_perplexity, held_out.perplexity);
            writeln!(f, "\n")?;
            writeln!(f, "{:<24} {:>12}  tokens", "held out", held_out.tokens)?;
            writeln!(f, "{:<24} {after:>12.2}  full precision: {before:.2}", "  perplexity")?;
            writeln!(f, "{:<24} {:>12.4}", "  divergence", held_out.kl_divergence)?;
            write!(f, "{:<24} {:>12.1} %", "  same likeliest token", 100.0 * held_out.top_1)?;
        }
        if let Some(warning) = self.reduction.as_ref().and_then(|reduction| reduction.warning.as_ref()) {
            write!(f, "\n\nwarning: {warning}")?;
        }
        Ok(())
    }
}
