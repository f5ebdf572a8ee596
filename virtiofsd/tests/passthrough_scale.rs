//! Many files cost little: fds stay few and memory small however many inodes the guest knows.
//! `OUTBOARD_SCALE_FILES` sets how many (default 50,000; the promise is about a million).
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;

use fuse_backend_rs::api::filesystem::{Context, DirEntry, Entry, FileSystem};
use virtiofsd::fuse::extension::{EntrySink, Extension};
use virtiofsd::passthrough::{Config, PassthroughFs};

const FILES_IN_A_DIRECTORY: usize = 1000;

#[derive(Default)]
struct Sink {
    inodes: Vec<u64>,
    room: usize,
    offset: u64,
}

impl EntrySink for Sink {
    fn fits(&self, _name_len: usize) -> bool {
        self.room > 0
    }

    fn add(&mut self, dirent: DirEntry<'_>, entry: &Entry) -> bool {
        self.room -= 1;
        self.offset = dirent.offset;
        self.inodes.extend(Some(entry.inode).filter(|&inode| inode != 0));
        true
    }
}

/// Private memory of this process, bytes.
fn private_memory() -> usize {
    let text = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let lines = text.lines().filter(|line| line.starts_with("Private_"));
    lines.map(|line| line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024).sum()
}

fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Lists `dir` with attributes; returns the inodes of its entries.
fn list(fs: &PassthroughFs, ctx: &Context, dir: u64, sink: &mut Sink) {
    let (handle, _) = fs.opendir(ctx, dir, 0).unwrap();
    let handle = handle.unwrap();
    (sink.offset, sink.room) = (0, 0);
    sink.inodes.clear();
    while sink.room == 0 {
        sink.room = 100;
        fs.readdirplus_into(ctx, dir, handle, 0, sink.offset, sink).unwrap();
    }
    fs.releasedir(ctx, dir, 0, handle).unwrap();
}

#[test]
fn many_inodes_need_few_fds_and_little_memory() {
    if !rustix::process::geteuid().is_root() {
        return; // without CAP_DAC_READ_SEARCH every inode needs an fd
    }
    let files: usize =
        std::env::var("OUTBOARD_SCALE_FILES").map_or(50_000, |text| text.parse().unwrap());
    let parent = std::env::var("OUTBOARD_SCALE_DIR").unwrap_or_else(|_| "/dev/shm".to_owned());
    let dir = tempfile::TempDir::new_in(parent).unwrap();
    for n in 0..files {
        let sub = dir.path().join((n / FILES_IN_A_DIRECTORY).to_string());
        if n % FILES_IN_A_DIRECTORY == 0 {
            std::fs::create_dir(&sub).unwrap();
        }
        File::create(sub.join(n.to_string())).unwrap();
    }
    let root = File::open(dir.path()).unwrap().into();
    let fs =
        PassthroughFs::new(Config::default(), root, File::open("/proc/self/fd").unwrap().into())
            .unwrap();
    fs.negotiate(u64::MAX).unwrap();
    let ctx = Context { uid: 0, gid: 0, pid: 1 };
    let (mut top, mut sub) = (Sink::default(), Sink::default());
    list(&fs, &ctx, 1, &mut top);
    let mut keep: Vec<u64> = vec![0; files];
    keep.clear();
    let before = private_memory();
    for &directory in &top.inodes {
        list(&fs, &ctx, directory, &mut sub);
        for &inode in &sub.inodes {
            fs.getattr(&ctx, inode, None).unwrap();
        }
        keep.extend_from_slice(&sub.inodes);
        assert!(open_fds() < 4096, "{} fds", open_fds());
    }
    let used = private_memory().saturating_sub(before).saturating_sub(keep.len() * 8);
    assert_eq!(keep.len(), files);
    assert!(fs.inode_count() >= files);
    let per_inode = used / files;
    println!("{files} inodes: {per_inode} bytes each, {} fds", open_fds());
    // What the process needs anyway is noise at small numbers.
    if files >= 20_000 {
        assert!(per_inode < 250, "{per_inode} bytes an inode");
    }
    for inode in keep.into_iter().chain(top.inodes) {
        fs.forget(&ctx, inode, 1);
    }
    assert_eq!(fs.inode_count(), 0);
}
