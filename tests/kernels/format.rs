use proptest::prelude::*;
use ternoss::backends::{CodeFormat, FormatError, TernaryLayout, format::MAX_IN_FEATURES};

use crate::support::{Noise, any_format, layout};

fn pack(format: CodeFormat, trits: &[i8]) -> Vec<u32> {
    let mut words = vec![0xdead_beef; format.words_per_row(trits.len())];
    format.pack_row(trits, &mut words);
    words
}

proptest! {
    #[test]
    fn packing_and_unpacking_gives_the_same_trits(format in any_format(), n in 0..700usize, seed: u64) {
        let trits = Noise::new(seed).trits(n);
        let words = pack(format, &trits);
        let mut back = vec![9; n];
        prop_assert_eq!(format.unpack_row(&words, &mut back), Ok(()));
        prop_assert_eq!(&back, &trits);
        prop_assert_eq!(format.validate_rows(&words, n), Ok(()));
    }

    #[test]
    fn whatever_is_accepted_packs_to_the_same_words(format in any_format(), n in 1..130usize, word: u32, at: prop::sample::Index) {
        let mut words = pack(format, &vec![0; n]);
        let at = at.index(words.len());
        words[at] = word;
        let mut trits = vec![0; n];
        let valid = format.unpack_row(&words, &mut trits).is_ok();
        prop_assert_eq!(valid, format.validate_rows(&words, n).is_ok());
        prop_assert_eq!(valid, pack(format, &trits) == words);
    }
}

#[test]
fn rows_have_the_documented_sizes() {
    let sizes = [(1, 4, 1), (63, 4, 4), (64, 4, 4), (65, 8, 4), (2880, 180, 144), (4096, 256, 205)];
    for (n, t2, t5) in sizes {
        assert_eq!(CodeFormat::T2.words_per_row(n), t2, "t2 row of {n}");
        assert_eq!(CodeFormat::T5.words_per_row(n), t5, "t5 row of {n}");
        for format in CodeFormat::ALL {
            let trits = Noise::new(n as u64).trits(n);
            let mut back = vec![0; n];
            format.unpack_row(&pack(format, &trits), &mut back).unwrap();
            assert_eq!(back, trits, "{format} row of {n}");
        }
    }
}

#[test]
fn bits_lie_where_the_drawing_says() {
    let mut trits = [0i8; 64];
    (trits[5], trits[16 + 5], trits[32 + 5], trits[48 + 5]) = (1, -1, 0, 1);
    let bytes: Vec<u8> = pack(CodeFormat::T2, &trits).iter().flat_map(|word| word.to_le_bytes()).collect();
    assert_eq!(bytes[5], 0b10_01_00_10);
    assert!(bytes.iter().enumerate().all(|(j, byte)| j == 5 || *byte == 0b01_01_01_01));

    // 40 weights: 8 bytes, byte 3 holds weights 3, 11, 19, 27, 35.
    let mut trits = [0i8; 40];
    (trits[3], trits[11], trits[19], trits[27], trits[35]) = (1, 0, -1, 1, -1);
    let bytes: Vec<u8> = pack(CodeFormat::T5, &trits).iter().flat_map(|word| word.to_le_bytes()).collect();
    assert_eq!(bytes[3], 2 * 81 + 27 + 2 * 3);
    assert!(bytes.iter().enumerate().all(|(j, byte)| j == 3 || *byte == 121));
}

#[test]
fn invalid_codes_and_padding_are_refused_with_their_place() {
    for (format, n, at, word) in [
        (CodeFormat::T2, 64, 2, 0x5555_5575), // a code of 3
        (CodeFormat::T2, 63, 3, 0x9555_5555), // weight 63 does not exist
        (CodeFormat::T5, 40, 1, 0x7979_79f3), // a byte of 243
        (CodeFormat::T5, 39, 1, 0x7a79_7979), // weight 39 does not exist
    ] {
        let mut words = pack(format, &vec![0; n]);
        words[at] = word;
        let rows = [pack(format, &vec![0; n]), words.clone()].concat();
        let error = FormatError::InvalidCode { format, row: 1, word: at, value: word };
        assert_eq!(format.validate_rows(&rows, n), Err(error));
        assert!(format.unpack_row(&words, &mut vec![0; n]).is_err());
    }
    assert!(matches!(CodeFormat::T2.unpack_row(&[0; 3], &mut [0; 64]), Err(FormatError::Length { .. })));
    assert!(matches!(CodeFormat::T2.validate_rows(&[0; 7], 64), Err(FormatError::Length { .. })));
}

#[test]
fn names_are_read_back() {
    for format in CodeFormat::ALL {
        assert_eq!(format.to_string().parse(), Ok(format));
    }
    assert!("t4".parse::<CodeFormat>().is_err());
}

#[test]
fn layouts_count_their_bytes() {
    let row_scales = TernaryLayout { matrices: 32, ..layout(CodeFormat::T2, 5760, 2880) };
    assert_eq!(row_scales.codes_shape(), [32, 1, 5760, 180]);
    assert_eq!(row_scales.groups(), 0);
    assert_eq!(row_scales.bytes(), 32 * 5760 * 724);
    let groups = TernaryLayout { group_size: Some(64), ..row_scales };
    assert_eq!(groups.group_scales_shape(), [32, 1, 5760, 45]);
    assert!((groups.bits_per_weight() - 2.136).abs() < 1e-3);
    let small = TernaryLayout { format: CodeFormat::T5, ..groups };
    assert!((small.bits_per_weight() - 1.736).abs() < 1e-3);
    let planes = TernaryLayout { planes: 2, ..groups };
    assert_eq!(planes.weights(), groups.weights());
    assert!((planes.bits_per_weight() - 2.0 * groups.bits_per_weight()).abs() < 1e-9);
}

#[test]
fn impossible_layouts_are_refused() {
    let good = layout(CodeFormat::T2, 4, 64);
    assert_eq!(good.validate(), Ok(()));
    assert!(matches!(TernaryLayout { rows: 0, ..good }.validate(), Err(FormatError::Empty { what: "rows" })));
    for group_size in [0, 32, 65] {
        let layout = TernaryLayout { group_size: Some(group_size), ..good };
        assert_eq!(layout.validate(), Err(FormatError::GroupSize { group_size }));
    }
    let wide = TernaryLayout { in_features: MAX_IN_FEATURES + 1, ..good };
    assert!(matches!(wide.validate(), Err(FormatError::TooWide { .. })));
    let huge = TernaryLayout { rows: usize::MAX / 64, ..good };
    assert!(matches!(huge.validate(), Err(FormatError::TooLarge { .. })));
}
