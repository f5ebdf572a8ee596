use anyhow::Context;
use clap::Parser;
use proptest::prelude::*;

use super::values::{SOCKET_PATH_MAX, Size, ValueError, check_socket_path, duration};
use super::*;

#[derive(Debug, Parser)]
#[command(name = "vhost-user-test")]
pub(super) struct Everything {
    #[command(flatten)]
    socket: SocketArgs,
    #[command(flatten)]
    log: LogArgs,
    #[command(flatten)]
    worker: WorkerArgs,
    #[command(flatten)]
    sandbox: SandboxArgs,
    #[command(flatten)]
    metrics: MetricsArgs,
    #[command(flatten)]
    control: ControlArgs,
    #[command(flatten)]
    _capabilities: CapabilitiesArgs,
    #[arg(long)]
    size: Option<Size>,
}

fn run(arguments: &str) -> Result<Everything, String> {
    let line = std::iter::once("vhost-user-test").chain(arguments.split_whitespace());
    match parse::<Everything>(line.map(OsString::from)) {
        Ok(Parsed::Arguments(arguments)) => Ok(arguments),
        Ok(Parsed::Text(text)) => Err(format!("text: {text}")),
        Err(error) => Err(error.to_string()),
    }
}

#[test]
fn the_command_is_well_formed() {
    Everything::command().debug_assert();
}

#[test]
fn each_way_to_a_socket() {
    let choice = |arguments| run(arguments).unwrap().socket.choice();
    assert_eq!(choice(""), None);
    assert_eq!(choice("--socket-path /a"), Some(SocketChoice::Listen("/a".into())));
    assert_eq!(choice("--socket-path=/a --client"), Some(SocketChoice::Dial("/a".into())));
    assert_eq!(choice("--fd=3"), Some(SocketChoice::Inherited(3)));
}

#[test]
fn defaults_are_the_safe_ones() {
    let arguments = run("").unwrap();
    assert_eq!(arguments.log.log_level, Level::Info);
    assert_eq!(arguments.worker.poll(), Duration::ZERO);
    assert_eq!(arguments.sandbox.seccomp.seccomp, SeccompMode::Kill);
    assert!(!arguments.sandbox.no_sandbox);
    assert!(arguments.metrics.metrics_socket.is_none());
    assert!(arguments.control.control_socket.is_none());
}

#[test]
fn a_wrong_command_line_is_one_line_that_names_the_option() {
    for (arguments, expected) in [
        ("--fd 3 --socket-path /a", "'--fd <FDNUM>' cannot be used with '--socket-path <PATH>'"),
        ("--client", "--socket-path <PATH>"),
        ("--client --fd 3", "'--fd <FDNUM>'"),
        ("--fd=-1", "-1 is not in 0..="),
        ("--fd three", "invalid value 'three' for '--fd <FDNUM>'"),
        ("--poll-us 1000001", "1000001 is not in 0..=1000000"),
        ("--cpu-affinity 3-1", "not a list of CPUs: write numbers and ranges, like 0-3,8"),
        ("--cpu-affinity 0,1023", "this machine has no CPU 1023"),
        ("--log-level loud", "possible values: off, error, warn, info, debug, trace"),
        ("--seccomp maybe", "possible values: kill, trap, log, none"),
        ("--no-sandbox --seccomp kill", "'--no-sandbox' cannot be used with '--seccomp <MODE>'"),
        ("--size 12X", "not a size: write a whole number of bytes"),
        ("--sokcet-path /a", "; tip: a similar argument exists: '--socket-path'"),
        ("stray", "unexpected argument 'stray'"),
        ("--socket-path", "a value is required for '--socket-path <PATH>'"),
    ] {
        let message = run(arguments).unwrap_err();
        assert!(message.contains(expected), "{arguments}: {message}");
        assert_eq!(message.lines().count(), 1, "{message}");
        assert!(message.ends_with("(see vhost-user-test --help)"), "{message}");
        assert!(!message.starts_with("error"), "{message}");
    }
}

#[test]
fn a_path_that_is_no_socket_address_is_refused() {
    let longest = format!("/{}", "x".repeat(SOCKET_PATH_MAX - 1));
    assert!(run(&format!("--socket-path {longest}")).is_ok());
    let message = run(&format!("--metrics-socket {longest}y")).unwrap_err();
    assert!(message.contains("has 108 bytes"), "{message}");
    assert!(run("--socket-path=").unwrap_err().contains("the path is empty"));
    assert_eq!(check_socket_path("/a\0b".as_ref()), Err(ValueError::PathNul));
}

#[test]
fn help_is_not_an_error() {
    assert!(run("--help").unwrap_err().starts_with("text: "));
}

#[test]
fn an_error_chain_is_one_line() {
    let error = Err::<(), _>(anyhow::anyhow!("c\nd")).context("b").context("a").unwrap_err();
    assert_eq!(error_line(&error), "error: a: b: c d");
    let quoting = Err::<(), _>(anyhow::anyhow!("no such file"))
        .context("cannot open x: no such file; make it")
        .context("disk 3")
        .unwrap_err();
    assert_eq!(error_line(&quoting), "error: disk 3: cannot open x: no such file; make it");
    let within = Err::<(), _>(anyhow::anyhow!("disk")).context("cannot open disk 3").unwrap_err();
    assert_eq!(error_line(&within), "error: cannot open disk 3: disk");
}

#[test]
fn sizes_and_durations() {
    for (text, bytes) in [("0", 0), ("512", 512), ("4k", 4096), ("3M", 3 << 20), ("16T", 16 << 40)]
    {
        assert_eq!(text.parse(), Ok(Size(bytes)));
    }
    for text in ["", "K", "-1", "+1", "1 K", "1.5G", "1KB", "é", "1é", "0x10"] {
        assert_eq!(text.parse::<Size>(), Err(ValueError::Size), "{text}");
    }
    for text in ["18446744073709551616", "16777216T"] {
        assert_eq!(text.parse::<Size>(), Err(ValueError::TooLarge), "{text}");
    }
    for (text, microseconds) in
        [("0", 0), ("7us", 7), ("7ms", 7_000), ("7s", 7_000_000), ("2m", 120_000_000)]
    {
        assert_eq!(duration(text), Ok(Duration::from_micros(microseconds)), "{text}");
    }
    assert_eq!(duration("1h"), Ok(Duration::from_secs(3600)));
    for text in ["", "7", "s", "-1s", "1.5s", "1 s", "1d"] {
        assert_eq!(duration(text), Err(ValueError::Duration), "{text}");
    }
    assert_eq!(duration("18446744073709551615h"), Err(ValueError::TooLarge));
}

#[test]
fn cpu_lists() {
    let list: CpuList = "2-4,0".parse().unwrap();
    assert_eq!(list.cpus(), [2, 3, 4, 0]);
    assert_eq!([0, 3, 4, 5].map(|worker| list.cpu_of_worker(worker)), [2, 0, 2, 3]);
    for text in ["", ",", "1,", "-", "1-", "a", "3-1", "1-2-3"] {
        assert_eq!(text.parse::<CpuList>(), Err(ValueError::CpuList), "{text}");
    }
    assert_eq!("1024".parse::<CpuList>(), Err(ValueError::CpuNumber));
    assert_eq!("0-3,2".parse::<CpuList>(), Err(ValueError::CpuTwice(2)));
}

#[test]
fn a_configuration_writes_sizes_as_numbers_or_text() {
    assert_eq!(serde_json::from_str::<Size>("4096").unwrap(), Size(4096));
    assert_eq!(serde_json::from_str::<Size>("\"4K\"").unwrap(), Size(4096));
    let error = serde_json::from_str::<Size>("\"4Q\"").unwrap_err();
    assert!(error.to_string().contains("not a size"), "{error}");
    let error = serde_json::from_str::<Size>("true").unwrap_err();
    assert!(error.to_string().starts_with("a size is a whole number of bytes"), "{error}");
    assert_eq!(serde_json::to_string(&Size(4096)).unwrap(), "4096");
}

proptest! {
    #[test]
    fn a_size_survives_its_own_text(bytes: u64) {
        prop_assert_eq!(Size(bytes).to_string().parse(), Ok(Size(bytes)));
    }

    #[test]
    fn no_text_panics(text in "\\PC{0,12}") {
        let _ = text.parse::<Size>();
        let _ = text.parse::<CpuList>();
        let _ = duration(&text);
    }
}
