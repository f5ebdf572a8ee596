//! INIT: which of the guest's features to switch on.

use std::io;
use std::sync::atomic::Ordering;

use super::config::Demand;
use super::{CachePolicy, PassthroughFs, errno};
use crate::fuse::wire::init;

/// Switched on whenever the guest has them.
///
/// Not among them is ATOMIC_O_TRUNC, a SETATTR less for each file that is opened to be overwritten: Linux
/// checks whether a file may be truncated (a running program may not, nor what a security module or
/// Landlock protects) after OPEN, when it would be too late.
const ALWAYS: u64 = init::ASYNC_READ
    | init::BIG_WRITES
    | init::AUTO_INVAL_DATA
    | init::ASYNC_DIO
    | init::PARALLEL_DIROPS
    | init::MAX_PAGES
    | init::CACHE_SYMLINKS
    | init::INIT_EXT
    | init::CREATE_SUPP_GROUP
    | init::ALLOW_IDMAP;

impl PassthroughFs {
    /// Starts a session with a guest that has the features `capable`; returns those switched on.
    pub(super) fn start_session(&self, capable: u64) -> io::Result<u64> {
        self.reset();
        self.start_dax()?;
        let on = self.offered(capable, self.dax_ready())?;
        self.negotiated.store(on, Ordering::Relaxed);
        Ok(on)
    }

    /// Which of the flags that the guest is `capable` of are switched on; `window`: there is one to map
    /// files in.
    ///
    /// # Errors
    /// The guest is not capable of what the operator demands (EPROTO).
    pub(super) fn offered(&self, capable: u64, window: bool) -> io::Result<u64> {
        let config = &self.config;
        let mut wanted = ALWAYS;
        let mut add = |condition: bool, flags: u64| {
            if condition {
                wanted |= flags;
            }
        };
        // Attributes that are stale when they arrive are asked for in vain.
        add(
            config.readdirplus && !config.timeout().is_zero(),
            init::DO_READDIRPLUS | init::READDIRPLUS_AUTO,
        );
        add(config.writeback, init::WRITEBACK_CACHE);
        add(config.announce_submounts, init::SUBMOUNTS);
        add(config.killpriv_v2, init::HANDLE_KILLPRIV_V2);
        add(config.posix_locks, init::POSIX_LOCKS);
        add(config.flock, init::FLOCK_LOCKS);
        add(window, init::HAS_INODE_DAX);
        add(config.allow_mmap, init::DIRECT_IO_ALLOW_MMAP);
        let acl = init::POSIX_ACL | init::DONT_MASK | init::SETXATTR_EXT;
        add(demand(config.posix_acl, capable, acl, "POSIX ACLs")?, acl);
        let label = demand(config.security_label, capable, init::SECURITY_CTX, "security labels")?;
        add(label, init::SECURITY_CTX);
        // With Never, every attribute is asked for anew anyway, but a cached link target would stay.
        if config.cache == CachePolicy::Never {
            wanted &= !init::CACHE_SYMLINKS;
        }
        Ok(wanted & capable)
    }
}

/// Whether to switch a feature on that needs all of `flags`.
fn demand(demand: Demand, capable: u64, flags: u64, what: &str) -> io::Result<bool> {
    let has = capable & flags == flags;
    if demand == Demand::Always && !has {
        tracing::error!("{what} were asked for, but the guest does not support them");
        return Err(errno(libc::EPROTO));
    }
    Ok(has && demand != Demand::Never)
}
