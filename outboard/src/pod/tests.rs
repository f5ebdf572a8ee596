//! Each mistake with its line.

use outboard_common::rate_limiter::Limit;
use tempfile::TempDir;

use super::*;

/// A directory with what a pod file may name: `dir`, `disk`, `disk2`, `disk.qcow2`, `kernel`.
fn things() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("dir")).unwrap();
    for name in ["disk", "disk2", "kernel"] {
        std::fs::write(dir.path().join(name), [0; 512]).unwrap();
    }
    std::fs::write(dir.path().join("disk.qcow2"), b"QFI\xfb....").unwrap();
    dir
}

/// The mistakes of `text`, each as `line:column: message`.
fn mistakes(text: &str) -> Vec<String> {
    let dir = things();
    let path = dir.path().join("pod.toml");
    std::fs::write(&path, text).unwrap();
    match Pod::read(&path) {
        Ok(pod) => panic!("accepted {pod:?}"),
        Err(PodError::Read(error)) => panic!("{error}"),
        Err(PodError::Mistakes { mistakes, .. }) => {
            let prefix = format!("{}:", path.display());
            mistakes.iter().map(|line| line.strip_prefix(&prefix).unwrap().to_owned()).collect()
        }
    }
}

fn pod(text: &str) -> Pod {
    let dir = things();
    let path = dir.path().join("web.toml");
    std::fs::write(&path, text).unwrap();
    Pod::read(&path).unwrap_or_else(|error| panic!("{error}: {error:?}"))
}

const GOOD: &str = r#"
run-dir = "/run/test-pod"

[guest]
memory = "2G"
cpus = 4
kernel = "kernel"
cmdline = "root=/dev/vda ro"

[[volume]]
name = "work"
tier = "shared"
path = "dir"
cache = "never"

[[volume]]
name = "root"
tier = "image"
path = "disk.qcow2"
format = "qcow2"
iops = 1000
bps = "100M:200M"

[[volume]]
name = "copy"
tier = "image"
path = "disk"
readonly = true

[[nic]]
name = "eth0"
tap = "tap0"
mac = "52:54:00:AB:cd:01"
mtu = 9000
queue-pairs = 2
pps = "10K"

[vsock]
cid = 7
"#;

#[test]
fn a_good_file_is_read_as_it_is_meant() {
    let pod = pod(GOOD);
    assert_eq!(pod.name, "web");
    assert_eq!(pod.run_dir, Some("/run/test-pod".into()));
    assert_eq!((pod.guest.memory_mib, pod.guest.cpus), (2048, 4));
    assert!(pod.guest.kernel.is_some_and(|path| path.is_absolute() && path.ends_with("kernel")));
    let [work, root, copy] = pod.volumes.as_slice() else { panic!("{:?}", pod.volumes) };
    let Storage::Shared { dir, tag, cache } = &work.storage else { panic!("{work:?}") };
    assert!(dir.ends_with("dir"));
    assert_eq!((tag.as_str(), *cache), ("work", "never"));
    let Storage::Image { format, limits, .. } = &root.storage else { panic!("{root:?}") };
    assert_eq!(*format, "qcow2");
    assert_eq!(limits.iops.map(Limit::rate), Some(1000));
    assert_eq!(limits.bps.map(Limit::burst), Some(200 << 20));
    assert!(copy.readonly && !root.readonly);
    let nic = &pod.nics[0];
    assert_eq!(nic.network, Network::Tap("tap0".into()));
    assert_eq!(nic.mac.as_deref(), Some("52:54:00:ab:cd:01"));
    assert_eq!((nic.mtu, nic.queue_pairs), (Some(9000), 2));
    assert_eq!(pod.vsock, Some(Vsock { cid: 7, uds_path: None }));
}

#[test]
fn every_mistake_is_found_at_once() {
    let text = r#"name = "bad name"
[guest]
memory = "1000"
cpu = 2
[[volume]]
name = "a"
tier = "shared"
path = "nowhere"
iops = 5
[[volume]]
name = "a"
tier = "image"
path = "disk"
iops = 0
[vsock]
cid = 2
"#;
    let found = mistakes(text);
    let expected = [
        ("1:8: ", "the name \"bad name\" is not usable; write 1 to 32 letters"),
        ("3:10: ", "`memory` = 1000: write whole MiB, from 16M to 16T"),
        ("4:1: ", "unknown key `cpu`; [guest] has cmdline, cpus, initrd, kernel, memory"),
        ("8:8: ", "nowhere does not exist; create it, or correct the path"),
        ("9:1: ", "unknown key `iops`; a volume of tier \"shared\" has cache, name, path"),
        ("11:8: ", "two devices have the name \"a\"; names are also those of sockets"),
        ("14:8: ", "`iops` = 0: a rate and a burst are at least 1; leave the limit out"),
        ("16:7: ", "`cid` = 2: write a number from 3 to 4294967294: 0 to 2 are reserved"),
    ];
    assert_eq!(found.len(), expected.len(), "{found:#?}");
    for (line, (place, part)) in found.iter().zip(expected) {
        assert!(line.starts_with(place) && line.contains(part), "{line}\n wanted {place}{part}");
    }
}

/// Each text has just this one mistake.
fn each(cases: Vec<(String, &str, &str)>) {
    for (text, place, part) in cases {
        let found = mistakes(&text);
        let line = &found[0];
        assert!(
            line.starts_with(place) && line.contains(part),
            "{text}\n{line}\n wanted {place}{part}"
        );
        assert_eq!(found.len(), 1, "{text}\n{found:#?}");
        assert_eq!(line.lines().count(), 1);
    }
}

const VOLUME: &str = "[[volume]]\nname = \"a\"\n";
const IMAGE: &str = "tier = \"image\"\npath = \"disk\"\n";
const NIC: &str = "[[nic]]\nname = \"n\"\n";

#[test]
fn each_mistake_of_a_volume_says_where_and_what_to_do() {
    each(vec![
        (String::new(), "1:1: ", "no device; add a [[volume]], [[nic]] or [vsock]"),
        (
            "volumes = 1\n[vsock]\ncid = 3".to_owned(),
            "1:1: ",
            "unknown key `volumes`; a pod file has",
        ),
        ("volume = 1\n".to_owned(), "1:10: ", "`volume` is a integer; write tables: [[volume]]"),
        ("run-dir = \"/a:b\"\n[vsock]\ncid = 3".to_owned(), "1:11: ", "':', which VMMs misread"),
        (format!("{VOLUME}path = \"dir\"\n"), "1:1: ", "`tier` is missing; write \"shared\""),
        (
            format!("{VOLUME}tier = \"fast\"\npath = \"dir\"\n"),
            "3:8: ",
            "one of shared, image, device",
        ),
        (format!("{VOLUME}tier = \"shared\"\n"), "1:1: ", "`path` is missing; say what"),
        (format!("{VOLUME}tier = \"shared\"\npath = 4\n"), "4:8: ", "write a text in quotes"),
        (
            format!("{VOLUME}tier = \"shared\"\npath = \"disk\"\n"),
            "4:8: ",
            "no directory; name one",
        ),
        (
            format!("{VOLUME}tier = \"image\"\npath = \"dir\"\n"),
            "4:8: ",
            "is a directory; name a file",
        ),
        (
            format!(
                "{VOLUME}tier = \"image\"\npath = \"/dev/null\"\n[[volume]]\nname = \"b\"\ntier = \"device\"\npath = \"disk\"\n"
            ),
            "8:8: ",
            "is no block device; name one, or write tier = \"image\"",
        ),
        (
            format!("{VOLUME}tier = \"image\"\npath = \"disk.qcow2\"\n"),
            "4:8: ",
            "looks like qcow2; write format = \"qcow2\"",
        ),
        (format!("{VOLUME}{IMAGE}format = \"vmdk\"\n"), "5:10: ", "one of raw, qcow2"),
        (format!("{VOLUME}{IMAGE}bps = \"1X\"\n"), "5:7: ", "RATE or RATE:BURST"),
        (format!("{VOLUME}{IMAGE}readonly = \"yes\"\n"), "5:12: ", "write true or false"),
        (
            format!("{VOLUME}{IMAGE}[[volume]]\nname = \"b\"\n{IMAGE}"),
            "8:8: ",
            "give each its own, or write readonly = true",
        ),
        (
            format!(
                "{VOLUME}tier = \"shared\"\npath = \"dir\"\n[[volume]]\nname = \"b\"\n\
                 tier = \"shared\"\npath = \"dir\"\ntag = \"a\"\n"
            ),
            "9:1: ",
            "two devices have the tag \"a\"; the guest mounts by it",
        ),
    ]);
}

#[test]
fn each_mistake_of_another_device_says_where_and_what_to_do() {
    each(vec![
        (
            NIC.to_owned(),
            "1:1: ",
            "one of `tap`, `macvtap`, `packet` and `user = true`; write just one",
        ),
        (format!("{NIC}tap = \"t\"\npacket = \"p\"\n"), "1:1: ", "write just one"),
        (format!("{NIC}tap = \"a/b\"\n"), "3:7: ", "is no interface; write 1 to 15"),
        (format!("{NIC}tap = \"t\"\nmac = \"01:00:00:00:00:00\"\n"), "4:7: ", "group address"),
        (format!("{NIC}tap = \"t\"\nmac = \"52:54\"\n"), "4:7: ", "like 52:54:00:12:34:56"),
        (format!("{NIC}tap = \"t\"\nmtu = 67\n"), "4:7: ", "from 68 to 65535"),
        (format!("{NIC}tap = \"t\"\nqueue-pairs = 65\n"), "4:15: ", "from 1 to 64"),
        (format!("{NIC}tap = \"t\"\nnetns = \"/no\"\n"), "4:9: ", "does not exist"),
        (
            format!("{NIC}macvtap = \"kernel\"\nnetns = \"kernel\"\n"),
            "4:1: ",
            "`netns` does not go with `macvtap`",
        ),
        (
            format!("{NIC}tap = \"t\"\n[[nic]]\nname = \"m\"\ntap = \"t\"\n"),
            "6:7: ",
            "two devices have the network \"t\"",
        ),
        (
            format!("{NIC}tap = \"t\"\n[[nic]]\nname = \"n\"\ntap = \"u\"\n"),
            "5:8: ",
            "two devices have the name \"n\"",
        ),
        (format!("{NIC}user = true\ntap = \"t\"\n"), "1:1: ", "write just one"),
        (format!("{NIC}user = false\n"), "1:1: ", "write just one"),
        (format!("{NIC}user = 1\ntap = \"t\"\n"), "3:8: ", "write true or false"),
        (
            format!("{NIC}user = true\nnetns = \"kernel\"\n"),
            "4:1: ",
            "`netns` does not go with `user`",
        ),
        (format!("{NIC}user = true\nqueue-pairs = 2\n"), "4:1: ", "`user` has one queue pair"),
        (
            format!("{NIC}tap = \"t\"\nuser-udp = [\"53\"]\n"),
            "4:1: ",
            "goes with `user = true` only",
        ),
        (format!("{NIC}user = true\nuser-tcp = \"22\"\n"), "4:12: ", "write texts in brackets"),
        (format!("{NIC}user = true\nuser-tcp = [22]\n"), "4:13: ", "write texts in brackets"),
        (
            format!("{NIC}user = true\nuser-tcp = [\"22\", \"70000:22\"]\n"),
            "4:19: ",
            "`user-tcp` = 70000:22: write ports as passt does, like 8080, 8022:22",
        ),
        ("[vsock]\n".to_owned(), "1:1: ", "`cid` is missing; write the guest's address"),
        ("[vsock]\ncid = 4294967295\n".to_owned(), "2:7: ", "from 3 to 4294967294"),
        ("[vsock]\ncid = 3\nuds-path = \"/no/x\"\n".to_owned(), "3:12: ", "directory is not there"),
        (
            "[vsock]\ncid = 3\n[[volume]]\nname = \"vsock\"\ntier = \"shared\"\npath = \"dir\"\n"
                .to_owned(),
            "4:8: ",
            "two devices have the name \"vsock\"",
        ),
    ]);
}

#[test]
fn ports_are_forwarded_as_passt_has_them() {
    let text = |ports: &str| format!("{NIC}user = true\nuser-tcp = [\"{ports}\"]\n");
    for good in
        ["80", "8022:22", "1000-1010:2000-2010,9", "127.0.0.1/80", "::1/80", "%eth0/all", "auto"]
    {
        let Network::User { tcp, udp } = pod(&text(good)).nics.remove(0).network else { panic!() };
        assert_eq!((tcp, udp), (vec![good.to_owned()], Vec::new()));
    }
    for bad in ["", "0", "65536", "ssh", "1-", "1:2:3", "80,", "localhost/80", "80 81", "--fd=3"] {
        assert!(mistakes(&text(bad))[0].contains("write ports as passt does"), "{bad}");
    }
}

#[test]
fn broken_toml_is_told_alone() {
    let found = mistakes("name = \n[guest]\nmemory = 0\n[[x]\n");
    assert_eq!(found.len(), 2, "{found:#?}");
    assert!(found[0].starts_with("1:8: ") && found[1].starts_with("4:"), "{found:#?}");
}

#[test]
fn a_disk_may_be_read_twice_but_not_through_a_link_written_twice() {
    let dir = things();
    let path = dir.path().join("pod.toml");
    std::os::unix::fs::symlink("disk", dir.path().join("link")).unwrap();
    let volume = |name: &str, path: &str, more: &str| {
        format!("[[volume]]\nname = \"{name}\"\ntier = \"image\"\npath = \"{path}\"\n{more}\n")
    };
    let both = |more| volume("a", "disk", more) + &volume("b", "link", more);
    std::fs::write(&path, both("readonly = true")).unwrap();
    Pod::read(&path).unwrap();
    std::fs::write(&path, both("")).unwrap();
    Pod::read(&path).unwrap_err();
}

#[test]
fn the_run_directory_must_fit_the_sockets_names() {
    let pod = pod(GOOD);
    let layout = crate::layout::Layout::of(&pod, None).unwrap();
    assert_eq!(layout.socket("work"), Path::new("/run/test-pod/work.sock"));
    let long = format!("/run/{}", "x".repeat(95));
    let error = crate::layout::Layout::of(&pod, Some(Path::new(&long))).unwrap_err();
    assert!(error.contains("choose a shorter run directory"), "{error}");
    let error = crate::layout::Layout::of(&pod, Some(Path::new("/run/a,b"))).unwrap_err();
    assert!(error.contains("','"), "{error}");
}

#[test]
fn the_examples_are_understood() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    let mut seen = 0;
    for entry in std::fs::read_dir(examples).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            seen += 1;
            let Err(error) = Pod::read(&path) else { continue };
            let PodError::Mistakes { mistakes, .. } = error else { panic!("{error}") };
            // What they name is the reader's to make.
            for mistake in mistakes {
                assert!(mistake.contains("does not exist"), "{mistake}");
            }
        }
    }
    assert!(seen >= 3, "the examples are gone");
}
