#![allow(unsafe_code, reason = "makes chains out of buffers that outlive them")]

use std::ffi::CStr;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{OpenOptions, stat64};
use fuse_backend_rs::api::filesystem::{FileSystem, FsOptions, ZeroCopyReader, ZeroCopyWriter};
use proptest::prelude::*;
use zerocopy::{FromBytes, IntoBytes};

use super::*;

/// One file, `file`, in a file system that knows only upstream's trait.
#[derive(Default)]
struct OneFile {
    contents: Mutex<Vec<u8>>,
    locked: AtomicBool,
}

fn attributes(ino: u64) -> stat64 {
    let mut st = wire::zeroed_stat();
    st.st_ino = ino;
    st.st_mode = libc::S_IFREG | 0o644;
    st
}

fn no<T>(errno: i32) -> io::Result<T> {
    Err(io::Error::from_raw_os_error(errno))
}

impl FileSystem for OneFile {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        Ok(capable & (FsOptions::ASYNC_READ | FsOptions::EXPORT_SUPPORT))
    }

    fn lookup(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        if parent != 1 || name != c"file" {
            return no(libc::ENOENT);
        }
        let attr_timeout = Duration::from_millis(1500);
        Ok(Entry { inode: 2, attr: attributes(2), attr_timeout, ..Entry::default() })
    }

    fn getattr(&self, _: &Context, inode: u64, _: Option<u64>) -> io::Result<(stat64, Duration)> {
        Ok((attributes(inode), Duration::ZERO))
    }

    fn open(
        &self,
        _: &Context,
        _: u64,
        _: u32,
        _: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        Ok((Some(7), OpenOptions::KEEP_CACHE, None))
    }

    fn read(
        &self,
        _: &Context,
        _: u64,
        _: u64,
        w: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        _: Option<u64>,
        _: u32,
    ) -> io::Result<usize> {
        let contents = self.contents.lock().unwrap();
        let rest = contents.get(usize::try_from(offset).unwrap()..).unwrap_or(&[]);
        let part = &rest[..rest.len().min(size as usize)];
        w.write_all(part)?;
        Ok(part.len())
    }

    fn write(
        &self,
        _: &Context,
        _: u64,
        _: u64,
        r: &mut dyn ZeroCopyReader,
        size: u32,
        _: u64,
        _: Option<u64>,
        _: bool,
        _: u32,
        _: u32,
    ) -> io::Result<usize> {
        let mut data = vec![0; size as usize];
        r.read_exact(&mut data)?;
        *self.contents.lock().unwrap() = data;
        Ok(size as usize)
    }

    fn setlk(&self, _: &Context, _: u64, _: u64, _: u64, _: FileLock, _: u32) -> io::Result<()> {
        if self.locked.load(Ordering::Relaxed) { no(libc::EAGAIN) } else { Ok(()) }
    }

    fn readdir(
        &self,
        _: &Context,
        _: u64,
        _: u64,
        _: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        for i in offset..100 {
            let name = format!("entry-{i}");
            let entry = DirEntry { ino: i + 2, offset: i + 1, type_: 8, name: name.as_bytes() };
            if add(entry)? == 0 {
                break;
            }
        }
        Ok(())
    }
}

impl Extension for OneFile {}

/// A request in pieces of `piece` bytes and room for its reply.
struct Wire {
    request: Vec<u8>,
    reply: Vec<u8>,
}

impl Wire {
    fn new(opcode: u32, unique: u64, nodeid: u64, body: &[&[u8]], room: usize) -> Self {
        let body = body.concat();
        let len = u32::try_from(40 + body.len()).unwrap();
        let head = InHeader { len, opcode, unique, nodeid, ..InHeader::default() };
        Self { request: [head.as_bytes(), &body].concat(), reply: vec![0xaa; room] }
    }

    fn chain(&mut self, piece: usize) -> Chain {
        let mut chain = Chain::new();
        for part in self.request.chunks_mut(piece) {
            // SAFETY: the buffers outlive the chain in all tests.
            unsafe { chain.readable.push(part.as_mut_ptr(), part.len()) };
        }
        for part in self.reply.chunks_mut(piece) {
            // SAFETY: as above.
            unsafe { chain.writable.push(part.as_mut_ptr(), part.len()) };
        }
        chain
    }

    fn head(&self) -> wire::OutHeader {
        wire::OutHeader::read_from_prefix(&self.reply).unwrap().0
    }

    fn body<T: FromBytes>(&self) -> T {
        T::read_from_prefix(&self.reply[16..]).unwrap().0
    }
}

fn call(server: &Server<OneFile>, wire: &mut Wire) -> Outcome {
    let outcome = server.handle(&mut wire.chain(13), &mut Scratch::default(), Wait::Allowed);
    if let Outcome::Done(n) = outcome
        && n > 0
    {
        assert_eq!(wire.head().len, n);
    }
    outcome
}

fn init(major: u32, minor: u32) -> Wire {
    let args = wire::InitIn { major, minor, max_readahead: 4096, flags: u32::MAX };
    Wire::new(26, 1, 0, &[args.as_bytes(), &u32::MAX.to_ne_bytes(), &[0; 44]], 80)
}

fn started() -> Server<OneFile> {
    let server = Server::new(OneFile::default(), Limits::default());
    call(&server, &mut init(7, 45));
    server
}

#[test]
fn a_session_begins_with_init() {
    let server = Server::new(OneFile::default(), Limits::default());
    let mut early = Wire::new(1, 5, 1, &[b"file\0"], 144);
    call(&server, &mut early);
    assert_eq!(early.head().error, -libc::EIO);

    let mut later = init(8, 0);
    call(&server, &mut later);
    assert_eq!((later.head().error, later.body::<InitOut>().major), (0, 7));
    assert_eq!(server.negotiated(), None);

    let mut old = init(7, 26);
    call(&server, &mut old);
    assert_eq!(old.head().error, -libc::EPROTO);

    let mut good = init(7, 45);
    assert_eq!(call(&server, &mut good), Outcome::Done(80));
    let out: InitOut = good.body();
    let flags = u64::from(out.flags) | u64::from(out.flags2) << 32;
    assert_eq!(server.negotiated(), Some(flags));
    assert_eq!(flags & init::EXPORT_SUPPORT, 0);
    for own in [init::ASYNC_READ, init::MAX_PAGES, init::SETXATTR_EXT, init::NO_EXPORT_SUPPORT] {
        assert_ne!(flags & own, 0, "{own:#x}");
    }
    assert_eq!(u32::from(out.max_pages) * 4096, out.max_write);
    assert_eq!(out.max_readahead, 4096);

    call(&server, &mut Wire::new(38, 9, 0, &[], 16));
    assert_eq!(server.negotiated(), None);
}

#[test]
fn lookup_and_getattr() {
    let server = started();
    let mut found = Wire::new(1, 5, 1, &[b"file\0"], 144);
    assert_eq!(call(&server, &mut found), Outcome::Done(144));
    let entry: EntryOut = found.body();
    assert_eq!((entry.nodeid, entry.attr_valid, entry.attr_valid_nsec), (2, 1, 500_000_000));
    assert_eq!(found.head(), wire::OutHeader { len: 144, error: 0, unique: 5 });

    let mut missing = Wire::new(1, 6, 1, &[b"other\0"], 144);
    assert_eq!(call(&server, &mut missing), Outcome::Done(16));
    assert_eq!(missing.head().error, -libc::ENOENT);

    let mut attr = Wire::new(3, 7, 2, &[wire::GetattrIn::default().as_bytes()], 120);
    assert_eq!(call(&server, &mut attr), Outcome::Done(120));
    assert_eq!(attr.body::<wire::AttrOut>().attr.mode, libc::S_IFREG | 0o644);
}

#[test]
fn the_unknown_and_the_malformed_get_errors() {
    let server = started();
    for (opcode, body, errno) in [
        (4000, &b"x"[..], libc::ENOSYS),
        (51, &[0; 16], libc::ENOSYS),
        (1, b"no end", libc::EIO),
        (1, b"..\0", libc::EINVAL),
        (1, b"a/b\0", libc::EINVAL),
        (3, b"short", libc::EIO),
    ] {
        let mut wire = Wire::new(opcode, 3, 1, &[body], 300);
        assert_eq!(call(&server, &mut wire), Outcome::Done(16), "{opcode} {body:?}");
        assert_eq!(wire.head().error, -errno, "{opcode} {body:?}");
    }
    // Longer than the chain.
    let mut lying = Wire::new(1, 3, 1, &[b"file\0"], 144);
    lying.request[..4].copy_from_slice(&1000u32.to_ne_bytes());
    call(&server, &mut lying);
    assert_eq!(lying.head().error, -libc::EIO);
    // No room for the entry: it must not be looked up.
    let mut narrow = Wire::new(1, 3, 1, &[b"file\0"], 143);
    call(&server, &mut narrow);
    assert_eq!(narrow.head().error, -libc::EIO);
    // Not even a header.
    let mut stub = Wire { request: vec![0; 39], reply: vec![0; 16] };
    assert_eq!(call(&server, &mut stub), Outcome::Rejected);
    // No room at all, as for FORGET.
    let mut mute = Wire::new(1, 3, 1, &[b"file\0"], 0);
    assert_eq!(call(&server, &mut mute), Outcome::Done(0));
    assert_eq!(call(&server, &mut Wire::new(2, 3, 2, &[&[1; 8]], 0)), Outcome::Done(0));
}

#[test]
fn reads_and_writes_go_through_upstream_traits() {
    let server = started();
    let data: Vec<u8> = (0..200).collect();
    let args = wire::WriteIn { fh: 7, size: 200, ..wire::WriteIn::default() };
    let mut write = Wire::new(16, 3, 2, &[args.as_bytes(), &data], 24);
    assert_eq!(call(&server, &mut write), Outcome::Done(24));
    assert_eq!(write.body::<wire::WriteOut>().size, 200);

    let args = wire::ReadIn { fh: 7, size: 150, offset: 100, ..wire::ReadIn::default() };
    let mut read = Wire::new(15, 4, 2, &[args.as_bytes()], 16 + 150);
    let mut chain = read.chain(7);
    let mut scratch = Scratch::default();
    // Upstream's trait cannot promise not to wait.
    assert_eq!(server.handle(&mut chain, &mut scratch, Wait::Never), Outcome::Slow);
    assert_eq!(server.handle(&mut chain, &mut scratch, Wait::Allowed), Outcome::Done(116));
    assert_eq!(scratch.bytes_read, 100);
    assert_eq!(read.head().len, 116);
    assert_eq!(read.reply[16..116], data[100..]);

    let lying = wire::WriteIn { fh: 7, size: 201, ..wire::WriteIn::default() };
    let mut write = Wire::new(16, 3, 2, &[lying.as_bytes(), &data], 24);
    call(&server, &mut write);
    assert_eq!(write.head().error, -libc::EIO);
}

#[test]
fn directories_are_listed_in_parts() {
    let server = started();
    let mut offset = 0;
    let mut names = 0;
    loop {
        let args = wire::ReadIn { size: 500, offset, ..wire::ReadIn::default() };
        let mut list = Wire::new(28, 4, 1, &[args.as_bytes()], 16 + 500);
        let Outcome::Done(n) = call(&server, &mut list) else { panic!() };
        let mut rest = &list.reply[16..n as usize];
        if rest.is_empty() {
            break;
        }
        while !rest.is_empty() {
            let (head, _) = wire::Dirent::read_from_prefix(rest).unwrap();
            let name = &rest[24..24 + head.namelen as usize];
            assert_eq!(name, format!("entry-{names}").as_bytes());
            rest = &rest[wire::dirent_size(name.len())..];
            offset = head.off;
            names += 1;
        }
    }
    assert_eq!(names, 100);
}

#[test]
fn a_lock_is_waited_for_until_it_is_free_or_the_guest_gives_up() {
    let server = started();
    server.fs.locked.store(true, Ordering::Relaxed);
    let body = wire::LkIn::default();
    let mut first = Wire::new(33, 10, 2, &[body.as_bytes()], 16);
    let mut second = Wire::new(33, 12, 2, &[body.as_bytes()], 16);
    for _ in 0..2 {
        assert_eq!(call(&server, &mut first), Outcome::Locked { unique: 10 });
        assert_eq!(call(&server, &mut second), Outcome::Locked { unique: 12 });
    }
    call(&server, &mut Wire::new(36, 0, 0, &[12u64.as_bytes()], 0));
    assert_eq!(call(&server, &mut second), Outcome::Done(16));
    assert_eq!(second.head().error, -libc::EINTR);
    assert_eq!(call(&server, &mut first), Outcome::Locked { unique: 10 });
    server.fs.locked.store(false, Ordering::Relaxed);
    assert_eq!(call(&server, &mut first), Outcome::Done(16));
    assert_eq!(first.head().error, 0);
    assert!(server.locks.is_empty());
}

proptest! {
    #[test]
    fn no_message_does_harm(
        at in 0..Opcode::ALL.len(),
        body in proptest::collection::vec(any::<u8>(), 0..160),
        room in 0usize..400,
        piece in 1usize..60,
        lie in -3i32..3,
    ) {
        let server = started();
        let mut wire = Wire::new(Opcode::ALL[at] as u32, 77, 1, &[&body], room);
        let len = u32::try_from(40 + body.len()).unwrap().wrapping_add_signed(lie);
        wire.request[..4].copy_from_slice(&len.to_ne_bytes());
        let outcome =
            server.handle(&mut wire.chain(piece), &mut Scratch::default(), Wait::Allowed);
        if let Outcome::Done(n) = outcome {
            prop_assert!(n as usize <= room);
            prop_assert!(n == 0 || n >= 16);
            if n > 0 {
                prop_assert_eq!(wire.head().len, n);
                prop_assert_eq!(wire.head().unique, 77);
                prop_assert!(wire.head().error <= 0);
            }
            // Nothing is written past the reply (reads fill before the length is known).
            prop_assert!(wire.reply[n as usize..].iter().all(|&b| b == 0xaa));
        }
    }
}
