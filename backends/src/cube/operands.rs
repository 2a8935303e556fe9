//! What products are made of, as kernels take it: tokens, or choices of experts, weights, and what is added to them.

use burn::tensor::DType;
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{
    buffer::{Rows, room},
    tokens::{Tokens, level_words},
    weight::{PackedLaunch, packed},
};
use crate::format::{TernaryLayout, TernaryWeight};

/// Four neighbouring words, which a unit reads at once: by CUDA, and unchecked.
pub(super) type Quad = Vector<u32, Const<4>>;

/// The words of an array, four at a time: one that [begins](super::buffer::begins_even) where they can be read.
#[cube]
pub(super) fn quads(words: &Array<u32>) -> Slice<Quad, ReadOnly> {
    words.to_slice().into_vectorized().with_vector_size::<Const<4>>()
}

/// Choices of a tile, where there are many.
pub(super) const TILE: u32 = 64;

/// Which matrix each token is multiplied with.
#[derive(Clone)]
pub(super) enum Matrices<R: CubeRuntime> {
    /// The same for all.
    One(usize),
    /// Every token goes through several: see [`Routes`].
    Routed(Routes<R>),
}

/// Tokens and their matrices. A choice is a token and one of its matrices.
#[derive(Clone)]
pub(super) struct Routes<R: CubeRuntime> {
    /// `[choices]`: matrices.
    pub(super) chosen: CubeTensor<R>,
    /// Choices an input takes part in: as many as a token has, or 1 where every choice has an input of its own.
    pub(super) per_input: usize,
    /// Choices in the order of their matrices.
    pub(super) plan: Option<Plan<R>>,
}

/// Tiles of choices that share a matrix.
#[derive(Clone)]
pub(super) struct Plan<R: CubeRuntime> {
    /// `[choices]`
    pub(super) order: CubeTensor<R>,
    /// `[tiles, 3]`: matrix, first of its choices in `order`, and past the last one.
    pub(super) tiles: CubeTensor<R>,
    pub(super) count: usize,
    /// Choices of a tile at most.
    pub(super) tile: u32,
}

/// What is added to products.
#[derive(CubeLaunch, CubeType)]
pub(super) struct Addends {
    bias: Array<f32>,
    /// `[choices, rows]`
    residual: Array<f32>,
    bias_pitch: u32,
    #[cube(comptime)]
    biased: bool,
    #[cube(comptime)]
    onto: bool,
}

#[cube]
impl Addends {
    /// What the product of a choice with a row begins with.
    pub(super) fn sum(&self, matrix: u32, choice: u32, row: u32, rows: u32) -> f32 {
        let mut sum = f32::new(0.0);
        if comptime!(self.biased) {
            sum += self.bias[(matrix * self.bias_pitch + row) as usize];
        }
        if comptime!(self.onto) {
            sum += self.residual[(choice * rows + row) as usize];
        }
        sum
    }
}

/// What weights are multiplied with.
#[derive(CubeLaunch, CubeType)]
pub(super) struct Operands {
    pub(super) levels: Array<u32>,
    scales: Array<f32>,
    /// Of each choice its matrix.
    chosen: Array<i32>,
    /// See [`Plan`].
    order: Array<u32>,
    /// See [`Plan`].
    tiles: Array<i32>,
    /// Words of a token.
    pub(super) level_words: u32,
    matrix: u32,
    pub(super) choices: u32,
    #[cube(comptime)]
    per_input: u32,
    #[cube(comptime)]
    pub(super) routed: bool,
    /// Whether there is a [`Plan`].
    #[cube(comptime)]
    pub(super) planned: bool,
}

#[cube]
impl Operands {
    /// The matrix of a choice.
    pub(super) fn matrix_of(&self, choice: u32) -> u32 {
        let mut matrix = self.matrix;
        if comptime!(self.routed) {
            matrix = u32::cast_from(self.chosen[choice as usize]);
        }
        matrix
    }

    /// A tile's matrix, which is none past the last one, the first of its choices and the end of them.
    pub(super) fn tile(&self, number: u32) -> (i32, u32, u32) {
        let mut matrix = i32::cast_from(self.matrix);
        let (mut start, mut end) = (number * TILE, min(number * TILE + TILE, self.choices));
        if comptime!(self.planned) {
            let tile = (3 * number) as usize;
            matrix = self.tiles[tile];
            start = u32::cast_from(self.tiles[tile + 1]);
            end = u32::cast_from(self.tiles[tile + 2]);
        }
        (matrix, start, end)
    }

    /// A choice by its place in the order.
    pub(super) fn choice_at(&self, place: u32) -> u32 {
        let mut choice = place;
        if comptime!(self.planned) {
            choice = self.order[place as usize];
        }
        choice
    }

    /// The token of a choice.
    pub(super) fn input_of(&self, choice: u32) -> u32 {
        if comptime!(self.routed) { choice / comptime!(self.per_input) } else { choice }
    }

    /// Four words of the tokens.
    pub(super) fn level_quad(&self, quad: u32) -> Quad {
        quads(&self.levels)[quad as usize]
    }

    /// What the levels of a token are multiplied with.
    pub(super) fn scale(&self, input: u32) -> f32 {
        self.scales[input as usize]
    }
}

/// A weight and what is added to its products.
pub(super) struct Term<'a, R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement> {
    pub(super) weight: &'a TernaryWeight<CubeBackend<R, F, I, BT>>,
    /// `[matrices, rows]`
    pub(super) bias: Option<Rows<R>>,
    /// `[choices, rows]`
    pub(super) residual: Option<CubeTensor<R>>,
}

impl<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement> Term<'_, R, F, I, BT> {
    /// The kernels' view of it, and room for the products of so many choices. What is not there is not looked at.
    pub(super) fn launch(self, x: &Tokens<R>, choices: usize) -> (PackedLaunch<R>, AddendsLaunch<R>, CubeTensor<R>) {
        let TernaryLayout { rows, .. } = self.weight.layout;
        // Kernels do not check.
        assert_eq!(x.words, level_words(&self.weight.layout), "words of a token and of a weight");
        let residual_fits = |residual: &CubeTensor<R>| residual.meta.num_elements() == choices * rows;
        assert!(self.residual.as_ref().is_none_or(residual_fits), "size of the residual");
        let (biased, onto) = (self.bias.is_some(), self.residual.is_some());
        let (bias, pitch) = self.bias.map_or_else(|| (x.scales.clone(), 0), |bias| (bias.array, bias.pitch));
        let residual = self.residual.unwrap_or_else(|| x.scales.clone());
        let addends = AddendsLaunch::new(bias.into_array_arg(), residual.into_array_arg(), pitch as u32, biased, onto);
        (packed(self.weight), addends, room(&x.levels, [choices, rows], DType::F32))
    }
}

impl<R: CubeRuntime> Tokens<R> {
    /// The kernels' view of tokens, or of choices, without those of [`Routes`] where all take the same matrix.
    pub(super) fn operands(&self, matrix: usize, routes: Option<&Routes<R>>) -> OperandsLaunch<R> {
        let none = || self.levels.clone();
        let chosen = routes.map_or_else(none, |routes| routes.chosen.clone());
        let plan = routes.and_then(|routes| routes.plan.as_ref());
        OperandsLaunch::new(
            self.levels.clone().into_array_arg(),
            self.scales.clone().into_array_arg(),
            chosen.into_array_arg(),
            plan.map_or_else(none, |plan| plan.order.clone()).into_array_arg(),
            plan.map_or_else(none, |plan| plan.tiles.clone()).into_array_arg(),
            self.words as u32,
            matrix as u32,
            self.choices(routes) as u32,
            routes.map_or(1, |routes| routes.per_input) as u32,
            routes.is_some(),
            plan.is_some(),
        )
    }

    /// How many products with a row there are.
    pub(super) fn choices(&self, routes: Option<&Routes<R>>) -> usize {
        routes.map_or(self.count, |routes| routes.chosen.meta.num_elements())
    }
}
