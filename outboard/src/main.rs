//! `outboard`: the launcher of a pod.
fn main() {}
