use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::{BLOCK, FormatError};

/// How the trits of a row are written into `u32` words. See the [module](super) for the drawn layouts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CodeFormat {
    /// 2 bits a weight, in blocks of 64: used in place by the kernels.
    T2,
    /// 5 weights a byte, 1.6 bits a weight: smaller, slower to multiply with on most processors.
    T5,
}

/// A word of t2 codes that are all trit 0.
const T2_ZEROS: u32 = 0x5555_5555;
/// Words of one t2 block.
const T2_BLOCK_WORDS: usize = BLOCK / 16;
/// Trits in a t5 byte.
const T5_DIGITS: usize = 5;
/// The least t5 byte that stands for nothing: 3 to the 5th.
const T5_END: u8 = 243;

impl CodeFormat {
    /// Both formats.
    pub const ALL: [Self; 2] = [Self::T2, Self::T5];

    /// Words that one row of `in_features` weights takes, padding included.
    #[must_use]
    pub const fn words_per_row(self, in_features: usize) -> usize {
        match self {
            Self::T2 => in_features.div_ceil(BLOCK) * T2_BLOCK_WORDS,
            Self::T5 => in_features.div_ceil(T5_DIGITS).div_ceil(4),
        }
    }

    /// Weights that a word has codes for.
    #[must_use]
    pub const fn weights_per_word(self) -> usize {
        match self {
            Self::T2 => BLOCK / T2_BLOCK_WORDS,
            Self::T5 => 4 * T5_DIGITS,
        }
    }

    /// Writes one row of trits (each -1, 0 or +1; other values are clamped into that range) as codes.
    ///
    /// # Panics
    /// If `words` is not exactly [`words_per_row`](Self::words_per_row) of `trits.len()` long.
    pub fn pack_row(self, trits: &[i8], words: &mut [u32]) {
        assert_eq!(words.len(), self.words_per_row(trits.len()), "words of a packed row");
        match self {
            Self::T2 => pack_t2(trits, words),
            Self::T5 => pack_t5(trits, words),
        }
    }

    /// Reads one row of `trits.len()` weights back.
    ///
    /// # Errors
    /// [`FormatError::Length`] for a wrong number of words, [`FormatError::InvalidCode`] for a t2 code of 3, a t5 byte
    /// of 243 or more, or padding that is not trit 0. `trits` holds no meaning then.
    pub fn unpack_row(self, words: &[u32], trits: &mut [i8]) -> Result<(), FormatError> {
        check_words(words, self.words_per_row(trits.len()))?;
        self.validate_row(words, trits.len(), 0)?;
        match self {
            Self::T2 => unpack_t2(words, trits),
            Self::T5 => unpack_t5(words, trits),
        }
        Ok(())
    }

    /// Checks every code of any number of whole rows of `in_features` weights, without unpacking them.
    ///
    /// # Errors
    /// As [`unpack_row`](Self::unpack_row), with the row that is wrong.
    pub fn validate_rows(self, words: &[u32], in_features: usize) -> Result<(), FormatError> {
        let per_row = self.words_per_row(in_features);
        if per_row == 0 {
            return check_words(words, 0);
        }
        check_words(words, words.len() / per_row * per_row)?;
        words.chunks_exact(per_row).enumerate().try_for_each(|(row, words)| self.validate_row(words, in_features, row))
    }

    fn validate_row(self, words: &[u32], in_features: usize, row: usize) -> Result<(), FormatError> {
        let valid = match self {
            Self::T2 => |word: u32| word & (word >> 1) & T2_ZEROS == 0,
            Self::T5 => |word: u32| word.to_le_bytes().iter().all(|&byte| byte < T5_END),
        };
        let padding = |word: usize| match self {
            Self::T2 => t2_padding_is_zero(word, words[word], in_features),
            Self::T5 => t5_padding_is_zero(word, words[word], words.len() * 4, in_features),
        };
        // Padding can only lie in the last t2 block; in a t5 row it lies in the last digits of the last bytes.
        let first_padded = match self {
            Self::T2 => in_features / BLOCK * T2_BLOCK_WORDS,
            Self::T5 => words.len().saturating_sub(words.len() * 20 - in_features),
        };
        let wrong = (0..words.len()).find(|&word| !valid(words[word]) || word >= first_padded && !padding(word));
        match wrong {
            None => Ok(()),
            Some(word) => Err(FormatError::InvalidCode { format: self, row, word, value: words[word] }),
        }
    }
}

fn check_words(words: &[u32], expected: usize) -> Result<(), FormatError> {
    if words.len() == expected {
        Ok(())
    } else {
        Err(FormatError::Length { what: "words of packed rows", expected, found: words.len() })
    }
}

fn code(trit: i8) -> u8 {
    (trit.clamp(-1, 1) + 1) as u8
}

fn pack_t2(trits: &[i8], words: &mut [u32]) {
    let mut blocks = words.chunks_exact_mut(T2_BLOCK_WORDS);
    let mut whole = trits.chunks_exact(BLOCK);
    for (block, out) in whole.by_ref().zip(blocks.by_ref()) {
        pack_t2_block(block, out);
    }
    if let Some(out) = blocks.next() {
        let mut block = [0i8; BLOCK];
        block[..whole.remainder().len()].copy_from_slice(whole.remainder());
        pack_t2_block(&block, out);
    }
}

fn pack_t2_block(trits: &[i8], words: &mut [u32]) {
    let mut bytes = [0u8; BLOCK / 4];
    for (j, byte) in bytes.iter_mut().enumerate() {
        *byte = code(trits[j]) | code(trits[16 + j]) << 2 | code(trits[32 + j]) << 4 | code(trits[48 + j]) << 6;
    }
    for (word, four) in words.iter_mut().zip(bytes.chunks_exact(4)) {
        *word = u32::from_le_bytes([four[0], four[1], four[2], four[3]]);
    }
}

fn unpack_t2(words: &[u32], trits: &mut [i8]) {
    for (block, out) in words.chunks_exact(T2_BLOCK_WORDS).zip(trits.chunks_mut(BLOCK)) {
        let mut all = [0i8; BLOCK];
        for (w, &word) in block.iter().enumerate() {
            for (b, byte) in word.to_le_bytes().into_iter().enumerate() {
                for k in 0..4 {
                    all[16 * k + 4 * w + b] = ((byte >> (2 * k)) & 3) as i8 - 1;
                }
            }
        }
        out.copy_from_slice(&all[..out.len()]);
    }
}

fn t2_padding_is_zero(word: usize, value: u32, in_features: usize) -> bool {
    let first = word / T2_BLOCK_WORDS * BLOCK + word % T2_BLOCK_WORDS * 4;
    (0..16).all(|n| first + 16 * (n % 4) + n / 4 < in_features || (value >> (n / 4 * 8 + n % 4 * 2)) & 3 == 1)
}

fn pack_t5(trits: &[i8], words: &mut [u32]) {
    let bytes = words.len() * 4;
    let digit = |i: usize| trits.get(i).map_or(1, |&trit| code(trit));
    for (w, word) in words.iter_mut().enumerate() {
        let byte = |b: usize| (0..T5_DIGITS).fold(0, |byte, k| byte * 3 + digit(k * bytes + 4 * w + b));
        *word = u32::from_le_bytes([byte(0), byte(1), byte(2), byte(3)]);
    }
}

fn unpack_t5(words: &[u32], trits: &mut [i8]) {
    let bytes = words.len() * 4;
    for (k, run) in trits.chunks_mut(bytes.max(1)).enumerate() {
        let power = [81, 27, 9, 3, 1][k];
        for (j, trit) in run.iter_mut().enumerate() {
            let byte = words[j / 4].to_le_bytes()[j % 4];
            *trit = (byte / power % 3) as i8 - 1;
        }
    }
}

fn t5_padding_is_zero(word: usize, value: u32, bytes: usize, in_features: usize) -> bool {
    let powers = [81, 27, 9, 3, 1];
    value.to_le_bytes().iter().enumerate().all(|(b, byte)| {
        let used = |k: usize| k * bytes + 4 * word + b < in_features;
        powers.iter().enumerate().all(|(k, power)| used(k) || byte / power % 3 == 1)
    })
}

impl fmt::Display for CodeFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::T2 => "t2",
            Self::T5 => "t5",
        })
    }
}

impl FromStr for CodeFormat {
    type Err = FormatError;

    fn from_str(name: &str) -> Result<Self, FormatError> {
        let unknown = || FormatError::Unknown { name: name.into(), known: "t2, t5" };
        Self::ALL.into_iter().find(|format| format.to_string() == name).ok_or_else(unknown)
    }
}
