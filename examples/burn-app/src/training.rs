//! What the small model learns, and the loop.

use std::{error::Error, fs};

use burn::{
    backend::Autodiff,
    module::AutodiffModule,
    optim::{AdamConfig, GradientsParams, Optimizer},
    tensor::{ElementConversion, Int, Tensor, TensorData},
};
use ternoss::{backends::TernaryBackend, model::tokenizer::Tokenizer};

use crate::{genre::Genre, writer::Writer};

const TEXTS_PER_GENRE: usize = 48;
const TOKENS_PER_TEXT: usize = 32;
const STEPS: usize = 60;
const LEARNING_RATE: f64 = 3e-3;

/// What the language model makes of texts `[texts, hidden]`, and their genres `[texts]`.
pub struct Samples<B: TernaryBackend> {
    pub x: Tensor<B, 2>,
    pub genres: Tensor<B, 1, Int>,
}

impl<B: TernaryBackend> Samples<B> {
    /// Pieces of the files, one genre a file, in turn.
    pub fn read(writer: &Writer<B>, tokenizer: &Tokenizer, files: &[String]) -> Result<Self, Box<dyn Error>> {
        let read = |file| Ok(tokenizer.encode(&fs::read_to_string(file)?, false)?);
        let files = files.iter().map(read).collect::<Result<Vec<_>, Box<dyn Error>>>()?;
        let (mut x, mut genres) = (Vec::new(), Vec::new());
        for text in 0..TEXTS_PER_GENRE {
            for (genre, tokens) in files.iter().enumerate() {
                let piece = tokens.chunks_exact(TOKENS_PER_TEXT).nth(text).ok_or("the texts are too short")?;
                x.push(writer.impression(piece)?);
                genres.push(genre as i32);
            }
        }
        let x = Tensor::cat(x, 0);
        let genres = Tensor::from_data(TensorData::from(genres.as_slice()), &x.device());
        Ok(Self { x, genres })
    }

    /// Three quarters to learn from, the others to measure on.
    pub fn split(self) -> (Self, Self) {
        let texts = self.x.dims()[0];
        let part = |range: std::ops::Range<usize>| Self {
            x: self.x.clone().slice_dim(0, range.clone()),
            genres: self.genres.clone().slice_dim(0, range),
        };
        (part(0..texts * 3 / 4), part(texts * 3 / 4..texts))
    }

    /// Share of the texts whose genre is recognized, in percent.
    pub fn right(&self, genre: &Genre<B>) -> f64 {
        let found = genre.forward(self.x.clone()).argmax(1).squeeze_dim(1);
        100.0 * found.equal(self.genres.clone()).float().mean().into_scalar().elem::<f64>()
    }
}

/// Trains a model under `Autodiff`. The language model stands outside: it made the samples, and nothing of it learns.
///
/// # Errors
/// When the loss did not fall by half.
pub fn train<B: TernaryBackend>(samples: &Samples<B>) -> Result<Genre<B>, Box<dyn Error>> {
    // Made where gradients are: a parameter made without them does not learn later either.
    let mut genre = Genre::<Autodiff<B>>::new(samples.x.dims()[1], &samples.x.device());
    let mut optimizer = AdamConfig::new().init();
    let x = Tensor::<Autodiff<B>, 2>::from_inner(samples.x.clone());
    let genres = Tensor::<Autodiff<B>, 1, Int>::from_inner(samples.genres.clone());
    let mut losses = Vec::new();
    for step in 0..=STEPS {
        let loss = genre.loss(x.clone(), genres.clone());
        losses.push(loss.clone().into_scalar().elem::<f32>());
        if step % 10 == 0 {
            println!("step {step:>2}  loss {:.4}", losses[step]);
        }
        let gradients = GradientsParams::from_grads(loss.backward(), &genre);
        genre = optimizer.step(LEARNING_RATE, genre, gradients);
    }
    match losses[STEPS] < 0.5 * losses[0] {
        true => Ok(genre.valid()),
        false => Err(format!("the loss went from {} to {}", losses[0], losses[STEPS]).into()),
    }
}
