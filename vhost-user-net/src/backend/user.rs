//! The network as an ordinary program has it: no interface, no privileges, and `passt` behind us.
//!
//! # Theory of operation
//! `passt` turns a guest's frames into the sockets of an ordinary process and back. One is started
//! before the sandbox closes and gets one end of a socket pair; frames cross it as [`FrameStream`] says.
//! A small process of ours stays outside the sandbox as its [`keeper`]: it starts another `passt` when
//! one ends, and sends the new socket over the *line*. The daemon itself can start nothing.
//!
//! A stream must never lose a byte, so it outlives the sessions that use it: a worker takes it out of
//! [`UserLink`] and puts it back when it ends.

mod keeper;

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Backend;
use crate::stream::FrameStream;

pub use keeper::StartError;

/// `passt`'s largest and usual MTU, bytes.
const MTU: u16 = 65520;

/// Options of `passt` that are ours to give, or that would break what we rely on.
const OURS: &[&str] = &[
    "-F",
    "--fd",
    "-s",
    "--socket",
    "--socket-path",
    "-1",
    "--one-off",
    "-f",
    "--foreground",
    "--vhost-user",
    "--repair-path",
    "-h",
    "--help",
    "--version",
    "--print-capabilities",
    "-m",
    "--mtu",
];

/// Whether `option` is one that an operator may give to `passt`.
///
/// # Errors
/// Why not, in words.
pub fn check_option(option: &str) -> Result<String, String> {
    let name = option.split('=').next().unwrap_or(option);
    if OURS.contains(&name) {
        return Err("the daemon sets this one itself".to_owned());
    }
    if name.starts_with('-') {
        Ok(option.to_owned())
    } else {
        Err("write a whole option of passt, like --dns=192.0.2.1".to_owned())
    }
}

/// How `passt` is run.
#[derive(Debug, Clone)]
pub struct UserOptions {
    /// The program, looked up in PATH if it has no slash.
    pub program: PathBuf,
    /// MTU of the guest, bytes.
    pub mtu: Option<u16>,
    /// Ports forwarded to the guest, as `passt`'s `--tcp-ports` takes them.
    pub tcp_ports: Vec<String>,
    /// As `tcp_ports`, for UDP.
    pub udp_ports: Vec<String>,
    /// More options, one word each.
    pub more: Vec<String>,
}

impl UserOptions {
    /// The command line but for the program and the socket.
    fn arguments(&self) -> Vec<OsString> {
        let mut all = vec!["--quiet".to_owned(), format!("--mtu={}", self.mtu.unwrap_or(MTU))];
        all.extend(self.tcp_ports.iter().map(|spec| format!("--tcp-ports={spec}")));
        all.extend(self.udp_ports.iter().map(|spec| format!("--udp-ports={spec}")));
        all.extend(self.more.iter().cloned());
        all.into_iter().map(OsString::from).collect()
    }
}

/// What came over the line.
#[derive(Debug)]
pub enum News {
    /// A new `passt` is at the other end of this socket.
    Started(OwnedFd),
    /// `passt` cannot be started at the moment; it is tried again.
    Failed(String),
    /// The keeper is gone; there will be no other `passt`.
    KeeperEnded,
}

/// The connection to `passt`, as the device's worker uses it.
#[derive(Debug)]
pub struct UserLink {
    line: OwnedFd,
    stream: Mutex<Option<Box<FrameStream>>>,
}

impl UserLink {
    fn stream(&self) -> MutexGuard<'_, Option<Box<FrameStream>>> {
        // Taken and put back whole.
        self.stream.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Readable when [`Self::news`] has something.
    #[must_use]
    pub fn line(&self) -> BorrowedFd<'_> {
        self.line.as_fd()
    }

    /// The stream to the present `passt`, unless another worker has it.
    #[must_use]
    pub fn take(&self) -> Option<Box<FrameStream>> {
        self.stream().take()
    }

    /// Puts the stream back for the next worker.
    pub fn put_back(&self, stream: Box<FrameStream>) {
        *self.stream() = Some(stream);
    }

    /// What happened to `passt` since the last look.
    #[must_use]
    pub fn news(&self) -> Option<News> {
        keeper::hear(self.line.as_fd())
    }
}

/// The back end.
#[derive(Debug)]
pub struct UserBackend {
    link: Arc<UserLink>,
    mtu: u16,
}

impl UserBackend {
    /// Starts `passt` and its keeper. To be called while the process has one thread and no sandbox.
    ///
    /// # Errors
    /// A sentence for the operator: there is no such program, or what it says itself.
    pub fn start(options: &UserOptions) -> Result<Self, StartError> {
        let (line, socket) = keeper::start(&options.program, &options.arguments())?;
        let link = UserLink { line, stream: Mutex::new(Some(Box::new(FrameStream::new(socket)))) };
        Ok(Self { link: Arc::new(link), mtu: options.mtu.unwrap_or(MTU) })
    }
}

impl Backend for UserBackend {
    fn pairs(&self) -> u16 {
        1
    }

    fn queue(&self, _pair: u16) -> Option<BorrowedFd<'_>> {
        None
    }

    fn user_link(&self) -> Option<Arc<UserLink>> {
        Some(self.link.clone())
    }

    fn tells_of_frames_sent(&self) -> bool {
        true
    }

    fn features(&self) -> u64 {
        // A stream has no header: every frame is whole and its checksums are right.
        0
    }

    fn mtu(&self) -> Option<u16> {
        Some(self.mtu)
    }

    fn set_header_size(&self, _bytes: usize) -> io::Result<()> {
        // The stream's user sets it.
        Ok(())
    }

    fn set_guest_offloads(&self, _offloads: u64) -> io::Result<()> {
        Ok(())
    }

    fn set_mtu(&self, mtu: u16) -> io::Result<()> {
        // passt takes frames of any size, and tells guests the MTU it was started with.
        if mtu <= MTU { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(program: &str) -> Result<UserBackend, StartError> {
        UserBackend::start(&UserOptions {
            program: program.into(),
            mtu: Some(1500),
            tcp_ports: vec!["8022:22".to_owned()],
            udp_ports: Vec::new(),
            more: vec!["--ipv4-only".to_owned()],
        })
    }

    #[test]
    fn a_program_that_is_not_there_is_named_so() {
        let error = start("/nonexistent/passt").unwrap_err().to_string();
        assert!(error.contains("/nonexistent/passt") && error.contains("install"), "{error}");
    }

    #[test]
    fn what_the_program_says_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let script = dir.path().join("passt");
        std::fs::write(&script, "#!/bin/sh\necho \"no: $@\" >&2\nexit 3\n").unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&script, mode).unwrap();
        let error = start(script.to_str().unwrap()).unwrap_err().to_string();
        assert!(error.contains("no: --fd="), "{error}");
        assert!(error.contains("--mtu=1500 --tcp-ports=8022:22 --ipv4-only"), "{error}");
    }

    #[test]
    fn options_that_are_ours_are_refused() {
        for bad in ["--fd=3", "-1", "--socket=/x", "--foreground", "--mtu=9000", "dns"] {
            assert!(check_option(bad).is_err(), "{bad}");
        }
        for good in ["--dns=192.0.2.1", "-4", "--no-map-gw"] {
            assert_eq!(check_option(good).as_deref(), Ok(good));
        }
    }
}
