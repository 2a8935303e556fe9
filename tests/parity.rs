//! The model equals the reference implementation: every golden output, on every backend and under `Autodiff`.
//!
//! The golden files come from Hugging Face transformers (see `tests/fixtures/PROVENANCE.md`); tolerances are the
//! ones stated there.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use burn::{
    backend::Autodiff,
    nn,
    tensor::{Tensor, TensorData, backend::Backend},
};
use support::{Golden, assert_close, fixture};
use ternoss::{
    backends::{ClampedSwiGlu, TernaryBackend, reference::clamped_swiglu},
    model::{
        Checkpoint, ExpertPlacement, GptOss, LoadOptions, StopRules,
        cache::LayerCache,
        checkpoint::ExpertMatrix,
        experts::Experts,
        rope::RotaryEmbedding,
        sampling::{Sampler, SamplingConfig},
    },
    quant::Linear,
};

const LOGITS: f32 = 2e-4;
const HIDDEN: f32 = 2e-4;
const EXPERT: f32 = 1e-4;
const RMS_NORM: f32 = 1e-5;
const LENGTHS: [usize; 6] = [1, 7, 8, 9, 40, 300];

struct Case<B: Backend> {
    golden: Golden,
    checkpoint: Checkpoint,
    model: GptOss<B>,
    device: B::Device,
}

impl<B: TernaryBackend> Case<B> {
    fn new(name: &str) -> Self {
        Self::placed(name, ExpertPlacement::Resident)
    }

    fn placed(name: &str, experts: ExpertPlacement) -> Self {
        let device = B::Device::default();
        let checkpoint = Checkpoint::open(&fixture(name)).unwrap();
        let model = GptOss::load(&checkpoint, LoadOptions { experts, ..LoadOptions::default() }, &device).unwrap();
        let golden = Golden::open(&fixture(name).join("golden.safetensors"));
        Self { golden, checkpoint, model, device }
    }

    fn tensor<const D: usize>(&self, name: &str) -> Tensor<B, D> {
        let shape: [usize; D] = self.golden.shape(name).try_into().unwrap();
        Tensor::from_data(TensorData::new(self.golden.floats(name).to_vec(), shape), &self.device)
    }

    fn logits(&self, ids: &[u32]) -> Tensor<B, 2> {
        self.model.forward(self.model.tokens(ids).unwrap(), &mut self.model.new_cache())
    }

    fn close<const D: usize>(&self, name: &str, found: Tensor<B, D>, tolerance: f32) {
        assert_close(name, &host(found), self.golden.floats(name), tolerance);
    }

    /// The golden rows of a sequence: all of them, or for the longest those it lists.
    fn rows(&self, length: usize, all: Tensor<B, 2>) -> Tensor<B, 2> {
        if length != 300 {
            return all;
        }
        let positions = self.golden.ints("seq300.positions");
        let rows = positions.iter().map(|at| all.clone().slice_dim(0, *at as usize..*at as usize + 1));
        Tensor::cat(rows.collect(), 0)
    }
}

fn host<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

fn logits_of_every_length<B: TernaryBackend>(name: &str) {
    let case = Case::<B>::new(name);
    for length in LENGTHS {
        let ids = case.golden.ids(&format!("seq{length}.input_ids"));
        let logits = case.rows(length, case.logits(&ids));
        case.close(&format!("seq{length}.logits"), logits, LOGITS);
    }
}

/// Token by token, and in two pieces of which the second is longer than the window.
fn logits_with_the_cache<B: TernaryBackend>(name: &str) {
    let case = Case::<B>::new(name);
    let ids = case.golden.ids("seq40.input_ids");
    for pieces in [vec![1; 40], vec![17, 23], vec![39, 1], vec![3, 9, 8, 20]] {
        let mut cache = case.model.new_cache();
        let mut rest = ids.as_slice();
        let mut logits = Vec::new();
        for piece in pieces {
            let (now, later) = rest.split_at(piece);
            logits.push(case.model.forward(case.model.tokens(now).unwrap(), &mut cache));
            rest = later;
        }
        case.close("seq40.logits", Tensor::cat(logits, 0), LOGITS);
        assert_eq!(cache.entries(0), 8, "a sliding layer keeps its window");
        assert_eq!(cache.entries(1), 40, "a full layer keeps everything");
    }
}

fn hidden_states_and_routing<B: TernaryBackend>(name: &str) {
    let case = Case::<B>::new(name);
    for length in [40, 300] {
        let ids = case.golden.ids(&format!("seq{length}.input_ids"));
        let tokens = case.model.tokens(&ids).unwrap();
        let mut states = Vec::new();
        case.model.hidden_states(tokens, &mut case.model.new_cache(), |_, state| states.push(state.clone()));
        for (layer, state) in states.iter().enumerate() {
            let rows = case.rows(length, state.clone());
            case.close(&format!("seq{length}.hidden.{layer}"), rows, HIDDEN);
        }
        let rope = RotaryEmbedding::new(&case.model.config().rope, case.model.config().head_dim);
        let tables = rope.tables::<B>(0..length, &case.device);
        for (number, layer) in case.model.layers.iter().enumerate() {
            let x = states[number].clone();
            let mut cache = LayerCache::new(case.model.config().window(number));
            let x = x.clone() + layer.self_attn.forward(layer.input_layernorm.forward(x), &tables, &mut cache);
            let normed = layer.post_attention_layernorm.forward(x);
            let routing = layer.mlp.router.forward(normed.clone());
            let indices: Vec<i32> =
                case.rows(length, routing.indices.float()).into_data().iter::<f32>().map(|i| i as i32).collect();
            assert_eq!(indices, case.golden.ints(&format!("seq{length}.router_indices.{number}")));
            case.close(&format!("seq{length}.router_weights.{number}"), case.rows(length, routing.weights), EXPERT);
            if length == 40 {
                case.close(&format!("seq40.router_logits.{number}"), layer.mlp.router.logits(normed), HIDDEN);
            }
        }
    }
}

fn parts_of_a_layer<B: TernaryBackend>(name: &str) {
    let case = Case::<B>::new(name);
    let config = case.model.config().clone();
    let rope = RotaryEmbedding::new(&config.rope, config.head_dim).tables::<B>(0..40, &case.device);
    for number in 0..2 {
        let layer = &case.model.layers[number];
        let attn_in = layer.input_layernorm.forward(case.tensor::<2>(&format!("seq40.hidden.{number}")));
        case.close(&format!("seq40.attn_in.{number}"), attn_in, HIDDEN);
        let x = case.tensor::<2>(&format!("seq40.attn_in.{number}"));
        let attn_out = layer.self_attn.forward(x, &rope, &mut LayerCache::new(config.window(number)));
        case.close(&format!("seq40.attn_out.{number}"), attn_out, HIDDEN);
        let mlp_out = layer.mlp.forward(case.tensor(&format!("seq40.mlp_in.{number}")));
        case.close(&format!("seq40.mlp_out.{number}"), mlp_out, EXPERT);
    }
    let normed = case.model.norm.forward(case.tensor::<2>("seq40.hidden.4"));
    case.close("seq40.final_norm", normed, HIDDEN);
}

fn single_experts<B: TernaryBackend>(name: &str) {
    let case = Case::<B>::new(name);
    let activation = ClampedSwiGlu { alpha: 1.702, limit: case.model.config().swiglu_limit };
    let Experts::Dense(dense) = &case.model.layers[0].mlp.experts else { panic!("experts are dense") };
    for number in [0, 5] {
        let expert = &dense.experts[number];
        let x = case.tensor::<2>("expert.in");
        let gate_up = expert.gate_up_proj.forward(x.clone());
        case.close(&format!("expert.{number}.gate_up"), gate_up.clone(), EXPERT);
        case.close(&format!("expert.{number}.act"), clamped_swiglu(gate_up, activation), EXPERT);
        case.close(&format!("expert.{number}.out"), expert.forward(x, activation), EXPERT);
    }
    let [rows, columns] = case.tensor::<2>("swiglu.gate").dims();
    let pairs = Tensor::stack::<3>(vec![case.tensor::<2>("swiglu.gate"), case.tensor("swiglu.up")], 2);
    let out = clamped_swiglu(pairs.reshape([rows, 2 * columns]), activation);
    case.close("swiglu.out", out, RMS_NORM);
}

fn norm_and_rope<B: TernaryBackend>(name: &str) {
    let case = Case::<B>::new(name);
    let weight = case.tensor::<1>("rmsnorm.weight");
    let epsilon = case.model.config().rms_norm_eps;
    let norm = nn::RmsNorm { gamma: burn::module::Param::from_tensor(weight), epsilon };
    case.close("rmsnorm.out", norm.forward(case.tensor::<2>("rmsnorm.in")), RMS_NORM);

    let rope = RotaryEmbedding::new(&case.model.config().rope, case.model.config().head_dim);
    assert_close("inv_freq", rope.inv_freq(), case.golden.floats("rope.inv_freq"), 1e-7);
    let scaling = case.golden.floats("rope.attention_scaling");
    assert_close("attention_scaling", &[rope.attention_scaling()], scaling, 1e-6);
    let pairs = case.model.config().head_dim / 2;
    for (row, position) in case.golden.ints("rope.positions").iter().enumerate() {
        let position = *position as usize;
        // The angle is float32: its resolution at far positions bounds the agreement.
        let tolerance = match position {
            0..=300 => 1e-5,
            301..=4096 => 5e-4,
            _ => 2e-2,
        };
        let tables = rope.tables::<B>(position..position + 1, &case.device);
        let golden = |name: &str, width: usize| case.golden.floats(name)[row * width..(row + 1) * width].to_vec();
        assert_close("rope.cos", &host(tables.cos.clone()), &golden("rope.cos", pairs), tolerance);
        assert_close("rope.sin", &host(tables.sin.clone()), &golden("rope.sin", pairs), tolerance);
        let x = Tensor::from_data(TensorData::new(golden("rope.x_in", 2 * pairs), [1, 1, 2 * pairs]), &case.device);
        let rotated = host(tables.rotate(x));
        assert_close("rope.x_out", &rotated, &golden("rope.x_out", 2 * pairs), 4.0 * tolerance);
    }
}

fn greedy_continuation<B: TernaryBackend>(name: &str) {
    let case = Case::<B>::new(name);
    let prompt = case.golden.ids("greedy.prompt");
    let rules = StopRules { max_tokens: 32, stop_tokens: vec![] };
    let mut sampler = Sampler::new(SamplingConfig::greedy()).unwrap();
    let go_on = |_| std::ops::ControlFlow::Continue(());
    let new = case.model.generate(&prompt, &mut case.model.new_cache(), &mut sampler, &rules, go_on).unwrap();
    assert_eq!(new, case.golden.ids("greedy.tokens"));
}

macro_rules! on_backend {
    ($module:ident, $backend:ty, $present:expr, $($test:ident),+) => {
        mod $module {
            type B = $backend;
            $(mod $test {
                #[test]
                fn bf16() {
                    if $present {
                        super::super::$test::<super::B>("tiny-bf16");
                    }
                }
                #[test]
                fn mxfp4() {
                    if $present {
                        super::super::$test::<super::B>("tiny-mxfp4");
                    }
                }
            })+
        }
    };
    ($module:ident, $backend:ty) => {
        on_backend!($module, $backend, true);
    };
    ($module:ident, $backend:ty, $present:expr) => {
        on_backend!(
            $module, $backend, $present, logits_of_every_length, logits_with_the_cache, hidden_states_and_routing,
            parts_of_a_layer, single_experts, norm_and_rope, greedy_continuation
        );
    };
}

on_backend!(flex, burn_flex::Flex);
on_backend!(ndarray, burn_ndarray::NdArray);
on_backend!(autodiff, burn::backend::Autodiff<burn_flex::Flex>);
#[cfg(feature = "wgpu")]
on_backend!(wgpu, ternoss::backends::cube::Wgpu, crate::support::gpu());

#[test]
fn experts_streamed_from_the_checkpoint_equal_resident_ones() {
    for name in ["tiny-bf16", "tiny-mxfp4"] {
        let resident = Case::<burn_flex::Flex>::new(name);
        let streamed = Case::<burn_flex::Flex>::placed(name, ExpertPlacement::Streamed);
        assert!(matches!(streamed.model.layers[0].mlp.experts, Experts::Streamed(_)));
        let ids = resident.golden.ids("seq40.input_ids");
        assert_eq!(host(streamed.logits(&ids)), host(resident.logits(&ids)));
    }
}

#[test]
fn mxfp4_experts_decode_to_the_reference_layout() {
    let case = Case::<burn_flex::Flex>::new("tiny-mxfp4");
    let [inputs, outputs] = ExpertMatrix::GateUp.shape(case.model.config());
    let rows = case.checkpoint.expert_rows(1, ExpertMatrix::GateUp, 3).unwrap();
    let Experts::Dense(dense) = &case.model.layers[1].mlp.experts else { panic!("experts are dense") };
    let Linear::Dense(linear) = &dense.experts[3].gate_up_proj else { panic!("the matrix is dense") };
    let columns = host(linear.weight.val());
    for input in 0..inputs {
        for output in 0..outputs {
            assert_eq!(rows[output * inputs + input], columns[input * outputs + output]);
        }
    }
}

#[test]
fn gradients_reach_every_dense_weight() {
    type B = Autodiff<burn_flex::Flex>;
    let case = Case::<B>::new("tiny-bf16");
    let ids = case.golden.ids("seq40.input_ids");
    let grads = case.logits(&ids).square().mean().backward();
    let layer = &case.model.layers[3];
    let Linear::Dense(query) = &layer.self_attn.q_proj else { panic!("dense") };
    assert!(query.weight.val().grad(&grads).is_some());
    assert!(layer.self_attn.sinks.val().grad(&grads).is_some());
    assert!(layer.mlp.router.linear.weight.val().grad(&grads).is_some());
    assert!(case.model.layers[0].input_layernorm.gamma.val().grad(&grads).is_some());
}
