//! The process that starts `passt`, and another one when it ends.
//!
//! # Theory of operation
//! It is a fork of the daemon, made while that has one thread, and shares nothing with it but the line: a
//! socket on which it only ever sends. So nothing that a guest could make of the daemon reaches what is
//! outside the sandbox. Each message is one byte of kind, then a text or, in its ancillary data, a
//! socket.
//!
//! `passt` puts itself into the background when all its options and ports are in order, so the end of
//! the process that was started says whether that worked, and it ends itself when its socket closes.
//! As the *subreaper* of what it starts, the keeper is told of that end. It dies with the daemon.
#![allow(unsafe_code, reason = "fork, prctl and close_range exist in no safe form")]

use std::ffi::OsString;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::io::{FdFlags, IoSlice, IoSliceMut, fcntl_setfd};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

use super::News;

/// The kinds of message.
const STARTED: u8 = b'+';
const FAILED: u8 = b'-';
/// Bytes of text in a message at the most.
const TEXT_MAX: usize = 1024;
/// Pause before another start, doubled up to the second number while they fail.
const PAUSE: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// Why there is no user-mode network.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum StartError {
    #[error("cannot start {} ({why}): install the package passt, or name the program with --passt", program.display())]
    Program { program: PathBuf, why: String },
    #[error("cannot make the process that keeps passt running")]
    Keeper(#[source] io::Error),
}

/// Starts `program` and its keeper; gives the line and the socket of the first `passt`.
pub(super) fn start(
    program: &Path,
    arguments: &[OsString],
) -> Result<(OwnedFd, OwnedFd), StartError> {
    let keeper = |error: rustix::io::Errno| StartError::Keeper(error.into());
    let pair =
        || socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
    let (ours, its) = pair().map_err(keeper)?;
    let daemon = std::process::id();
    // SAFETY: the caller promises that this process has no other thread, so the child may do anything
    // the parent may.
    match unsafe { libc::fork() } {
        -1 => return Err(StartError::Keeper(io::Error::last_os_error())),
        0 => {
            keep(&its, daemon, program, arguments);
            // SAFETY: ends the process without running what the parent registered for its end.
            unsafe { libc::_exit(0) }
        }
        _ => drop(its),
    }
    // The first message is awaited here, later ones are asked for by the worker.
    let why = match hear(ours.as_fd()) {
        Some(News::Started(socket)) => {
            rustix::io::ioctl_fionbio(&ours, true).map_err(keeper)?;
            return Ok((ours, socket));
        }
        Some(News::Failed(why)) => why,
        Some(News::KeeperEnded) | None => "its keeper ended".to_owned(),
    };
    Err(StartError::Program { program: program.to_owned(), why })
}

/// The next message of the line, if there is one.
pub(super) fn hear(line: BorrowedFd<'_>) -> Option<News> {
    let mut bytes = [0; 1 + TEXT_MAX];
    let mut space = [MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let got = match recvmsg(line, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
        Ok(message) => message.bytes,
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return None,
        Err(_) => 0,
    };
    let socket = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    Some(match (bytes.get(..got), socket) {
        (Some([STARTED, ..]), Some(socket)) => News::Started(socket),
        (Some([FAILED, text @ ..]), _) => News::Failed(String::from_utf8_lossy(text).into_owned()),
        _ => News::KeeperEnded,
    })
}

/// The keeper's life.
fn keep(line: &OwnedFd, daemon: u32, program: &Path, arguments: &[OsString]) {
    if prepare(line, daemon).is_err() {
        return;
    }
    let mut pause = PAUSE;
    let mut first = true;
    loop {
        let began = Instant::now();
        let told = match start_passt(program, arguments) {
            Ok(socket) => tell(line, &[STARTED], Some(socket.as_fd())),
            Err(why) => {
                let mut message = vec![FAILED];
                message.extend(why.bytes().take(TEXT_MAX));
                tell(line, &message, None).and(if first {
                    Err(io::ErrorKind::Other.into())
                } else {
                    Ok(())
                })
            }
        };
        // Nobody listens any more, or the operator has to do something first.
        if told.is_err() {
            return;
        }
        first = false;
        wait_for_all();
        pause = if began.elapsed() > PAUSE_MAX { PAUSE } else { (pause * 2).min(PAUSE_MAX) };
        std::thread::sleep(pause);
    }
}

/// Waits until no process that was started here is left.
fn wait_for_all() {
    use rustix::process::{WaitOptions, wait};
    while matches!(wait(WaitOptions::empty()), Ok(_) | Err(rustix::io::Errno::INTR)) {}
}

/// Makes the child of the daemon a process of its own, that ends with it.
fn prepare(line: &OwnedFd, daemon: u32) -> io::Result<()> {
    use rustix::process::{Signal, getppid, set_child_subreaper, set_parent_process_death_signal};
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let parent = getppid().map_or(0, |pid| pid.as_raw_nonzero().get());
    if u32::try_from(parent).is_ok_and(|parent| parent != daemon) {
        return Err(io::ErrorKind::NotFound.into());
    }
    set_child_subreaper(Some(rustix::process::getpid()))?;
    rustix::thread::set_name(c"passt-keeper")?;
    // What the daemon inherited is not for passt.
    let line = u32::try_from(line.as_raw_fd()).map_err(io::Error::other)?;
    for (from, to) in [(3, line.saturating_sub(1)), (line + 1, u32::MAX)] {
        if from <= to {
            // SAFETY: this process uses none of these descriptors any more.
            unsafe { libc::syscall(libc::SYS_close_range, from, to, 0) };
        }
    }
    Ok(())
}

fn tell(line: &OwnedFd, message: &[u8], socket: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut space = [MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let sockets: Vec<_> = socket.into_iter().collect();
    if !sockets.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(&sockets));
    }
    sendmsg(line, &[IoSlice::new(message)], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Starts one `passt` and waits until it has gone to the background; gives our end of its socket.
fn start_passt(program: &Path, arguments: &[OsString]) -> Result<OwnedFd, String> {
    let text = |error: rustix::io::Errno| io::Error::from(error).to_string();
    let (ours, its) =
        socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .map_err(text)?;
    rustix::io::ioctl_fionbio(&ours, true).map_err(text)?;
    // No other thread can start a program meanwhile.
    fcntl_setfd(&its, FdFlags::empty()).map_err(text)?;
    let mut child = Command::new(program)
        .arg(format!("--fd={}", its.as_raw_fd()))
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| error.to_string())?;
    drop(its);
    let mut said = String::new();
    if let Some(stderr) = &mut child.stderr {
        // What cannot be read is not told.
        let _ = stderr.read_to_string(&mut said);
    }
    let status = child.wait().map_err(|error| error.to_string())?;
    if status.success() {
        return Ok(ours);
    }
    let said: Vec<_> = said.split_whitespace().collect();
    Err(if said.is_empty() { status.to_string() } else { said.join(" ") })
}
