//! virtiofsd as a file system of the host, through the fuse bridge.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;

use testkit::daemon::Daemon;
use testkit::fuse_bridge::{self, BridgeOptions, FuseBridge};
use testkit::skip::skip;

/// A daemon with a mount.
struct Mounted {
    // Dropped in this order.
    bridge: FuseBridge,
    daemon: Daemon,
    dir: tempfile::TempDir,
}

impl Mounted {
    fn new(arguments: &[&str], options: BridgeOptions) -> Option<Self> {
        if !fuse_bridge::available() {
            skip("mounting a fuse device needs root and /dev/fuse");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        for name in ["shared", "mount"] {
            fs::create_dir(dir.path().join(name)).unwrap();
            fs::set_permissions(dir.path().join(name), fs::Permissions::from_mode(0o755)).unwrap();
        }
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let socket = dir.path().join("fs.sock");
        let shared = format!("--shared-dir={}", dir.path().join("shared").display());
        let mut all = vec![shared.as_str()];
        all.extend(arguments);
        let daemon = Daemon::start("virtiofsd", &socket, &all).unwrap();
        let bridge = FuseBridge::mount(&socket, &dir.path().join("mount"), options).unwrap();
        Some(Self { bridge, daemon, dir })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.bridge.path().join(name)
    }

    fn shared(&self, name: &str) -> PathBuf {
        self.dir.path().join("shared").join(name)
    }
}

#[test]
fn files_made_through_the_mount_are_on_the_host_and_back() {
    for queues in [1, 3] {
        let options = BridgeOptions { queues, ..BridgeOptions::default() };
        let Some(mut mounted) = Mounted::new(&["--xattr"], options) else { return };
        fs::create_dir(mounted.path("d")).unwrap();
        let data: Vec<u8> = (0..3_000_000_u32).map(|n| u8::try_from(n % 251).unwrap()).collect();
        fs::write(mounted.path("d/file"), &data).unwrap();
        assert!(fs::read(mounted.shared("d/file")).unwrap() == data);
        fs::write(mounted.shared("d/other"), &data).unwrap();
        assert!(fs::read(mounted.path("d/other")).unwrap() == data);
        symlink("d/file", mounted.path("link")).unwrap();
        fs::hard_link(mounted.path("d/file"), mounted.path("hard")).unwrap();
        assert_eq!(fs::metadata(mounted.path("hard")).unwrap().nlink(), 2);
        assert_eq!(
            fs::metadata(mounted.path("link")).unwrap().ino(),
            fs::metadata(mounted.path("hard")).unwrap().ino()
        );
        fs::rename(mounted.path("d"), mounted.path("e")).unwrap();
        let names: Vec<_> =
            fs::read_dir(mounted.path("e")).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names.len(), 2);
        fs::remove_dir_all(mounted.path("e")).unwrap();
        assert!(!mounted.shared("e").exists());
        assert!(mounted.daemon.is_running());
    }
}
