//! A tuned layer packed again, as it goes to its file.

use burn::{
    module::{AutodiffModule, Param},
    tensor::Tensor,
};
use ternoss_backends::{FormatError, TernaryBackend};
use ternoss_model::{
    checkpoint::{ExpertMatrix, LinearName, TernaryPath},
    experts::{Expert, Experts, PackedExperts},
    layer::Layer,
};
use ternoss_quant::{BitLinear, Linear, PackedTernary, TernaryTensor};

use crate::{
    layer::{ChangedFloats, TernaryLayer},
    report::LayerReport,
    solution::host,
    tuned::{Composed, TunedLayer},
};

/// A layer that is packed again.
pub(crate) struct HardLayer<B: TernaryBackend> {
    pub(crate) layer: Layer<B>,
    /// q, k, v, o, and where the experts are ternary, gate_up and down of all of them.
    pub(crate) matrices: Vec<PackedTernary>,
}

impl<B: TernaryBackend> TunedLayer<B> {
    /// The layer at its present values, packed: trits hard, scales rounded as the format stores them.
    pub(crate) fn harden(&self) -> Result<HardLayer<B>, FormatError> {
        let Composed { layer, packed } = self.still().compose(1.0, true)?;
        let mut layer = layer.valid();
        let device = layer.input_layernorm.gamma.val().device();
        let mut packed = packed.into_iter();
        let mut matrices: Vec<_> = packed.by_ref().take(4).collect();
        let attention = &mut layer.self_attn;
        let linears = [&mut attention.q_proj, &mut attention.k_proj, &mut attention.v_proj, &mut attention.o_proj];
        for (linear, packed) in linears.into_iter().zip(&matrices) {
            let weight = TernaryTensor::from_packed(packed.clone(), &device)?;
            *linear = Linear::Ternary(BitLinear::from_packed(weight, linear.bias()));
        }
        if let (Experts::Ternary(before), Experts::Dense(now)) = (&self.layer.mlp.experts, &layer.mlp.experts) {
            let packed: Vec<_> = packed.collect();
            let stacked = |first: usize| PackedTernary::stack(packed.iter().skip(first).step_by(2).cloned());
            let biases = |of: fn(&Expert<B>) -> &Linear<B>| {
                Tensor::stack::<2>(now.experts.iter().filter_map(|expert| of(expert).bias()).collect(), 0)
            };
            let (gate_up, down) = (stacked(0)?, stacked(1)?);
            layer.mlp.experts = Experts::Ternary(PackedExperts::new(
                TernaryTensor::from_packed(gate_up.clone(), &device)?,
                biases(|expert| &expert.gate_up_proj),
                TernaryTensor::from_packed(down.clone(), &device)?,
                biases(|expert| &expert.down_proj),
                before.activation,
            ));
            matrices.extend([gate_up, down]);
        }
        Ok(HardLayer { layer, matrices })
    }
}

impl<B: TernaryBackend> HardLayer<B> {
    /// Layer `number` as it goes to its file, everything with its name.
    pub(crate) fn written(self, number: usize) -> TernaryLayer {
        let linears = LinearName::ALL.map(|name| name.path(number));
        let experts = ExpertMatrix::ALL.map(|matrix| matrix.path(number));
        let mut floats = vec![
            vector(format!("model.layers.{number}.input_layernorm.weight"), &self.layer.input_layernorm.gamma),
            vector(
                format!("model.layers.{number}.post_attention_layernorm.weight"),
                &self.layer.post_attention_layernorm.gamma,
            ),
            vector(format!("model.layers.{number}.self_attn.sinks"), &self.layer.self_attn.sinks),
        ];
        let router = &self.layer.mlp.router.linear;
        // Burn's layer has [in, out].
        let weight = router.weight.val().transpose();
        floats.push((format!("model.layers.{number}.mlp.router.weight"), weight.dims().to_vec(), host(weight)));
        floats.extend(router.bias.as_ref().map(|bias| vector(format!("model.layers.{number}.mlp.router.bias"), bias)));
        for (path, linear) in linears.iter().zip(self.layer.self_attn.projections()) {
            floats.extend(linear.bias().map(|bias| (format!("{path}.bias"), bias.dims().to_vec(), host(bias))));
        }
        if let Experts::Ternary(packed) = &self.layer.mlp.experts {
            for (path, bias) in experts.iter().zip([&packed.gate_up_proj_bias, &packed.down_proj_bias]) {
                floats.push((format!("{path}_bias"), bias.dims().to_vec(), host(bias.val())));
            }
        }
        let paths = linears.map(TernaryPath::Linear).into_iter().chain(experts.map(TernaryPath::Experts));
        TernaryLayer { matrices: paths.zip(self.matrices).collect(), floats, report: LayerReport::default() }
    }
}

fn vector<B: TernaryBackend>(name: String, values: &Param<Tensor<B, 1>>) -> ChangedFloats {
    (name, values.dims().to_vec(), host(values.val()))
}
