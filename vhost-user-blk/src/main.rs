//! `vhost-user-blk`.
fn main() {}
