//! The DAX window without a VMM: a front end that maps as QEMU does, or plainly as crosvm does, and a
//! guest that does what no kernel would. Whatever happens, what the window shows is what the file has.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

mod histories;
mod hostile;
mod orders;
mod restart;
mod share;
mod sharing;
mod traps;
