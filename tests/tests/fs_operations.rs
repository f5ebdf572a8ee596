//! Every FUSE operation that a Linux 7.2 guest can send, as a raw message through the rings of a real,
//! confined daemon. The last line of the test knows whether one was forgotten.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::PathBuf;

use testkit::daemon::Daemon;
use testkit::driver::fs::{Answer, FsClient, Message};
use virtiofsd::fuse::Opcode;
use virtiofsd::fuse::wire::{self, EntryOut, OpenOut};
use zerocopy::{FromBytes, Immutable, IntoBytes};

const ROOT: u64 = 1;
const MIB: u64 = 1 << 20;

/// A guest that remembers which operations it has sent.
struct Guest {
    client: FsClient,
    sent: BTreeSet<u32>,
    shared: PathBuf,
    _daemon: Daemon,
    _dir: tempfile::TempDir,
}

/// A body of a fixed part and what follows it.
fn body<T: IntoBytes + Immutable>(fixed: &T, rest: &[&[u8]]) -> Vec<u8> {
    [&[fixed.as_bytes()][..], rest].concat().concat()
}

impl Guest {
    fn new(arguments: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let shared = dir.path().join("shared");
        fs::create_dir(&shared).unwrap();
        let shared_dir = format!("--shared-dir={}", shared.display());
        let arguments = [&[shared_dir.as_str()][..], arguments].concat();
        let daemon = Daemon::start("virtiofsd", &dir.path().join("s"), &arguments).unwrap();
        let client = FsClient::start(daemon.socket(), 1, 2).unwrap();
        let sent = [Opcode::Init as u32].into();
        Self { client, sent, shared, _daemon: daemon, _dir: dir }
    }

    fn call(&mut self, opcode: Opcode, nodeid: u64, body: Vec<u8>) -> Answer {
        self.sent.insert(opcode as u32);
        let message = Message { opcode: opcode as u32, nodeid, body, ..Message::default() };
        self.client.call(message).unwrap()
    }

    /// The reply to an operation that must succeed.
    fn get<T: FromBytes>(&mut self, opcode: Opcode, nodeid: u64, body: Vec<u8>) -> T {
        let answer = self.call(opcode, nodeid, body);
        answer.get().unwrap_or_else(|error| panic!("{opcode:?}: {error:#}"))
    }

    /// An operation that succeeds with nothing to say.
    fn ok(&mut self, opcode: Opcode, nodeid: u64, body: Vec<u8>) {
        let answer = self.call(opcode, nodeid, body);
        assert_eq!((answer.errno, answer.len), (0, 16), "{opcode:?}");
    }

    fn fails(&mut self, opcode: Opcode, nodeid: u64, body: Vec<u8>, errno: i32) {
        let answer = self.call(opcode, nodeid, body);
        assert_eq!(answer.errno, errno, "{opcode:?}");
    }

    /// A message without a reply, on the high-priority queue.
    fn urgent(&mut self, opcode: Opcode, nodeid: u64, body: Vec<u8>) {
        self.sent.insert(opcode as u32);
        let message = Message { opcode: opcode as u32, nodeid, body, ..Message::default() };
        self.client.add(0, 1, &message).unwrap();
        self.client.queues[0].kick();
        self.client.queues[0].wait(std::time::Duration::from_secs(10)).unwrap();
    }

    fn lookup(&mut self, parent: u64, name: &str) -> u64 {
        self.sent.insert(Opcode::Lookup as u32);
        self.client.lookup(parent, name).unwrap()
    }

    fn create(&mut self, name: &str) -> (u64, u64) {
        let args = wire::CreateIn { flags: 0o2, mode: 0o100_644, ..Default::default() };
        let answer = self.call(Opcode::Create, ROOT, body(&args, &[name.as_bytes(), b"\0"]));
        (answer.u64_at(0).unwrap(), answer.u64_at(size_of::<EntryOut>()).unwrap())
    }

    fn write(&mut self, node: u64, fh: u64, offset: u64, data: &[u8]) {
        self.sent.insert(Opcode::Write as u32);
        let at = self.client.data_at(0).0;
        self.client.ram().write(at, data);
        let size = u32::try_from(data.len()).unwrap();
        let answer = self.client.call(Message::write(node, fh, offset, size)).unwrap();
        assert_eq!(answer.get::<wire::WriteOut>().unwrap().size, size);
    }

    fn read(&mut self, node: u64, fh: u64, offset: u64, size: u32) -> Vec<u8> {
        self.sent.insert(Opcode::Read as u32);
        let answer = self.client.call(Message::read(node, fh, offset, size)).unwrap();
        assert_eq!(answer.errno, 0);
        let at = self.client.data_at(0).1;
        self.client.ram().bytes(at, usize::try_from(answer.len - 16).unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.shared.join(name)
    }
}

/// Names: what makes, finds, moves and removes them.
fn names(guest: &mut Guest) {
    let mkdir = wire::MkdirIn { mode: 0o755, umask: 0 };
    let dir: EntryOut = guest.get(Opcode::Mkdir, ROOT, body(&mkdir, &[b"dir\0"]));
    assert_eq!(dir.attr.mode, 0o040_755);
    let mknod = wire::MknodIn { mode: libc::S_IFIFO | 0o600, ..Default::default() };
    guest.get::<EntryOut>(Opcode::Mknod, dir.nodeid, body(&mknod, &[b"fifo\0"]));
    assert!(fs::symlink_metadata(guest.path("dir/fifo")).unwrap().file_type().is_fifo());
    let link: EntryOut = guest.get(Opcode::Symlink, ROOT, b"link\0the target\0".to_vec());
    let target = guest.call(Opcode::Readlink, link.nodeid, Vec::new());
    assert_eq!(target.body, b"the target");
    let fifo = guest.lookup(dir.nodeid, "fifo");
    let hard: EntryOut = guest.get(Opcode::Link, ROOT, body(&fifo, &[b"hard\0"]));
    assert_eq!((hard.nodeid, hard.attr.nlink), (fifo, 2));
    guest.ok(Opcode::Rename, ROOT, body(&dir.nodeid, &[b"hard\0moved\0"]));
    assert!(guest.path("dir/moved").exists());
    guest.ok(Opcode::Unlink, dir.nodeid, b"fifo\0".to_vec());
    guest.fails(Opcode::Rmdir, ROOT, b"dir\0".to_vec(), libc::ENOTEMPTY);
    guest.ok(Opcode::Unlink, dir.nodeid, b"moved\0".to_vec());
    guest.ok(Opcode::Rmdir, ROOT, b"dir\0".to_vec());
    guest.ok(Opcode::Unlink, ROOT, b"link\0".to_vec());
    guest.urgent(Opcode::Forget, link.nodeid, 1_u64.as_bytes().to_vec());
    let head = wire::BatchForgetIn { count: 2, dummy: 0 };
    let one = |nodeid, nlookup| wire::ForgetOne { nodeid, nlookup };
    let list = [one(fifo, 3), one(dir.nodeid, 1)];
    guest.urgent(Opcode::BatchForget, 0, body(&head, &[list.as_bytes()]));
    let getattr = wire::GetattrIn::default().as_bytes().to_vec();
    for gone in [fifo, dir.nodeid, link.nodeid] {
        guest.fails(Opcode::Getattr, gone, getattr.clone(), libc::ESTALE);
    }
}

/// RENAME2 with each of its flags.
fn renames(guest: &mut Guest) {
    for name in ["a", "b"] {
        fs::write(guest.path(name), name).unwrap();
    }
    let mut rename = |flags, names: &[u8]| {
        let args = wire::Rename2In { newdir: ROOT, flags, padding: 0 };
        guest.call(Opcode::Rename2, ROOT, body(&args, &[names])).errno
    };
    assert_eq!(rename(libc::RENAME_NOREPLACE, b"a\0b\0"), libc::EEXIST);
    assert_eq!(rename(libc::RENAME_EXCHANGE, b"a\0b\0"), 0);
    assert_eq!(rename(libc::RENAME_EXCHANGE | libc::RENAME_NOREPLACE, b"a\0b\0"), libc::EINVAL);
    assert_eq!(rename(1 << 9, b"a\0b\0"), libc::EINVAL);
    assert_eq!(rename(libc::RENAME_NOREPLACE, b"a\0c\0"), 0);
    assert_eq!(rename(libc::RENAME_WHITEOUT, b"c\0d\0"), 0);
    assert_eq!(rename(0, b"d\0b\0"), 0);
    assert_eq!(fs::read(guest.path("b")).unwrap(), b"b", "exchanged, and replaced");
    let whiteout = fs::symlink_metadata(guest.path("c")).unwrap();
    assert!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0);
    for name in ["b", "c"] {
        guest.ok(Opcode::Unlink, ROOT, [name.as_bytes(), b"\0"].concat());
    }
}

/// Attributes, plain, extended and of the file system.
fn attributes(guest: &mut Guest, node: u64, fh: u64) {
    let set = wire::SetattrIn {
        valid: 1 << 3 | 1 << 0 | 1 << 5,
        size: 5,
        mode: 0o640,
        mtime: 77,
        ..Default::default()
    };
    let now: wire::AttrOut = guest.get(Opcode::Setattr, node, set.as_bytes().to_vec());
    assert_eq!((now.attr.size, now.attr.mode & 0o777, now.attr.mtime), (5, 0o640, 77));
    let get = wire::GetattrIn { getattr_flags: wire::GETATTR_FH, fh, ..Default::default() };
    let now: wire::AttrOut = guest.get(Opcode::Getattr, node, get.as_bytes().to_vec());
    assert_eq!((now.attr.size, now.attr.ino), (5, fs::metadata(guest.path("file")).unwrap().ino()));

    let statx = wire::StatxIn { sx_mask: libc::STATX_BTIME, ..Default::default() };
    let extended: wire::StatxOut = guest.get(Opcode::Statx, node, statx.as_bytes().to_vec());
    let born = fs::metadata(guest.path("file")).unwrap().created().unwrap();
    let born = born.duration_since(std::time::UNIX_EPOCH).unwrap();
    assert_ne!(extended.stat.mask & libc::STATX_BTIME, 0);
    assert_eq!(extended.stat.btime.tv_sec.cast_unsigned(), born.as_secs());
    assert_eq!((extended.stat.size, extended.stat.mtime.tv_sec), (5, 77));

    let statfs: wire::Kstatfs = guest.get(Opcode::Statfs, ROOT, Vec::new());
    assert!(statfs.blocks > 0 && statfs.namelen == 255);
    let access = |mask| wire::AccessIn { mask, padding: 0 }.as_bytes().to_vec();
    guest.ok(Opcode::Access, node, access(4));
    guest.fails(Opcode::Access, node, access(0xff), libc::EINVAL);

    // The long form, since INIT agreed on SETXATTR_EXT.
    let head = wire::SetxattrIn { size: 5, flags: 0 };
    let ext = wire::SetxattrExt::default();
    let value = body(&head, &[ext.as_bytes(), b"user.key\0", b"value"]);
    guest.ok(Opcode::Setxattr, node, value);
    let size = |size| wire::GetxattrSize { size, padding: 0 };
    let length: wire::GetxattrSize =
        guest.get(Opcode::Getxattr, node, body(&size(0), &[b"user.key\0"]));
    assert_eq!(length.size, 5);
    guest.fails(Opcode::Getxattr, node, body(&size(4), &[b"user.key\0"]), libc::ERANGE);
    assert_eq!(
        guest.call(Opcode::Getxattr, node, body(&size(64), &[b"user.key\0"])).body,
        b"value"
    );
    assert_eq!(guest.call(Opcode::Listxattr, node, body(&size(64), &[])).body, b"user.key\0");
    guest.ok(Opcode::Removexattr, node, b"user.key\0".to_vec());
    guest.fails(Opcode::Getxattr, node, body(&size(9), &[b"user.key\0"]), libc::ENODATA);
}

/// FALLOCATE with each mode, and LSEEK over what it leaves.
fn space(guest: &mut Guest, node: u64, fh: u64) {
    let mut allocate = |mode: i32, offset, length| {
        let mode = mode.cast_unsigned();
        let args = wire::FallocateIn { fh, offset, length, mode, padding: 0 };
        guest.call(Opcode::Fallocate, node, args.as_bytes().to_vec()).errno
    };
    assert_eq!(allocate(0, 0, 4 * MIB), 0);
    assert_eq!(allocate(libc::FALLOC_FL_KEEP_SIZE, 4 * MIB, MIB), 0);
    assert_eq!(allocate(libc::FALLOC_FL_PUNCH_HOLE, 0, MIB), libc::EOPNOTSUPP);
    assert_eq!(allocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, MIB, MIB), 0);
    assert_eq!(allocate(0, 0, 0), libc::EINVAL);
    assert_eq!(allocate(0, u64::MAX, 1), libc::EINVAL);
    // Those that not every file system has: what the host's says is what the guest is told.
    let rest =
        [libc::FALLOC_FL_ZERO_RANGE, libc::FALLOC_FL_COLLAPSE_RANGE, libc::FALLOC_FL_INSERT_RANGE];
    let told: Vec<i32> = rest.iter().map(|mode| allocate(*mode, MIB, MIB)).collect();
    let host = fs::File::create(guest.path("other")).unwrap();
    host.set_len(4 * MIB).unwrap();
    let said = rest.map(|mode| {
        let mode = rustix::fs::FallocateFlags::from_bits_retain(mode.cast_unsigned());
        rustix::fs::fallocate(&host, mode, MIB, MIB).map_or_else(|e| e.raw_os_error(), |()| 0)
    });
    assert_eq!(told, said);
    guest.ok(Opcode::Unlink, ROOT, b"other\0".to_vec());

    guest.write(node, fh, 8 * MIB, b"far");
    let mut seek = |offset, whence: i32| {
        let whence = whence.cast_unsigned();
        let args = wire::LseekIn { fh, offset, whence, padding: 0 };
        guest.call(Opcode::Lseek, node, args.as_bytes().to_vec())
    };
    assert_eq!(seek(5 * MIB, libc::SEEK_DATA).u64_at(0).unwrap(), 8 * MIB);
    assert!(seek(0, libc::SEEK_HOLE).u64_at(0).unwrap() < 8 * MIB);
    assert_eq!(seek(9 * MIB, libc::SEEK_DATA).errno, libc::ENXIO);
}

/// COPY_FILE_RANGE in both forms: the old one's reply has 32 bits, the new one's 64.
fn copies(guest: &mut Guest, node: u64, fh: u64) {
    guest.write(node, fh, 0, b"0123456789");
    let (other, other_fh) = guest.create("copy");
    let args = |off_out, len| wire::CopyFileRangeIn {
        fh_in: fh,
        off_in: 2,
        nodeid_out: other,
        fh_out: other_fh,
        off_out,
        len,
        flags: 0,
    };
    let narrow = args(0, 4).as_bytes().to_vec();
    let copied: wire::WriteOut = guest.get(Opcode::CopyFileRange, node, narrow);
    assert_eq!(copied.size, 4);
    let wide = guest.call(Opcode::CopyFileRange64, node, args(4, 3).as_bytes().to_vec());
    assert_eq!((wide.len, wide.u64_at(0).unwrap()), (16 + 8, 3));
    assert_eq!(fs::read(guest.path("copy")).unwrap(), b"2345234");
    // More than there is, and more than 32 bits can say.
    let rest = args(7, u64::MAX >> 1).as_bytes().to_vec();
    let wide = guest.call(Opcode::CopyFileRange64, node, rest);
    assert_eq!(wide.u64_at(0).unwrap(), 8 * MIB + 3 - 2);
    let release = wire::ReleaseIn { fh: other_fh, ..Default::default() };
    guest.ok(Opcode::Release, other, release.as_bytes().to_vec());
    guest.ok(Opcode::Unlink, ROOT, b"copy\0".to_vec());
}

fn locks(guest: &mut Guest, node: u64, fh: u64) {
    let lock = |owner, lock_type: i32| {
        let lock_type = lock_type.cast_unsigned();
        let lk = wire::FileLock { start: 0, end: i64::MAX.cast_unsigned(), lock_type, pid: 9 };
        wire::LkIn { fh, owner, lk, ..Default::default() }.as_bytes().to_vec()
    };
    guest.ok(Opcode::Setlk, node, lock(1, libc::F_WRLCK));
    guest.fails(Opcode::Setlk, node, lock(2, libc::F_RDLCK), libc::EAGAIN);
    let held: wire::FileLock = guest.get(Opcode::Getlk, node, lock(2, libc::F_RDLCK));
    assert_eq!((held.lock_type, held.pid), (libc::F_WRLCK.cast_unsigned(), 9));
    // The one that waits is given up.
    guest.sent.insert(Opcode::Setlkw as u32);
    let body = lock(2, libc::F_WRLCK);
    let wait = Message { opcode: Opcode::Setlkw as u32, nodeid: node, body, ..Message::default() };
    let unique = guest.client.add(1, 0, &wait).unwrap();
    guest.client.queues[1].kick();
    std::thread::sleep(std::time::Duration::from_millis(20));
    guest.urgent(Opcode::Interrupt, 0, unique.as_bytes().to_vec());
    let used = guest.client.queues[1].wait(std::time::Duration::from_secs(10)).unwrap();
    assert_eq!(guest.client.answer(0, used.len).unwrap().errno, libc::EINTR);
    guest.ok(Opcode::Setlk, node, lock(1, libc::F_UNLCK));
    guest.ok(Opcode::Setlkw, node, lock(2, libc::F_WRLCK));
    let flush = wire::FlushIn { fh, lock_owner: 2, ..Default::default() };
    guest.ok(Opcode::Flush, node, flush.as_bytes().to_vec());
    guest.ok(Opcode::Setlk, node, lock(1, libc::F_WRLCK));
}

fn directories(guest: &mut Guest) {
    let opened: OpenOut =
        guest.get(Opcode::Opendir, ROOT, wire::OpenIn::default().as_bytes().to_vec());
    let read = wire::ReadIn { fh: opened.fh, size: 2048, ..Default::default() };
    let plain = guest.call(Opcode::Readdir, ROOT, read.as_bytes().to_vec());
    assert!(plain.body.windows(4).any(|bytes| bytes == b"file"), "{plain:?}");
    let plus = guest.call(Opcode::Readdirplus, ROOT, read.as_bytes().to_vec());
    assert!(plus.body.windows(4).any(|bytes| bytes == b"file"));
    assert!(plus.len > plain.len + 100, "attributes came along");
    let sync = wire::FsyncIn { fh: opened.fh, ..Default::default() };
    guest.ok(Opcode::Fsyncdir, ROOT, sync.as_bytes().to_vec());
    let release = wire::ReleaseIn { fh: opened.fh, ..Default::default() };
    guest.ok(Opcode::Releasedir, ROOT, release.as_bytes().to_vec());
    guest.fails(Opcode::Readdir, ROOT, read.as_bytes().to_vec(), libc::EBADF);
}

/// What a directory of the host has no answer to: the guest's kernel does without.
fn refused(guest: &mut Guest, node: u64, fh: u64) {
    let bmap = wire::BmapIn { block: 0, blocksize: 512, padding: 0 }.as_bytes().to_vec();
    guest.fails(Opcode::Bmap, node, bmap, libc::ENOSYS);
    let ioctl = wire::IoctlIn { fh, cmd: 0x8008_6601, out_size: 8, ..Default::default() };
    guest.fails(Opcode::Ioctl, node, ioctl.as_bytes().to_vec(), libc::ENOTTY);
    let poll = wire::PollIn { fh, ..Default::default() }.as_bytes().to_vec();
    guest.fails(Opcode::Poll, node, poll, libc::ENOSYS);
    guest.fails(Opcode::NotifyReply, node, Vec::new(), libc::ENOSYS);
    // Without --dax there is no window; with it, see the tests of DAX.
    let map = wire::SetupmappingIn { fh: u64::MAX, len: 2 * MIB, ..Default::default() };
    guest.fails(Opcode::SetupMapping, node, map.as_bytes().to_vec(), libc::ENOSYS);
    let one = wire::RemovemappingOne { moffset: 0, len: 2 * MIB };
    let unmap = body(&1_u32, &[one.as_bytes()]);
    guest.fails(Opcode::RemoveMapping, node, unmap, libc::ENOSYS);
}

#[test]
fn every_operation_does_what_it_says() {
    let mut guest = Guest::new(&["--xattr", "--posix-lock", "--flock"]);
    names(&mut guest);
    renames(&mut guest);
    let (node, fh) = guest.create("file");
    guest.write(node, fh, 0, b"contents");
    assert_eq!(guest.read(node, fh, 3, 100), b"tents");
    attributes(&mut guest, node, fh);
    space(&mut guest, node, fh);
    copies(&mut guest, node, fh);
    locks(&mut guest, node, fh);
    directories(&mut guest);
    refused(&mut guest, node, fh);

    let sync = wire::FsyncIn { fh, ..Default::default() };
    guest.ok(Opcode::Fsync, node, sync.as_bytes().to_vec());
    guest.ok(Opcode::Syncfs, ROOT, 0_u64.as_bytes().to_vec());
    let opened: OpenOut =
        guest.get(Opcode::Open, node, wire::OpenIn::default().as_bytes().to_vec());
    assert_ne!(opened.fh, fh);
    let release = wire::ReleaseIn { fh: opened.fh, ..Default::default() };
    guest.ok(Opcode::Release, node, release.as_bytes().to_vec());

    let args = wire::CreateIn { flags: 0o2, mode: 0o100_600, ..Default::default() };
    let nameless = guest.call(Opcode::Tmpfile, ROOT, body(&args, &[b"#1\0"]));
    let (nameless, handle) =
        (nameless.u64_at(0).unwrap(), nameless.u64_at(size_of::<EntryOut>()).unwrap());
    guest.write(nameless, handle, 0, b"named later");
    assert_eq!(fs::read_dir(&guest.shared).unwrap().count(), 1);
    guest.get::<EntryOut>(Opcode::Link, ROOT, body(&nameless, &[b"name\0"]));
    assert_eq!(fs::read(guest.path("name")).unwrap(), b"named later");
    assert_eq!(fs::metadata(guest.path("name")).unwrap().permissions().mode() & 0o777, 0o600);

    guest.ok(Opcode::Destroy, 0, Vec::new());
    guest.fails(Opcode::Statfs, ROOT, Vec::new(), libc::EIO);
    let missing: Vec<&Opcode> =
        Opcode::ALL.iter().filter(|op| !guest.sent.contains(&(**op as u32))).collect();
    assert!(missing.is_empty(), "never sent: {missing:?}");
}
