//! `virtiofsd`'s sandboxes, and whose files are whose: each kind for real, with a mount through it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use testkit::daemon::{Daemon, bin, copy_program};
use testkit::fuse_bridge::BridgeOptions;
use testkit::mounted::Mounted;
use testkit::skip::skip;

/// A user who is nobody in particular, on any machine.
const USER: u32 = 12_345;

fn mounted(arguments: &[&str]) -> Option<Mounted> {
    let mounted = Mounted::new(arguments, BridgeOptions::default())?;
    fs::set_permissions(mounted.shared(""), fs::Permissions::from_mode(0o777)).unwrap();
    Some(mounted)
}

/// Makes an empty file as `id`; whether that worked.
fn touch(path: &Path, id: u32) -> bool {
    Command::new("touch").arg(path).uid(id).gid(id).status().unwrap().success()
}

fn owner(path: &Path) -> (u32, u32) {
    let meta = fs::symlink_metadata(path).unwrap();
    (meta.uid(), meta.gid())
}

/// The field `name` of a process's status.
fn status(pid: u32, name: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap().trim().to_owned()
}

fn namespace(pid: &str, kind: &str) -> std::path::PathBuf {
    fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap()
}

/// What a guest may want of a directory.
fn expect_service(mounted: &Mounted) {
    fs::write(mounted.path("file"), "contents").unwrap();
    assert_eq!(fs::read(mounted.shared("file")).unwrap(), b"contents");
    fs::create_dir(mounted.path("dir")).unwrap();
    fs::rename(mounted.path("file"), mounted.path("dir/moved")).unwrap();
    fs::hard_link(mounted.path("dir/moved"), mounted.path("hard")).unwrap();
    symlink("/etc/passwd", mounted.path("link")).unwrap();
    assert_eq!(fs::read_link(mounted.path("link")).unwrap(), Path::new("/etc/passwd"));
    fs::set_permissions(mounted.path("hard"), fs::Permissions::from_mode(0o640)).unwrap();
    let file = fs::File::options().write(true).open(mounted.path("hard")).unwrap();
    file.set_len(3).unwrap();
    file.sync_all().unwrap();
    let meta = fs::metadata(mounted.shared("dir/moved")).unwrap();
    assert_eq!((meta.len(), meta.mode() & 0o777, meta.nlink()), (3, 0o640, 2));
    assert_eq!(fs::read_dir(mounted.mountpoint()).unwrap().count(), 3);
    rustix::fs::setxattr(
        mounted.path("hard"),
        "user.key",
        b"value",
        rustix::fs::XattrFlags::CREATE,
    )
    .unwrap();
    fs::remove_file(mounted.path("dir/moved")).unwrap();
    fs::remove_dir(mounted.path("dir")).unwrap();
}

#[test]
fn each_sandbox_confines_as_it_says_and_serves() {
    // Chown, dac_override, dac_read_search, fowner, fsetid, setgid, setuid, mknod, setfcap.
    let usual: u64 = [0, 1, 2, 3, 4, 6, 7, 27, 31].iter().map(|bit| 1_u64 << bit).sum();
    for (kind, own_root, own_namespaces) in
        [("namespace", true, true), ("chroot", true, false), ("none", false, false)]
    {
        let sandbox = format!("--sandbox={kind}");
        let Some(mut mounted) = mounted(&[&sandbox, "--xattr"]) else { return };
        expect_service(&mounted);
        touch(&mounted.path("of-a-user"), USER);
        assert_eq!(owner(&mounted.shared("of-a-user")), (USER, USER), "{kind}");
        chown(mounted.path("of-a-user"), Some(7), Some(8)).unwrap();
        assert_eq!(owner(&mounted.shared("of-a-user")), (7, 8), "{kind}");
        let pid = mounted.daemon().serving_pid();
        let root = fs::metadata(format!("/proc/{pid}/root/.")).unwrap().ino();
        let expected = if own_root { mounted.shared("") } else { "/".into() };
        assert_eq!(root, fs::metadata(expected).unwrap().ino(), "{kind}");
        for name in ["mnt", "pid", "net"] {
            let apart = namespace(&pid.to_string(), name) != namespace("self", name);
            assert_eq!(apart, own_namespaces, "{kind}: {name}");
        }
        let effective = u64::from_str_radix(&status(pid, "CapEff"), 16).unwrap();
        assert_eq!(effective, usual, "{kind}: {effective:#x}");
        assert_eq!(effective, u64::from_str_radix(&status(pid, "CapPrm"), 16).unwrap());
        assert_eq!(status(pid, "NoNewPrivs"), "1");
        assert_eq!(status(pid, "Seccomp"), "2", "a filter");
    }
}

/// Whoever the daemon acts as would be in them too.
#[test]
fn groups_of_the_daemon_are_nobody_elses() {
    if !rustix::process::geteuid().is_root() {
        return skip("needs root, to be in other groups");
    }
    let dir = tempfile::tempdir().unwrap();
    for sandbox in ["namespace", "chroot", "none"] {
        let socket = dir.path().join(sandbox);
        let mut command = Command::new("setpriv");
        command.arg("--groups=4,24,27").arg(bin("virtiofsd").unwrap());
        command.arg(format!("--sandbox={sandbox}"));
        command.arg(format!("--socket-path={}", socket.display()));
        command.arg(format!("--shared-dir={}", dir.path().display()));
        let daemon = Daemon::start_command("virtiofsd", command, &socket).unwrap();
        assert_eq!(status(daemon.serving_pid(), "Groups"), "", "{sandbox}");
    }
}

#[test]
fn capabilities_and_limits_are_those_asked_for() {
    let arguments = ["--modcaps=+sys_admin:-mknod", "--seccomp=none", "--rlimit-nofile=777"];
    let Some(mut mounted) = mounted(&arguments) else { return };
    let pid = mounted.daemon().serving_pid();
    let effective = u64::from_str_radix(&status(pid, "CapEff"), 16).unwrap();
    assert_eq!((effective >> 21 & 1, effective >> 27 & 1), (1, 0));
    assert_eq!(status(pid, "Seccomp"), "0");
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let files = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    assert_eq!(files.split_whitespace().nth(3), Some("777"), "{files}");
    // Without the capability the guest cannot have devices, and everything else works.
    let refused = rustix::fs::mknodat(
        rustix::fs::CWD,
        mounted.path("null"),
        rustix::fs::FileType::CharacterDevice,
        rustix::fs::Mode::RUSR,
        rustix::fs::makedev(1, 3),
    );
    assert_eq!(refused, Err(rustix::io::Errno::PERM));
    fs::write(mounted.path("file"), "x").unwrap();
}

#[test]
fn ids_of_the_user_namespace_are_others_outside() {
    let maps =
        ["--uid-map=:0:100000:1000:", "--uid-map=:1000:5000:1:", "--gid-map=:0:200000:2000:"];
    let Some(mounted) = mounted(&[&maps[..], &["--xattr"]].concat()) else { return };
    chown(mounted.shared(""), Some(100_000), Some(200_000)).unwrap();
    expect_service(&mounted);
    assert_eq!(owner(&mounted.shared("hard")), (100_000, 200_000));
    assert_eq!(owner(&mounted.path("hard")), (0, 0));
    assert!(touch(&mounted.path("of-a-user"), 1000));
    assert_eq!(owner(&mounted.shared("of-a-user")), (5000, 201_000));
    assert_eq!(owner(&mounted.path("of-a-user")), (1000, 1000));
    chown(mounted.path("of-a-user"), Some(7), Some(8)).unwrap();
    assert_eq!(owner(&mounted.shared("of-a-user")), (100_007, 200_008));
    // Who has no id inside is nobody there, and cannot have files.
    fs::write(mounted.shared("of-the-host"), "x").unwrap();
    assert_eq!(owner(&mounted.path("of-the-host")), (65_534, 65_534));
    assert!(!touch(&mounted.path("unmapped"), 1001));
    assert!(!mounted.shared("unmapped").exists());
}

#[test]
fn ids_are_translated_without_a_namespace() {
    for sandbox in ["--sandbox=namespace", "--sandbox=chroot", "--sandbox=none"] {
        let arguments = [
            sandbox,
            "--translate-uid=map:1000:2000:10",
            "--translate-uid=forbid-guest:3000:10",
            "--translate-uid=guest:4000:4500:10",
            "--translate-uid=squash-host:7000:9:100",
            "--translate-gid=squash-guest:0:777:4294967295",
            "--translate-gid=squash-host:0:5:4294967295",
        ];
        let Some(mounted) = mounted(&arguments) else { return };
        assert!(touch(&mounted.path("mapped"), 1003));
        assert_eq!(owner(&mounted.shared("mapped")), (2003, 777), "{sandbox}");
        assert_eq!(owner(&mounted.path("mapped")), (1003, 5), "{sandbox}");
        assert!(!touch(&mounted.path("forbidden"), 3001));
        // On the way back it is somebody else, who alone could set the file's times.
        touch(&mounted.path("one-way"), 4001);
        assert_eq!(owner(&mounted.path("one-way")).0, 4501);
        assert_eq!(owner(&mounted.shared("one-way")).0, 4501);
        fs::write(mounted.shared("squashed"), "").unwrap();
        chown(mounted.shared("squashed"), Some(7042), Some(1)).unwrap();
        assert_eq!(owner(&mounted.path("squashed")), (9, 5), "{sandbox}");
        chown(mounted.path("mapped"), Some(1005), None).unwrap();
        assert_eq!(owner(&mounted.shared("mapped")).0, 2005);
    }
}

/// Whether a process without privileges may make a user namespace here.
fn user_namespaces() -> bool {
    let mut unshare = Command::new("unshare");
    unshare.args(["--user", "--map-root-user", "true"]).uid(USER).gid(USER);
    let allowed = unshare.output().is_ok_and(|output| output.status.success());
    if !allowed {
        skip("users without privileges may not make user namespaces");
    }
    allowed
}

#[test]
fn a_user_without_privileges_shares_a_directory_of_theirs() {
    if !testkit::fuse_bridge::available() {
        return skip("needs root, to become somebody else");
    }
    if !user_namespaces() {
        return;
    }
    let as_root: &[&str] = &["--uid-map=:0:12345:1:", "--gid-map=:0:12345:1:"];
    for (sandbox, maps, seen) in [
        ("--sandbox=namespace", &[][..], USER),
        ("--sandbox=namespace", as_root, 0),
        ("--sandbox=none", &[], USER),
    ] {
        let arguments = [&[sandbox, "--xattr"], maps].concat();
        let options = BridgeOptions::default();
        let Some(mut mounted) = Mounted::new_as(Some(USER), &arguments, options) else { return };
        expect_service(&mounted);
        // What the guest's root makes is the user's.
        assert_eq!(owner(&mounted.shared("hard")), (USER, USER), "{sandbox}");
        assert_eq!(owner(&mounted.path("hard")), (seen, seen), "{sandbox}");
        // The guest's user of that number is served too.
        assert!(touch(&mounted.path("of-theirs"), seen), "{sandbox}");
        assert_eq!(owner(&mounted.shared("of-theirs")), (USER, USER), "{sandbox}");
        // Others cannot be served: they get an error, and the daemon goes on.
        fs::set_permissions(mounted.shared(""), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(!touch(&mounted.path("of-another"), USER + 1), "{sandbox}");
        assert!(chown(mounted.path("hard"), Some(USER + 1), None).is_err());
        // What the user may not read, the guest's root may not either.
        fs::write(mounted.shared("secret"), "x").unwrap();
        fs::set_permissions(mounted.shared("secret"), fs::Permissions::from_mode(0o600)).unwrap();
        assert!(fs::read(mounted.path("secret")).is_err(), "{sandbox}");
        assert!(mounted.daemon().log().contains("every inode that the guest knows stays open"));
        let pid = mounted.daemon().serving_pid();
        assert_eq!(status(pid, "Uid").split_whitespace().next(), Some(&*USER.to_string()));
        assert_eq!(status(pid, "Seccomp"), "2");
    }
}

#[test]
fn what_a_sandbox_cannot_do_is_told() {
    if !rustix::process::geteuid().is_root() {
        return skip("needs root, to become somebody else");
    }
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let program = dir.path().join("virtiofsd");
    // Not with a descriptor of ours, which a test beside this one might inherit.
    copy_program(&bin("virtiofsd").unwrap(), &program, None).unwrap();
    let shared = format!("--shared-dir={}", dir.path().display());
    let socket = format!("--socket-path={}", dir.path().join("s").display());
    let cases: [(Option<u32>, &[&str], &str); 8] = [
        (None, &["--sandbox=chroot", "--uid-map=:0:0:1:"], "--sandbox=namespace"),
        (None, &["--sandbox=none", "--gid-map=:0:0:1:"], "--sandbox=namespace"),
        (None, &["--uid-map=:1000:100000:10:"], "nobody in this namespace"),
        (None, &["--translate-uid=map:0:1:1", "--posix-acl"], "ACLs"),
        (None, &["--rlimit-nofile=20"], "raise --rlimit-nofile"),
        (Some(USER), &["--sandbox=chroot"], "root"),
        (Some(USER), &["--inode-file-handles=mandatory"], "CAP_DAC_READ_SEARCH"),
        (Some(USER), &["--uid-map=:0:100000:5:"], "newuidmap"),
    ];
    for (user, arguments, part) in cases {
        let mut command = Command::new(&program);
        command.args([&shared, &socket]).args(arguments);
        if let Some(id) = user {
            command.uid(id).gid(id);
        }
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {text}");
        let last = text.lines().last().unwrap();
        assert!(last.contains(part), "{arguments:?}: {text}");
        let _ = fs::remove_file(dir.path().join("s"));
    }
}
