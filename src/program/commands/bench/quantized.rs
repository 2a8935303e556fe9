//! A model with Burn's own quantized linears, to compare with.

use burn::{
    module::Param,
    nn,
    tensor::{
        Int, Tensor,
        ops::QuantizedTensor,
        quantization::{QTensorPrimitive, QuantLevel, QuantParam, QuantValue},
    },
};
use ternoss::{
    backends::{TernaryBackend, ternary_rows},
    model::{
        GptOss,
        experts::{DenseExperts, Expert, Experts, PackedExperts},
    },
    quant::{BitWeight, Linear, TernaryTensor},
};

/// The same model with every ternary or dense matrix of attention and experts as Burn quantizes it: 8 bits, symmetric, one
/// scale a matrix. Embedding, output layer, router, norms and biases stay.
pub(super) fn with_burns_linears<B: TernaryBackend>(mut model: GptOss<B>) -> GptOss<B> {
    let activation = model.config().activation();
    for layer in &mut model.layers {
        let attention = &mut layer.self_attn;
        for linear in [&mut attention.q_proj, &mut attention.k_proj, &mut attention.v_proj, &mut attention.o_proj] {
            *linear = quantized_linear(linear);
        }
        let experts = match &layer.mlp.experts {
            Experts::Ternary(packed) => unpacked(packed),
            Experts::Dense(dense) => dense.experts.iter().map(quantized_expert).collect(),
            // Too large to be held, so they stay where they are.
            Experts::Streamed(_) => continue,
        };
        layer.mlp.experts = Experts::Dense(DenseExperts::new(experts, activation));
    }
    model
}

fn quantized_linear<B: TernaryBackend>(linear: &Linear<B>) -> Linear<B> {
    let (weight, bias) = match linear {
        Linear::Dense(dense) => (dense.weight.val(), dense.bias.as_ref().map(Param::val)),
        Linear::Ternary(ternary) => {
            let weight = match &ternary.weight {
                BitWeight::Packed(packed) => matrix(packed, 0),
                BitWeight::Tuned(tuned) => matrix(&tuned.rounded(), 0),
                BitWeight::Latent(latent) => latent.weight.val(),
            };
            (weight, ternary.bias.as_ref().map(Param::val))
        }
    };
    quantized(weight, bias)
}

fn quantized_expert<B: TernaryBackend>(expert: &Expert<B>) -> Expert<B> {
    let (gate_up_proj, down_proj) = (quantized_linear(&expert.gate_up_proj), quantized_linear(&expert.down_proj));
    Expert { gate_up_proj, down_proj }
}

fn unpacked<B: TernaryBackend>(packed: &PackedExperts<B>) -> Vec<Expert<B>> {
    let linear = |weight: &TernaryTensor<B>, biases: &Param<Tensor<B, 2>>, expert: usize| {
        let bias = biases.val().slice_dim(0, expert..expert + 1).flatten(0, 1);
        quantized(matrix(weight, expert), Some(bias))
    };
    let expert = |expert| Expert {
        gate_up_proj: linear(&packed.gate_up_proj, &packed.gate_up_proj_bias, expert),
        down_proj: linear(&packed.down_proj, &packed.down_proj_bias, expert),
    };
    (0..packed.gate_up_proj.layout().matrices).map(expert).collect()
}

/// A ternary matrix in floats, `[in_features, rows]`, as it was before its rotation.
fn matrix<B: TernaryBackend>(tensor: &TernaryTensor<B>, matrix: usize) -> Tensor<B, 2> {
    let weight = tensor.weight();
    let ids = Tensor::<B, 1, Int>::arange(0..weight.layout.rows as i64, &weight.row_scales.device());
    ternary_rows(&weight, matrix, ids).transpose()
}

/// `weight [in_features, out_features]`.
fn quantized<B: TernaryBackend>(weight: Tensor<B, 2>, bias: Option<Tensor<B, 1>>) -> Linear<B> {
    let scheme = <QuantizedTensor<B> as QTensorPrimitive>::default_scheme()
        .with_value(QuantValue::Q8S)
        .with_level(QuantLevel::Tensor)
        .with_param(QuantParam::F32);
    let weight = Param::from_tensor(weight.quantize_dynamic(&scheme));
    Linear::Dense(nn::Linear { weight, bias: bias.map(Param::from_tensor) })
}
