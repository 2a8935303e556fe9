use burn::tensor::{Int, Tensor, TensorData, backend::Backend};
use burn_autodiff::Autodiff;
use burn_flex::Flex;
use burn_ndarray::NdArray;
use proptest::prelude::*;
use ternoss::backends::{CodeFormat, Rotation, TernaryBackend, TernaryLayout, reference, ternary_linear, ternary_rows};

use crate::support::{Weights, any_layout, assert_close, assert_same, layout, matrix, values};

fn ids<B: Backend>(ids: &[i64]) -> Tensor<B, 1, Int> {
    Tensor::from_data(TensorData::new(ids.to_vec(), [ids.len()]), &Default::default())
}

/// One row by the definition.
fn row(weights: &Weights, matrix: usize, row: usize) -> Vec<f32> {
    let TernaryLayout { planes, rows, in_features, group_size, rotation, .. } = weights.layout;
    let mut out = vec![0.0; in_features];
    for at in (0..planes).map(|plane| (matrix * planes + plane) * rows + row) {
        for (i, out) in out.iter_mut().enumerate() {
            let group = match (&weights.group_scales, group_size) {
                (Some(scales), Some(size)) => f32::from(scales[at * weights.layout.groups() + i / size]),
                _ => 1.0,
            };
            *out += f32::from(weights.trits[at * in_features + i]) * group * weights.row_scales[at];
        }
    }
    if let Some(rotation) = rotation {
        rotation.rotate_back(&mut out);
    }
    out
}

fn backend_agrees<B: TernaryBackend>(layout: TernaryLayout, seed: u64) {
    let weights = Weights::new(layout, seed);
    let last = layout.rows as i64 - 1;
    let chosen = [last, 0, last, last + 1, -1, i64::from(i32::MAX)];
    for matrix in 0..layout.matrices {
        let found = values(ternary_rows(&weights.tensor::<B>(), matrix, ids(&chosen)));
        let plain = values(reference::ternary_rows(&weights.tensor::<B>(), matrix, ids(&chosen)));
        let known: Vec<f32> =
            [layout.rows - 1, 0, layout.rows - 1].iter().flat_map(|at| row(&weights, matrix, *at)).collect();
        let (rows, rest) = found.split_at(known.len());
        // The definition starts from zero, which makes -0 to 0.
        assert_close(rows, &known, 0.0, "the definition");
        assert!(rest.iter().all(|x| x.is_nan()), "rows that are not there");
        assert_same(&found, &plain, "plain Burn");
    }
    assert_eq!(ternary_rows(&weights.tensor::<B>(), 0, ids(&[])).dims(), [0, layout.in_features]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn every_backend_decodes_the_rows_of_the_definition(layout in any_layout(), seed: u64) {
        backend_agrees::<Flex>(layout, seed);
        backend_agrees::<NdArray>(layout, seed);
        backend_agrees::<Autodiff<Flex>>(layout, seed);
    }
}

#[test]
fn a_rotated_table_embeds_what_it_scores() {
    // Logits of a row's own embedding: the product of the unrotated rows, up to the rounding of the activations.
    let rotated = TernaryLayout { rotation: Some(Rotation { seed: 7 }), planes: 2, ..layout(CodeFormat::T5, 20, 320) };
    let weights = Weights::new(rotated, 1).tensor::<Flex>();
    let rows = ternary_rows(&weights, 0, ids(&(0..20).collect::<Vec<_>>()));
    let logits = values(ternary_linear(rows.clone(), &weights, 0));
    assert_close(&logits, &values(rows.clone().matmul(rows.transpose())), 0.02, "logits");
}

#[test]
fn row_scales_get_a_gradient() {
    type B = Autodiff<Flex>;
    let layout = TernaryLayout { rotation: Some(Rotation { seed: 7 }), planes: 2, ..layout(CodeFormat::T2, 3, 96) };
    let mut weights = Weights::new(layout, 1).tensor::<B>();
    weights.row_scales = weights.row_scales.require_grad();
    let loss = (ternary_rows(&weights, 0, ids(&[2, 0, 2])) * matrix::<B>(&[0.5; 288], [3, 96])).sum();
    let gradient = weights.row_scales.grad(&loss.backward()).unwrap();
    let gradient = values(gradient);
    // Linear in the scales: the loss is the product of scales and gradient.
    let product: f32 = values(weights.row_scales.clone()).iter().zip(&gradient).map(|(scale, g)| scale * g).sum();
    assert_close(&[product], &values(loss), 1e-4, "loss");
    assert!(gradient[1] == 0.0 && gradient[4] == 0.0, "a row that nobody chose: {gradient:?}");
}

#[test]
fn codes_that_stand_for_nothing_read_as_zero() {
    for format in CodeFormat::ALL {
        let mut weights = Weights::new(layout(format, 4, 130), 3);
        let words = weights.layout.words_per_row();
        weights.codes[words] = u32::MAX;
        let found = values(ternary_rows(&weights.tensor::<Flex>(), 0, ids(&[1, 2])));
        assert!(found[..130].iter().all(|x| *x == 0.0) && found[130..].iter().any(|x| *x != 0.0), "{format}");
    }
}
