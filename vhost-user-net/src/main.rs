//! `vhost-user-net`.
fn main() {}
