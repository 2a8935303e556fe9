//! What can go wrong in a quantization.

use std::path::PathBuf;

use ternoss_backends::FormatError;
use ternoss_model::{CheckpointError, GenerateError};

use crate::{Method, Side};

/// A quantization that cannot be done.
#[derive(Debug, thiserror::Error)]
pub enum CalibError {
    /// Reading the model or writing the result failed.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The options do not describe a valid layout.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The model cannot write the text it would be calibrated on.
    #[error("the model cannot write its own calibration text: {0}")]
    Trace(#[from] GenerateError),
    /// The method needs a text and none was given.
    #[error("method {method} needs a calibration text")]
    NoText {
        /// The method.
        method: Method,
    },
    /// The calibration text cannot be read.
    #[error("{path}")]
    ReadText {
        /// The file.
        path: String,
        /// What failed.
        source: std::io::Error,
    },
    /// The calibration text is not UTF-8.
    #[error("{path}: not UTF-8 at byte {position}, a calibration text must be")]
    NotUtf8 {
        /// The file.
        path: String,
        /// The first byte that is not.
        position: usize,
    },
    /// The calibration text says nothing.
    #[error("{path}: empty, a calibration text is expected")]
    EmptyText {
        /// The file.
        path: String,
    },
    /// The calibration text does not fill a window.
    #[error(
        "the calibration text has {tokens} tokens, at least one window of {context} is needed \
         ({wanted} tokens or more give a good result)"
    )]
    ShortText {
        /// Tokens of the text.
        tokens: usize,
        /// Tokens a window.
        context: usize,
        /// Tokens that this model should have.
        wanted: usize,
    },
    /// A model computes NaN or infinity.
    #[error(
        "the activations of the {side} hold NaN or infinity after layer {layer}: its weights are too large for f32"
    )]
    NotFinite {
        /// The layer, counted from 0.
        layer: usize,
        /// Which of the two models.
        side: Side,
    },
    /// Distillation has nothing to be judged on.
    #[error("distillation needs a calibration text of at least two windows: one of them is held out to judge it")]
    NothingHeldOut,
    /// The calibration text holds a token that the model does not have.
    #[error("token {token} of the calibration text is outside the vocabulary of {vocab_size}")]
    Token {
        /// The token.
        token: u32,
        /// Tokens the model has.
        vocab_size: usize,
    },
    /// A number of planes that the method cannot do.
    #[error("{planes} planes: {method} makes 1 to {most}")]
    Planes {
        /// The number asked for.
        planes: usize,
        /// The method.
        method: Method,
        /// The most it can make.
        most: usize,
    },
    /// Two limits that are not worked out together.
    #[error("a target size and a number of bits per weight cannot be combined: give the planes instead of the bits")]
    TwoBudgets,
    /// Bits to share out by a method that has nothing to give.
    #[error("{method} makes one plane everywhere: bits per weight are for {other} only", other = Method::Ternoss)]
    OnePlane {
        /// The method.
        method: Method,
    },
    /// Fewer bits than one plane needs.
    #[error("{bits_per_weight} bits a weight are too few: one plane everywhere takes {least:.3}")]
    Budget {
        /// The bits asked for.
        bits_per_weight: f64,
        /// The least that is possible with these scales and this packing.
        least: f64,
    },
    /// Experts were to be chosen and there is no text to measure them on.
    #[error("keeping {keep} experts a layer needs a calibration text that shows which ones matter")]
    NoTextToChoose {
        /// Experts to keep.
        keep: usize,
    },
    /// A number of experts that the model cannot do with, or does not have.
    #[error("{keep} experts to keep: this model sends a token to {least} experts and has {all} a layer")]
    KeepExperts {
        /// The number asked for.
        keep: usize,
        /// The fewest possible.
        least: usize,
        /// All there are.
        all: usize,
    },
    /// A number of planes that a table cannot have.
    #[error("{planes} planes for embedding and output layer: 1 to {most} are possible")]
    TablePlanes {
        /// The number asked for.
        planes: usize,
        /// The most possible.
        most: usize,
    },
    /// A size that cannot be reached.
    #[error("a folder of {target} bytes is not possible with this packing: the smallest has {smallest}")]
    TargetSize {
        /// Bytes asked for.
        target: u64,
        /// The least possible.
        smallest: u64,
    },
    /// The folder turned out larger than computed.
    #[error("{folder} is whole, but it has {found} bytes, more than the {target} asked for")]
    TargetMissed {
        /// The output.
        folder: String,
        /// Bytes asked for.
        target: u64,
        /// Bytes there are.
        found: u64,
    },
    /// A granularity that the method cannot do.
    #[error("one scale a matrix is for absmean only: {method} needs one a row, or one a group")]
    OneScale {
        /// The method.
        method: Method,
    },
    /// The output would take the place of the input.
    #[error("{folder} is the model's own folder, or holds it")]
    OutputIsInput {
        /// The folder.
        folder: String,
    },
    /// Activations past the memory for them cannot be written to disk, or read again.
    #[error("{}: cannot keep activations on disk: {source}", path.display())]
    Spill {
        /// The file.
        path: PathBuf,
        /// What failed.
        source: std::io::Error,
    },
    /// What an interrupted run left to go on from is damaged.
    #[error("{name} in the unfinished output is damaged: remove that folder to start anew")]
    Damaged {
        /// The file.
        name: String,
    },
    /// There is nothing left to quantize.
    #[error("{folder} is ternary already")]
    AlreadyTernary {
        /// The model's folder.
        folder: String,
    },
    /// The model's own configuration is not an object.
    #[error("{path}: not a JSON object")]
    Config {
        /// `config.json` of the model.
        path: String,
    },
}
