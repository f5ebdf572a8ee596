//! The death of the process before a given store, for crash tests: every store to a ring or to the
//! inflight record counts, and the chosen one unwinds instead.

use std::cell::Cell;

thread_local! {
    /// Stores until the crash.
    static LEFT: Cell<u64> = const { Cell::new(u64::MAX) };
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

/// What a crash unwinds with.
pub(super) struct Crash;

/// Called before each store.
pub(super) fn before_store() {
    COUNT.set(COUNT.get() + 1);
    let left = LEFT.get();
    LEFT.set(left.saturating_sub(1));
    if left == 0 {
        LEFT.set(u64::MAX);
        // No panic message: dying here is what the test wants.
        std::panic::resume_unwind(Box::new(Crash));
    }
}

/// Runs `life`, which dies after `stores` stores. `None`: it died.
pub(super) fn live_for<T>(stores: u64, life: impl FnOnce() -> T) -> Option<T> {
    LEFT.set(stores);
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(life));
    LEFT.set(u64::MAX);
    match outcome {
        Ok(value) => Some(value),
        Err(payload) if payload.is::<Crash>() => None,
        Err(payload) => std::panic::resume_unwind(payload),
    }
}

/// How many stores `work` makes.
pub(super) fn count_stores(work: impl FnOnce()) -> u64 {
    let before = COUNT.get();
    work();
    COUNT.get() - before
}
