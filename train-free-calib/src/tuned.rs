//! A ternary layer that gradients tune: scales, norms, biases, sinks and router, and trits where they are soft.

use burn::{
    module::{AutodiffModule, Param, ParamId},
    tensor::{Tensor, activation::sigmoid, backend::Backend},
};
use burn_autodiff::Autodiff;
use ternoss_backends::{FormatError, TernaryBackend, TernaryLayout, TernaryWeight, reference::spread};
use ternoss_model::{
    experts::{DenseExperts, Expert, Experts},
    layer::Layer,
};
use ternoss_quant::{BitLinear, BitWeight, Linear, PackedTernary, TernaryConfig, TernaryParts, TernaryTensor};

use crate::adam::{Slot, Tuned, rms};

/// A ternary layer, and what gradients change in it.
#[derive(Clone)]
pub(crate) struct TunedLayer<B: TernaryBackend> {
    pub(crate) layer: Layer<B>,
    /// Where each trit may go, for every plane of every matrix in order; empty where trits stay.
    toward: Vec<Tensor<B, 2>>,
    pub(crate) tuned: Tuned<B>,
}

/// A layer put together from its tuned tensors.
pub(crate) struct Composed<B: TernaryBackend> {
    /// Gradients reach what is tuned.
    pub(crate) layer: Layer<Autodiff<B>>,
    /// Its matrices packed, with hard trits: q, k, v, o, then gate_up and down of every expert. Only if asked for.
    pub(crate) packed: Vec<PackedTernary>,
}

impl<B: TernaryBackend> TunedLayer<B> {
    /// A layer whose linears are packed. Trits stay, unless `toward` says where each may go.
    pub(crate) fn new(layer: Layer<B>, toward: Vec<Tensor<B, 2>>) -> Result<Self, FormatError> {
        let mut slots = Vec::new();
        let mut record = |slot: Slot<B>| {
            slots.push(slot.clone());
            Tensor::from_inner(slot.start)
        };
        Assembly { next: &mut record, toward: toward.iter(), hardness: 1.0, packed: None }.layer(&layer)?;
        let tuned = Tuned::new(slots);
        Ok(Self { layer, toward, tuned })
    }

    /// The same layer in a graph of its own.
    pub(crate) fn apart(&self) -> Self {
        Self { tuned: self.tuned.apart(), ..self.clone() }
    }

    /// The same layer in no graph.
    pub(crate) fn still(&self) -> Self {
        Self { tuned: self.tuned.still(), ..self.clone() }
    }

    /// The layer at its present values, soft trits as hard as `hardness` makes them; packed as well if `pack`.
    pub(crate) fn compose(&self, hardness: f32, pack: bool) -> Result<Composed<B>, FormatError> {
        let mut slot = 0;
        let mut next = |_| {
            slot += 1;
            self.tuned.value(slot - 1)
        };
        let packed = pack.then(Vec::new);
        let mut assembly = Assembly { next: &mut next, toward: self.toward.iter(), hardness, packed };
        let layer = assembly.layer(&self.layer)?;
        Ok(Composed { layer, packed: assembly.packed.unwrap_or_default() })
    }
}

/// How far a trit has gone, from 0 to 1: a sigmoid stretched so that it reaches both ends (AdaRound, Nagel et al.,
/// arXiv 2004.10568, equation 23).
fn gone<B: Backend>(logit: Tensor<B, 2>, hardness: f32) -> Tensor<B, 2> {
    (sigmoid(logit * hardness) * 1.2 - 0.1).clamp(0.0, 1.0)
}

/// Logit at which a trit has not gone anywhere, but can.
const STAYS: f32 = -2.3;

/// Unit of the logits: a trit can go all the way in some tens of steps.
const LOGIT_UNIT: f32 = 100.0;

/// Walks through a layer in a fixed order and puts it together from the values that `next` gives for each slot.
struct Assembly<'a, B: TernaryBackend> {
    next: &'a mut dyn FnMut(Slot<B>) -> Tensor<Autodiff<B>, 1>,
    toward: std::slice::Iter<'a, Tensor<B, 2>>,
    hardness: f32,
    packed: Option<Vec<PackedTernary>>,
}

impl<B: TernaryBackend> Assembly<'_, B> {
    fn layer(&mut self, layer: &Layer<B>) -> Result<Layer<Autodiff<B>>, FormatError> {
        let mut composed = Layer::<Autodiff<B>>::from_inner(layer.clone());
        composed.input_layernorm.gamma = self.vector(&layer.input_layernorm.gamma);
        composed.post_attention_layernorm.gamma = self.vector(&layer.post_attention_layernorm.gamma);
        let (attention, before) = (&mut composed.self_attn, &layer.self_attn);
        attention.sinks = keep(self.tune(before.sinks.val(), 1.0));
        attention.q_proj = self.linear(&before.q_proj)?;
        attention.k_proj = self.linear(&before.k_proj)?;
        attention.v_proj = self.linear(&before.v_proj)?;
        attention.o_proj = self.linear(&before.o_proj)?;
        let router = &layer.mlp.router.linear;
        let weight = router.weight.val();
        let shape @ [hidden, experts] = weight.dims();
        let weight = weight.reshape([hidden * experts]);
        let unit = rms(&weight);
        composed.mlp.router.linear.weight = keep(self.tune(weight, unit).reshape(shape));
        if let Some(bias) = &router.bias {
            composed.mlp.router.linear.bias = Some(keep(self.tune(bias.val(), 1.0)));
        }
        if let Experts::Ternary(packed) = &layer.mlp.experts {
            let experts = (0..packed.gate_up_proj.layout().matrices).map(|expert| {
                let mut linear = |weight: &TernaryTensor<B>, biases: &Param<Tensor<B, 2>>| {
                    let bias = biases.val().slice_dim(0, expert..expert + 1).squeeze_dim(0);
                    self.matrix(weight, expert, Some(bias))
                };
                Ok(Expert {
                    gate_up_proj: linear(&packed.gate_up_proj, &packed.gate_up_proj_bias)?,
                    down_proj: linear(&packed.down_proj, &packed.down_proj_bias)?,
                })
            });
            let experts = experts.collect::<Result<_, FormatError>>()?;
            composed.mlp.experts = Experts::Dense(DenseExperts::new(experts, packed.activation));
        }
        Ok(composed)
    }

    fn tune(&mut self, start: Tensor<B, 1>, unit: f32) -> Tensor<Autodiff<B>, 1> {
        (self.next)(Slot { start, unit, soft: false })
    }

    fn vector(&mut self, start: &Param<Tensor<B, 1>>) -> Param<Tensor<Autodiff<B>, 1>> {
        let unit = rms(&start.val());
        keep(self.tune(start.val(), unit))
    }

    fn linear(&mut self, linear: &Linear<B>) -> Result<Linear<Autodiff<B>>, FormatError> {
        match linear {
            Linear::Ternary(BitLinear { weight: BitWeight::Packed(weight), bias }) => {
                self.matrix(weight, 0, bias.as_ref().map(Param::val))
            }
            other => Ok(Linear::from_inner(other.clone())),
        }
    }

    /// One matrix: `sum over planes of trits * (scales * gain)`, the gains tuned, and the trits where they are soft.
    fn matrix(
        &mut self,
        weight: &TernaryTensor<B>,
        matrix: usize,
        bias: Option<Tensor<B, 1>>,
    ) -> Result<Linear<Autodiff<B>>, FormatError> {
        let weight = weight.matrix(matrix);
        let scales = self.scales(&weight.weight());
        let soft = match self.toward.len() {
            0 => None,
            _ => Some(self.soft(&weight.weight(), &scales)?),
        };
        let bias = bias.map(|bias| {
            let unit = rms(&bias);
            self.tune(bias, unit)
        });
        let config = TernaryConfig { rotation: weight.layout().rotation, ..TernaryConfig::default() };
        let linear = match soft {
            Some(soft) => BitLinear::composed(soft, bias, &config),
            None => {
                let linear = BitLinear::tuned(TernaryTensor::from_inner(weight), Tensor::stack(scales, 0), bias);
                self.pack(|| linear.to_packed())?;
                linear
            }
        };
        Ok(Linear::Ternary(linear))
    }

    /// The scales of each plane, `[rows, groups]`.
    fn scales(&mut self, weight: &TernaryWeight<B>) -> Vec<Tensor<Autodiff<B>, 2>> {
        let plane = |plane| {
            let scales = weight.scales(0, plane);
            let shape @ [rows, groups] = scales.dims();
            let gain = self.tune(Tensor::ones([rows * groups], &scales.device()), 1.0).reshape(shape);
            Tensor::from_inner(scales) * gain
        };
        (0..weight.layout.planes).map(plane).collect()
    }

    /// A matrix of soft trits as floats.
    fn soft(
        &mut self,
        weight: &TernaryWeight<B>,
        scales: &[Tensor<Autodiff<B>, 2>],
    ) -> Result<Tensor<Autodiff<B>, 2>, FormatError> {
        let TernaryLayout { in_features, group_size, format, rotation, .. } = weight.layout;
        let (mut sum, mut parts) = (None, Vec::new());
        for ((plane, scales), toward) in scales.iter().enumerate().zip(self.toward.by_ref().take(scales.len())) {
            let trits = weight.parts(0, plane).0;
            let shape @ [rows, _] = trits.dims();
            let start = Tensor::full([rows * in_features], STAYS, &trits.device());
            let logit = (self.next)(Slot { start, unit: LOGIT_UNIT, soft: true }).reshape(shape);
            if self.packed.is_some() {
                let hard = trits.clone() + toward.clone() * logit.clone().inner().greater_elem(0.0).float();
                parts.push(TernaryParts::from_scales(hard, scales.clone().inner().clamp_min(0.0), group_size));
            }
            let soft = Tensor::from_inner(trits) + Tensor::from_inner(toward.clone()) * gone(logit, self.hardness);
            let plane = soft * spread(scales.clone(), in_features, group_size.unwrap_or(in_features));
            sum = Some(match sum {
                Some(sum) => sum + plane,
                None => plane,
            });
        }
        self.pack(|| PackedTernary::pack(&parts, format, rotation))?;
        sum.ok_or(FormatError::Empty { what: "planes" })
    }

    /// Keeps a packed matrix, if that is asked for.
    fn pack(&mut self, matrix: impl FnOnce() -> Result<PackedTernary, FormatError>) -> Result<(), FormatError> {
        if let Some(packed) = &mut self.packed {
            packed.push(matrix()?);
        }
        Ok(())
    }
}

/// A parameter that stays a node of the graph it comes from.
fn keep<B: Backend, const D: usize>(value: Tensor<B, D>) -> Param<Tensor<B, D>> {
    Param::initialized(ParamId::new(), value)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use burn::{module::AutodiffModule, tensor::TensorData};
    use burn_flex::Flex;
    use ternoss_backends::{CodeFormat, Rotation};
    use ternoss_model::{Checkpoint, ExpertPlacement, LoadOptions, cache::LayerCache, rope::RotaryEmbedding};
    use ternoss_quant::Granularity;

    use super::*;
    use crate::solution::host;

    const TOKENS: usize = 24;

    /// A layer of the shipped model, rounded.
    fn ternary(number: usize, config: &TernaryConfig) -> (Checkpoint, Layer<Flex>) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/tiny-gpt-oss");
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let options = LoadOptions { experts: ExpertPlacement::Resident, ..LoadOptions::default() };
        let layer = Layer::load(&checkpoint, number, options, &Default::default()).unwrap();
        let layer = layer.to_ternary(config).unwrap();
        (checkpoint, layer)
    }

    fn stream<B: Backend>(hidden: usize) -> Tensor<B, 2> {
        let x = (0..TOKENS * hidden).map(|i| ((i * 7919 + 13) % 1009) as f32 / 504.5 - 1.0).collect();
        Tensor::from_data(TensorData::new::<f32, _>(x, [TOKENS, hidden]), &Default::default())
    }

    fn forward<B: TernaryBackend>(checkpoint: &Checkpoint, number: usize, layer: &Layer<B>) -> Tensor<B, 2> {
        let config = checkpoint.config();
        let rope = RotaryEmbedding::new(&config.rope, config.head_dim).tables(0..TOKENS, &Default::default());
        layer.forward(stream(config.hidden_size), &rope, &mut LayerCache::new(config.window(number)))
    }

    fn output(checkpoint: &Checkpoint, number: usize, layer: &Layer<Flex>) -> Vec<f32> {
        host(forward(checkpoint, number, layer))
    }

    fn distance(found: &[f32], expected: &[f32]) -> f64 {
        let squares = |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>();
        squares(&mut found.iter().zip(expected).map(|(a, b)| a - b)) / squares(&mut expected.iter().copied())
    }

    #[test]
    fn a_composed_layer_computes_what_the_packed_one_does_and_is_packed_to_it_again() {
        for (number, rotation, format, granularity) in [
            (0, None, CodeFormat::T2, Granularity::Group(64)),
            (1, Some(Rotation::default()), CodeFormat::T5, Granularity::Group(64)),
            (2, Some(Rotation::default()), CodeFormat::T2, Granularity::Row),
        ] {
            let (checkpoint, packed) = ternary(number, &TernaryConfig { granularity, format, rotation });
            let tuned = TunedLayer::new(packed.clone(), Vec::new()).unwrap();
            let expected = output(&checkpoint, number, &packed);
            let composed = tuned.compose(1.0, false).unwrap().layer.valid();
            let off = distance(&output(&checkpoint, number, &composed), &expected);
            assert!(off < 1e-6, "layer {number}: composed is off by {off}");
            let hard = tuned.harden().unwrap();
            let off = distance(&output(&checkpoint, number, &hard.layer), &expected);
            assert!(off < 1e-6, "layer {number}: packed again is off by {off}");
            let linears = packed.self_attn.projections();
            for (linear, again) in linears.into_iter().zip(&hard.matrices) {
                let before = linear.to_packed(&TernaryConfig::default()).unwrap();
                assert_eq!(again.codes, before.codes, "layer {number}");
            }
        }
    }

    #[test]
    fn gradients_are_those_of_the_layer_in_floats() {
        let rotated = TernaryConfig { rotation: Some(Rotation::default()), ..TernaryConfig::default() };
        for (number, config) in [(0, TernaryConfig::default()), (1, rotated)] {
            let (checkpoint, packed) = ternary(number, &config);
            let Experts::Ternary(experts) = &packed.mlp.experts else { panic!("not packed") };
            let linears = packed.self_attn.projections().map(|linear| linear.shape());
            let pairs = [&experts.gate_up_proj, &experts.down_proj].map(TernaryTensor::layout);
            let pairs = pairs.map(|layout| [layout.in_features, layout.rows]);
            let shapes = linears.into_iter().chain(pairs.repeat(experts.gate_up_proj.layout().matrices));
            // Trits that may go nowhere make a layer that is put together in floats.
            let nowhere = shapes.map(|[inputs, rows]| Tensor::zeros([rows, inputs], &Default::default())).collect();
            let [kernels, floats] = [Vec::new(), nowhere].map(|toward: Vec<Tensor<Flex, 2>>| {
                let layer = TunedLayer::new(packed.clone(), toward).unwrap();
                let y = forward(&checkpoint, number, &layer.compose(1.0, false).unwrap().layer);
                let slopes = stream(checkpoint.config().hidden_size) + 0.5;
                let gradients = layer.tuned.gradients(&(y * slopes).sum().backward());
                let hard = gradients.into_iter().zip(&layer.tuned.slots).filter(|(_, slot)| !slot.soft);
                hard.map(|(gradient, _)| gradient.map(host)).collect::<Vec<_>>()
            });
            assert!(kernels.len() == floats.len() && kernels.iter().flatten().count() > kernels.len() / 2);
            for (slot, (found, expected)) in kernels.into_iter().zip(floats).enumerate() {
                assert_eq!(found.is_some(), expected.is_some(), "slot {slot}");
                let off = found.zip(expected).map_or(0.0, |(found, expected)| distance(&found, &expected));
                assert!(off < 1e-6, "layer {number}, slot {slot} of the gradient is off by {off}");
            }
        }
    }

    #[test]
    fn a_soft_trit_hardens_to_where_it_has_gone() {
        let (_, packed) = ternary(0, &TernaryConfig::default());
        let Linear::Ternary(BitLinear { weight: BitWeight::Packed(query), .. }) = &packed.self_attn.q_proj else {
            panic!("not packed")
        };
        let (before, scales) = query.weight().parts(0, 0);
        // Zeros may become 1, the others 0.
        let toward = before.clone().equal_elem(0.0).float() - before.clone();
        let mut tuned = TunedLayer::new(packed.clone(), vec![toward.clone()]).unwrap();
        let still = tuned.harden().unwrap();
        assert_eq!(still.matrices[0], packed.self_attn.q_proj.to_packed(&TernaryConfig::default()).unwrap());

        // Every third trit has a logit of 3 now, the others stay at theirs.
        let slot = tuned.tuned.slots.iter().position(|slot| slot.soft).unwrap();
        let count = before.dims().iter().product::<usize>();
        let moved: Vec<f32> = (0..count).map(|i| if i % 3 == 0 { (3.0 - STAYS) / LOGIT_UNIT } else { 0.0 }).collect();
        let device = Default::default();
        tuned.tuned.deltas[slot].value = Tensor::from_data(TensorData::new(moved, [count]), &device);

        let [old, way] = [before.clone(), toward].map(host);
        let expected: Vec<f32> = (0..count).map(|i| if i % 3 == 0 { old[i] + way[i] } else { old[i] }).collect();
        let hard = tuned.harden().unwrap();
        let again = TernaryTensor::<Flex>::from_packed(hard.matrices[0].clone(), &device).unwrap();
        assert_eq!(host(again.weight().parts(0, 0).0), expected);
        // The soft matrix comes to it as it grows harder.
        let distances = [1.0, 2.0, 4.0].map(|hardness| {
            let layer = tuned.compose(hardness, false).unwrap().layer.valid();
            let Linear::Ternary(BitLinear { weight: BitWeight::Latent(latent), .. }) = &layer.self_attn.q_proj else {
                panic!("not composed")
            };
            let hard = Tensor::from_data(TensorData::new(expected.clone(), before.dims()), &device);
            let hard = hard * spread(scales.clone(), before.dims()[1], 64);
            distance(&host(latent.fake_quantize()), &host(hard))
        });
        assert!(distances.is_sorted_by(|softer, harder| softer >= harder), "{distances:?}");
        assert!(distances[0] < 0.01 && distances[2] < 1e-6, "{distances:?}");
    }
}
