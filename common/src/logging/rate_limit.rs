//! At most so many lines a second from one place in the code.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lets a number of lines through each second and counts the rest.
///
/// Made for a `static` beside the statement that logs; see
/// [`warn_limited!`](crate::warn_limited).
#[derive(Debug)]
pub struct RateLimit {
    per_second: u32,
    window: Mutex<Option<Window>>,
    suppressed: AtomicU64,
}

/// The second that is being counted.
#[derive(Debug, Clone, Copy)]
struct Window {
    start: Instant,
    lines: u32,
}

/// Leave to write one line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admitted {
    /// Lines that were held back since the last one that was written.
    pub suppressed: u64,
    /// Whether this is the last line of its second.
    pub last: bool,
}

impl RateLimit {
    /// Admits `lines` lines each second.
    pub const fn per_second(lines: u32) -> Self {
        Self { per_second: lines, window: Mutex::new(None), suppressed: AtomicU64::new(0) }
    }

    /// Asks to write a line at the time `now`; `None` means no.
    pub fn admit(&self, now: Instant) -> Option<Admitted> {
        let mut guard = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        let mut window = match *guard {
            Some(window)
                if now.saturating_duration_since(window.start) < Duration::from_secs(1) =>
            {
                window
            }
            _ => Window { start: now, lines: 0 },
        };
        if window.lines >= self.per_second {
            self.suppressed.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        window.lines += 1;
        *guard = Some(window);
        drop(guard);
        Some(Admitted {
            suppressed: self.suppressed.swap(0, Ordering::Relaxed),
            last: window.lines == self.per_second,
        })
    }
}

/// Logs a warning, at most five a second from this place.
///
/// For everything a guest or a peer can provoke. Takes what `tracing::warn!` takes. The arguments
/// are not evaluated for a line that is held back.
#[macro_export]
macro_rules! warn_limited {
    ($($event:tt)+) => {{
        static LIMIT: $crate::logging::RateLimit = $crate::logging::RateLimit::per_second(5);
        if let Some(admitted) = LIMIT.admit(::std::time::Instant::now()) {
            if admitted.suppressed > 0 {
                $crate::logging::tracing::warn!("… {} more suppressed", admitted.suppressed);
            }
            $crate::logging::tracing::warn!($($event)+);
            if admitted.last {
                $crate::logging::tracing::warn!("… lines like this are suppressed for a second");
            }
        }
    }};
}
