//! What the crate promises, checked through its public interface on every backend and instruction set at hand.
#![allow(clippy::unwrap_used, clippy::panic)]

mod attention;
mod cache;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod cube;
mod experts;
mod format;
mod gradients;
mod linear;
mod lookup;
mod mapped;
mod routing;
mod rows;
mod screen;
mod softmax;
mod stored;
mod support;
