//! The embedding and the output layer made ternary: the scales that fit the weights best, without looking at a text.

use ternoss_backends::{TernaryBackend, TernaryLayout};
use ternoss_model::{Checkpoint, checkpoint::TableName};
use ternoss_quant::{PackedTernary, TernaryParts};

use crate::{
    CalibError,
    report::MatrixReport,
    solution::{Geometry, Solution},
    ternarize::{Recipe, rotate_rows},
};

/// Weights that are in memory in full at a time: 16 MiB in f32.
const WEIGHTS_AT_ONCE: usize = 4 << 20;

/// A table as `planes` ternary planes whose scales are fitted jointly, group by group, rotated where the recipe's other
/// matrices are. `progress` hears of the weights as they are done.
///
/// The result is in memory as a whole (at the size of gpt-oss-20b, t5 and one scale a row: 117 MB a plane), the weights are
/// not.
pub(crate) fn table<B: TernaryBackend>(
    checkpoint: &Checkpoint,
    name: TableName,
    planes: usize,
    recipe: &Recipe,
    device: &B::Device,
    progress: &(dyn Fn(usize) + Sync),
) -> Result<(PackedTernary, MatrixReport), CalibError> {
    let layout = table_layout(checkpoint, name, planes, recipe);
    let TernaryLayout { rows, in_features, group_size, .. } = layout;
    let weight_name = name.weight();
    let mut packed = PackedTernary::zeros(layout)?;
    let (mut error, mut power, mut nonzero) = (0.0f64, 0.0f64, 0usize);
    let step = (WEIGHTS_AT_ONCE / in_features).max(1);
    for first in (0..rows).step_by(step) {
        let chunk = first..(first + step).min(rows);
        let mut weights = checkpoint.float_rows(&weight_name, [rows, in_features], chunk.clone())?;
        if let Some(rotation) = layout.rotation {
            rotate_rows(&mut weights, in_features, rotation);
        }
        let solution = Solution::fitted(&weights, Geometry { rows: chunk.len(), in_features, group_size, planes });
        let parts: Vec<TernaryParts<B>> = solution.parts(device);
        packed.set_rows(first, &PackedTernary::pack(&parts, layout.format, layout.rotation)?)?;
        let dense = parts.iter().map(TernaryParts::to_dense).reduce(|sum, plane| sum + plane);
        let dense = dense.map(crate::solution::host).unwrap_or_default();
        error += squares(weights.iter().zip(&dense).map(|(weight, found)| weight - found));
        power += squares(weights.iter().copied());
        nonzero += solution.rows.iter().flat_map(|row| &row.trits).filter(|trit| **trit != 0).count();
        progress(weights.len());
    }
    let report = MatrixReport {
        planes,
        name: name.path().into(),
        relative_error: error / power.max(f64::MIN_POSITIVE),
        zeros: 1.0 - nonzero as f64 / (planes * rows * in_features) as f64,
        tokens: 0,
    };
    Ok((packed, report))
}

/// What a table becomes.
pub(crate) fn table_layout(checkpoint: &Checkpoint, name: TableName, planes: usize, recipe: &Recipe) -> TernaryLayout {
    let [in_features, rows] = name.shape(checkpoint.config());
    let group_size = recipe.ternary.granularity.group_size();
    let (format, rotation) = (recipe.ternary.format, recipe.ternary.rotation);
    TernaryLayout { format, matrices: 1, planes, rows, in_features, group_size, rotation }
}

/// The sum of squares in double precision, in order.
fn squares(values: impl Iterator<Item = f32>) -> f64 {
    values.map(|value| f64::from(value).powi(2)).sum()
}
