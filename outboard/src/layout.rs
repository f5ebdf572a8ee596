//! Where the files of a running pod are: one directory, named after the pod.

use std::path::{Path, PathBuf};

use outboard_common::cli::values::check_socket_path;

use crate::pod::{Pod, VSOCK_NAME};

/// The directory of a running pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// The directory itself.
    pub dir: PathBuf,
}

/// The directory in which run directories are: `$XDG_RUNTIME_DIR/outboard`, or `/run/outboard`.
#[must_use]
pub fn base_dir() -> PathBuf {
    let of_user = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    of_user.filter(|dir| dir.is_absolute()).unwrap_or_else(|| "/run".into()).join("outboard")
}

/// Whether sockets of this directory can be written in every VMM's arguments.
///
/// # Errors
/// What is wrong, and what to do.
pub(crate) fn check_dir(dir: &Path) -> Result<(), String> {
    let Some(text) = dir.to_str().filter(|_| dir.is_absolute()) else {
        return Err(format!("{} is no absolute path in UTF-8; choose another", dir.display()));
    };
    // The others have a meaning in some VMM's arguments: `,` in QEMU's, `:` in UML's.
    let good = |c: char| c.is_ascii_alphanumeric() || "/-_.+@~".contains(c);
    if let Some(bad) = text.chars().find(|c| !good(*c)) {
        return Err(format!("{text} has a {bad:?}, which VMMs misread; choose another directory"));
    }
    Ok(())
}

impl Layout {
    /// The directory of `pod`: `given`, or what its file says, or the usual one; checked for the
    /// sockets' names.
    ///
    /// # Errors
    /// It cannot be used, and what to do.
    pub fn of(pod: &Pod, given: Option<&Path>) -> Result<Self, String> {
        let dir = match (given, &pod.run_dir) {
            (Some(dir), _) => std::path::absolute(dir).map_err(|error| error.to_string())?,
            (None, Some(dir)) => dir.clone(),
            (None, None) => base_dir().join(&pod.name),
        };
        check_dir(&dir)?;
        let layout = Self { dir };
        for name in pod.device_names() {
            let longest = layout.handover(name);
            check_socket_path(&longest).map_err(|why| {
                format!("{}: {why}; choose a shorter run directory", longest.display())
            })?;
        }
        Ok(layout)
    }

    /// Where the VMM meets the daemon of a device.
    #[must_use]
    pub fn socket(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.sock"))
    }

    /// Where the daemon tells what it counts.
    #[must_use]
    pub fn metrics(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.metrics"))
    }

    /// Where a newer process of the daemon takes over from it.
    #[must_use]
    pub fn handover(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.handover"))
    }

    /// What the daemon logs.
    #[must_use]
    pub fn log(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.log"))
    }

    /// The host's end of the vsock device, unless the pod names another.
    #[must_use]
    pub fn vsock_uds(&self) -> PathBuf {
        self.dir.join(format!("{VSOCK_NAME}.host"))
    }

    /// Where clients of the host that want SOCK_SEQPACKET connect: beside [`Self::vsock_uds`].
    #[must_use]
    pub fn vsock_seqpacket(&self) -> PathBuf {
        self.dir.join(format!("{VSOCK_NAME}.host_seqpacket"))
    }

    /// What the launcher says of the pod, for `ps` and `top`.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.dir.join("state.json")
    }

    /// Locked by the launcher as long as it runs.
    #[must_use]
    pub fn lock(&self) -> PathBuf {
        self.dir.join("lock")
    }

    /// Firecracker's configuration.
    #[must_use]
    pub fn firecracker_config(&self) -> PathBuf {
        self.dir.join("firecracker.json")
    }
}
