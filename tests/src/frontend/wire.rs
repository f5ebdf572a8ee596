//! vhost-user messages on a real socket, sent as told: right or wrong.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Bytes of a message header.
pub const HEADER_SIZE: usize = 12;
/// Header flags: protocol version 1.
pub const FLAG_VERSION: u32 = 1;
/// Header flags: this is a reply.
pub const FLAG_REPLY: u32 = 4;
/// Header flags: acknowledge this request.
pub const FLAG_NEED_REPLY: u32 = 8;

/// How long any reply may take.
pub const REPLY_TIMEOUT: Duration = Duration::from_secs(20);

/// File descriptors received with one message at the most.
const MAX_FDS: usize = 32;

/// One message.
#[derive(Debug)]
pub struct Message {
    /// Request code.
    pub request: u32,
    /// Header flags.
    pub flags: u32,
    /// What follows the header.
    pub body: Vec<u8>,
    /// Descriptors that came along.
    pub fds: Vec<OwnedFd>,
}

impl Message {
    /// The body's `u32` at byte `at`.
    ///
    /// # Errors
    /// The body is too short.
    pub fn u32_at(&self, at: usize) -> Result<u32> {
        let bytes = self.body.get(at..at + 4).context("a short message body")?;
        Ok(u32::from_ne_bytes(bytes.try_into()?))
    }

    /// The body's `u64` at byte `at`.
    ///
    /// # Errors
    /// The body is too short.
    pub fn u64_at(&self, at: usize) -> Result<u64> {
        let bytes = self.body.get(at..at + 8).context("a short message body")?;
        Ok(u64::from_ne_bytes(bytes.try_into()?))
    }

    /// The body as one `u64`, and nothing else.
    ///
    /// # Errors
    /// The body has another size.
    pub fn as_u64(&self) -> Result<u64> {
        ensure!(self.body.len() == 8, "a body of {} bytes where a u64 belongs", self.body.len());
        self.u64_at(0)
    }
}

/// Header and body as they go over the wire.
#[must_use]
pub fn encode(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(body.len()).unwrap_or(u32::MAX);
    let mut bytes = Vec::with_capacity(HEADER_SIZE + body.len());
    for word in [request, flags, size] {
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    bytes.extend_from_slice(body);
    bytes
}

/// One end of a vhost-user socket.
#[derive(Debug)]
pub struct Wire {
    stream: UnixStream,
}

impl Wire {
    /// A wire over `stream`, with [`REPLY_TIMEOUT`] for reads and writes.
    ///
    /// # Errors
    /// The socket is not usable.
    pub fn new(stream: UnixStream) -> Result<Self> {
        stream.set_read_timeout(Some(REPLY_TIMEOUT))?;
        stream.set_write_timeout(Some(REPLY_TIMEOUT))?;
        Ok(Self { stream })
    }

    /// The socket.
    #[must_use]
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Sends `bytes`, whatever they are, with `fds` attached to the first of them.
    ///
    /// # Errors
    /// The other side is gone, or does not read.
    pub fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            ensure!(
                control.push(SendAncillaryMessage::ScmRights(fds)),
                "too many descriptors for one message"
            );
        }
        let mut sent = sendmsg(
            &self.stream,
            &[std::io::IoSlice::new(bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        )?;
        while sent < bytes.len() {
            sent += rustix::net::send(&self.stream, &bytes[sent..], SendFlags::NOSIGNAL)?;
        }
        Ok(())
    }

    /// Sends one well-formed message.
    ///
    /// # Errors
    /// As [`Self::send_bytes`].
    pub fn send(
        &self,
        request: u32,
        flags: u32,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<()> {
        self.send_bytes(&encode(request, flags | FLAG_VERSION, body), fds)
    }

    /// The next message; `None` when the other side has hung up.
    ///
    /// # Errors
    /// Nothing came in time, or half a message did.
    pub fn receive(&self) -> Result<Option<Message>> {
        let mut header = [0u8; HEADER_SIZE];
        let mut fds = Vec::new();
        if !self.receive_exact(&mut header, &mut fds).context("receiving a header")? {
            return Ok(None);
        }
        let word =
            |i: usize| u32::from_ne_bytes([header[i], header[i + 1], header[i + 2], header[i + 3]]);
        let size = usize::try_from(word(8))?;
        ensure!(size <= 1 << 20, "a message of {size} bytes");
        let mut body = vec![0; size];
        if size > 0 && !self.receive_exact(&mut body, &mut fds).context("receiving a body")? {
            bail!("the daemon hung up in the middle of a message");
        }
        Ok(Some(Message { request: word(0), flags: word(4), body, fds }))
    }

    /// Fills `out`. False when the other side hung up before the first byte.
    fn receive_exact(&self, out: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<bool> {
        let mut done = 0;
        while done < out.len() {
            let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut iov = [IoSliceMut::new(&mut out[done..])];
            let flags = RecvFlags::CMSG_CLOEXEC;
            let n = match recvmsg(self.stream.as_fd(), &mut iov, &mut control, flags) {
                Ok(got) => got.bytes,
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::AGAIN) => bail!("no message within {REPLY_TIMEOUT:?}"),
                Err(rustix::io::Errno::CONNRESET) => 0,
                Err(e) => return Err(e.into()),
            };
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    fds.extend(rights);
                }
            }
            if n == 0 {
                ensure!(done == 0, "the daemon hung up in the middle of a message");
                return Ok(false);
            }
            done += n;
        }
        Ok(true)
    }
}
