//! Linux guests on vhost-user-blk: a file system on it is sound, also behind an IOMMU, a resize is seen,
//! and a guest whose daemon is killed again and again notices nothing.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use testkit::daemon::Daemon;
use testkit::guests::qemu::QemuGuest;
use testkit::guests::uml::UmlGuest;
use testkit::guests::{Job, VirtioId};
use testkit::toolroot::ToolRoot;

/// Far above what a boot takes, so that only a hang reaches it.
const TIMEOUT: Duration = Duration::from_secs(90);
/// QEMU emulates the CPU.
const EMULATED_TIMEOUT: Duration = Duration::from_secs(180);

fn image(dir: &Path, mib: u64) -> PathBuf {
    let path = dir.join("disk.img");
    fs::File::create(&path).unwrap().set_len(mib << 20).unwrap();
    path
}

fn start(dir: &Path, image: &Path, arguments: &[&str]) -> Daemon {
    let mut all = vec![format!("--blk-file={}", image.display())];
    all.extend(arguments.iter().map(|a| (*a).to_owned()));
    Daemon::start("vhost-user-blk", &dir.join("blk.sock"), &all).unwrap()
}

fn file_system_job() -> Job {
    Job::named("blk-basic").unwrap().tool("/usr/sbin/mkfs.ext4").tool("/usr/sbin/e2fsck")
}

#[test]
fn uml_makes_and_checks_a_file_system() {
    let Some(root) = ToolRoot::for_test() else { return };
    let dir = tempfile::tempdir().unwrap();
    for arguments in [&[][..], &["--write-cache=off"], &["--buffered", "--poll-us=30"]] {
        // A new one each time: mkfs asks before it overwrites a file system.
        let image = image(dir.path(), 128);
        let daemon = start(dir.path(), &image, arguments);
        let guest = UmlGuest::new(root).device(daemon.socket(), VirtioId::Blk);
        guest.run(&file_system_job(), TIMEOUT).unwrap().expect_success();
        drop(daemon);
    }
}

#[test]
fn uml_finds_a_serial_number_and_a_read_only_disk() {
    let Some(root) = ToolRoot::for_test() else { return };
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path(), 16);
    let daemon = start(dir.path(), &image, &["--read-only", "--serial=outboard-7"]);
    let job = Job::from_script(
        "[ \"$(cat /sys/block/vda/serial)\" = outboard-7 ]; [ \"$(cat /sys/block/vda/ro)\" = 1 ]; \
         dd if=/dev/vda of=/dev/null bs=1M; ! dd if=/dev/zero of=/dev/vda bs=4k count=1",
    );
    let guest = UmlGuest::new(root).device(daemon.socket(), VirtioId::Blk);
    guest.run(&job, TIMEOUT).unwrap().expect_success();
}

#[test]
fn qemu_with_two_queues_sees_a_resize() {
    let Some(root) = ToolRoot::for_test() else { return };
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path(), 128);
    let daemon = start(dir.path(), &image, &[]);
    let job = Job::from_script(
        "[ \"$(ls /sys/block/vda/mq | wc -l)\" = 2 ]; [ \"$(cat /sys/block/vda/size)\" = 262144 ]; \
         echo now resize; n=0; \
         while [ \"$(cat /sys/block/vda/size)\" != 524288 ]; do n=$((n + 1)); [ $n -lt 600 ]; sleep 0.1; done; \
         dd if=/dev/vda of=/dev/null bs=4k skip=65535 count=1",
    );
    let guest = QemuGuest::new(root).cpus(2);
    let guest = guest.device_with(daemon.socket(), VirtioId::Blk, "num-queues=2");
    let mut guest = guest.start(&job).unwrap();
    guest.wait_for("now resize", EMULATED_TIMEOUT).unwrap();
    fs::File::options().write(true).open(&image).unwrap().set_len(256 << 20).unwrap();
    guest.wait(EMULATED_TIMEOUT).unwrap().expect_success();
}

/// What it takes to be behind QEMU's IOMMU: the guest's driver maps every buffer, and the daemon is told
/// of a mapping when it asks.
#[test]
fn qemu_with_an_iommu_makes_and_checks_a_file_system() {
    let Some(root) = ToolRoot::for_test() else { return };
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path(), 128);
    let daemon = start(dir.path(), &image, &["--iommu-platform"]);
    let arguments = [
        "-device",
        "intel-iommu,intremap=off,device-iotlb=on",
        "-device",
        "vhost-user-blk-pci,chardev=@,disable-legacy=on,iommu_platform=on,ats=on",
    ];
    let guest = QemuGuest::new(root)
        .device_arguments(daemon.socket(), arguments.map(str::to_owned).to_vec());
    // VIRTIO_F_ACCESS_PLATFORM is bit 33; files begin with bit 0.
    let job = Job::from_script(&format!(
        "[ -d /sys/class/iommu/dmar0 ]; [ \"$(cut -c34 /sys/bus/virtio/devices/virtio0/features)\" = 1 ]; \
         [ -e /sys/bus/virtio/devices/virtio0/../iommu_group ]\n{}",
        include_str!("../jobs/blk-basic.sh")
    ));
    let job = job.tool("/usr/sbin/mkfs.ext4").tool("/usr/sbin/e2fsck");
    guest.run(&job, EMULATED_TIMEOUT).unwrap().expect_success();
}

/// What the guest does while its daemon dies again and again.
const UNDER_FIRE: &str = "
[ \"$(ls /sys/block/vda/mq | wc -l)\" = 2 ]
mkfs.ext4 -q /dev/vda
mkdir /mnt/disk
mount -t ext4 /dev/vda /mnt/disk
echo under fire
for i in 1 2 3 4 5 6; do
    dd if=/dev/urandom of=/mnt/disk/file$i bs=64k count=64 conv=fsync 2>/dev/null
    sha256sum /mnt/disk/file$i >>/tmp/sums
    echo 3 >/proc/sys/vm/drop_caches
    sha256sum -c /tmp/sums >/dev/null
done
echo out of fire
umount /mnt/disk
e2fsck -fn /dev/vda
mount -t ext4 /dev/vda /mnt/disk
sha256sum -c /tmp/sums
umount /mnt/disk
";

#[test]
fn qemu_does_not_notice_that_its_daemon_dies() {
    let Some(root) = ToolRoot::for_test() else { return };
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path(), 128);
    let mut daemon = start(dir.path(), &image, &[]);
    let job = Job::from_script(UNDER_FIRE).tool("/usr/sbin/mkfs.ext4").tool("/usr/sbin/e2fsck");
    let guest = QemuGuest::new(root).reconnect_ms(20);
    let mut guest = guest.device(daemon.socket(), VirtioId::Blk).start(&job).unwrap();
    guest.wait_for("under fire", EMULATED_TIMEOUT).unwrap();
    let mut kills = 0;
    while !guest.console().contains("out of fire") && !guest.has_ended().unwrap() && kills < 200 {
        std::thread::sleep(Duration::from_millis(250));
        daemon.kill().unwrap();
        daemon = start(dir.path(), &image, &[]);
        kills += 1;
    }
    let result = guest.wait(EMULATED_TIMEOUT).unwrap();
    result.expect_success();
    assert!(kills >= 3, "only {kills} kills");
    assert!(!result.console.contains("I/O error"), "{}", result.console);
}
