use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::super::seccomp::lists::{BASE, DIAL, SOCKETS};
use super::super::seccomp::{Filter, Mode, Rule, allow, allow_if, argument_is};
use super::*;

fn apply(lists: &[&[Rule]], mode: Mode) {
    assert_eq!(Filter::of(lists).apply(mode).unwrap(), Outcome::Applied);
}

fn call(number: libc::c_long, arguments: [libc::c_long; 3]) -> Result<libc::c_long, i32> {
    // SAFETY: the calls made here take numbers only, or pointers that may be null.
    match unsafe { libc::syscall(number, arguments[0], arguments[1], arguments[2]) } {
        -1 => Err(io::Error::last_os_error().raw_os_error().unwrap()),
        value => Ok(value),
    }
}

#[test]
fn a_call_that_is_not_listed_kills() {
    dies_of(libc::SIGSYS, || {
        apply(&[BASE], Mode::Kill);
        let _ = call(libc::SYS_setsid, [0; 3]);
    });
}

#[test]
fn trap_can_be_handled() {
    extern "C" fn handler(_signal: libc::c_int) {
        // SAFETY: ends the child.
        unsafe { libc::_exit(7) }
    }
    let status = in_child(|| {
        let handler: extern "C" fn(libc::c_int) = handler;
        // SAFETY: the handler only ends the process.
        unsafe { libc::signal(libc::SIGSYS, handler as libc::sighandler_t) };
        apply(&[BASE], Mode::Trap);
        let _ = call(libc::SYS_setsid, [0; 3]);
    });
    assert_eq!(status.exit_status(), Some(7), "{status:?}");
}

#[test]
fn log_and_none_let_it_pass() {
    succeeds(|| {
        apply(&[BASE], Mode::Log);
        assert!(call(libc::SYS_setsid, [0; 3]).is_ok());
        assert!(fs::read("/proc/self/stat").is_ok());
    });
    succeeds(|| {
        let outcome = Filter::of(&[BASE]).apply(Mode::None).unwrap();
        assert!(matches!(outcome, Outcome::Unavailable(_)));
        assert!(call(libc::SYS_setsid, [0; 3]).is_ok());
    });
}

#[test]
fn threads_that_run_already_are_covered() {
    dies_of(libc::SIGSYS, || {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        let thread = std::thread::spawn(move || {
            theirs.read_exact(&mut [0]).unwrap();
            let _ = call(libc::SYS_setsid, [0; 3]);
        });
        apply(&[BASE, SOCKETS], Mode::Kill);
        ours.write_all(&[1]).unwrap();
        thread.join().unwrap();
    });
}

#[test]
fn the_language_runs_on_the_base_list() {
    succeeds(|| {
        apply(&[BASE, SOCKETS], Mode::Kill);
        let shared = Arc::new(Mutex::new(HashMap::new()));
        let threads: Vec<_> = (0..4)
            .map(|number| {
                let shared = Arc::clone(&shared);
                let named = std::thread::Builder::new().name(format!("worker-{number}"));
                let work = move || {
                    let memory = vec![number; 1 << 20];
                    shared.lock().unwrap().insert(number, memory.len());
                    std::thread::sleep(Duration::from_millis(1));
                };
                named.spawn(work).unwrap()
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(shared.lock().unwrap().len(), 4);
        let (mut one, mut other) = UnixStream::pair().unwrap();
        one.write_all(b"x").unwrap();
        other.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        other.read_exact(&mut [0]).unwrap();
        assert!(Instant::now().elapsed() < Duration::from_secs(1));
        eprintln!("a line on stderr");
        assert!(catch_unwind(|| panic!("panics are reported")).is_err());
    });
}

#[test]
fn an_abort_is_an_abort() {
    dies_of(libc::SIGABRT, || {
        apply(&[BASE], Mode::Kill);
        std::process::abort();
    });
}

#[test]
fn neither_processes_nor_executable_memory_can_be_made() {
    dies_of(libc::SIGSYS, || {
        apply(&[BASE], Mode::Kill);
        let _ = call(libc::SYS_clone, [libc::SIGCHLD.into(), 0, 0]);
    });
    dies_of(libc::SIGSYS, || {
        apply(&[BASE], Mode::Kill);
        let protection = libc::PROT_READ | libc::PROT_EXEC;
        let _ = call(libc::SYS_mprotect, [0, 0, protection.into()]);
    });
    succeeds(|| {
        apply(&[BASE], Mode::Kill);
        assert_eq!(call(libc::SYS_mprotect, [0, 0, libc::PROT_READ.into()]), Ok(0));
    });
}

#[test]
fn soft_calls_fail_without_a_death() {
    succeeds(|| {
        apply(&[BASE], Mode::Kill);
        assert_eq!(call(libc::SYS_clone3, [0; 3]), Err(libc::ENOSYS));
        let error = fs::File::open("/proc/self/stat").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    });
    succeeds(|| {
        apply(&[BASE, &[allow(libc::SYS_openat)]], Mode::Kill);
        assert!(fs::File::open("/proc/self/stat").is_ok());
        assert_eq!(fs::remove_file("/none").unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    });
}

#[test]
fn conditions_of_one_call_are_alternatives() {
    const LISTED: &[Rule] = &[
        allow_if(libc::SYS_ioctl, &[argument_is(1, 11), argument_is(2, 22)]),
        allow_if(libc::SYS_ioctl, &[argument_is(1, 33)]),
    ];
    const ALWAYS: &[Rule] = &[allow(libc::SYS_ioctl)];
    for (lists, arguments, allowed) in [
        (&[BASE, LISTED][..], [-1, 11, 22], true),
        (&[BASE, LISTED], [-1, 33, 5], true),
        (&[BASE, LISTED], [-1, 11, 23], false),
        (&[BASE, LISTED], [-1, 22, 22], false),
        (&[BASE, LISTED, ALWAYS], [-1, 22, 22], true),
    ] {
        let status = in_child(|| {
            apply(lists, Mode::Kill);
            assert_eq!(call(libc::SYS_ioctl, arguments), Err(libc::EBADF));
        });
        assert_eq!(status.exit_status() == Some(0), allowed, "{arguments:?}: {status:?}");
    }
}

#[test]
fn only_unix_sockets_can_be_dialled() {
    succeeds(|| {
        apply(&[BASE, SOCKETS, DIAL], Mode::Kill);
        let error = UnixStream::connect("/none/at/all").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    });
    dies_of(libc::SIGSYS, || {
        apply(&[BASE, SOCKETS, DIAL], Mode::Kill);
        let _ = std::net::UdpSocket::bind("127.0.0.1:0");
    });
}
