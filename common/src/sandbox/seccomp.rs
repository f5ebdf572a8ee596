//! The system call filter: what is not on a daemon's list cannot be called.
//!
//! # Theory of operation
//! A daemon names its calls in lists of [`Rule`]s: [`lists::BASE`], which the language's runtime
//! needs, the shared lists for what it uses of this crate, and its own, beside the code that makes
//! the calls. They become one filter that allows these calls and does what [`Mode`] says on others.
//!
//! A few calls are *soft*: the C library makes them of its own accord and does well when they fail.
//! For these another filter answers with an error number. The kernel asks all filters and takes the
//! strictest answer, so the main one lets these calls pass. (Mode `log` does without: it is there to
//! see every call.) `clone3` is always soft, since its
//! flags are behind a pointer where no filter can see them; the C library falls back to `clone`,
//! which is allowed for threads only.
//!
//! Filters cover all threads of the process (TSYNC), and the kernel keeps a bitmap of calls that are
//! allowed whatever their arguments, so those cost next to nothing.

use std::collections::{BTreeMap, BTreeSet};

use clap::ValueEnum;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter_all_threads,
};

use super::{Outcome, StageError};

pub mod lists;

/// What happens on a call that is not on the list.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// The process dies at once (SIGSYS).
    #[default]
    Kill,
    /// The thread gets SIGSYS, which dumps core unless it is handled.
    Trap,
    /// The call is made, and the kernel writes it to the audit log.
    Log,
    /// There is no filter.
    None,
}

impl Mode {
    /// What the filter answers for a call that is not listed; `None` without a filter.
    fn unlisted(self) -> Option<SeccompAction> {
        match self {
            Self::Kill => Some(SeccompAction::KillProcess),
            Self::Trap => Some(SeccompAction::Trap),
            Self::Log => Some(SeccompAction::Log),
            Self::None => None,
        }
    }
}

/// A call that is allowed, always or when all of its conditions hold.
#[derive(Debug, Clone, Copy)]
pub struct Rule {
    number: libc::c_long,
    conditions: &'static [Condition],
}

/// A condition on one argument of a call.
#[derive(Debug, Clone, Copy)]
pub struct Condition {
    argument: u8,
    mask: u64,
    value: u64,
}

/// Allows a call whatever its arguments.
pub const fn allow(number: libc::c_long) -> Rule {
    Rule { number, conditions: &[] }
}

/// Allows a call when all conditions hold. Several such rules for one call are alternatives.
pub const fn allow_if(number: libc::c_long, conditions: &'static [Condition]) -> Rule {
    Rule { number, conditions }
}

/// The lower 32 bits of the argument with this index (from 0) are `value`.
///
/// 32 bits are what the kernel looks at in flags, commands and descriptors.
pub const fn argument_is(argument: u8, value: u32) -> Condition {
    argument_bits(argument, u32::MAX, value)
}

/// The bits of `mask` in the argument with this index (from 0) are `value`.
pub const fn argument_bits(argument: u8, mask: u32, value: u32) -> Condition {
    // `From` is not const yet.
    #[allow(clippy::cast_lossless, reason = "there is no const From")]
    Condition { argument, mask: mask as u64, value: value as u64 }
}

/// All calls a daemon may make.
#[derive(Debug, Clone)]
pub struct Filter {
    rules: Vec<Rule>,
}

impl Filter {
    /// The calls in all these lists.
    pub fn of(lists: &[&[Rule]]) -> Self {
        Self { rules: lists.concat() }
    }

    /// Puts the filter in force for all threads of the process.
    ///
    /// # Errors
    /// [`StageError::FilterBuild`] and [`StageError::FilterInstall`].
    pub fn apply(&self, mode: Mode) -> Result<Outcome, StageError> {
        let Some(unlisted) = mode.unlisted() else {
            return Ok(Outcome::Unavailable("switched off".to_owned()));
        };
        // The soft filters come first: installing one is itself a call the main filter forbids.
        let soft = if mode == Mode::Log { BTreeMap::new() } else { self.soft() };
        for (errno, numbers) in &soft {
            let answer = SeccompAction::Errno(*errno);
            let only = numbers.iter().map(|number| (*number, Vec::new())).collect();
            apply_filter_all_threads(&compile(only, SeccompAction::Allow, answer)?)?;
        }
        let allowed = self.allowed(soft.into_values().flatten())?;
        apply_filter_all_threads(&compile(allowed, unlisted, SeccompAction::Allow)?)?;
        Ok(Outcome::Applied)
    }

    /// The soft calls that this daemon does not list, by the error they give.
    fn soft(&self) -> BTreeMap<u32, Vec<i64>> {
        let mut soft: BTreeMap<u32, Vec<i64>> = BTreeMap::new();
        for (number, errno) in lists::SOFT {
            if !self.rules.iter().any(|rule| rule.number == *number) {
                soft.entry(*errno).or_default().push(*number);
            }
        }
        soft
    }

    /// The rules of the main filter by call; an empty list allows a call without conditions.
    ///
    /// The calls in `soft` pass it, because their own filter answers them.
    fn allowed(
        &self,
        soft: impl Iterator<Item = i64>,
    ) -> Result<BTreeMap<i64, Vec<SeccompRule>>, StageError> {
        let mut allowed: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
        let mut always: BTreeSet<i64> = soft.collect();
        for rule in &self.rules {
            if rule.conditions.is_empty() {
                always.insert(rule.number);
                continue;
            }
            let conditions = rule.conditions.iter().map(|condition| {
                SeccompCondition::new(
                    condition.argument,
                    SeccompCmpArgLen::Dword,
                    SeccompCmpOp::MaskedEq(condition.mask),
                    condition.value,
                )
            });
            let conditions = conditions.collect::<Result<Vec<_>, _>>()?;
            allowed.entry(rule.number).or_default().push(SeccompRule::new(conditions)?);
        }
        allowed.extend(always.into_iter().map(|number| (number, Vec::new())));
        Ok(allowed)
    }
}

fn compile(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    unmatched: SeccompAction,
    matched: SeccompAction,
) -> Result<BpfProgram, StageError> {
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    Ok(SeccompFilter::new(rules, unmatched, matched, arch)?.try_into()?)
}
