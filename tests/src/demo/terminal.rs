//! The terminal's settings, given back after a guest had its console there.

use rustix::termios::{OptionalActions, Termios};

/// Restores the settings of stdin when dropped; a killed guest leaves the terminal raw.
#[derive(Debug)]
pub(super) struct Terminal {
    settings: Option<Termios>,
}

impl Terminal {
    /// Remembers the settings; without a terminal there is nothing to restore.
    pub(super) fn save() -> Self {
        Self { settings: rustix::termios::tcgetattr(rustix::stdio::stdin()).ok() }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(settings) = &self.settings {
            // A terminal that is gone needs no settings.
            let _ = rustix::termios::tcsetattr(
                rustix::stdio::stdin(),
                OptionalActions::Drain,
                settings,
            );
        }
    }
}
