//! wip
use clap::ValueEnum;
/// wip
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// The process dies (SIGSYS).
    #[default]
    Kill,
    /// The thread gets SIGSYS, which dumps core.
    Trap,
    /// The call is done and written to the audit log.
    Log,
    /// There is no filter.
    None,
}
