//! How large a folder becomes, known before anything is written, and what to give up so that it fits a size.

use std::{collections::BTreeSet, fs};

use serde::{Deserialize, Serialize};
use ternoss_backends::TernaryLayout;
use ternoss_model::{
    Checkpoint,
    checkpoint::{CONFIG_FILE, ExpertMatrix, LinearName, Part, TableName, TensorEntry, tensors_by_expert},
};

use crate::{
    CalibError, MatrixReport, QuantizeOptions, folder::COMPANIONS, levels::MAX_PLANES, pipeline::recipe, step::Done,
    tables::table_layout, ternarize::Recipe,
};

/// Bytes that the folder itself, `config.json` and the frames of the report and of its picture take at most.
const FRAME: usize = 32 << 10;
/// Bytes that a tensor's name and place take at most, in a header and in the index.
const PER_TENSOR: usize = 256;
/// Bytes that a matrix takes at most in the report.
const PER_MATRIX: usize = 512;
/// Bytes that a layer, and an expert of a layer, take at most in the picture.
const PER_LAYER_DRAWN: usize = 512;
const PER_EXPERT_DRAWN: usize = 48;

/// What was given up for size beside making attention and experts ternary.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reduction {
    /// Bytes that the folder may take, if that was asked for.
    pub target_bytes: Option<u64>,
    /// Planes of embedding and output layer; null where they are as in the checkpoint.
    pub table_planes: Option<usize>,
    /// Bytes of their codes and scales.
    pub table_bytes: usize,
    /// Their errors, of the weights.
    pub tables: Vec<MatrixReport>,
    /// Experts that each layer keeps.
    pub experts_kept: usize,
    /// Experts that each layer had.
    pub experts_before: usize,
    /// Tokens of text that the importance of the experts was measured on.
    pub importance_tokens: usize,
    /// What to expect of the model; null where nothing was given up.
    pub warning: Option<String>,
}

impl Reduction {
    /// What a recipe gave up; nothing where it gave up nothing and no size was asked for. Takes the reports of the tables out
    /// of `done`.
    pub(crate) fn of(
        checkpoint: &Checkpoint,
        recipe: &Recipe,
        target_bytes: Option<u64>,
        tokens: usize,
        done: &mut [Done],
    ) -> Option<Self> {
        let &Recipe { table_planes, keep_experts, .. } = recipe;
        let before = checkpoint.config().num_local_experts;
        let kept = keep_experts.unwrap_or(before);
        let asked = table_planes.is_some() || keep_experts.is_some() || target_bytes.is_some();
        asked.then(|| Self {
            target_bytes,
            table_planes,
            table_bytes: done.iter().map(|step| step.table_bytes).sum(),
            tables: done.iter_mut().flat_map(|step| std::mem::take(&mut step.tables)).collect(),
            experts_kept: kept,
            experts_before: before,
            importance_tokens: keep_experts.map_or(0, |_| tokens),
            warning: warning(table_planes, kept, before),
        })
    }
}

impl QuantizeOptions {
    /// The same options with the planes of the tables and the number of experts chosen so that the whole folder takes at most
    /// `target_size` bytes. What is least missed goes first: the tables stay as they are if everything fits; then they get 3
    /// planes, then 2; then as few experts as possible are dropped; 1 plane comes last. Whatever is set already stays.
    /// Without a target only the values are checked. Keeping all experts is the same as saying nothing.
    ///
    /// # Errors
    /// [`CalibError::TargetSize`] with the least possible size, [`CalibError::KeepExperts`], [`CalibError::TablePlanes`], and
    /// what [`quantize`](crate::quantize) says of the other options.
    pub fn resolved(&self, checkpoint: &Checkpoint) -> Result<Self, CalibError> {
        let config = checkpoint.config();
        let (least, all) = (config.experts_per_token, config.num_local_experts);
        if let Some(keep) = self.keep_experts.filter(|keep| !(least..=all).contains(keep)) {
            return Err(CalibError::KeepExperts { keep, least, all });
        }
        if let Some(planes) = self.table_planes.filter(|planes| !(1..=MAX_PLANES).contains(planes)) {
            return Err(CalibError::TablePlanes { planes, most: MAX_PLANES });
        }
        if self.target_size.is_some() && self.bits_per_weight.is_some() {
            return Err(CalibError::TwoBudgets);
        }
        let recipe = recipe(self)?;
        let keep = self.keep_experts.unwrap_or(all);
        let (table_planes, keep) = match self.target_size {
            None => (self.table_planes, keep),
            Some(target) => {
                let least = self.keep_experts.unwrap_or(least);
                let wanted = choices(self.table_planes, least, keep);
                let fits = |&(planes, keep): &_| folder_bytes(checkpoint, &recipe, planes, keep) as u64 <= target;
                let smallest = || {
                    let sizes = choices(self.table_planes, least, least);
                    sizes.into_iter().map(|(planes, keep)| folder_bytes(checkpoint, &recipe, planes, keep) as u64).min()
                };
                wanted
                    .into_iter()
                    .find(fits)
                    .ok_or_else(|| CalibError::TargetSize { target, smallest: smallest().unwrap_or_default() })?
            }
        };
        Ok(Self { table_planes, keep_experts: Some(keep).filter(|keep| *keep < all), ..*self })
    }

    /// Whether a calibration text is looked at: by the steps of the method, to choose the experts that stay
    /// or the planes of each matrix, or to distill.
    pub fn look_at_text(&self) -> bool {
        self.steps.look_at_text() || self.keep_experts.is_some() || self.distill > 0 || self.bits_per_weight.is_some()
    }

    /// Weights that become ternary, of the tables too.
    pub fn weights(&self, checkpoint: &Checkpoint) -> usize {
        let tables = self.table_planes.map_or(0, |_| table_weights(checkpoint));
        layer_weights(checkpoint, self.keep_experts) * checkpoint.config().num_hidden_layers() + tables
    }
}

/// Planes of the tables and experts to keep, in the order in which they are tried.
fn choices(table_planes: Option<usize>, least: usize, most: usize) -> Vec<(Option<usize>, usize)> {
    let fewer = |planes| (least..most).rev().map(move |keep| (planes, keep));
    match table_planes {
        Some(_) => std::iter::once((table_planes, most)).chain(fewer(table_planes)).collect(),
        None => {
            let all = [None, Some(3), Some(2)].map(|planes| (planes, most));
            let last = std::iter::once((Some(1), most));
            all.into_iter().chain(fewer(Some(2))).chain(last).chain(fewer(Some(1))).collect()
        }
    }
}

/// Weights of a layer that become ternary, with so many experts or all.
pub(crate) fn layer_weights(checkpoint: &Checkpoint, keep_experts: Option<usize>) -> usize {
    let config = checkpoint.config();
    let size = |[in_features, out_features]: [usize; 2]| in_features * out_features;
    let attention: usize = LinearName::ALL.iter().map(|linear| size(linear.shape(config))).sum();
    let expert: usize = ExpertMatrix::ALL.iter().map(|matrix| size(matrix.shape(config))).sum();
    attention + keep_experts.unwrap_or(config.num_local_experts) * expert
}

/// Weights of embedding and output layer.
pub(crate) fn table_weights(checkpoint: &Checkpoint) -> usize {
    let config = checkpoint.config();
    TableName::of(config).len() * config.vocab_size * config.hidden_size
}

/// All weights of a model with so many experts or all, however they are stored.
pub(crate) fn parameters(checkpoint: &Checkpoint, keep_experts: Option<usize>) -> usize {
    let config = checkpoint.config();
    let (all, keep) = (config.num_local_experts, keep_experts.unwrap_or(config.num_local_experts));
    let by_expert: BTreeSet<String> = (0..config.num_hidden_layers()).flat_map(tensors_by_expert).collect();
    let size = |(name, entry): (&str, &TensorEntry)| {
        let elements: usize = entry.shape.iter().product();
        if by_expert.contains(name) { elements / all * keep } else { elements }
    };
    let rest = checkpoint.tensors().filter(|(name, _)| !Part::of(name).is_ternary());
    config.num_hidden_layers() * layer_weights(checkpoint, keep_experts) + rest.map(size).sum::<usize>()
}

/// All tensors that a quantization writes.
struct Written {
    /// Their bytes, exactly where everything that may change does.
    bytes: usize,
    /// How many there are at most.
    tensors: usize,
}

fn written(checkpoint: &Checkpoint, recipe: &Recipe, table_planes: Option<usize>, keep: usize) -> Written {
    let config = checkpoint.config();
    let (format, group_size) = (recipe.ternary.format, recipe.ternary.granularity.group_size());
    let mut replaced = BTreeSet::new();
    let mut by_expert = BTreeSet::new();
    let mut layouts = Vec::new();
    let layout = |matrices, [in_features, rows]: [usize; 2]| TernaryLayout {
        format,
        matrices,
        planes: recipe.planes,
        rows,
        in_features,
        group_size,
        rotation: None,
    };
    for layer in 0..config.num_hidden_layers() {
        for linear in LinearName::ALL {
            replaced.insert(format!("{}.weight", linear.path(layer)));
            layouts.push(layout(1, linear.shape(config)));
        }
        for matrix in ExpertMatrix::ALL {
            replaced.extend(checkpoint.expert_tensors(layer, matrix));
            layouts.push(layout(keep, matrix.shape(config)));
        }
        by_expert.extend(tensors_by_expert(layer));
    }
    if let Some(planes) = table_planes {
        replaced.extend(TableName::ALL.map(TableName::weight));
        layouts.extend(TableName::of(config).iter().map(|name| table_layout(checkpoint, *name, planes, recipe)));
    }
    // What may change is f32 then.
    let changes = |name: &str| match Part::of(name) {
        Part::BiasesAndSinks => recipe.tuned || recipe.steps.bias && name.ends_with("bias"),
        Part::Norms | Part::Router => recipe.tuned,
        _ => false,
    };
    let size = |(name, entry): (&str, &TensorEntry)| {
        let elements: usize = entry.shape.iter().product();
        let bytes = if changes(name) { 4 * elements } else { entry.bytes() };
        if by_expert.contains(name) { bytes / config.num_local_experts * keep } else { bytes }
    };
    let stay: Vec<usize> = checkpoint.tensors().filter(|(name, _)| !replaced.contains(*name)).map(size).collect();
    // A ternary matrix is up to three tensors.
    let tensors = stay.len() + 3 * layouts.len();
    Written { bytes: stay.into_iter().chain(layouts.iter().map(TernaryLayout::bytes)).sum(), tensors }
}

/// Bytes of a whole folder: its tensors exactly, the files that are copied exactly, the rest at most.
pub(crate) fn folder_bytes(
    checkpoint: &Checkpoint,
    recipe: &Recipe,
    table_planes: Option<usize>,
    keep: usize,
) -> usize {
    let size = |name: &&str| fs::metadata(checkpoint.folder().join(name)).map_or(0, |file| file.len() as usize);
    let copied: usize = COMPANIONS.iter().chain(&[CONFIG_FILE]).map(size).sum();
    let config = checkpoint.config();
    let written = written(checkpoint, recipe, table_planes, keep);
    let matrices = config.num_hidden_layers() * (LinearName::ALL.len() + ExpertMatrix::ALL.len() * (keep + 1));
    let drawn = config.num_hidden_layers() * (PER_LAYER_DRAWN + PER_EXPERT_DRAWN * keep);
    written.bytes + copied + FRAME + PER_TENSOR * written.tensors + PER_MATRIX * matrices + drawn
}

/// What to expect of a model that has lost planes of its tables or experts; nothing if it has lost neither.
fn warning(table_planes: Option<usize>, kept: usize, before: usize) -> Option<String> {
    let mut losses = Vec::new();
    if kept < before {
        losses.push(format!(
            "{kept} of {before} experts a layer are left: what the others knew is gone, and without training afterwards \
             nothing makes up for it"
        ));
    }
    match table_planes {
        Some(1) => losses.push("embedding and output layer have one ternary plane: expect many wrong words".into()),
        Some(planes) => {
            losses.push(format!("embedding and output layer have {planes} ternary planes: expect some loss"));
        }
        None => {}
    }
    let measure = "measure with `perplexity --against` before relying on it";
    (!losses.is_empty()).then(|| format!("{}; {measure}", losses.join("; ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_made_smaller_before_experts_are_dropped_and_one_plane_comes_last() {
        let found = choices(None, 2, 4);
        let two_then_one = [(Some(2), 3), (Some(2), 2), (Some(1), 4), (Some(1), 3), (Some(1), 2)];
        let all = [(None, 4), (Some(3), 4), (Some(2), 4)];
        assert_eq!(found, [&all[..], &two_then_one].concat());
    }

    #[test]
    fn what_was_asked_for_is_not_changed() {
        assert_eq!(choices(Some(3), 2, 3), [(Some(3), 3), (Some(3), 2)]);
        assert_eq!(choices(None, 3, 3), [(None, 3), (Some(3), 3), (Some(2), 3), (Some(1), 3)]);
    }
}
