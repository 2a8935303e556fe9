use super::CodeFormat;

/// What can be wrong with packed weights or with the tensors that carry them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// A code that stands for no trit, or padding that is not zero.
    #[error("row {row}: word {word} ({value:#010x}) is not a valid {format} code")]
    InvalidCode {
        /// The code the words are said to be in.
        format: CodeFormat,
        /// Row in the slice that was checked.
        row: usize,
        /// Word in that row.
        word: usize,
        /// The word itself.
        value: u32,
    },
    /// A slice of the wrong length.
    #[error("{what}: expected {expected} elements, found {found}")]
    Length {
        /// What the slice holds.
        what: &'static str,
        /// Elements it must have.
        expected: usize,
        /// Elements it has.
        found: usize,
    },
    /// A tensor of the wrong shape.
    #[error("{tensor}: expected shape {expected:?}, found {found:?}")]
    Shape {
        /// The tensor's name.
        tensor: &'static str,
        /// Shape it must have.
        expected: Vec<usize>,
        /// Shape it has.
        found: Vec<usize>,
    },
    /// A tensor of the wrong element type.
    #[error("{tensor}: expected elements of type {expected}, found {found}")]
    ElementType {
        /// The tensor's name.
        tensor: &'static str,
        /// Type its elements must have.
        expected: &'static str,
        /// Type they have.
        found: &'static str,
    },
    /// Group scales are there but the layout has no groups, or the other way round.
    #[error("group scales are {found}, but the layout has {groups} groups a row")]
    GroupScales {
        /// "given" or "missing".
        found: &'static str,
        /// Groups a row of the layout.
        groups: usize,
    },
    /// A size that must be at least one is zero.
    #[error("{what} must be at least 1")]
    Empty {
        /// The size's name.
        what: &'static str,
    },
    /// A group size that is not a positive multiple of [`BLOCK`](super::BLOCK).
    #[error("a group of {group_size} inputs: group sizes are positive multiples of 64")]
    GroupSize {
        /// The offending size.
        group_size: usize,
    },
    /// A row too long for exact 32-bit sums.
    #[error("{in_features} inputs a row: at most {limit} keep the integer sums exact in 32 bits")]
    TooWide {
        /// Inputs a row.
        in_features: usize,
        /// The most allowed.
        limit: usize,
    },
    /// Sizes whose product does not fit this machine's address space.
    #[error("a tensor of these sizes does not fit in memory: {layout}")]
    TooLarge {
        /// The sizes, as text.
        layout: String,
    },
    /// A stored row that is not a whole number of 32-bit words.
    #[error("rows of {columns} elements of {element_bytes} bytes are not whole 32-bit words")]
    RaggedRow {
        /// Elements a row.
        columns: usize,
        /// Bytes an element.
        element_bytes: usize,
    },
    /// The name of a format this version does not know.
    #[error("unknown format {name:?}: expected one of {known}")]
    Unknown {
        /// The name found.
        name: String,
        /// The names known.
        known: &'static str,
    },
}
