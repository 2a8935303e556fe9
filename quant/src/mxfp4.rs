//! MXFP4, the format gpt-oss's experts are published in (OCP Microscaling Formats v1.0, section 5.3).
//!
//! A block is 32 weights: 16 bytes of 4-bit floats (E2M1, low nibble first) and one byte of scale, `2^(scale - 127)`.
//!
//! ```
//! use ternoss_quant::mxfp4::{BLOCK, BLOCK_BYTES, decode};
//!
//! // The codes 2 and 9 in turn, which are 1 and -0.5, times two: the lower half of a byte comes first.
//! let mut weights = [0.0; BLOCK];
//! decode(&[0x92; BLOCK_BYTES], &[128], &mut weights).unwrap();
//! assert_eq!(weights[..4], [2.0, -1.0, 2.0, -1.0]);
//! ```

/// Weights per block.
pub const BLOCK: usize = 32;

/// Bytes of codes per block.
pub const BLOCK_BYTES: usize = BLOCK / 2;

/// The sixteen E2M1 values in code order.
pub const VALUES: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// A block count that does not fit its scales or its output.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("MXFP4: {scales} scales need {} bytes of blocks and {} weights, found {blocks} and {weights}",
        scales * BLOCK_BYTES, scales * BLOCK)]
pub struct BlockMismatch {
    /// Bytes of codes given.
    pub blocks: usize,
    /// Scales given.
    pub scales: usize,
    /// Weights asked for.
    pub weights: usize,
}

/// `2^(scale - 127)`, exact down to the subnormal 2^-127; 255 gives infinity as in the reference implementation.
fn scale_value(scale: u8) -> f32 {
    match scale {
        0 => f32::from_bits(0x0040_0000),
        _ => f32::from_bits(u32::from(scale) << 23),
    }
}

/// Decodes `scales.len()` blocks into `weights`.
///
/// Equal bit for bit to `convert_moe_packed_tensors` of Hugging Face transformers before its transposition; values
/// past the range of f32 (scale 254 with codes 4 and 6) come out as infinity.
///
/// # Errors
/// [`BlockMismatch`] when `blocks` is not 16 bytes or `weights` not 32 floats a scale.
pub fn decode(blocks: &[u8], scales: &[u8], weights: &mut [f32]) -> Result<(), BlockMismatch> {
    if blocks.len() != scales.len() * BLOCK_BYTES || weights.len() != scales.len() * BLOCK {
        return Err(BlockMismatch { blocks: blocks.len(), scales: scales.len(), weights: weights.len() });
    }
    let blocks = blocks.chunks_exact(BLOCK_BYTES);
    for ((codes, scale), out) in blocks.zip(scales).zip(weights.chunks_exact_mut(BLOCK)) {
        let scale = scale_value(*scale);
        let table = VALUES.map(|value| value * scale);
        for (byte, pair) in codes.iter().zip(out.chunks_exact_mut(2)) {
            pair[0] = table[usize::from(byte & 15)];
            pair[1] = table[usize::from(byte >> 4)];
        }
    }
    Ok(())
}
