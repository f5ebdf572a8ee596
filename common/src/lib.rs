//! placeholder

pub mod admin;
pub mod capabilities;
pub mod cli;
pub mod logging;
pub mod metrics;
pub mod rate_limiter;
pub mod sandbox;
