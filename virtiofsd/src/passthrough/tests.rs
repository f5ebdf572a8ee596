//! Tests of the passthrough against real directories, one module a promise.

mod escape;
mod families;
mod first_use;
mod harness;
mod ids;
mod property;
mod state;
