//! Text to tokens and back, by the model's own `tokenizer.json`.
//!
//! ```
//! use ternoss_model::tokenizer::Tokenizer;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let tokenizer = Tokenizer::from_folder("../examples/tiny-gpt-oss".as_ref())?;
//! let tokens = tokenizer.encode("She was quite surprised", false)?;
//! assert_eq!(tokenizer.decode(&tokens, true)?, "She was quite surprised");
//! # Ok(()) }
//! ```

use std::path::{Path, PathBuf};

/// A tokenizer that cannot be read, or text or tokens it cannot take.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The file is not there or not readable.
    #[error("{}: {source}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is no tokenizer.
    #[error("{}: not a tokenizer.json: {message}", path.display())]
    Parse {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// A text cannot be encoded.
    #[error("the text cannot be tokenized: {0}")]
    Encode(String),
    /// A token is unknown.
    #[error("token {token} is not in the tokenizer's vocabulary of {vocab_size}")]
    UnknownToken {
        /// The token.
        token: u32,
        /// Tokens the tokenizer knows.
        vocab_size: usize,
    },
    /// Tokens cannot be decoded.
    #[error("the tokens cannot be decoded: {0}")]
    Decode(String),
}

/// File name in a model folder.
const TOKENIZER_FILE: &str = "tokenizer.json";

/// A model's tokenizer.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
}

impl Tokenizer {
    /// Reads the `tokenizer.json` of a model folder.
    ///
    /// # Errors
    /// [`TokenizerError::Read`] or [`TokenizerError::Parse`]
    pub fn from_folder(folder: &Path) -> Result<Self, TokenizerError> {
        Self::from_file(&folder.join(TOKENIZER_FILE))
    }

    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// [`TokenizerError::Read`] or [`TokenizerError::Parse`]
    pub fn from_file(path: &Path) -> Result<Self, TokenizerError> {
        let contents = std::fs::read(path).map_err(|source| TokenizerError::Read { path: path.into(), source })?;
        let inner = tokenizers::Tokenizer::from_bytes(contents)
            .map_err(|error| TokenizerError::Parse { path: path.into(), message: error.to_string() })?;
        Ok(Self { inner })
    }

    /// Tokens of a text. `add_special_tokens` lets the tokenizer add what its file says, such as a first token.
    ///
    /// # Errors
    /// [`TokenizerError::Encode`]
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.inner.encode_fast(text, add_special_tokens);
        let encoding = encoding.map_err(|error| TokenizerError::Encode(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Tokens of a text in which the names of special tokens, such as `<|end|>`, are text like any other.
    ///
    /// # Errors
    /// [`TokenizerError::Encode`]
    pub fn encode_ordinary(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let added = self.inner.get_added_vocabulary().get_added_tokens_decoder();
        if !added.values().any(|token| token.special && text.contains(&token.content)) {
            return self.encode(text, false);
        }
        // Rare enough for a copy, which takes a while.
        let mut ordinary = self.clone();
        ordinary.inner.set_encode_special_tokens(true);
        ordinary.encode(text, false)
    }

    /// Text of tokens; bytes that form no character come out as U+FFFD.
    ///
    /// # Errors
    /// [`TokenizerError::UnknownToken`] or [`TokenizerError::Decode`]
    pub fn decode(&self, tokens: &[u32], skip_special_tokens: bool) -> Result<String, TokenizerError> {
        self.check(tokens)?;
        self.inner.decode(tokens, skip_special_tokens).map_err(|error| TokenizerError::Decode(error.to_string()))
    }

    /// Tokens the tokenizer knows, special ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The id of a token such as `<|return|>`.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Starts decoding token by token, special tokens left out.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream { tokenizer: self, pending: Vec::new(), context: Vec::new() }
    }

    fn check(&self, tokens: &[u32]) -> Result<(), TokenizerError> {
        match tokens.iter().find(|token| self.inner.id_to_token(**token).is_none()) {
            None => Ok(()),
            Some(token) => Err(TokenizerError::UnknownToken { token: *token, vocab_size: self.vocab_size() }),
        }
    }
}

/// Text from tokens as they come, cut only between whole characters.
///
/// All pieces together are what [`Tokenizer::decode`] makes of all tokens.
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    /// Tokens whose text is not out yet.
    pending: Vec<u32>,
    /// The tokens before them, whose text is out: decoders may treat the first token of a text differently.
    context: Vec<u32>,
}

impl TextStream<'_> {
    /// Takes the next token and returns the text that became complete, if any.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, token: u32) -> Result<Option<String>, TokenizerError> {
        self.tokenizer.check(&[token])?;
        self.pending.push(token);
        let text = self.pending_text()?;
        // A character that is still incomplete decodes to U+FFFD for now.
        if text.is_empty() || text.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(None);
        }
        self.context = std::mem::take(&mut self.pending);
        Ok(Some(text))
    }

    /// The text of a last, incomplete character.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(self) -> Result<Option<String>, TokenizerError> {
        let text = self.pending_text()?;
        Ok(Some(text).filter(|text| !text.is_empty()))
    }

    fn pending_text(&self) -> Result<String, TokenizerError> {
        let before = self.tokenizer.decode(&self.context, true)?;
        let all = self.tokenizer.decode(&[self.context.as_slice(), &self.pending].concat(), true)?;
        Ok(all.get(before.len()..).unwrap_or_default().to_string())
    }
}
