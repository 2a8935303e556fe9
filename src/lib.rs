//! ternoss.
