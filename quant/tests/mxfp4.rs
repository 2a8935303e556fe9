//! MXFP4 decoding equals the reference implementation bit for bit.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use proptest::prelude::*;
use safetensors::SafeTensors;
use ternoss_quant::mxfp4;

fn golden(part: &str) {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/mxfp4-golden.safetensors");
    let contents = std::fs::read(file).unwrap();
    let tensors = SafeTensors::deserialize(&contents).unwrap();
    let bytes = |name: &str| tensors.tensor(&format!("{part}.{name}")).unwrap().data().to_vec();
    let expected: Vec<u32> =
        bytes("values").chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect();
    let mut found = vec![0f32; expected.len()];
    mxfp4::decode(&bytes("blocks"), &bytes("scales"), &mut found).unwrap();
    let found: Vec<u32> = found.into_iter().map(f32::to_bits).collect();
    assert_eq!(found, expected);
}

#[test]
fn every_code_at_many_scales() {
    golden("all_codes");
}

#[test]
fn random_blocks() {
    golden("random");
}

#[test]
fn edge_scales_down_to_subnormals_and_up_to_infinity() {
    golden("edge");
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    let error = mxfp4::decode(&[0; 16], &[127; 2], &mut [0.0; 64]).unwrap_err();
    assert_eq!(error.to_string(), "MXFP4: 2 scales need 32 bytes of blocks and 64 weights, found 16 and 64");
    assert!(mxfp4::decode(&[0; 16], &[127], &mut [0.0; 31]).is_err());
}

proptest! {
    #[test]
    fn a_weight_is_its_code_times_two_to_the_scale(code in 0u8..16, scale in 0u8..=254, at in 0usize..32) {
        let mut blocks = [0u8; 16];
        blocks[at / 2] = code << (4 * (at % 2));
        let mut weights = [0f32; 32];
        mxfp4::decode(&blocks, &[scale], &mut weights).unwrap();
        let exact = f64::from(mxfp4::VALUES[usize::from(code)]) * 2f64.powi(i32::from(scale) - 127);
        prop_assert_eq!(weights[at], exact as f32);
    }
}
