#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "lengths of test frames are small"
)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use proptest::prelude::*;

use super::*;

fn pair() -> (FrameStream, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    (FrameStream::new(ours.into()), theirs)
}

/// A frame's memory in pieces of `piece` bytes, header included.
fn memory(bytes: &mut [u8], piece: usize) -> FrameMemory {
    let mut frame = FrameMemory::default();
    bytes.chunks_mut(piece).for_each(|part| frame.push(part.as_mut_ptr(), part.len()));
    frame
}

fn write(stream: &mut FrameStream, frames: &mut [Vec<u8>], piece: usize) -> Vec<i32> {
    let memory: Vec<_> = frames.iter_mut().map(|f| memory(f, piece)).collect();
    // SAFETY: the frames outlive the call.
    unsafe { stream.transfer(Transfer::Write, &memory) }.to_vec()
}

fn read(stream: &mut FrameStream, count: usize, room: usize) -> (Vec<Vec<u8>>, Vec<i32>) {
    let mut frames = vec![vec![0xee; room]; count];
    let memory: Vec<_> = frames.iter_mut().map(|f| memory(f, 777)).collect();
    // SAFETY: the frames outlive the call.
    let results = unsafe { stream.transfer(Transfer::Read, &memory) }.to_vec();
    (frames, results)
}

fn frame(len: usize, seed: u8) -> Vec<u8> {
    let mut bytes = vec![0xaa; HEADER_SIZE];
    bytes.extend((0..len).map(|i| (i % 251) as u8 ^ seed));
    bytes
}

#[test]
fn a_frame_in_too_many_pieces_is_refused_and_the_connection_stays() {
    let (mut stream, mut peer) = pair();
    let mut whole = [frame(60, 1), frame(60, 2)];
    let mut pieces = frame(1012, 3);
    let [first, last] = &mut whole;
    let frames = [memory(first, 72), memory(&mut pieces, 1), memory(last, 72)];
    // SAFETY: the frames outlive the call.
    let results = unsafe { stream.transfer(Transfer::Write, &frames) }.to_vec();
    assert_eq!(results, [72, -libc::EMSGSIZE, 72]);
    assert!(stream.take_error().is_none());
    let mut wire = vec![0; 2 * (4 + 60)];
    peer.read_exact(&mut wire).unwrap();
    assert_eq!(wire[4..64], whole[0][12..]);
    assert_eq!(wire[68..], whole[1][12..]);
}

#[test]
fn frames_travel_behind_their_length_and_without_header() {
    let (mut stream, mut peer) = pair();
    let mut frames = vec![frame(60, 1), frame(1514, 2)];
    assert_eq!(write(&mut stream, &mut frames, 100), [72, 1526]);
    let mut wire = vec![0; 4 + 60 + 4 + 1514];
    peer.read_exact(&mut wire).unwrap();
    assert_eq!(wire[..4], [0, 0, 0, 60]);
    assert_eq!(wire[4..64], frames[0][12..]);
    assert_eq!(wire[64..68], 1514u32.to_be_bytes());
    assert_eq!(wire[68..], frames[1][12..]);
    peer.write_all(&wire).unwrap();
    let (got, results) = read(&mut stream, 3, 2000);
    assert_eq!(results, [72, 1526, -libc::EAGAIN]);
    assert_eq!(got[0][..12], [0; 12]);
    assert_eq!(got[1][12..1526], frames[1][12..]);
}

#[test]
fn a_full_socket_loses_nothing() {
    let (mut stream, mut peer) = pair();
    peer.set_nonblocking(true).unwrap();
    let mut wire = Vec::new();
    let mut sent = 0u8;
    while sent < 100 {
        let mut frames: Vec<_> =
            (sent..(sent + 8).min(100)).map(|n| frame(40_000 + usize::from(n), n)).collect();
        let results = write(&mut stream, &mut frames, 4096);
        let taken = results.iter().take_while(|&&r| r > 0).count();
        assert!(results[taken..].iter().all(|&r| r == -libc::EAGAIN), "{results:?}");
        sent += taken as u8;
        if taken < frames.len() {
            let mut some = vec![0; 70_001];
            let n = peer.read(&mut some).unwrap();
            wire.extend_from_slice(&some[..n]);
        }
    }
    // Whatever the last one left behind goes out with nothing new.
    for _ in 0..50 {
        write(&mut stream, &mut [], 1);
        let mut some = vec![0; 1 << 20];
        if let Ok(n) = peer.read(&mut some) {
            wire.extend_from_slice(&some[..n]);
        }
    }
    let mut rest = &wire[..];
    for n in 0..100u8 {
        let (prefix, after) = rest.split_first_chunk::<4>().unwrap();
        let len = u32::from_be_bytes(*prefix) as usize;
        assert_eq!(len, 40_000 + usize::from(n));
        assert!(after[..len] == frame(len, n)[12..], "frame {n}");
        rest = &after[len..];
    }
    assert!(rest.is_empty());
}

#[test]
fn the_end_and_nonsense_are_told_once() {
    let (mut stream, mut peer) = pair();
    peer.write_all(&[0xff, 0, 0, 0, 1]).unwrap();
    assert_eq!(read(&mut stream, 1, 100).1, [-libc::EAGAIN]);
    assert!(matches!(stream.take_error(), Some(StreamError::Length(0xff00_0000))));
    for len in [0, 13, MAX_FRAME_SIZE + 1] {
        let (mut stream, mut peer) = pair();
        peer.write_all(&u32::try_from(len).unwrap().to_be_bytes()).unwrap();
        read(&mut stream, 1, 100);
        assert!(matches!(stream.take_error(), Some(StreamError::Length(l)) if l == len));
    }
    let (mut stream, peer) = pair();
    drop(peer);
    assert_eq!(write(&mut stream, &mut [frame(60, 0)], 100), [-libc::EAGAIN]);
    assert!(matches!(stream.take_error(), Some(StreamError::Ended)));
    read(&mut stream, 1, 100);
    assert!(matches!(stream.take_error(), Some(StreamError::Ended)));
}

proptest! {
    /// However the bytes are cut into reads, the same frames come out.
    #[test]
    fn frames_are_found_wherever_reads_end(
        lens in prop::collection::vec(14usize..3000, 1..20),
        cuts in prop::collection::vec(1usize..4000, 1..20),
        count in 1usize..5,
    ) {
        let (mut stream, mut peer) = pair();
        let frames: Vec<_> = lens.iter().map(|&len| frame(len, len as u8)).collect();
        let wire: Vec<u8> = frames
            .iter()
            .flat_map(|f| [&u32::try_from(f.len() - 12).unwrap().to_be_bytes()[..], &f[12..]].concat())
            .collect();
        let mut got = Vec::new();
        let (mut rest, mut cuts) = (&wire[..], cuts.iter().cycle());
        while !rest.is_empty() {
            let (now, later) = rest.split_at((*cuts.next().unwrap()).min(rest.len()));
            peer.write_all(now).unwrap();
            rest = later;
            loop {
                let (some, results) = read(&mut stream, count, 4000);
                let taken = results.iter().take_while(|&&r| r > 0).count();
                for (frame, &len) in some.iter().zip(&results[..taken]) {
                    got.push(frame[12..len as usize].to_vec());
                }
                if taken < count {
                    break;
                }
            }
        }
        prop_assert_eq!(got.len(), frames.len());
        for (got, sent) in got.iter().zip(&frames) {
            prop_assert_eq!(&got[..], &sent[12..]);
        }
        prop_assert!(stream.take_error().is_none());
    }
}
