use std::os::unix::net::UnixListener;

use super::super::landlock::{Access, PathRules};
use super::super::namespaces::Namespace;
use super::super::seccomp::lists::BASE;
use super::super::seccomp::{Filter, Mode, Rule, allow};
use super::super::stages::no_new_privileges;
use super::super::{capabilities, rlimits};
use super::*;

fn held() -> rustix::thread::CapabilitySets {
    rustix::thread::capabilities(None).unwrap()
}

#[test]
fn only_the_named_capabilities_stay() {
    if !is_root() {
        return;
    }
    let kept = CapabilitySet::CHOWN | CapabilitySet::FOWNER;
    succeeds(|| {
        assert_eq!(capabilities::keep(kept).unwrap(), Outcome::Applied);
        assert_eq!((held().effective, held().permitted), (kept, kept));
        assert!(held().inheritable.is_empty());
        let bound = rustix::thread::capability_is_in_bounding_set(CapabilitySet::CHOWN);
        assert_eq!(bound, Ok(false));
        // What is gone is gone.
        assert!(rustix::thread::set_thread_uid(rustix::process::Uid::from_raw(1)).is_err());
        let error = capabilities::keep(CapabilitySet::SETUID).unwrap_err();
        assert!(chain(error).starts_with("the capabilities CAP_SETUID are needed"));
    });
}

#[test]
fn without_privileges_there_is_nothing_to_drop() {
    succeeds(|| {
        become_nobody();
        assert_eq!(capabilities::keep(CapabilitySet::empty()).unwrap(), Outcome::Applied);
        let wanted = CapabilitySet::SYS_ADMIN | CapabilitySet::CHOWN;
        let error = chain(capabilities::keep(wanted).unwrap_err());
        assert!(error.contains("CAP_CHOWN, CAP_SYS_ADMIN"), "{error}");
    });
}

#[test]
fn capabilities_have_names() {
    for name in ["CAP_SYS_ADMIN", "sys_admin", "SYS_ADMIN", "cap_sys_admin"] {
        assert_eq!(capabilities::by_name(name), Some(CapabilitySet::SYS_ADMIN), "{name}");
    }
    assert_eq!(capabilities::by_name("CAP_FLY"), None);
    assert_eq!(capabilities::by_name(""), None);
}

#[test]
fn the_number_of_files_is_limited() {
    succeeds(|| {
        assert_eq!(rlimits::open_files(64).unwrap(), Outcome::Applied);
        let files: Vec<_> = (0..100).map_while(|_| fs::File::open("/dev/null").ok()).collect();
        assert!(files.len() < 64, "{}", files.len());
        drop(files);
        become_nobody();
        let outcome = rlimits::open_files(1000).unwrap();
        let sentence = "1000 open files wanted, 64 allowed".to_owned();
        assert_eq!(outcome, Outcome::Partly(sentence));
    });
}

/// False, loudly, where the kernel has no landlock to test.
fn in_force(outcome: &Outcome) -> bool {
    let there = !matches!(outcome, Outcome::Unavailable(_));
    if !there {
        // SAFETY: with these arguments the call only tells the version.
        let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, 1) };
        assert!(version <= 0, "the kernel has landlock {version}, and it was not used");
        eprintln!("no landlock here: not tested");
    }
    there
}

#[test]
fn only_the_named_paths_can_be_opened() {
    let dir = open_directory();
    let path = |name: &str| dir.path().join(name);
    for name in ["read", "write", "other"] {
        fs::write(path(name), "text").unwrap();
    }
    for name in ["sockets", "shared"] {
        fs::create_dir(path(name)).unwrap();
    }
    let rules = PathRules::none()
        .allow(path("read"), Access::Read)
        .allow(path("write"), Access::ReadWrite)
        .allow(path("sockets"), Access::Sockets)
        .allow(path("shared"), Access::Everything);
    let refused = |result: io::Result<()>| {
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    };
    succeeds(|| {
        no_new_privileges().unwrap();
        if !in_force(&rules.apply().unwrap()) {
            return;
        }
        assert_eq!(fs::read(path("read")).unwrap(), b"text");
        refused(fs::write(path("read"), "changed"));
        fs::write(path("write"), "changed").unwrap();
        refused(fs::remove_file(path("write")));
        refused(fs::read(path("other")).map(drop));
        refused(fs::write(path("new"), "new"));
        refused(fs::read("/etc/passwd").map(drop));
        drop(UnixListener::bind(path("sockets/s")).unwrap());
        fs::remove_file(path("sockets/s")).unwrap();
        refused(fs::write(path("sockets/file"), "new"));
        fs::write(path("shared/new"), "new").unwrap();
        fs::rename(path("shared/new"), path("shared/newer")).unwrap();
        refused(std::process::Command::new("/bin/true").status().map(drop));
    });
}

#[test]
fn tcp_is_out_of_reach() {
    succeeds(|| {
        no_new_privileges().unwrap();
        match PathRules::none().apply().unwrap() {
            // Ports came with the fourth version of landlock.
            Outcome::Applied => {
                let error = std::net::TcpListener::bind("127.0.0.1:0").unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
            }
            other => eprintln!("{other:?}: not tested"),
        }
    });
}

#[test]
fn a_path_that_is_not_there_is_named() {
    succeeds(|| {
        no_new_privileges().unwrap();
        let rules = PathRules::none().allow("/none/at/all", Access::Read);
        let error = chain(rules.apply().unwrap_err());
        assert!(error.starts_with("cannot allow access to /none/at/all: No such file"), "{error}");
    });
}

#[test]
fn stages_are_entered_in_one_order() {
    succeeds(|| {
        let mut stages = Stages::begin().unwrap();
        stages.require(Stage::Rlimits, || Ok(Outcome::Applied)).unwrap();
        stages.require(Stage::Landlock, || Ok(Outcome::Applied)).unwrap();
        stages.require(Stage::Landlock, || Ok(Outcome::Applied)).unwrap();
        let wrong = AssertUnwindSafe(|| stages.require(Stage::Namespaces, || Ok(Outcome::Applied)));
        assert!(catch_unwind(wrong).is_err());
    });
}

#[test]
fn a_required_stage_that_fails_is_named_and_an_attempted_one_is_not_fatal() {
    succeeds(|| {
        let failing = || rlimits::open_files(u64::MAX - 1);
        let mut stages = Stages::begin().unwrap();
        stages.attempt(Stage::Rlimits, || Err(StageError::MissingCapabilities("X".to_owned())));
        become_nobody();
        // Not above the hard limit, which nobody may raise.
        assert!(matches!(failing().unwrap(), Outcome::Partly(_)));
        let error = stages
            .require(Stage::Capabilities, || capabilities::keep(CapabilitySet::SYS_ADMIN))
            .unwrap_err();
        let line = crate::cli::error_line(&error.into());
        let expected =
            "error: sandbox stage capabilities: the capabilities CAP_SYS_ADMIN are needed";
        assert!(line.starts_with(expected), "{line}");
    });
}

#[test]
fn threads_that_run_already_are_a_reason_to_stop() {
    succeeds(|| {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let thread = std::thread::spawn(move || {
            let _ = theirs.read(&mut [0]);
        });
        assert!(matches!(Stages::begin(), Err(SandboxError::Threads(2))));
        drop(ours);
        thread.join().unwrap();
    });
}

const OPEN_AND_LOOK: &[Rule] = &[allow(libc::SYS_openat), allow(libc::SYS_capget)];

#[test]
fn a_whole_sandbox_closes_for_root_and_for_nobody() {
    let dir = open_directory();
    let image = dir.path().join("image");
    fs::write(&image, "data").unwrap();
    for prepare in [|| (), become_nobody] {
        dies_of(libc::SIGSYS, || {
            prepare();
            let plan = Plan {
                open_files: 100,
                namespaces: &[Namespace::Network, Namespace::Ipc, Namespace::Uts],
                capabilities: CapabilitySet::empty(),
                paths: PathRules::none().allow(&image, Access::Read),
                syscalls: Filter::of(&[BASE, OPEN_AND_LOOK]),
                seccomp: Mode::Kill,
            };
            enter(&plan).unwrap();
            assert!(held().permitted.is_empty());
            assert!(fs::File::open(&image).is_ok());
            assert!(fs::File::open("/etc/passwd").is_err());
            // This is what must not return.
            let _ = rustix::process::setsid();
        });
    }
}
