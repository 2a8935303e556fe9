//! The embedding and the output layer: frozen matrices that stay as the checkpoint stores them.

use burn::{
    module::{Module, Param, ParamId},
    tensor::{Int, Tensor, backend::Backend},
};
use ternoss_backends::{StoredFloat, StoredMatrix, TernaryBackend, stored_linear, stored_rows};

/// A matrix `[vocabulary, hidden]` in its stored precision, usually pointing into the mapped file.
///
/// Arithmetic on it is f32: bf16 and f16 widen exactly.
#[derive(Module, Debug)]
pub struct Table<B: Backend> {
    /// U32 words: `[vocabulary, words_per_row]`.
    pub words: Param<Tensor<B, 2, Int>>,
    hidden: usize,
    #[module(skip)]
    float: StoredFloat,
}

impl<B: Backend> Table<B> {
    /// Wraps a stored matrix.
    pub fn new(matrix: StoredMatrix<B>) -> Self {
        Self {
            hidden: matrix.columns(),
            float: matrix.float(),
            words: Param::initialized(ParamId::new(), matrix.words),
        }
    }

    /// Tokens it has a row for.
    pub fn rows(&self) -> usize {
        self.words.dims()[0]
    }

    fn matrix(&self) -> StoredMatrix<B> {
        StoredMatrix { words: self.words.val(), columns: self.hidden, float: self.float }
    }
}

impl<B: TernaryBackend> Table<B> {
    /// The rows of these tokens: `[tokens]` to `[tokens, hidden]`.
    pub fn embed(&self, tokens: Tensor<B, 1, Int>) -> Tensor<B, 2> {
        stored_rows(&self.matrix(), tokens)
    }

    /// The product with every row: `[tokens, hidden]` to logits `[tokens, vocabulary]`.
    pub fn logits(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        stored_linear(x, &self.matrix())
    }
}
