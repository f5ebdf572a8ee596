//! Every message that a front end can send, in every state of a session and every shape: each gets exactly
//! the answers that the specification gives it, and one that is refused changes nothing.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use outboard_common::device::{Device, WorkerBody};
use outboard_common::sys::EventFd;
use outboard_common::vhost_user::session::{Ended, Session, SessionOptions};
use testkit::driver::{Buffer, GuestQueue, RingFormat};
use testkit::frontend::{
    AttachOptions, F_PROTOCOL_FEATURES, FLAG_NEED_REPLY, FLAG_REPLY, FLAG_VERSION, FrontEnd,
    Inflight, Message,
};
use testkit::inverter::Inverter;
use testkit::memory::GuestRam;
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;

const TIMEOUT: Duration = Duration::from_secs(10);
/// Where no guest memory is.
const ELSEWHERE: u64 = 1 << 40;

/// An inverter with everything that a device can have.
struct Complete;

impl Device for Complete {
    fn name(&self) -> &str {
        "complete"
    }
    fn queue_count(&self) -> u16 {
        Inverter.queue_count()
    }
    fn features(&self) -> u64 {
        Inverter.features()
    }
    fn protocol_features(&self) -> u64 {
        (Protocol::MTU | Protocol::RARP).bits()
    }
    fn read_config(&self, _offset: u32, _out: &mut [u8]) {}
    fn write_config(
        &self,
        _offset: u32,
        _data: &[u8],
    ) -> Result<(), outboard_common::device::ConfigError> {
        Ok(())
    }
    fn worker_of(&self, queue: u16) -> usize {
        Inverter.worker_of(queue)
    }
    fn worker(&self, worker: usize) -> anyhow::Result<WorkerBody> {
        Inverter.worker(worker)
    }
    fn set_mtu(&self, _mtu: u16) -> bool {
        true
    }
    fn send_rarp(&self, _mac: [u8; 6]) -> bool {
        true
    }
    fn shmem_regions(&self) -> Vec<u64> {
        vec![1 << 20]
    }
    fn save(&self, _to: &mut dyn Write) -> anyhow::Result<()> {
        Ok(())
    }
    fn load(&self, _from: &mut dyn Read) -> anyhow::Result<()> {
        Ok(())
    }
}

/// What has been said before the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing.
    Fresh,
    /// Features, and protocol features without REPLY_ACK.
    Quiet,
    /// All features.
    Acknowledging,
    /// All features, and ring 0 runs.
    Running,
}

const STATES: [State; 4] = [State::Fresh, State::Quiet, State::Acknowledging, State::Running];

/// How the message is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    Right,
    /// With bytes after its body, as a later version may have.
    Long,
    Short,
    /// With a descriptor too many.
    More,
    /// With a descriptor too few.
    Fewer,
}

const SHAPES: [Shape; 5] = [Shape::Right, Shape::Long, Shape::Short, Shape::More, Shape::Fewer];

/// The answer of its own that a message has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    /// None: acknowledged where that was agreed on and asked for.
    None,
    /// A number; when it is refused, this one.
    Number(u64),
    /// 0 or an error code, if LOG_SHMFD was agreed on; else as `None`.
    Log,
    /// So many bytes; when it is refused, so many.
    Bytes(usize, usize),
}

/// What a message does when it is sent right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Done,
    /// Not while a ring runs.
    DoneAtRest,
    Refused,
}

/// What comes with a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fd {
    No,
    /// One that is not looked at.
    Ignored,
    /// A memory file of 64 KiB.
    Memory,
    Event,
    Socket,
    /// The end of a pipe that is written to.
    Pipe,
}

struct Row {
    code: u32,
    name: &'static str,
    body: Vec<u8>,
    fd: Fd,
    answer: Answer,
    result: Outcome,
}

fn row(
    code: u32,
    name: &'static str,
    body: Vec<u8>,
    (fd, answer, result): (Fd, Answer, Outcome),
) -> Row {
    Row { code, name, body, fd, answer, result }
}

fn longs<const N: usize>(values: [u64; N]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_ne_bytes()).collect()
}

fn ints<const N: usize>(values: [u32; N]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_ne_bytes()).collect()
}

/// A region of 64 KiB where there is none.
fn region() -> Vec<u8> {
    longs([ELSEWHERE, 1 << 16, ELSEWHERE, 0])
}

/// The description of an inflight file for a ring of 16.
fn inflight() -> Vec<u8> {
    [longs([1 << 16, 0]), ints([1 | 16 << 16, 0])].concat()
}

/// A vring's number of the messages that bring a descriptor: ring 1, which never runs.
fn ring_1() -> Vec<u8> {
    longs([1])
}

/// The messages of features, memory and rings.
fn rings() -> Vec<Row> {
    use self::{Answer as A, Fd, Outcome as R};
    let done = (Fd::No, A::None, R::Done);
    let number = (Fd::No, A::Number(0), R::Done);
    let addresses = [ints([1, 0]), longs([ELSEWHERE; 4])].concat();
    let table = [ints([1, 0]), region()].concat();
    vec![
        row(1, "GET_FEATURES", vec![], number),
        row(2, "SET_FEATURES", longs([F_PROTOCOL_FEATURES]), done),
        row(3, "SET_OWNER", vec![], done),
        row(4, "RESET_OWNER", vec![], done),
        row(5, "SET_MEM_TABLE", table, (Fd::Memory, A::None, R::Done)),
        row(6, "SET_LOG_BASE", longs([1 << 16, 0]), (Fd::Memory, A::Log, R::Done)),
        row(7, "SET_LOG_FD", vec![], (Fd::Event, A::None, R::Done)),
        row(8, "SET_VRING_NUM", ints([1, 64]), done),
        row(9, "SET_VRING_ADDR", addresses, done),
        row(10, "SET_VRING_BASE", ints([1, 0]), done),
        row(11, "GET_VRING_BASE", ints([1, 0]), (Fd::No, A::Bytes(8, 8), R::Done)),
        row(12, "SET_VRING_KICK", ring_1(), (Fd::Event, A::None, R::Done)),
        row(13, "SET_VRING_CALL", ring_1(), (Fd::Event, A::None, R::Done)),
        row(14, "SET_VRING_ERR", ring_1(), (Fd::Event, A::None, R::Done)),
        row(15, "GET_PROTOCOL_FEATURES", vec![], number),
        row(16, "SET_PROTOCOL_FEATURES", longs([Protocol::REPLY_ACK.bits()]), done),
        row(17, "GET_QUEUE_NUM", vec![], number),
        row(18, "SET_VRING_ENABLE", ints([1, 1]), done),
        row(35, "VRING_KICK", ints([1, 0]), done),
        row(36, "GET_MAX_MEM_SLOTS", vec![], number),
        row(37, "ADD_MEM_REG", [longs([0]), region()].concat(), (Fd::Memory, A::None, R::Done)),
        row(38, "REM_MEM_REG", [longs([0]), region()].concat(), (Fd::Ignored, A::None, R::Refused)),
    ]
}

/// The messages of the device, and those that nothing here has.
fn device() -> Vec<Row> {
    use self::{Answer as A, Fd, Outcome as R};
    let done = (Fd::No, A::None, R::Done);
    let number = (Fd::No, A::Number(0), R::Done);
    let unknown = (Fd::Ignored, A::None, R::Refused);
    let descriptor = (Fd::Ignored, A::Bytes(0, 0), R::Refused);
    let moved = (Fd::Pipe, A::Number(0x101), R::DoneAtRest);
    vec![
        row(19, "SEND_RARP", longs([2]), done),
        row(20, "NET_SET_MTU", longs([1500]), done),
        row(21, "SET_BACKEND_REQ_FD", vec![], (Fd::Socket, A::None, R::Done)),
        row(22, "IOTLB_MSG", longs([0, 4096, 0, 3 | 2 << 8]), (Fd::No, A::Number(1), R::Done)),
        row(23, "SET_VRING_ENDIAN", ints([1, 0]), unknown),
        row(24, "GET_CONFIG", ints([0, 8, 0, 0, 0]), (Fd::No, A::Bytes(20, 0), R::Done)),
        row(25, "SET_CONFIG", ints([0, 4, 0, 1]), done),
        row(26, "CREATE_CRYPTO_SESSION", vec![0; 64], descriptor),
        row(27, "CLOSE_CRYPTO_SESSION", longs([0]), unknown),
        row(28, "POSTCOPY_ADVISE", vec![], descriptor),
        row(29, "POSTCOPY_LISTEN", vec![], unknown),
        row(30, "POSTCOPY_END", vec![], (Fd::Ignored, A::Number(1), R::Refused)),
        row(31, "GET_INFLIGHT_FD", inflight(), (Fd::No, A::Bytes(24, 24), R::Done)),
        row(32, "SET_INFLIGHT_FD", inflight(), (Fd::Memory, A::None, R::Done)),
        row(33, "GPU_SET_SOCKET", vec![], unknown),
        row(34, "RESET_DEVICE", vec![], done),
        row(39, "SET_STATUS", longs([15]), done),
        row(40, "GET_STATUS", vec![], number),
        row(41, "GET_SHARED_OBJECT", vec![0; 16], descriptor),
        row(42, "SET_DEVICE_STATE_FD", ints([0, 0]), moved),
        row(43, "CHECK_DEVICE_STATE", vec![], (Fd::No, A::Number(1), R::Refused)),
        row(44, "GET_SHMEM_CONFIG", vec![], (Fd::No, A::Bytes(2056, 2056), R::Done)),
        row(45, "a message to come", longs([0]), unknown),
        row(0, "NONE", vec![], unknown),
    ]
}

/// A session in some state.
struct Stage {
    front_end: FrontEnd,
    thread: JoinHandle<Ended>,
    /// While a ring runs.
    ring: Option<(Arc<GuestRam>, GuestQueue, Option<Inflight>)>,
}

impl Stage {
    fn set(state: State) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let metrics = vec![Arc::default(), Arc::default()];
        let thread = std::thread::spawn(move || {
            let session =
                Session::new(Arc::new(Complete), theirs, metrics, SessionOptions::default());
            session.serve(&EventFd::new().unwrap())
        });
        let mut front_end = FrontEnd::from_stream(ours).unwrap();
        let mut ring = None;
        match state {
            State::Fresh => {}
            State::Quiet | State::Acknowledging => {
                let without = if state == State::Quiet { Protocol::REPLY_ACK.bits() } else { 0 };
                front_end.negotiate(RingFormat::Split.features(), !without).unwrap();
            }
            State::Running => {
                let ram = GuestRam::new(1 << 20).unwrap();
                let options =
                    AttachOptions { queue_size: 16, ..AttachOptions::new(RingFormat::Split) };
                let (mut queues, inflight) = front_end.attach(&ram, &options).unwrap();
                ring = Some((ram, queues.remove(0), inflight));
            }
        }
        Self { front_end, thread, ring }
    }

    /// Everything that comes for a message, until a question after it is answered.
    fn answers(&self, row: &Row, shape: Shape, need_reply: bool) -> Vec<Message> {
        let mut body = row.body.clone();
        match shape {
            Shape::Long => body.extend([0; 4]),
            Shape::Short => body.truncate(body.len() / 2),
            Shape::Right | Shape::More | Shape::Fewer => {}
        }
        let wanted = usize::from(!matches!(row.fd, Fd::No | Fd::Ignored));
        let count = match shape {
            Shape::More => wanted + 1,
            Shape::Fewer => 0,
            Shape::Right | Shape::Long | Shape::Short => wanted,
        };
        let fds: Vec<OwnedFd> = (0..count).map(|_| descriptor(row.fd)).collect();
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let wire = self.front_end.wire();
        let flags = if need_reply { FLAG_NEED_REPLY } else { 0 };
        wire.send(row.code, flags, &body, &fds).unwrap();
        let probe = if row.code == 17 { 36 } else { 17 };
        wire.send(probe, 0, &[], &[]).unwrap();
        let mut answers = Vec::new();
        loop {
            let message = wire.receive().unwrap().expect("the session goes on");
            assert_eq!(message.flags, FLAG_VERSION | FLAG_REPLY);
            if message.request == probe {
                return answers;
            }
            assert_eq!(message.request, row.code);
            answers.push(message);
        }
    }

    /// The ring works, if there is one; then the front end leaves.
    fn leave(mut self, works: bool) {
        if let Some((ram, queue, _)) = self.ring.as_mut().filter(|_| works) {
            let at = ram.alloc(128, 64).unwrap();
            ram.fill(at, 64, 0x5a);
            assert!(queue.add(&[Buffer::readable(at, 64), Buffer::writable(at + 64, 64)], 0));
            queue.kick();
            assert_eq!(queue.wait(TIMEOUT).unwrap().len, 64);
            assert_eq!(ram.bytes(at + 64, 64), [!0x5a; 64]);
        }
        drop(self.front_end);
        assert!(matches!(self.thread.join().unwrap(), Ended::FrontendLeft));
    }
}

fn descriptor(fd: Fd) -> OwnedFd {
    match fd {
        Fd::Memory => {
            let file = rustix::fs::memfd_create("walk", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
            rustix::fs::ftruncate(&file, 1 << 16).unwrap();
            file
        }
        Fd::Socket => UnixStream::pair().unwrap().0.into(),
        Fd::Pipe => rustix::pipe::pipe().unwrap().1,
        Fd::Event | Fd::Ignored | Fd::No => {
            rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap()
        }
    }
}

/// Whether the message is to be carried out.
fn is_done(row: &Row, state: State, shape: Shape) -> bool {
    let possible = match row.result {
        Outcome::Done => true,
        Outcome::DoneAtRest => state != State::Running,
        Outcome::Refused => false,
    };
    possible && matches!(shape, Shape::Right | Shape::Long)
}

/// The answers that there must be: their sizes, and the number in them if that is known.
fn expected(row: &Row, state: State, done: bool, need_reply: bool) -> Option<(usize, Option<u64>)> {
    // SET_PROTOCOL_FEATURES itself is acknowledged by what it agrees on.
    let agreed = matches!(state, State::Acknowledging | State::Running) || row.code == 16 && done;
    let status = Some(u64::from(!done));
    match row.answer {
        Answer::Log if state != State::Fresh => Some((8, status)),
        Answer::None | Answer::Log => (agreed && need_reply).then_some((8, status)),
        Answer::Number(refusal) => Some((8, (!done).then_some(refusal))),
        Answer::Bytes(answer, refusal) => Some((if done { answer } else { refusal }, None)),
    }
}

fn walk(rows: &[Row]) {
    for row in rows {
        for (state, shape) in STATES.iter().flat_map(|&s| SHAPES.map(|shape| (s, shape))) {
            let has_fd = !matches!(row.fd, Fd::No | Fd::Ignored);
            if shape == Shape::Short && row.body.is_empty() || shape == Shape::Fewer && !has_fd {
                continue;
            }
            for need_reply in [false, true] {
                let what = format!("{} {state:?} {shape:?} need_reply {need_reply}", row.name);
                let stage = Stage::set(state);
                let done = is_done(row, state, shape);
                let answers = stage.answers(row, shape, need_reply);
                match expected(row, state, done, need_reply) {
                    None => assert!(answers.is_empty(), "{what}: an answer that nobody asked for"),
                    Some((size, number)) => {
                        assert_eq!(answers.len(), 1, "{what}");
                        assert_eq!(answers[0].body.len(), size, "{what}");
                        if let Some(number) = number {
                            assert_eq!(answers[0].as_u64().unwrap(), number, "{what}");
                        }
                        // A file is what GET_INFLIGHT_FD is for; nothing else brings one.
                        assert_eq!(answers[0].fds.len(), usize::from(row.code == 31 && done));
                    }
                }
                stage.leave(!done);
            }
        }
    }
}

#[test]
fn every_message_about_rings_is_answered_as_specified() {
    walk(&rings());
}

#[test]
fn every_message_about_the_device_is_answered_as_specified() {
    walk(&device());
}

/// None is left out.
#[test]
fn the_walk_has_every_message() {
    let mut codes: Vec<u32> = rings().iter().chain(&device()).map(|row| row.code).collect();
    codes.sort_unstable();
    assert_eq!(codes, (0..=45).collect::<Vec<_>>());
}
