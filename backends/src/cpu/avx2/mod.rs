//! x86-64 with AVX2, FMA and F16C.
#![allow(unsafe_code)]

mod lookup;
mod product;
mod screen;
mod stored;
mod t5;
mod ternary;

pub(super) use lookup::lookup_totals;
pub(super) use product::add_product;
pub(super) use screen::{last_totals, screen_totals};
pub(super) use stored::stored_dots;
pub(super) use t5::t5_to_t2;
pub(super) use ternary::t2_totals;

super::shared::shared_arithmetic!("avx2,fma,f16c");
