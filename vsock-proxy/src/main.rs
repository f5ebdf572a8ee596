//! `vsock-proxy`.
fn main() {}
