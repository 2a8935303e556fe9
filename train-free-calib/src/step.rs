//! One weight file of the ternary folder: what belongs to no layer, or one layer.

use std::collections::BTreeMap;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use ternoss_backends::{FormatError, TernaryBackend, TernaryLayout};
use ternoss_model::{
    Checkpoint, CheckpointError,
    checkpoint::{ExpertMatrix, FolderWriter, LinearName, OutputTensor, TableName, TernaryPath, tensors_by_expert},
};
use ternoss_quant::PackedTernary;

use crate::{
    CalibError,
    activations::Activations,
    budget::{LayerPlanes, Plan, TENSORS},
    layer::{LayerCalibration, TernaryLayer},
    prune::{self, KeptExpert},
    report::{LayerReport, MatrixReport, PartBytes, bytes_by_part},
    tables::{table, table_layout},
    ternarize::Recipe,
};

/// Expert matrices in work at the same time: bounds memory whatever the number of threads.
const MATRICES_AT_ONCE: usize = 4;

/// One quantization under way.
pub(crate) struct Job<'a, B: TernaryBackend> {
    pub(crate) checkpoint: &'a Checkpoint,
    pub(crate) recipe: Recipe,
    /// Planes of every tensor, where they differ.
    pub(crate) plan: Option<Plan>,
    pub(crate) device: &'a B::Device,
    pub(crate) progress: &'a (dyn Fn(usize) + Sync),
}

/// One weight file that is done.
#[derive(Serialize, Deserialize)]
pub(crate) struct Done {
    pub(crate) ternary_bytes: usize,
    pub(crate) full_precision_bytes: usize,
    /// Bytes of ternary tables, which are in the first file.
    pub(crate) table_bytes: usize,
    /// What became of them.
    pub(crate) tables: Vec<MatrixReport>,
    /// All bytes by what they are spent on.
    pub(crate) parts: PartBytes,
    /// What became of the layer in it; the first file has none.
    pub(crate) layer: Option<LayerReport>,
}

/// The activations after so many layers.
pub(crate) fn activations_file(layers: usize) -> String {
    format!("activations-{layers:05}.bin")
}

impl Recipe {
    /// Refuses options that no matrix can have, before anything is written.
    pub(crate) fn check_layout(&self, checkpoint: &Checkpoint) -> Result<(), FormatError> {
        TernaryLayout {
            format: self.ternary.format,
            matrices: 1,
            planes: self.planes,
            rows: 1,
            in_features: checkpoint.config().hidden_size,
            group_size: self.ternary.granularity.group_size(),
            rotation: self.ternary.rotation,
        }
        .validate()?;
        match self.table_planes {
            Some(planes) => table_layout(checkpoint, TableName::Embedding, planes, self).validate(),
            None => Ok(()),
        }
    }
}

impl<'a, B: TernaryBackend> Job<'a, B> {
    /// Weight file `step`: what belongs to no layer, then the layers.
    pub(crate) fn step(
        &self,
        step: usize,
        activations: Option<&mut Activations<B>>,
        writer: &mut FolderWriter,
    ) -> Result<Done, CalibError> {
        let number = step.checked_sub(1);
        self.check_finite(number)?;
        let layer = match (number, activations) {
            (None, _) => self.tables()?,
            (Some(number), None) => self.layer(number, Vec::new())?,
            (Some(number), Some(activations)) => {
                let layer = match self.recipe.keep_experts {
                    Some(keep) if !self.recipe.steps.look_at_text() => {
                        let kept = prune::advance(self.checkpoint, number, keep, activations, self.device)?;
                        self.layer(number, kept)?
                    }
                    _ => LayerCalibration::new(
                        self.checkpoint,
                        number,
                        &self.recipe,
                        self.planes(number),
                        self.device,
                        self.progress,
                    )?
                    .run(activations)?,
                };
                activations.expect_finite(number)?;
                activations.save(&writer.folder().join(activations_file(step)))?;
                layer
            }
        };
        let mut tensors = self.copied(number, &layer)?;
        for (name, shape, values) in &layer.floats {
            tensors.push((name.clone(), OutputTensor::floats(shape.clone(), values)));
        }
        let full_precision_bytes = tensors.iter().map(|(_, tensor)| tensor.bytes()).sum();
        for (path, matrices) in &layer.matrices {
            tensors.extend(OutputTensor::ternary(path, matrices));
        }
        let parts = bytes_by_part(tensors.iter().map(|(name, tensor)| (name.as_str(), tensor.bytes())));
        writer.shard(step, tensors)?;
        let bytes = layer.matrices.iter().map(|(_, packed)| packed.layout.bytes()).sum();
        let done =
            Done { ternary_bytes: 0, full_precision_bytes, table_bytes: 0, tables: Vec::new(), parts, layer: None };
        Ok(match number {
            Some(_) => Done { ternary_bytes: bytes, layer: Some(layer.report), ..done },
            None => Done { table_bytes: bytes, tables: layer.report.matrices, ..done },
        })
    }

    /// Planes of the ternary tensors of a layer.
    fn planes(&self, layer: usize) -> LayerPlanes {
        let planned = self.plan.as_ref().and_then(|plan| plan.0.get(layer).copied());
        planned.unwrap_or([self.recipe.planes; TENSORS])
    }

    /// The ternary tables, if they are to be ternary.
    fn tables(&self) -> Result<TernaryLayer, CalibError> {
        let mut result = TernaryLayer::default();
        let Some(planes) = self.recipe.table_planes else { return Ok(result) };
        for name in TableName::of(self.checkpoint.config()) {
            self.checkpoint.expect_finite_stored(&name.weight())?;
            let (packed, report) =
                table::<B>(self.checkpoint, *name, planes, &self.recipe, self.device, self.progress)?;
            result.report.matrices.push(report);
            result.matrices.push((TernaryPath::Linear(name.path().into()), packed));
        }
        Ok(result)
    }

    /// All ternary matrices of a layer, without looking at a text: of the experts in `kept`, or of all if it is empty.
    fn layer(&self, layer: usize, kept: Vec<KeptExpert>) -> Result<TernaryLayer, CalibError> {
        let mut result = TernaryLayer::default();
        result.report.kept = kept;
        for linear in LinearName::ALL {
            let path = linear.path(layer);
            let shape = linear.shape(self.checkpoint.config());
            let name = format!("{path}.weight");
            let weight = self.checkpoint.floats(&name, &[shape[1], shape[0]])?;
            let planes = self.planes(layer)[linear as usize];
            let (matrix, report) = self.ternarize(&name, path.clone(), weight, shape, planes)?;
            result.report.matrices.push(report);
            result.matrices.push((TernaryPath::Linear(path), matrix));
        }
        for matrix in ExpertMatrix::ALL {
            let experts = self.experts(layer, matrix, &mut result.report)?;
            result.matrices.push((TernaryPath::Experts(matrix.path(layer)), experts));
        }
        Ok(result)
    }

    fn experts(
        &self,
        layer: usize,
        matrix: ExpertMatrix,
        report: &mut LayerReport,
    ) -> Result<PackedTernary, CalibError> {
        let experts = prune::those_that_stay(&report.kept, self.checkpoint);
        let shape = matrix.shape(self.checkpoint.config());
        let name = self.checkpoint.expert_tensors(layer, matrix).swap_remove(0);
        let planes = self.planes(layer)[LinearName::ALL.len() + matrix as usize];
        let mut matrices = Vec::with_capacity(experts.len());
        for experts in experts.chunks(MATRICES_AT_ONCE) {
            let batch: Result<Vec<_>, CalibError> = experts
                .par_iter()
                .map(|&expert| {
                    let weight = self.checkpoint.expert_rows(layer, matrix, expert)?;
                    self.ternarize(&name, format!("{}.{expert}", matrix.path(layer)), weight, shape, planes)
                })
                .collect();
            for (packed, matrix_report) in batch? {
                report.matrices.push(matrix_report);
                matrices.push(packed);
            }
        }
        Ok(PackedTernary::stack(matrices)?)
    }

    /// One matrix, `[in, out]` its shape and `weight` its rows.
    fn ternarize(
        &self,
        tensor: &str,
        name: String,
        weight: Vec<f32>,
        shape: [usize; 2],
        planes: usize,
    ) -> Result<(PackedTernary, MatrixReport), CalibError> {
        self.checkpoint.expect_finite(tensor, &weight)?;
        let recipe = Recipe { planes, ..self.recipe };
        let made = recipe.ternarize::<B>(weight, shape, None, self.device)?;
        (self.progress)(shape[0] * shape[1]);
        let report = made.report(name, 0);
        Ok((made.packed, report))
    }

    /// The tensors of a layer, or of no layer, that stay as they are, without the rows of experts that were dropped. Changed
    /// floats do not.
    fn copied<'b>(
        &self,
        layer: Option<usize>,
        made: &TernaryLayer,
    ) -> Result<Vec<(String, OutputTensor<'b>)>, CalibError>
    where
        'a: 'b,
    {
        let checkpoint: &'b Checkpoint = self.checkpoint;
        let mut tensors = Vec::new();
        let kept = prune::numbers(&made.report.kept);
        let by_expert = layer.filter(|_| !kept.is_empty()).map(tensors_by_expert).unwrap_or_default();
        for name in self.full_precision(layer) {
            if made.floats.iter().any(|(changed, ..)| changed == name) {
                continue;
            }
            let tensor = match by_expert.iter().any(|other| other == name) {
                true => OutputTensor::copied_parts(checkpoint, name, &kept)?,
                false => OutputTensor::copied(checkpoint, name)?,
            };
            tensors.push((name.to_string(), tensor));
        }
        Ok(tensors)
    }

    /// Refuses NaN and infinity in what does not become ternary; the rest is checked when it does.
    fn check_finite(&self, layer: Option<usize>) -> Result<(), CheckpointError> {
        self.full_precision(layer).iter().try_for_each(|name| self.checkpoint.expect_finite_stored(name))
    }

    /// Names of the tensors of a layer, or of no layer, that do not become ternary.
    fn full_precision(&self, layer: Option<usize>) -> Vec<&'a str> {
        let tables = || self.recipe.table_planes.map_or(Vec::new(), |_| TableName::ALL.map(TableName::weight).into());
        let ternary: Vec<String> = layer.map_or_else(tables, |layer| {
            let linears = LinearName::ALL.iter().map(|linear| format!("{}.weight", linear.path(layer)));
            let experts = ExpertMatrix::ALL.iter().flat_map(|m| self.checkpoint.expert_tensors(layer, *m));
            linears.chain(experts).collect()
        });
        let of_layer =
            |name: &&str| layer_of(name, self.checkpoint) == layer && !ternary.iter().any(|other| other == name);
        self.checkpoint.tensors().map(|(name, _)| name).filter(of_layer).collect()
    }
}

/// Writes weight file `step` of another ternary model once more, with what `changed` has instead.
pub(crate) fn write_changed(
    source: &Checkpoint,
    step: usize,
    changed: &TernaryLayer,
    writer: &mut FolderWriter,
) -> Result<PartBytes, CheckpointError> {
    let number = step.checked_sub(1);
    let mut tensors: BTreeMap<String, OutputTensor<'_>> = BTreeMap::new();
    for (name, _) in source.tensors().filter(|(name, _)| layer_of(name, source) == number) {
        tensors.insert(name.into(), OutputTensor::copied(source, name)?);
    }
    for (name, shape, values) in &changed.floats {
        tensors.insert(name.clone(), OutputTensor::floats(shape.clone(), values));
    }
    for (path, matrices) in &changed.matrices {
        tensors.extend(OutputTensor::ternary(path, matrices));
    }
    let parts = bytes_by_part(tensors.iter().map(|(name, tensor)| (name.as_str(), tensor.bytes())));
    writer.shard(step, tensors.into_iter().collect())?;
    Ok(parts)
}

/// The layer a tensor belongs to, if the model has it.
fn layer_of(name: &str, checkpoint: &Checkpoint) -> Option<usize> {
    let number = name.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()?;
    (number < checkpoint.config().num_hidden_layers()).then_some(number)
}
