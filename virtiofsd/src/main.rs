//! `virtiofsd`.
fn main() {}
