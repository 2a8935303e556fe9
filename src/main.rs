//! ternoss.
fn main() {}
