use std::ffi::OsString;
use std::time::Duration;

use clap::CommandFactory;
use outboard_common::cli::{Parsed, SocketChoice, parse};
use outboard_common::logging::Level;
use rustix::thread::CapabilitySet;

use super::compat::{CompatError, modernise};
use super::*;

fn words(line: &str) -> Vec<OsString> {
    line.split(' ').map(OsString::from).collect()
}

fn try_read(line: &str) -> Result<Arguments, String> {
    let modern = modernise(words(line)).map_err(|e| e.to_string())?;
    match parse::<Arguments>(modern).map_err(|e| e.to_string())? {
        Parsed::Arguments(arguments) => Ok(arguments),
        Parsed::Text(text) => Err(text),
    }
}

fn read(line: &str) -> Arguments {
    try_read(line).unwrap()
}

#[test]
fn the_command_is_consistent() {
    Arguments::command().debug_assert();
}

#[test]
fn kata_with_a_listening_descriptor() {
    let a = read(
        "virtiofsd --syslog --cache=auto --shared-dir=/d --fd=3 --thread-pool-size=1 --announce-submounts",
    );
    assert!(a.log.syslog && a.sharing.announce_submounts && !a.sharing.no_announce_submounts);
    assert_eq!(a.sharing.cache, Cache::Auto);
    assert_eq!(a.shared_dir.unwrap().to_str(), Some("/d"));
    assert_eq!(a.socket.choice(), Some(SocketChoice::Inherited(3)));
    assert_eq!(a.threads.thread_pool_size, 1);
}

#[test]
fn kata_with_a_socket_path() {
    let a = read(
        "virtiofsd --socket-path /s --shared-dir /d --cache auto --thread-pool-size=1 -o announce_submounts --xattr",
    );
    assert!(a.sharing.announce_submounts && a.sharing.xattr);
    assert_eq!(a.socket.choice(), Some(SocketChoice::Listen("/s".into())));
}

#[test]
fn libvirt_then_and_now() {
    let a = read("virtiofsd --fd=12 -o source=/d,cache=always,xattr,no_flock,sandbox=chroot");
    assert_eq!(a.sharing.cache, Cache::Always);
    assert_eq!(a.confinement.sandbox, Sandbox::Chroot);
    assert!(a.sharing.xattr && !a.sharing.flock);
    let a = read("virtiofsd --fd=12 --shared-dir /d --cache never --sandbox namespace --xattr");
    assert_eq!(a.sharing.cache, Cache::Never);
}

#[test]
fn more_threads_than_there_will_be_may_be_asked_for() {
    assert_eq!(read("virtiofsd --thread-pool-size=65536").threads.thread_pool_size, 65536);
}

#[test]
fn the_last_of_two_contradicting_options_counts() {
    let a = read("virtiofsd --cache auto -o cache=none,xattr,no_xattr --writeback -o no_writeback");
    assert_eq!(a.sharing.cache, Cache::Never);
    assert!(!a.sharing.xattr && !a.sharing.writeback);
    let a = read("virtiofsd -o no_readdirplus -o readdirplus,posix_lock,timeout=2.5");
    assert!(!a.sharing.no_readdirplus && a.sharing.posix_lock);
    assert_eq!(a.sharing.timeout, Some(Duration::from_millis(2500)));
}

#[test]
fn old_words_are_todays() {
    let a = read("virtiofsd -f -d --socket=/s -osource=/a\\,b,modcaps=+sys_admin:-chown");
    assert_eq!(a.log.log_level, Level::Debug);
    assert_eq!(a.shared_dir.unwrap().to_str(), Some("/a,b"));
    assert_eq!(a.socket.socket_path.unwrap().to_str(), Some("/s"));
    let kept = a.confinement.modcaps.unwrap().apply(CapabilitySet::CHOWN | CapabilitySet::FOWNER);
    assert_eq!(kept, CapabilitySet::FOWNER | CapabilitySet::SYS_ADMIN);
    assert_eq!(read("virtiofsd -o log_level=err").log.log_level, Level::Error);
    assert_eq!(
        read("virtiofsd --inode-file-handles=fallback").sharing.inode_file_handles,
        InodeHandles::Prefer
    );
}

#[test]
fn demands_have_three_forms() {
    assert_eq!(read("virtiofsd").sharing.posix_acl, When::Never);
    assert_eq!(read("virtiofsd --posix-acl").sharing.posix_acl, When::Always);
    assert_eq!(read("virtiofsd --posix-acl=auto").sharing.posix_acl, When::Auto);
    assert_eq!(read("virtiofsd -o security_label").sharing.security_label, When::Always);
}

#[test]
fn maps_repeat() {
    let a = read(
        "virtiofsd --uid-map :0:1000:1: --uid-map /1/100000/65535/ --translate-uid map:0:1:2 --translate-uid guest:5:6:1",
    );
    assert_eq!(a.ids.uid_map[1], IdMap { inside: 1, outside: 100_000, count: 65535 });
    assert_eq!(a.ids.translate_uid.len(), 2);
}

#[test]
fn mistakes_are_told() {
    assert_eq!(modernise(words("v -o")), Err(CompatError::NoList));
    for (line, part) in [
        ("virtiofsd -o bogus", "bogus"),
        ("virtiofsd -o xattr=1", "takes no value"),
        ("virtiofsd -o source", "needs a value"),
        ("virtiofsd --uid-map 0:1:2", "not a map of ids"),
        ("virtiofsd --uid-map :0:1:0:", "not a map of ids"),
        ("virtiofsd --modcaps chown", "must begin with"),
        ("virtiofsd --modcaps +flying", "flying"),
        ("virtiofsd --tag aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "48 bytes"),
        ("virtiofsd --timeout -1", "-1"),
        ("virtiofsd --timeout=-1", "not a number of seconds"),
        ("virtiofsd --num-request-queues 0", "0"),
        ("virtiofsd --socket-path /a --fd 3", "cannot be used with"),
        ("virtiofsd --socket-group kvm --fd 3", "cannot be used with"),
    ] {
        let error = try_read(line).unwrap_err();
        assert!(error.contains(part), "{line}: {error}");
        assert!(!error.contains('\n'), "{line}: {error}");
    }
}
