//! Clients from outside on vhost-user-blk: QEMU's own tools over its virtio-blk-vhost-user driver, and fio
//! with libblkio, both of which check what they read.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use testkit::daemon::Daemon;
use testkit::skip::skip;
use testkit::toolroot::ToolRoot;

fn image_options(socket: &Path) -> String {
    format!("driver=virtio-blk-vhost-user,path={},cache.direct=on", socket.display())
}

/// Runs a tool of the tool root and returns what it printed; it has to succeed.
fn run(root: &ToolRoot, program: &str, arguments: &[&str]) -> String {
    let output = root.command(program).unwrap().args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {text}");
    text
}

#[test]
fn qemu_io_finds_what_it_wrote() {
    let Some(root) = ToolRoot::for_test() else { return };
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.img");
    fs::write(&image, vec![9; 32 << 20]).unwrap();
    let file = format!("--blk-file={}", image.display());
    let daemon = Daemon::start("vhost-user-blk", &dir.path().join("blk.sock"), &[file]).unwrap();
    let options = image_options(daemon.socket());
    let mut arguments = vec!["--image-opts", options.as_str()];
    for command in [
        "read -P 9 0 1M",
        "write -P 0x11 0 64k",
        "write -P 0x22 512 512",
        "aio_write -P 0x33 1M 1M",
        "aio_write -P 0x44 3M 300k",
        "aio_flush",
        "flush",
        "read -P 0x11 0 512",
        "read -P 0x22 512 512",
        "read -P 0x11 1024 63k",
        "read -P 0x33 1M 1M",
        "read -P 0x44 3M 300k",
        "writev -P 0x55 5M 512 512 4096 1024",
        "read -P 0x55 5M 6144",
        "write -z 1M 512k",
        "read -P 0 1M 512k",
        "read -P 0x33 1536k 512k",
        "write -z -u 8M 1M",
        "read -P 0 8M 1M",
        "discard 16M 4M",
        "read -P 9 20M 12M",
    ] {
        arguments.extend(["-c", command]);
    }
    let text = run(root, "qemu-io", &arguments);
    assert!(!text.contains("Pattern verification failed") && !text.contains("rror"), "{text}");
}

#[test]
fn qemu_img_measures_and_copies() {
    let Some(root) = ToolRoot::for_test() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (image, copy) = (dir.path().join("disk.img"), dir.path().join("copy.img"));
    let bytes: Vec<u8> = (0..16u32 << 20).map(|i| (i >> 9) as u8 ^ (i >> 17) as u8).collect();
    fs::write(&image, &bytes).unwrap();
    for arguments in [&[][..], &["--num-queues=1", "--queue-size=256", "--buffered"]] {
        let mut all = vec![format!("--blk-file={}", image.display())];
        all.extend(arguments.iter().map(|a| (*a).to_owned()));
        let daemon = Daemon::start("vhost-user-blk", &dir.path().join("s"), &all).unwrap();
        let options = image_options(daemon.socket());
        let bench = ["bench", "-c", "5000", "-d", "32", "-s", "4k", "-t", "none", "--image-opts"];
        run(root, "qemu-img", &[&bench[..], &[options.as_str()]].concat());
        let copy_name = copy.to_str().unwrap();
        let convert = ["convert", "-n", "--image-opts", &options];
        fs::write(&copy, vec![0; bytes.len()]).unwrap();
        let target = format!("driver=raw,file.driver=file,file.filename={copy_name}");
        run(root, "qemu-img", &[&convert[..], &["--target-image-opts", &target]].concat());
        assert!(fs::read(&copy).unwrap() == bytes);
    }
}

/// fio writes random blocks of mixed sizes, each with a checksum and its place in it, and reads them back,
/// some while others are still being written.
#[test]
fn fio_verifies_what_it_wrote() {
    let Some(root) = ToolRoot::for_test() else { return };
    let fio = |daemon: &Daemon, arguments: &[&str]| {
        let mut command = root.fio_with_libblkio().map_err(|error| {
            skip(&format!("no fio with libblkio: {error:#}"));
        })?;
        command
            .args(["--name=job", "--ioengine=libblkio", "--thread", "--rw=randwrite", "--size=16M"])
            .args(["--libblkio_driver=virtio-blk-vhost-user", "--bsrange=4k-128k", "--do_verify=1"])
            .args(["--verify_fatal=1", "--verify_dump=0", "--randseed=7"])
            .arg(format!("--libblkio_path={}", daemon.socket().display()))
            .args(arguments)
            .current_dir(daemon.socket().parent().unwrap());
        Ok::<_, ()>(outcome_of(command))
    };
    let dir = tempfile::tempdir().unwrap();
    // Of our daemon, of fio, and of fio while it writes.
    let runs = [
        // Many at once through io_uring and O_DIRECT; the queue sleeps.
        (&[][..], &["--iodepth=32", "--libblkio_wait_mode=block", "--verify=crc32c"][..], &[][..]),
        // The page cache, two queues, polling daemon and client.
        (
            &["--buffered", "--poll-us=50"][..],
            &[
                "--iodepth=8",
                "--libblkio_queue_size=64",
                "--libblkio_wait_mode=loop",
                "--verify=md5",
            ],
            &[],
        ),
        // Durable writes, and checks soon after the writes.
        (
            &["--write-cache=off"],
            &["--iodepth=16", "--libblkio_wait_mode=block", "--verify=xxhash"],
            &["--verify_backlog=64"],
        ),
    ];
    for (ours, theirs, writing) in runs {
        let image = dir.path().join("disk.img");
        fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
        let mut arguments = vec![format!("--blk-file={}", image.display())];
        arguments.extend(ours.iter().map(|a| (*a).to_owned()));
        let daemon = Daemon::start("vhost-user-blk", &dir.path().join("s"), &arguments).unwrap();
        let Ok((success, text)) = fio(&daemon, &[theirs, writing].concat()) else { return };
        assert!(success && text.contains("err= 0"), "{theirs:?}: {text}");
        // What fio checks is what the image has: it finds a bit of it that changed.
        let again = [theirs, &["--verify_only"]].concat();
        let (success, text) = fio(&daemon, &again).unwrap();
        assert!(success, "{theirs:?}, once more: {text}");
        flip_a_bit(&image);
        let (success, text) = fio(&daemon, &again).unwrap();
        assert!(!success && text.contains("verify"), "{theirs:?}, with a changed bit: {text}");
    }
}

/// Whether a command succeeds, and what it prints.
fn outcome_of(mut command: Command) -> (bool, String) {
    let output = command.output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

/// Changes one bit in the middle of an image.
fn flip_a_bit(image: &Path) {
    let image = fs::File::options().read(true).write(true).open(image).unwrap();
    let mut byte = [0];
    image.read_exact_at(&mut byte, (8 << 20) + 2000).unwrap();
    image.write_all_at(&[byte[0] ^ 1], (8 << 20) + 2000).unwrap();
}

#[test]
fn qcow2_images_of_qemu_are_read_and_written() {
    let Some(root) = ToolRoot::for_test() else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (base, top) = (path("base.qcow2"), path("top.qcow2"));
    run(root, "qemu-img", &["create", "-q", "-f", "qcow2", &base, "64M"]);
    run(root, "qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 8M", &base]);
    let backing = ["create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &top];
    run(root, "qemu-img", &backing);
    let file = format!("--blk-file={top},format=qcow2");
    let mut daemon = Daemon::start("vhost-user-blk", &dir.path().join("s"), &[file]).unwrap();
    let options = image_options(daemon.socket());
    let text = run(
        root,
        "qemu-io",
        &[
            "--image-opts",
            &options,
            "-c",
            "read -P 1 0 8M",
            "-c",
            "read -P 0 8M 8M",
            "-c",
            "write -P 2 1M 3000k",
            "-c",
            "write -P 3 40M 512",
            "-c",
            "write -z 2M 64k",
            "-c",
            "discard 5M 1M",
            "-c",
            "flush",
        ],
    );
    assert!(!text.contains("Pattern verification failed"), "{text}");
    assert!(daemon.terminate(std::time::Duration::from_secs(5)).unwrap().success());
    run(root, "qemu-img", &["check", &top]);
    let text = run(
        root,
        "qemu-io",
        &[
            "-f",
            "qcow2",
            "-c",
            "read -P 1 0 1M",
            "-c",
            "read -P 2 1M 1M",
            "-c",
            "read -P 0 2M 64k",
            "-c",
            "read -P 3 40M 512",
            &top,
        ],
    );
    assert!(!text.contains("Pattern verification failed"), "{text}");
}
