//! Tests of the inode table.
use std::fs::File;
use std::os::fd::AsRawFd;

use super::*;

fn fd() -> NodeFd {
    NodeFd::new(File::open("/dev/null").unwrap().into())
}

fn info(ino: u64, handle: Handle) -> NodeInfo {
    NodeInfo {
        key: Key { ino, mount: 3, dev: 9 },
        birth_ns: 100,
        file_type: libc::S_IFREG,
        submount: false,
        verified: false,
        handle,
    }
}

fn store(hot: usize) -> InodeStore {
    InodeStore::new(info(2, Handle::None), fd(), hot)
}

fn handle(ino: u64) -> Handle {
    Handle::new(1, &ino.to_le_bytes())
}

#[test]
fn a_node_lives_until_its_last_lookup_is_forgotten() {
    let store = store(64);
    let id = store.insert(NewNode { info: info(7, handle(7)), fd: None }).unwrap().0;
    assert_eq!(store.look_up(info(7, Handle::None).key, 100), Some(id));
    assert_eq!(
        store.look_up(info(7, Handle::None).key, 101),
        None,
        "reborn number is another inode"
    );
    assert_eq!(store.forget(id, 1), None);
    assert_eq!(store.info(id).unwrap().file_type, libc::S_IFREG);
    assert_eq!(store.forget(id, 1), Some(info(7, Handle::None).key));
    assert!(store.info(id).is_none() && store.is_empty());
    let again = store.insert(NewNode { info: info(7, handle(7)), fd: None }).unwrap().0;
    assert_ne!(again, id, "a slot used again has another id");
}

#[test]
fn hostile_ids_and_counts_find_nothing_and_break_nothing() {
    let store = store(64);
    let id = store.insert(NewNode { info: info(7, handle(7)), fd: None }).unwrap().0;
    for wrong in [0, 2, id ^ (1 << 32), id ^ 1, u64::MAX, id + 16] {
        assert!(store.info(wrong).is_none() && store.fd(wrong).is_none(), "{wrong:#x}");
        assert_eq!(store.forget(wrong, 1), None);
    }
    assert_eq!(store.forget(ROOT_ID, u64::MAX), None);
    assert!(store.fd(ROOT_ID).is_some());
    assert!(store.forget(id, u64::MAX).is_some());
    assert_eq!(store.forget(id, 1), None);
}

#[test]
fn a_detached_node_keeps_its_id_but_not_its_identity() {
    let store = store(64);
    let old = store.insert(NewNode { info: info(7, handle(7)), fd: None }).unwrap().0;
    store.detach(old);
    let new = store.insert(NewNode { info: info(7, handle(8)), fd: None }).unwrap().0;
    assert_ne!(old, new);
    assert!(store.info(old).is_some());
    assert!(store.forget(old, 1).is_some());
    assert_eq!(store.peek(info(7, Handle::None).key, 100), Some(new), "the new one stays indexed");
}

#[test]
fn hot_fds_stay_within_the_limit_and_used_ones_stay_longest() {
    let store = store(SHARDS * 4);
    let favourite =
        store.insert(NewNode { info: info(1000, handle(1)), fd: Some(fd()) }).unwrap().0;
    let mut ids = Vec::new();
    for ino in 2000..4000 {
        assert!(store.fd(favourite).is_some(), "used all the time, so always hot");
        let id = store.insert(NewNode { info: info(ino, handle(ino)), fd: None }).unwrap().0;
        store.set_fd(id, fd());
        ids.push(id);
    }
    let hot = ids.iter().filter(|&&id| store.fd(id).is_some()).count();
    assert!((SHARDS..=SHARDS * 4).contains(&hot), "{hot}");
    assert_eq!(store.cool_all(), hot + 1);
    assert!(store.fd(favourite).is_none() && store.info(favourite).is_some());
}

#[test]
fn nodes_without_handles_keep_their_fd() {
    let store = store(SHARDS);
    let ids: Vec<u64> = (0..500)
        .map(|ino| {
            store.insert(NewNode { info: info(ino, Handle::None), fd: Some(fd()) }).unwrap().0
        })
        .collect();
    store.cool_all();
    assert!(ids.iter().all(|&id| store.fd(id).is_some()));
    store.clear_with(&mut |_| ());
    assert!(store.is_empty() && ids.iter().all(|&id| store.fd(id).is_none()));
}

#[test]
fn the_faster_thread_wins() {
    let store = store(64);
    let id = store.insert(NewNode { info: info(7, handle(7)), fd: None }).unwrap().0;
    assert_eq!(
        store.insert(NewNode { info: info(7, handle(7)), fd: Some(fd()) }),
        Some((id, false))
    );
    let first = store.set_fd(id, fd());
    let second = store.set_fd(id, fd());
    assert_eq!(first.as_fd().as_raw_fd(), second.as_fd().as_raw_fd());
    assert_eq!(store.forget(id, 2), Some(info(7, Handle::None).key));
}

#[test]
fn threads_agree_on_lookups_and_forgets() {
    let store = store(64);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for round in 0..20_000_u64 {
                    let ino = round % 64;
                    let found = store.look_up(info(ino, Handle::None).key, 100);
                    let id = found.unwrap_or_else(|| {
                        store.insert(NewNode { info: info(ino, handle(ino)), fd: None }).unwrap().0
                    });
                    assert!(store.info(id).is_some());
                    store.forget(id, 1);
                }
            });
        }
    });
    assert!(store.is_empty());
}

#[test]
fn a_node_is_small() {
    assert!(size_of::<Node>() <= 96, "{} bytes", size_of::<Node>());
}

#[test]
fn handles_round_trip_at_every_size() {
    for len in [0_usize, 8, 20, 21, 128] {
        let bytes: Vec<u8> = (0..len).map(|n| u8::try_from(n).unwrap()).collect();
        for kind in [1, 0x97, 0x1234] {
            assert_eq!(Handle::new(kind, &bytes).parts(), Some((kind, bytes.as_slice())));
        }
    }
}
