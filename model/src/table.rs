//! The embedding and the output layer: frozen matrices, as the checkpoint stores them or ternary.
//!
//! ```
//! use burn::tensor::Tensor;
//! use ternoss_model::{Checkpoint, screening::LazyLogits, table::{Screening, Table}};
//! type B = burn_flex::Flex;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let checkpoint = Checkpoint::open("../examples/tiny-gpt-oss".as_ref())?;
//! let device = Default::default();
//! let x = Table::<B>::embedding(&checkpoint, &device)?.embed(Tensor::from_data([5, 7], &device));
//! let output = Table::<B>::output(&checkpoint, &device)?.with_screening(Screening::Always);
//! let logits = output.logits(x.clone());
//! assert_eq!(logits.dims(), [2, output.rows()]);
//! // Bounds of all logits at a fraction of the bytes, and single logits with the same bits.
//! let screened = output.screened(&x).ok_or("no kernels for it")?;
//! let logits = logits.into_data().into_vec::<f32>()?;
//! assert_eq!(screened[0].exact(&[9]), [logits[9]]);
//! assert!(screened[0].bounds()[9] >= logits[9]);
//! # Ok(()) }
//! ```

use std::sync::{Arc, OnceLock};

use burn::{
    module::{Module, Param, ParamId},
    tensor::{Int, Tensor, TensorData, backend::Backend},
};
use ternoss_backends::{
    Screen, StoredFloat, StoredMatrix, TernaryBackend, closer_bounds, cpu::screen::ROWS_BETWEEN_PAUSES, screen,
    screen_bounds, stored_linear, stored_linear_at, stored_rows, ternary_linear, ternary_rows,
};
use ternoss_quant::TernaryTensor;

use crate::{pager::Pager, screening::LazyLogits};

/// Weights from which on [`Screening::Auto`] makes a compact copy: smaller tables are read as fast as it.
const SCREENED_WEIGHTS: usize = 1 << 24;

/// Rows here and there that are computed before they leave memory again, where that is limited. Systems with large pages of
/// files map a megabyte and more beside each of them.
const ROWS_IN_LIMITED_MEMORY: usize = 16;

/// The same of rows one after the other.
const NEIGHBOURS_IN_LIMITED_MEMORY: usize = 4096;

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
    #[module(skip)]
    screening: Screening,
    /// The compact copy of the words, made at its first use. Clones share it.
    #[module(skip)]
    screen: Arc<OnceLock<Option<Screen>>>,
    /// Where memory is limited: lets go what was read.
    #[module(skip)]
    pager: Option<Arc<Pager>>,
}

/// Whether the next token is looked for with a compact copy of the output layer, less than a quarter of its bytes, that tells
/// which logits need to be computed ([`ternoss_backends::screen()`]). The chosen tokens are the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Screening {
    /// Where the table is large and the backend can.
    #[default]
    Auto,
    /// Wherever the backend can.
    Always,
    /// Every logit is computed.
    Never,
}

impl<B: Backend> StoredTable<B> {
    /// Wraps a stored matrix.
    pub fn new(matrix: StoredMatrix<B>) -> Self {
        Self {
            hidden: matrix.columns(),
            float: matrix.float(),
            words: Param::initialized(ParamId::new(), matrix.words),
            screening: Screening::Auto,
            screen: Arc::default(),
            pager: None,
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

    /// The same table, in limited memory.
    pub(crate) fn with_pager(mut self, pager: Option<Arc<Pager>>) -> Self {
        if let Self::Stored(table) = &mut self {
            table.pager = pager;
        }
        self
    }

    /// The same table, screened or not. A ternary one never is.
    #[must_use]
    pub fn with_screening(mut self, screening: Screening) -> Self {
        if let Self::Stored(table) = &mut self {
            table.screening = screening;
        }
        self
    }
}

impl<B: TernaryBackend> StoredTable<B> {
    /// Takes what was read out of resident memory, where that is limited.
    fn let_go(&self) {
        if let Some(pager) = &self.pager {
            pager.release_tables();
        }
    }

    fn screen(&self) -> Option<&Screen> {
        let wanted = match self.screening {
            Screening::Auto => self.words.dims()[0] * self.hidden >= SCREENED_WEIGHTS,
            Screening::Always => true,
            Screening::Never => false,
        };
        if !wanted {
            return None;
        }
        let make = || {
            if let Some(pager) = &self.pager {
                let [rows, words] = self.words.dims();
                // Four bits a weight and two floats a row, and what is read between two pauses.
                pager.make_room((rows * (self.hidden / 2 + 8) + ROWS_BETWEEN_PAUSES * words * 4) as u64);
            }
            screen(&self.matrix(), || self.let_go())
        };
        self.screen.get_or_init(make).as_ref()
    }

    /// The product with every row, where memory is limited with some rows at a time.
    fn logits(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        if self.pager.is_none() {
            return stored_linear(x, &self.matrix());
        }
        let rows = self.words.dims()[0];
        let parts = (0..rows).step_by(NEIGHBOURS_IN_LIMITED_MEMORY).map(|first| {
            let ids = first as i64..(first + NEIGHBOURS_IN_LIMITED_MEMORY).min(rows) as i64;
            let part = stored_linear_at(x.clone(), &self.matrix(), Tensor::arange(ids, &x.device()));
            self.let_go();
            part
        });
        Tensor::cat(parts.collect(), 1)
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
            Self::Stored(table) => table.logits(x),
            Self::Ternary(table) => ternary_linear(x, &table.weight(), 0),
        }
    }

    /// Makes the compact copy if there is to be one, which [`screened`](Self::screened) would do at its first call; returns
    /// whether there is one.
    pub fn prepare_screen(&self) -> bool {
        matches!(self, Self::Stored(table) if table.screen().is_some())
    }

    /// Bytes of the compact copy that a token reads, if there is to be one.
    pub(crate) fn screen_bytes(&self) -> Option<usize> {
        match self {
            Self::Stored(table) => table.screen().map(Screen::bytes),
            Self::Ternary(_) => None,
        }
    }

    /// The logits of each token of `x [tokens, hidden]`, to be computed where they are looked at. `None` where every logit
    /// has to be computed anyway ([`logits`](Self::logits)): a table that is ternary, small or not to be screened, a backend
    /// without kernels for it.
    pub fn screened(&self, x: &Tensor<B, 2>) -> Option<Vec<ScreenedLogits<B>>> {
        let Self::Stored(table) = self else { return None };
        let bounds: Vec<f32> = screen_bounds(x.clone(), table.screen()?).into_data().into_vec().ok()?;
        let tokens = bounds.chunks(self.rows().max(1)).enumerate();
        let logits = |(token, bounds): (usize, &[f32])| ScreenedLogits {
            table: table.clone(),
            x: x.clone().slice_dim(0, token..token + 1),
            bounds: bounds.to_vec(),
        };
        Some(tokens.map(logits).collect())
    }
}

/// The logits of one token, computed where they are looked at: see [`Table::screened`].
#[derive(Debug)]
pub struct ScreenedLogits<B: Backend> {
    table: StoredTable<B>,
    /// `[1, hidden]`.
    x: Tensor<B, 2>,
    bounds: Vec<f32>,
}

impl<B: TernaryBackend> LazyLogits for ScreenedLogits<B> {
    fn bounds(&self) -> &[f32] {
        &self.bounds
    }

    fn closer_bounds(&self, tokens: &[u32]) -> Vec<f32> {
        let mut bounds = tokens.iter().map(|token| self.bounds[*token as usize]).collect::<Vec<f32>>();
        if let Some(screen) = self.table.screen() {
            closer_bounds(self.x.clone(), screen, tokens, &mut bounds);
        }
        bounds
    }

    fn exact(&self, tokens: &[u32]) -> Vec<f32> {
        // The system maps pages beside each row that is read.
        let at_once = if self.table.pager.is_some() { ROWS_IN_LIMITED_MEMORY } else { usize::MAX };
        let logits = tokens.chunks(at_once.min(tokens.len().max(1))).flat_map(|tokens| {
            let ids: Vec<i64> = tokens.iter().map(|token| i64::from(*token)).collect();
            let shape = [ids.len()];
            let ids = Tensor::from_data(TensorData::new(ids, shape), &self.x.device());
            let logits = stored_linear_at(self.x.clone(), &self.table.matrix(), ids).into_data();
            self.table.let_go();
            logits.iter::<f32>().collect::<Vec<_>>()
        });
        logits.collect()
    }

    fn all(&self) -> Vec<f32> {
        self.table.logits(self.x.clone()).into_data().iter::<f32>().collect()
    }
}
