//! The embedding and the output layer: frozen matrices, as the checkpoint stores them or ternary.

use burn::{
    module::{Module, Param, ParamId},
    tensor::{Int, Tensor, backend::Backend},
};
use ternoss_backends::{
    StoredFloat, StoredMatrix, TernaryBackend, stored_linear, stored_rows, ternary_linear, ternary_rows,
};
use ternoss_quant::TernaryTensor;

/// A matrix `[vocabulary, hidden]`.
#[derive(Module, Debug)]
pub enum Table<B: Backend> {
    /// In the precision of the checkpoint.
    Stored(StoredTable<B>),
    /// As the sum of a few ternary planes.
    Ternary(TernaryTensor<B>),
}

/// A matrix `[vocabulary, hidden]` in its stored precision, usually pointing into the mapped file.
///
/// Arithmetic on it is f32: bf16 and f16 widen exactly.
#[derive(Module, Debug)]
pub struct StoredTable<B: Backend> {
    /// U32 words: `[vocabulary, words_per_row]`.
    pub words: Param<Tensor<B, 2, Int>>,
    hidden: usize,
    #[module(skip)]
    float: StoredFloat,
}

impl<B: Backend> StoredTable<B> {
    /// Wraps a stored matrix.
    pub fn new(matrix: StoredMatrix<B>) -> Self {
        Self {
            hidden: matrix.columns(),
            float: matrix.float(),
            words: Param::initialized(ParamId::new(), matrix.words),
        }
    }

    fn matrix(&self) -> StoredMatrix<B> {
        StoredMatrix { words: self.words.val(), columns: self.hidden, float: self.float }
    }
}

impl<B: Backend> Table<B> {
    /// Tokens it has a row for.
    pub fn rows(&self) -> usize {
        match self {
            Self::Stored(table) => table.words.dims()[0],
            Self::Ternary(table) => table.layout().rows,
        }
    }
}

impl<B: TernaryBackend> Table<B> {
    /// The rows of these tokens: `[tokens]` to `[tokens, hidden]`. Only those rows are read; ternary ones are decoded,
    /// without rounding.
    pub fn embed(&self, tokens: Tensor<B, 1, Int>) -> Tensor<B, 2> {
        match self {
            Self::Stored(table) => stored_rows(&table.matrix(), tokens),
            Self::Ternary(table) => ternary_rows(&table.weight(), 0, tokens),
        }
    }

    /// The product with every row: `[tokens, hidden]` to logits `[tokens, vocabulary]`. A ternary table rounds `x` to int8
    /// first, as every ternary layer does.
    pub fn logits(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        match self {
            Self::Stored(table) => stored_linear(x, &table.matrix()),
            Self::Ternary(table) => ternary_linear(x, &table.weight(), 0),
        }
    }
}
