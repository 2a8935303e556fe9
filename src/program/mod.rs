//! The `ternoss` program: one subcommand a file, under `commands`.
//!
//! It is a part of the library, and `main.rs` three lines: so a test that runs a model on a backend finds the model compiled
//! for that backend here, and need not do it again. The library's own tests are built without it, but for what they test.

mod byte_size;

#[cfg(not(test))]
#[macro_use]
mod backend;
#[cfg(not(test))]
mod commands;
#[cfg(not(test))]
mod error;
#[cfg(not(test))]
mod progress;
#[cfg(not(test))]
mod run;

#[cfg(not(test))]
pub use run::run;
