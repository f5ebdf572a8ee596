//! Received frames as a guest takes them, where the back end cannot be told what that is.
//!
//! # Theory of operation
//! A packet socket gives frames as the sender's side left them: super-frames, and checksums not filled in.
//! Guests of our time mostly take both, and then nothing is looked at. For others each frame's header is
//! looked at after the read. One that the guest does not take is copied out of its memory, its checksum
//! filled in or itself cut up, and it waits here; so do those read with it and after it, for the order's
//! sake. The next reads get what waits. For the receiver, a frame that was taken back is one of
//! [`TAKEN_BACK`] bytes, too short to be any.
#![allow(unsafe_code, reason = "copies what the kernel wrote to lent memory")]

use std::collections::VecDeque;
use std::sync::Arc;

use outboard_common::metrics::Counter;
use virtio_bindings::virtio_net as v;
use zerocopy::{FromZeros, IntoBytes};

use super::has;
use crate::batch::FrameMemory;
use crate::header::{F_NEEDS_CSUM, GSO_NONE, HEADER_SIZE, NetHeader};
use crate::segment::Segments;

/// What a read gives for a frame that waits here instead. More than 0: there may be more to read.
const TAKEN_BACK: i32 = 1;

/// The most pieces of one frame: TCP's least segments, 48 bytes, of the longest packet. Somebody else's
/// frame in smaller ones would be a lot of memory and time for its few bytes.
const PIECES_MAX: usize = 65535_usize.div_ceil(48);
/// The most bytes of them all, with the headers that each repeats: twice what so many pieces have with the
/// longest headers of TCP over IPv6. The guest can write to a frame before it is copied, and claim headers as
/// long as the frame.
const PIECES_BYTES_MAX: usize = 1 << 19;
/// Buffers kept for the next frames.
const SPARE_MAX: usize = 64;

/// Everything that Linux leaves to the reader of a packet socket.
const ALL_TAKEN: u64 = 1 << v::VIRTIO_NET_F_GUEST_CSUM
    | 1 << v::VIRTIO_NET_F_GUEST_TSO4
    | 1 << v::VIRTIO_NET_F_GUEST_TSO6
    | 1 << v::VIRTIO_NET_F_GUEST_ECN
    | USO;
const USO: u64 = 1 << v::VIRTIO_NET_F_GUEST_USO4 | 1 << v::VIRTIO_NET_F_GUEST_USO6;

/// Makes frames such that the guest takes them.
#[derive(Debug)]
pub(super) struct Rework {
    offloads: u64,
    header_size: usize,
    /// Frames with header that go first.
    waiting: VecDeque<Vec<u8>>,
    spare: Vec<Vec<u8>>,
    /// A frame as it was read.
    whole: Vec<u8>,
    /// Counts what cannot be cut up.
    lost: Arc<Counter>,
}

impl Rework {
    pub(super) fn new(lost: Arc<Counter>) -> Self {
        Self {
            offloads: ALL_TAKEN,
            header_size: HEADER_SIZE,
            waiting: VecDeque::new(),
            spare: Vec::new(),
            whole: Vec::new(),
            lost,
        }
    }

    /// What the guest takes (`VIRTIO_NET_F_GUEST_*`), and the bytes of header before its frames.
    pub(super) fn set_guest(&mut self, offloads: u64, header_size: usize) {
        (self.offloads, self.header_size) = (offloads, header_size);
    }

    /// Whether frames wait for the next reads.
    pub(super) fn holds_frames(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Forgets frames that wait.
    pub(super) fn forget_frames(&mut self) {
        self.waiting.clear();
    }

    /// Whether frames are to be looked at.
    pub(super) fn is_needed(&self) -> bool {
        self.offloads & ALL_TAKEN != ALL_TAKEN || self.holds_frames()
    }

    /// Puts frames that wait into `frames`; gives how many, whose results are now in `results`.
    ///
    /// # Safety
    /// All memory of `frames` is mapped until this returns.
    pub(super) unsafe fn give(&mut self, frames: &[FrameMemory], results: &mut Vec<i32>) -> usize {
        let before = results.len();
        for frame in frames {
            let Some(bytes) = self.waiting.pop_front() else { break };
            // SAFETY: as the caller promised.
            let copied = unsafe { frame.copy_from(&[], &bytes) };
            results.push(i32::try_from(copied).unwrap_or(i32::MAX));
            if self.spare.len() < SPARE_MAX {
                self.spare.push(bytes);
            }
        }
        results.len() - before
    }

    /// Looks at what was just read: takes back what the guest does not take, and what came after it.
    ///
    /// # Safety
    /// All memory of `frames` is mapped until this returns.
    pub(super) unsafe fn look(&mut self, frames: &[FrameMemory], results: &mut [i32]) {
        let mut taking = false;
        for (frame, result) in frames.iter().zip(results) {
            let Ok(len) = usize::try_from(*result) else { continue };
            if len <= self.header_size {
                continue;
            }
            // SAFETY: as the caller promised.
            let header = unsafe { self.header_of(frame) };
            let as_it_is = self.is_taken(&header);
            if as_it_is && !taking {
                continue;
            }
            taking = true;
            *result = TAKEN_BACK;
            self.whole.clear();
            // SAFETY: as the caller promised.
            unsafe { frame.copy_to(self.header_size, len - self.header_size, &mut self.whole) };
            self.set_aside(header, as_it_is);
        }
    }

    /// # Safety
    /// All memory of `frame` is mapped until this returns.
    unsafe fn header_of(&mut self, frame: &FrameMemory) -> NetHeader {
        self.whole.clear();
        // SAFETY: as the caller promised.
        unsafe { frame.copy_to(0, self.header_size, &mut self.whole) };
        let mut header = NetHeader::new_zeroed();
        for (to, from) in header.as_mut_bytes().iter_mut().zip(&self.whole) {
            *to = *from;
        }
        header
    }

    /// Whether the guest takes such a frame as it is.
    fn is_taken(&self, header: &NetHeader) -> bool {
        let summed = header.flags == 0 || has(self.offloads, v::VIRTIO_NET_F_GUEST_CSUM);
        summed && header.is_taken_whole(self.offloads)
    }

    /// Puts the frame in `whole` with those that wait.
    fn set_aside(&mut self, header: NetHeader, as_it_is: bool) {
        let mut whole = std::mem::take(&mut self.whole);
        let fits = |p: &Segments<'_>| p.count() <= PIECES_MAX && p.bytes() <= PIECES_BYTES_MAX;
        let pieces = |whole| Segments::new(&header, whole).filter(fits);
        if as_it_is {
            self.add(&header, &whole);
        } else if header.gso_type == GSO_NONE {
            if header.flags & F_NEEDS_CSUM != 0 {
                header.fill_checksum(&mut whole);
            }
            self.add(&NetHeader::new_zeroed(), &whole);
        } else if let Some(mut pieces) = pieces(&whole) {
            let mut piece = Vec::new();
            while pieces.next_into(&mut piece) {
                self.add(&NetHeader::new_zeroed(), &piece);
            }
        } else {
            self.lost.add(1);
        }
        self.whole = whole;
    }

    fn add(&mut self, header: &NetHeader, frame: &[u8]) {
        let mut bytes = self.spare.pop().unwrap_or_default();
        bytes.clear();
        bytes.extend(header.as_bytes().iter().take(self.header_size));
        bytes.extend_from_slice(frame);
        self.waiting.push_back(bytes);
    }
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;
    use crate::checksum::sum;
    use crate::header::GSO_UDP_L4;

    const UDP_AT: usize = 34;

    /// A datagram's super-frame with `payload` bytes in pieces of `size`, as a socket gives it.
    fn super_frame(payload: usize, size: u16) -> Vec<u8> {
        let mut header = NetHeader::new_zeroed();
        header.flags = F_NEEDS_CSUM;
        header.gso_type = GSO_UDP_L4;
        header.gso_size = size.into();
        header.csum_start = 34.into();
        header.csum_offset = 6.into();
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend([[0x02; 12].as_slice(), &[8, 0, 0x45], &[0; 8], &[17]].concat());
        bytes.resize(HEADER_SIZE + UDP_AT + 8 + payload, 7);
        bytes
    }

    /// What a guest without offloads gets of `frames`, read at once.
    fn reworked(rework: &mut Rework, mut frames: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
        let mut results: Vec<_> = frames.iter().map(|f| i32::try_from(f.len()).unwrap()).collect();
        let memory = |bytes: &mut Vec<u8>| {
            let mut memory = FrameMemory::default();
            memory.push(bytes.as_mut_ptr(), bytes.len());
            memory
        };
        let lent: Vec<_> = frames.iter_mut().map(memory).collect();
        // SAFETY: `frames` outlives the call.
        unsafe { rework.look(&lent, &mut results) };
        let kept = results.iter().zip(&frames).take_while(|(result, _)| **result != TAKEN_BACK);
        let mut got: Vec<_> = kept.map(|(_, bytes)| bytes.clone()).collect();
        assert!(results[got.len()..].iter().all(|&result| result == TAKEN_BACK));
        loop {
            let mut room = vec![0; 1 << 17];
            let (frame, mut results) = (memory(&mut room), Vec::new());
            // SAFETY: `room` outlives the call.
            if unsafe { rework.give(&[frame], &mut results) } == 0 {
                return got;
            }
            room.truncate(usize::try_from(results[0]).unwrap());
            got.push(room);
        }
    }

    #[test]
    fn order_is_kept_and_what_is_too_fine_is_lost() {
        let lost = Arc::new(Counter::default());
        let mut rework = Rework::new(lost.clone());
        assert!(!rework.is_needed());
        rework.set_guest(1 << v::VIRTIO_NET_F_GUEST_CSUM, HEADER_SIZE);
        assert!(rework.is_needed());
        let plain = |byte| [vec![0; HEADER_SIZE], vec![byte; 60]].concat();
        let frames = vec![plain(1), super_frame(2500, 1000), plain(2), super_frame(60000, 1)];
        let got = reworked(&mut rework, frames);
        let sizes: Vec<_> = got.iter().map(|f| f.len() - HEADER_SIZE).collect();
        let headers = UDP_AT + 8;
        assert_eq!(sizes, [60, headers + 1000, headers + 1000, headers + 500, 60]);
        assert_eq!((got[0][20], got[4][20]), (1, 2));
        assert!(got.iter().all(|f| f[..HEADER_SIZE] == [0; HEADER_SIZE]));
        assert_eq!(lost.get(), 1);
        // Who takes them gets them as they are.
        rework.set_guest(u64::MAX, HEADER_SIZE);
        assert!(!rework.is_needed());
    }

    #[test]
    fn a_guest_cannot_have_long_headers_repeated() {
        let lost = Arc::new(Counter::default());
        let mut rework = Rework::new(lost.clone());
        rework.set_guest(0, HEADER_SIZE);
        // 60,000 bytes of headers before 1,000 pieces of a byte.
        let mut header = NetHeader::new_zeroed();
        header.flags = F_NEEDS_CSUM;
        header.gso_type = GSO_UDP_L4;
        header.gso_size = 1.into();
        header.csum_start = 60_000.into();
        header.csum_offset = 6.into();
        let mut frame = header.as_bytes().to_vec();
        frame.extend([&[2; 12][..], &[0x86, 0xdd, 0x60]].concat());
        frame.resize(HEADER_SIZE + 60_000 + 8 + 1000, 0);
        assert!(reworked(&mut rework, vec![frame]).is_empty());
        assert_eq!(lost.get(), 1);
        // An honest frame in the smallest pieces is far below.
        let headers = 14 + 40 + 60;
        assert!(2 * PIECES_MAX * (headers + 48) <= PIECES_BYTES_MAX);
    }

    #[test]
    fn a_checksum_is_filled_in() {
        let mut rework = Rework::new(Arc::default());
        rework.set_guest(0, HEADER_SIZE);
        let mut frame = super_frame(10, 0);
        frame[1] = GSO_NONE;
        let place = HEADER_SIZE + UDP_AT + 6;
        frame[place..place + 2].copy_from_slice(&[0x12, 0x34]);
        let got = reworked(&mut rework, vec![frame]);
        assert_eq!((sum(&got[0][HEADER_SIZE + UDP_AT..]) + 0x1234) % 0xffff, 0);
    }
}
