use std::ffi::OsString;

use outboard_common::cli::{Parsed, parse};

use super::*;

fn args(line: &str) -> Result<BlkArgs, String> {
    let words = std::iter::once("vhost-user-blk").chain(line.split_whitespace());
    match parse::<BlkArgs>(words.map(OsString::from)) {
        Ok(Parsed::Arguments(args)) => Ok(args),
        Ok(Parsed::Text(text)) => Err(text),
        Err(error) => Err(error.to_string()),
    }
}

fn all(line: &str) -> Result<Vec<Disk>, String> {
    disks(&args(line)?).map_err(|e| e.to_string())
}

fn one(line: &str) -> Disk {
    let mut disks = all(line).unwrap();
    assert_eq!(disks.len(), 1);
    disks.remove(0)
}

fn options(disk: &Disk) -> &OpenOptions {
    match &disk.source {
        Source::Raw(options) | Source::Qcow2(options) => options,
        other => panic!("{other:?} is no file"),
    }
}

#[test]
fn the_command_is_well_formed() {
    use clap::CommandFactory as _;
    BlkArgs::command().debug_assert();
}

#[test]
fn one_disk_with_defaults() {
    let disk = one("--blk-file /disk --socket-path /s");
    assert_eq!(options(&disk).path, Path::new("/disk"));
    assert!(options(&disk).lock && !options(&disk).read_only);
    assert_eq!(options(&disk).cache, Cache::Auto);
    assert_eq!(disk.device.name, "blk0");
    assert_eq!((disk.device.num_queues, disk.device.queue_size), (MAX_QUEUES, MAX_QUEUE_SIZE));
    assert!(disk.device.write_cache && disk.device.discard);
    assert_eq!(disk.device.limits, Limits::default());
}

#[test]
fn a_disk_s_own_keys_come_before_the_options_for_all() {
    let disk = one(
        "--blk-file /d,,1,readonly=off,cache=buffered,serial=own,queue-size=64,iops=7,write-iops=9 \
         --read-only --direct --serial all --queue-size 128 --num-queues 3 --bps 1M:2M --socket-path /s",
    );
    assert_eq!(options(&disk).path, Path::new("/d,1"));
    assert!(!options(&disk).read_only);
    assert_eq!(options(&disk).cache, Cache::Buffered);
    assert_eq!(&disk.device.serial[..4], b"own\0");
    assert_eq!((disk.device.num_queues, disk.device.queue_size), (3, 64));
    let Limits { read, write } = disk.device.limits;
    assert_eq!(read.ops, Some(Limit::per_second(7).unwrap()));
    assert_eq!(write.ops, Some(Limit::per_second(9).unwrap()));
    assert_eq!(read.bytes, Some(Limit::new(1 << 20, 2 << 20).unwrap()));
    assert_eq!(write.bytes, read.bytes);
}

#[test]
fn several_disks() {
    let disks =
        all("--blk-file /a,socket=/1 --null 1G,socket=/2,name=nil --memory 4k,socket=/3").unwrap();
    let names: Vec<&str> = disks.iter().map(|d| d.device.name.as_str()).collect();
    assert_eq!(names, ["blk0", "nil", "blk2"]);
    assert!(matches!(disks[1].source, Source::Null(n) if n == 1 << 30));
    assert!(matches!(disks[2].source, Source::Memory(4096)));
    assert_eq!(disks[2].socket, SocketChoice::Listen("/3".into()));
}

#[test]
fn a_configuration_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("blk.toml");
    let text = "[[disk]]\npath = \"/a\"\nsocket = \"/1\"\nformat = \"qcow2\"\nread-iops = \"10:20\"\n\
                [[disk]]\nmemory = \"1M\"\nsocket = \"/2\"\nwrite-cache = false\n";
    std::fs::write(&path, text).unwrap();
    let disks = all(&format!("--config {}", path.display())).unwrap();
    assert!(matches!(disks[0].source, Source::Qcow2(_)));
    assert_eq!(disks[0].device.limits.read.ops, Some(Limit::new(10, 20).unwrap()));
    assert!(!disks[1].device.write_cache);

    std::fs::write(&path, "[[disk]]\npath = \"/a\"\ncolour = 1\n").unwrap();
    let error = all(&format!("--config {}", path.display())).unwrap_err();
    assert!(error.contains("blk.toml:3:1: unknown field `colour`"), "{error}");
    assert_eq!(error.lines().count(), 1, "{error}");

    std::fs::write(&path, "[[disk]]\npath = \"/a\"\niops = true\n").unwrap();
    let error = all(&format!("--config {}", path.display())).unwrap_err();
    assert!(error.contains("blk.toml:3:8: a limit is a whole number"), "{error}");
}

#[test]
fn a_name_is_one_that_a_thread_can_have() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("blk.toml");
    for name in ["", "a\\u0000b", "a\\nb", "x".repeat(65).as_str()] {
        let text = format!("[[disk]]\nnull = 512\nsocket = \"/1\"\nname = \"{name}\"\n");
        std::fs::write(&path, text).unwrap();
        let error = all(&format!("--config {}", path.display())).unwrap_err();
        assert!(error.contains("give 1 to 64 others"), "{name}: {error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}

#[test]
fn mistakes_are_one_clear_sentence() {
    for (line, expected) in [
        ("--socket-path /s", "no disk is given; use --blk-file"),
        ("--blk-file /a", "no socket is given; use --socket-path"),
        ("--blk-file /a --blk-file /b --socket-path /s", "disk blk0 has no socket; with several"),
        ("--blk-file /a,socket=/1 --socket-path /s", "disk blk0 has a socket of its own"),
        ("--blk-file /a,socket=/1 --blk-file /b,socket=/1", "two disks have the socket /1"),
        ("--null 1M,socket=/1,name=x --null 1M,socket=/2,name=x", "two disks have the name x"),
        ("--null 1M,socket=/1 --null 1M,socket=/2 --serial x", "--serial would give 2 disks"),
        ("--blk-file /a,nonsense --socket-path /s", "is no KEY=VALUE"),
        ("--blk-file /a,colour=red --socket-path /s", "unknown key colour"),
        ("--blk-file /a,serial=1,serial=2 --socket-path /s", "serial is given twice"),
        ("--blk-file /a,readonly=maybe --socket-path /s", "bad value of readonly: write on or off"),
        ("--blk-file /a,queue-size=100 --socket-path /s", "a queue size of 100 is impossible"),
        ("--blk-file /a --queue-size 100 --socket-path /s", "a queue size of 100 is impossible"),
        ("--blk-file /a,num-queues=0 --socket-path /s", "0 queues are impossible"),
        ("--blk-file /a --num-queues 65 --socket-path /s", "65 is not in 1..=64"),
        ("--blk-file /a --block-size 600 --socket-path /s", "a block size of 600 bytes"),
        ("--blk-file /a --serial 123456789012345678901 --socket-path /s", "longer than 20 bytes"),
        ("--null 100 --socket-path /s", "the size 100 is not a multiple of 512"),
        ("--memory 0 --socket-path /s", "the size 0 is not a multiple of 512"),
        ("--null 1M,cache=direct --socket-path /s", "cache cannot be used with"),
        ("--blk-file /a --direct --buffered --socket-path /s", "cannot be used with"),
        ("--blk-file /a,iops=0 --socket-path /s", "bad value of iops"),
        ("--blk-file , --socket-path /s", "no disk is given"),
        ("--config /nowhere/x.toml", "cannot read the configuration /nowhere/x.toml: No such file"),
        ("--config /dev/zero", "larger than 1 MiB"),
    ] {
        let error = all(line).unwrap_err();
        assert!(error.contains(expected), "{line}: {error}");
        assert_eq!(error.lines().count(), 1, "{line}: {error}");
    }
}

proptest::proptest! {
    #[test]
    fn no_text_panics(text in "\\PC{0,40}") {
        let _ = DiskConfig::parse_file(&text);
        let _ = DiskConfig::parse_null(&text);
    }

    #[test]
    fn every_path_can_be_named(path in "/[a-z,=]{0,20}") {
        let disk = DiskConfig::parse_file(&path.replace(',', ",,")).unwrap();
        proptest::prop_assert_eq!(disk.path, Some(PathBuf::from(path)));
    }
}
