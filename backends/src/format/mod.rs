//! Packed ternary weights: the one place that knows where a trit lies.
//!
//! A *trit* is -1, 0 or +1. A row of trits is stored as little-endian `u32` words in one of two codes,
//! chosen per tensor ([`CodeFormat`]):
//!
//! ```text
//! t2: 2 bits a weight. Code = trit + 1, so 0, 1 or 2; 3 is invalid. Blocks of 64 weights, 16 bytes, 4 words.
//!     Byte j of a block (0 <= j < 16) holds the weights j, 16+j, 32+j and 48+j of the block:
//!
//!       bit   7 6     5 4     3 2     1 0
//!           +-------+-------+-------+-------+
//!           | 48+j  | 32+j  | 16+j  |   j   |
//!           +-------+-------+-------+-------+
//!
//!     A 16-byte load, shifted right by 2k bits and masked with 3, is 16 consecutive weights.
//!     The last block of a row is filled up with code 1 (trit 0).
//!
//! t5: 5 trits a byte, 1.6 bits a weight. A row has n = 4 * words bytes. Byte j (0 <= j < n) holds the weights
//!     j, n+j, 2n+j, 3n+j and 4n+j as one number in base 3, the first weight in front:
//!
//!       byte = 81 * c(j) + 27 * c(n+j) + 9 * c(2n+j) + 3 * c(3n+j) + c(4n+j),   c = trit + 1,   byte <= 242
//!
//!     Digit k of 16 neighbouring bytes is 16 consecutive weights. Weights at or past the end of the row are trit 0.
//! ```
//!
//! A tensor of weights is `[matrices, planes, rows, words]`: several matrices (the experts of a layer, or one),
//! each the sum of one or more ternary planes. The value of a weight is
//!
//! ```text
//! w[m, r, i] = sum over planes p of  row_scale[m, p, r] * group_scale[m, p, r, i / group_size] * trit[m, p, r, i]
//! ```
//!
//! with an `f32` for each row and, only where the tensor has groups, a `u8` for each group of `group_size` inputs.
//! So the dot product of a row with int8 activations is an exact integer, times one float. The activations may be rotated
//! before they are rounded ([`Rotation`]); the weights are then those of the rotated input.
//!
//! ```
//! use ternoss_backends::CodeFormat;
//!
//! let trits = [1, 0, -1, 0, 1];
//! let mut words = vec![0; CodeFormat::T2.words_per_row(trits.len())];
//! CodeFormat::T2.pack_row(&trits, &mut words);
//! let mut found = [0; 5];
//! CodeFormat::T2.unpack_row(&words, &mut found).unwrap();
//! assert_eq!(found, trits);
//! ```

mod codes;
mod error;
mod layout;
mod rotation;
mod weight;

pub use codes::CodeFormat;
pub use error::FormatError;
pub use layout::{MAX_IN_FEATURES, TernaryLayout};
pub use rotation::Rotation;
pub use weight::TernaryWeight;
pub(crate) use weight::{check_dtype, check_shape};

/// Weights in a block: group sizes are multiples of it, and t2 rows are padded to whole blocks.
pub const BLOCK: usize = 64;

/// Bytes of one t2 block.
pub const T2_BLOCK_BYTES: usize = BLOCK / 4;
