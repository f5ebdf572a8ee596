//! Messages of the vhost-user protocol as bytes: headers, bodies, and the pure decoder.
//!
//! vhost-user specification, "Message Specification". Everything is in the host's byte order, since
//! both ends share a machine. Nothing here does I/O.
#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use vhost::vhost_user::message::FrontendReq;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::iotlb::IotlbBody;
use super::memory::RegionInfo;
use crate::ring::VringAddresses;

/// Bytes of a message header.
pub const HEADER_SIZE: usize = 12;
/// Bytes a body may have: the largest that the specification defines, GET_SHMEM_CONFIG's answer and
/// a configuration space of 4 KiB, with room to spare.
pub const MAX_BODY: usize = 8192;
/// Descriptors a message may bring.
pub const MAX_FDS: usize = 32;

/// Header flag: protocol version 1.
const FLAG_VERSION: u32 = 1;
const FLAG_VERSION_MASK: u32 = 3;
/// Header flag: this is an answer.
pub const FLAG_REPLY: u32 = 1 << 2;
/// Header flag: answer even if the message has no answer of its own.
pub const FLAG_NEED_REPLY: u32 = 1 << 3;

/// A message header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// Request code.
    pub request: u32,
    /// Version and flags.
    pub flags: u32,
    /// Bytes of the body.
    pub size: u32,
}

impl Header {
    /// A header of a message that we send.
    #[must_use]
    pub fn new(request: u32, flags: u32, size: usize) -> Self {
        Self { request, flags: flags | FLAG_VERSION, size: u32::try_from(size).unwrap_or(u32::MAX) }
    }

    /// Whether the sender wants an acknowledgement.
    #[must_use]
    pub fn need_reply(&self) -> bool {
        self.flags & FLAG_NEED_REPLY != 0
    }
}

/// Why a message cannot be understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A version other than 1: the stream is not vhost-user, or out of step.
    #[error("message {request} has version {version}, not 1")]
    Version {
        /// Request code.
        request: u32,
        /// Version found.
        version: u32,
    },
    /// A body that no message has.
    #[error("message {request} has a body of {size} bytes")]
    TooLong {
        /// Request code.
        request: u32,
        /// Bytes announced.
        size: u32,
    },
    /// The body is shorter than the message needs, or disagrees with itself.
    #[error("message {0} has a malformed body")]
    Body(u32),
    /// Too few or too many descriptors came along.
    #[error("message {request} came with {count} file descriptors")]
    Fds {
        /// Request code.
        request: u32,
        /// Descriptors that came.
        count: usize,
    },
}

impl WireError {
    /// Whether the stream can go on after the message was skipped.
    #[must_use]
    pub fn is_recoverable(&self) -> bool {
        matches!(self, Self::Body(_) | Self::Fds { .. })
    }
}

/// Decodes a header.
///
/// # Errors
/// A wrong version or a body too long; neither can be recovered from.
pub fn parse_header(bytes: &[u8; HEADER_SIZE]) -> Result<Header, WireError> {
    let header: Header = zerocopy::transmute!(*bytes);
    let version = header.flags & FLAG_VERSION_MASK;
    if version != FLAG_VERSION {
        return Err(WireError::Version { request: header.request, version });
    }
    if header.size as usize > MAX_BODY {
        return Err(WireError::TooLong { request: header.request, size: header.size });
    }
    Ok(header)
}

/// "Vring state": index and a number. Also "Single memory region"'s neighbour in size, 8 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VringState {
    /// Vring index.
    pub index: u32,
    /// Size, base or switch.
    pub num: u32,
}

/// "Vring address".
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VringAddrBody {
    /// Vring index.
    pub index: u32,
    /// Bit 0: log writes to the used ring.
    pub flags: u32,
    /// Descriptor table, front end's address.
    pub descriptor: u64,
    /// Used ring, front end's address.
    pub used: u64,
    /// Available ring, front end's address.
    pub available: u64,
    /// Guest address of the used ring, for the log.
    pub log: u64,
}

/// "Memory region".
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RegionBody {
    /// Guest physical address.
    pub guest_addr: u64,
    /// Bytes.
    pub size: u64,
    /// Front end's address.
    pub user_addr: u64,
    /// Offset in the descriptor's file.
    pub mmap_offset: u64,
}

impl From<RegionBody> for RegionInfo {
    fn from(b: RegionBody) -> Self {
        Self {
            guest_addr: b.guest_addr,
            size: b.size,
            user_addr: b.user_addr,
            mmap_offset: b.mmap_offset,
        }
    }
}

/// "Inflight description".
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct InflightBody {
    /// Bytes of the area.
    pub mmap_size: u64,
    /// Where it starts in its file.
    pub mmap_offset: u64,
    /// Queues in it.
    pub num_queues: u16,
    /// Entries of each queue.
    pub queue_size: u16,
    /// Makes the size a multiple of 8.
    pub padding: u32,
}

/// "Virtio device config space", the part before the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ConfigHeader {
    /// Offset in the device's configuration space.
    pub offset: u32,
    /// Bytes.
    pub size: u32,
    /// 0: by the driver; bit 0: writable field; bit 1: migration.
    pub flags: u32,
}

/// A decoded request. Descriptors travel beside it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "each is the specification's message of the same name")]
pub enum Request {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    SetMemTable(Vec<RegionInfo>),
    SetLogBase {
        size: u64,
        offset: u64,
    },
    SetLogFd,
    SetVringNum(VringState),
    SetVringAddr {
        index: u32,
        log: bool,
        addresses: VringAddresses,
    },
    SetVringBase(VringState),
    GetVringBase(u32),
    SetVringKick {
        index: u32,
        fd: bool,
    },
    SetVringCall {
        index: u32,
        fd: bool,
    },
    SetVringErr {
        index: u32,
        fd: bool,
    },
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    SetVringEnable {
        index: u32,
        enable: bool,
    },
    SendRarp([u8; 6]),
    NetSetMtu(u64),
    SetBackendReqFd,
    Iotlb(IotlbBody),
    GetConfig {
        offset: u32,
        size: u32,
        flags: u32,
    },
    SetConfig {
        offset: u32,
        flags: u32,
        data: Vec<u8>,
    },
    GetInflightFd {
        num_queues: u16,
        queue_size: u16,
    },
    SetInflightFd(InflightBody),
    ResetDevice,
    VringKick(u32),
    GetMaxMemSlots,
    AddMemReg(RegionInfo),
    RemMemReg(RegionInfo),
    SetStatus(u64),
    GetStatus,
    SetDeviceStateFd {
        direction: u32,
        phase: u32,
    },
    CheckDeviceState,
    GetShmemConfig,
    /// Known or not, nothing that a back end of ours has.
    Unsupported(u32),
}

/// Bits of the u64 in SET_VRING_KICK, CALL and ERR.
const VRING_INDEX_MASK: u64 = 0xff;
const VRING_NO_FD: u64 = 1 << 8;

fn body<T: FromBytes + KnownLayout + Immutable>(code: u32, bytes: &[u8]) -> Result<T, WireError> {
    T::read_from_prefix(bytes).map(|(value, _)| value).map_err(|_size| WireError::Body(code))
}

fn number(code: u32, bytes: &[u8]) -> Result<u64, WireError> {
    body::<u64>(code, bytes)
}

/// Index and whether a descriptor comes, of the three messages that bring one for a vring.
fn vring_fd(code: u32, bytes: &[u8], fds: usize) -> Result<(u32, bool), WireError> {
    let value = number(code, bytes)?;
    let fd = value & VRING_NO_FD == 0;
    if fds != usize::from(fd) {
        return Err(WireError::Fds { request: code, count: fds });
    }
    Ok((u32::try_from(value & VRING_INDEX_MASK).unwrap_or(u32::MAX), fd))
}

fn mem_table(code: u32, bytes: &[u8], fds: usize) -> Result<Request, WireError> {
    let count = usize::try_from(body::<u32>(code, bytes)?).unwrap_or(usize::MAX);
    if count != fds || count > MAX_FDS {
        return Err(WireError::Fds { request: code, count: fds });
    }
    let mut rest = bytes.get(8..).ok_or(WireError::Body(code))?;
    let mut regions = Vec::with_capacity(count);
    for _ in 0..count {
        let (region, after) =
            RegionBody::read_from_prefix(rest).map_err(|_size| WireError::Body(code))?;
        regions.push(region.into());
        rest = after;
    }
    Ok(Request::SetMemTable(regions))
}

/// ADD_MEM_REG and REM_MEM_REG: eight bytes of padding, then one region.
fn one_region(code: u32, bytes: &[u8]) -> Result<RegionInfo, WireError> {
    let bytes = bytes.get(8..).ok_or(WireError::Body(code))?;
    body::<RegionBody>(code, bytes).map(RegionInfo::from)
}

fn set_config(code: u32, bytes: &[u8]) -> Result<Request, WireError> {
    let (header, data) =
        ConfigHeader::read_from_prefix(bytes).map_err(|_size| WireError::Body(code))?;
    let data = usize::try_from(header.size)
        .ok()
        .and_then(|n| data.get(..n))
        .ok_or(WireError::Body(code))?;
    Ok(Request::SetConfig { offset: header.offset, flags: header.flags, data: data.to_vec() })
}

/// Whether `request` must come with exactly one descriptor, or with none. `None`: its own rule.
fn fd_rule(request: FrontendReq) -> Option<usize> {
    use FrontendReq as R;
    match request {
        R::SET_MEM_TABLE
        | R::SET_VRING_KICK
        | R::SET_VRING_CALL
        | R::SET_VRING_ERR
        | R::REM_MEM_REG => None,
        R::SET_LOG_BASE
        | R::SET_LOG_FD
        | R::SET_BACKEND_REQ_FD
        | R::SET_INFLIGHT_FD
        | R::ADD_MEM_REG
        | R::SET_DEVICE_STATE_FD => Some(1),
        _ => Some(0),
    }
}

/// Decodes the message `code` with body `bytes` that came with `fds` descriptors.
///
/// # Errors
/// A body that is too short or inconsistent, or a wrong number of descriptors.
#[allow(clippy::too_many_lines, reason = "one line for each message of the protocol, nothing else")]
pub fn parse(code: u32, bytes: &[u8], fds: usize) -> Result<Request, WireError> {
    use FrontendReq as R;
    let Ok(request) = FrontendReq::try_from(code) else { return Ok(Request::Unsupported(code)) };
    if fd_rule(request).is_some_and(|n| n != fds) {
        return Err(WireError::Fds { request: code, count: fds });
    }
    Ok(match request {
        R::GET_FEATURES => Request::GetFeatures,
        R::SET_FEATURES => Request::SetFeatures(number(code, bytes)?),
        R::SET_OWNER => Request::SetOwner,
        R::RESET_OWNER => Request::ResetOwner,
        R::SET_MEM_TABLE => mem_table(code, bytes, fds)?,
        R::SET_LOG_BASE => {
            let [size, offset] = body::<[u64; 2]>(code, bytes)?;
            Request::SetLogBase { size, offset }
        }
        R::SET_LOG_FD => Request::SetLogFd,
        R::SET_VRING_NUM => Request::SetVringNum(body(code, bytes)?),
        R::SET_VRING_ADDR => {
            let b: VringAddrBody = body(code, bytes)?;
            let addresses =
                VringAddresses { descriptor: b.descriptor, available: b.available, used: b.used };
            Request::SetVringAddr { index: b.index, log: b.flags & 1 != 0, addresses }
        }
        R::SET_VRING_BASE => Request::SetVringBase(body(code, bytes)?),
        R::GET_VRING_BASE => Request::GetVringBase(body::<VringState>(code, bytes)?.index),
        R::SET_VRING_KICK => {
            vring_fd(code, bytes, fds).map(|(index, fd)| Request::SetVringKick { index, fd })?
        }
        R::SET_VRING_CALL => {
            vring_fd(code, bytes, fds).map(|(index, fd)| Request::SetVringCall { index, fd })?
        }
        R::SET_VRING_ERR => {
            vring_fd(code, bytes, fds).map(|(index, fd)| Request::SetVringErr { index, fd })?
        }
        R::GET_PROTOCOL_FEATURES => Request::GetProtocolFeatures,
        R::SET_PROTOCOL_FEATURES => Request::SetProtocolFeatures(number(code, bytes)?),
        R::GET_QUEUE_NUM => Request::GetQueueNum,
        R::SET_VRING_ENABLE => {
            let state: VringState = body(code, bytes)?;
            Request::SetVringEnable { index: state.index, enable: state.num != 0 }
        }
        R::SEND_RARP => Request::SendRarp(body(code, bytes)?),
        R::NET_SET_MTU => Request::NetSetMtu(number(code, bytes)?),
        R::SET_BACKEND_REQ_FD => Request::SetBackendReqFd,
        R::IOTLB_MSG => Request::Iotlb(body(code, bytes)?),
        R::GET_CONFIG => {
            let h: ConfigHeader = body(code, bytes)?;
            Request::GetConfig { offset: h.offset, size: h.size, flags: h.flags }
        }
        R::SET_CONFIG => set_config(code, bytes)?,
        R::GET_INFLIGHT_FD => {
            let b = inflight(code, bytes)?;
            Request::GetInflightFd { num_queues: b.num_queues, queue_size: b.queue_size }
        }
        R::SET_INFLIGHT_FD => Request::SetInflightFd(inflight(code, bytes)?),
        R::RESET_DEVICE => Request::ResetDevice,
        R::VRING_KICK => Request::VringKick(body::<VringState>(code, bytes)?.index),
        R::GET_MAX_MEM_SLOTS => Request::GetMaxMemSlots,
        R::ADD_MEM_REG => Request::AddMemReg(one_region(code, bytes)?),
        R::REM_MEM_REG => Request::RemMemReg(one_region(code, bytes)?),
        R::SET_STATUS => Request::SetStatus(number(code, bytes)?),
        R::GET_STATUS => Request::GetStatus,
        R::SET_DEVICE_STATE_FD => {
            let [direction, phase] = body::<[u32; 2]>(code, bytes)?;
            Request::SetDeviceStateFd { direction, phase }
        }
        R::CHECK_DEVICE_STATE => Request::CheckDeviceState,
        R::GET_SHMEM_CONFIG => Request::GetShmemConfig,
        _ => Request::Unsupported(code),
    })
}

/// The inflight description, whose sender may leave the padding at its end out.
fn inflight(code: u32, bytes: &[u8]) -> Result<InflightBody, WireError> {
    let mut padded = [0u8; size_of::<InflightBody>()];
    let n = bytes.len().min(padded.len());
    if n < 20 {
        return Err(WireError::Body(code));
    }
    if let (Some(to), Some(from)) = (padded.get_mut(..n), bytes.get(..n)) {
        to.copy_from_slice(from);
    }
    Ok(zerocopy::transmute!(padded))
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::arithmetic_side_effects, reason = "tests may panic")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_region_count_that_lies_about_descriptors_is_refused() {
        let mut bytes = vec![0u8; 8 + 64];
        bytes[0] = 2;
        assert!(matches!(parse(5, &bytes, 1), Err(WireError::Fds { .. })));
        assert!(matches!(parse(5, &bytes, 2), Ok(Request::SetMemTable(r)) if r.len() == 2));
        assert!(matches!(parse(5, &bytes[..40], 2), Err(WireError::Body(5))));
    }

    #[test]
    fn no_fd_bit_and_descriptor_exclude_each_other() {
        assert_eq!(
            parse(12, &3u64.to_ne_bytes(), 1),
            Ok(Request::SetVringKick { index: 3, fd: true })
        );
        assert_eq!(
            parse(12, &0x103u64.to_ne_bytes(), 0),
            Ok(Request::SetVringKick { index: 3, fd: false })
        );
        assert!(parse(12, &0x103u64.to_ne_bytes(), 1).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_parse_or_fail(code in 0u32..64, bytes in proptest::collection::vec(any::<u8>(), 0..400), fds in 0usize..5) {
            let _ = parse(code, &bytes, fds);
        }
    }
}
