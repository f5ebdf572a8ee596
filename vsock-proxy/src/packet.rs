//! The packets of virtio-vsock, from and to bytes. Virtio 1.3, 5.10.6.
//!
//! Pure: a chain's readable part goes in, a [`Header`] comes out and the payload is what remains of
//! the chain. Nothing here trusts a field; what the fields mean is the connection's business.
#![cfg_attr(not(test), warn(clippy::indexing_slicing, clippy::arithmetic_side_effects))]

use std::fmt;

use outboard_common::ring::IoVecs;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of a packet header.
pub const HEADER_SIZE: usize = 44;

/// A context identifier: the address of a machine. Virtio 1.3, 5.10.4.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Cid(u64);

impl Cid {
    /// The host's own.
    pub const HOST: Self = Self(2);

    /// A CID as a packet has it; the upper 32 bits may be set, and then it is nobody's.
    #[must_use]
    pub const fn from_wire(value: u64) -> Self {
        Self(value)
    }

    /// A CID that a guest may have.
    ///
    /// # Errors
    /// 0, 1, 2, all-ones of 32 bits and everything above are reserved.
    pub const fn guest(value: u64) -> Result<Self, ReservedCid> {
        if value < 3 || value >= 0xffff_ffff { Err(ReservedCid(value)) } else { Ok(Self(value)) }
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for Cid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A number that no guest can have as its CID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("CID {0} is reserved: a guest's is from 3 to 4294967294")]
pub struct ReservedCid(pub u64);

/// A port of one CID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Port(pub u32);

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Socket types of virtio 1.3, 5.10.6.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SocketType {
    /// VIRTIO_VSOCK_TYPE_STREAM.
    Stream,
    /// VIRTIO_VSOCK_TYPE_SEQPACKET.
    SeqPacket,
}

impl SocketType {
    /// The type's number in a packet.
    #[must_use]
    pub const fn to_wire(self) -> u16 {
        match self {
            Self::Stream => 1,
            Self::SeqPacket => 2,
        }
    }

    /// The type of a number, if there is one.
    #[must_use]
    pub const fn from_wire(value: u16) -> Option<Self> {
        match value {
            1 => Some(Self::Stream),
            2 => Some(Self::SeqPacket),
            _ => None,
        }
    }
}

/// Operations of virtio 1.3, 5.10.6.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Op {
    /// Asks for a connection.
    Request,
    /// Accepts a connection.
    Response,
    /// Refuses or ends a connection.
    Rst,
    /// Says what its sender will no longer do.
    Shutdown,
    /// Carries data.
    Rw,
    /// Tells the sender's credit.
    CreditUpdate,
    /// Asks for the peer's credit.
    CreditRequest,
}

impl Op {
    /// The operation's number in a packet.
    #[must_use]
    pub const fn to_wire(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Rst => 3,
            Self::Shutdown => 4,
            Self::Rw => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
        }
    }

    /// The operation of a number, if there is one.
    #[must_use]
    pub const fn from_wire(value: u16) -> Option<Self> {
        match value {
            1 => Some(Self::Request),
            2 => Some(Self::Response),
            3 => Some(Self::Rst),
            4 => Some(Self::Shutdown),
            5 => Some(Self::Rw),
            6 => Some(Self::CreditUpdate),
            7 => Some(Self::CreditRequest),
            _ => None,
        }
    }
}

/// SHUTDOWN: its sender will receive no more.
pub const SHUTDOWN_RCV: u32 = 1;
/// SHUTDOWN: its sender will send no more.
pub const SHUTDOWN_SEND: u32 = 2;
/// SHUTDOWN: both.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RCV | SHUTDOWN_SEND;
/// RW of a seqpacket socket: the message ends here.
pub const SEQ_EOM: u32 = 1;
/// RW of a seqpacket socket: the record ends here (MSG_EOR). It goes between guests and to AF_VSOCK; Linux
/// keeps none on Unix sockets.
pub const SEQ_EOR: u32 = 2;

/// A packet's header as it lies in memory.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RawHeader {
    src_cid: U64,
    dst_cid: U64,
    src_port: U32,
    dst_port: U32,
    len: U32,
    socket_type: U16,
    op: U16,
    flags: U32,
    buf_alloc: U32,
    fwd_cnt: U32,
}

const _: () = assert!(size_of::<RawHeader>() == HEADER_SIZE);

/// A packet's header. The type and the operation stay numbers, since an answer must repeat a type
/// that we do not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Sender.
    pub src_cid: Cid,
    /// Receiver.
    pub dst_cid: Cid,
    /// Sender's port.
    pub src_port: Port,
    /// Receiver's port.
    pub dst_port: Port,
    /// Bytes of payload.
    pub len: u32,
    /// The socket type's number.
    pub socket_type: u16,
    /// The operation's number.
    pub op: u16,
    /// What they mean depends on the operation.
    pub flags: u32,
    /// Bytes of receive buffer that the sender has for this connection.
    pub buf_alloc: u32,
    /// Bytes that the sender's application has taken so far, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// The header in memory's form.
    #[must_use]
    pub fn to_raw(&self) -> RawHeader {
        RawHeader {
            src_cid: U64::new(self.src_cid.get()),
            dst_cid: U64::new(self.dst_cid.get()),
            src_port: U32::new(self.src_port.0),
            dst_port: U32::new(self.dst_port.0),
            len: U32::new(self.len),
            socket_type: U16::new(self.socket_type),
            op: U16::new(self.op),
            flags: U32::new(self.flags),
            buf_alloc: U32::new(self.buf_alloc),
            fwd_cnt: U32::new(self.fwd_cnt),
        }
    }

    /// The header of memory's form.
    #[must_use]
    pub fn from_raw(raw: &RawHeader) -> Self {
        Self {
            src_cid: Cid::from_wire(raw.src_cid.get()),
            dst_cid: Cid::from_wire(raw.dst_cid.get()),
            src_port: Port(raw.src_port.get()),
            dst_port: Port(raw.dst_port.get()),
            len: raw.len.get(),
            socket_type: raw.socket_type.get(),
            op: raw.op.get(),
            flags: raw.flags.get(),
            buf_alloc: raw.buf_alloc.get(),
            fwd_cnt: raw.fwd_cnt.get(),
        }
    }

    /// The RST that answers this packet: addresses swapped, the same type. An RST is never answered.
    #[must_use]
    pub fn reset(&self) -> Option<Self> {
        (self.op != Op::Rst.to_wire()).then_some(Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            len: 0,
            socket_type: self.socket_type,
            op: Op::Rst.to_wire(),
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        })
    }
}

/// What a driver can get wrong in a packet's form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// There is not even a header, so nobody to answer.
    #[error("a chain of {0} bytes holds no packet header")]
    NoHeader(usize),
    /// The payload is cut off.
    #[error("a packet says {says} bytes of payload and has {has}")]
    ShortPayload {
        /// The packet's header, to be answered.
        header: Header,
        /// Bytes promised.
        says: u32,
        /// Bytes there.
        has: usize,
    },
}

/// Takes the header off the front of a chain of any shape and leaves the payload, no more.
///
/// # Errors
/// The chain is shorter than its header, or than the header says.
#[inline]
pub fn parse(chain: &mut IoVecs) -> Result<Header, Malformed> {
    let len = chain.len();
    let raw: RawHeader = chain.read_obj().ok_or(Malformed::NoHeader(len))?;
    let header = Header::from_raw(&raw);
    let has = chain.len();
    // usize is at least 32 bits on everything that Linux has virtio on.
    let wanted = usize::try_from(header.len).unwrap_or(usize::MAX);
    if has < wanted {
        return Err(Malformed::ShortPayload { header, says: header.len, has });
    }
    chain.truncate(wanted);
    Ok(header)
}

#[cfg(test)]
#[path = "packet/tests.rs"]
mod tests;
