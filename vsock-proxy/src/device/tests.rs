use outboard_common::metrics::Registry;

use super::*;
use crate::config::VmEntry;

fn device(dir: &std::path::Path) -> VsockDevice {
    let text = format!("cid=1234567,uds-path={}/host", dir.display());
    let config = VmEntry::parse(&text).unwrap().check(None).unwrap();
    let counters = Counters::of(&Registry::new("test").device("vsock"));
    VsockDevice::new(config, Arc::default(), counters).unwrap()
}

#[test]
fn the_configuration_space_is_the_cid() {
    let dir = tempfile::tempdir().unwrap();
    let device = device(dir.path());
    let mut all = [0xff; 12];
    device.read_config(0, &mut all);
    assert_eq!(all[..8], 1_234_567u64.to_le_bytes());
    assert_eq!(all[8..], [0; 4]);
    let mut one = [0xff; 1];
    device.read_config(1, &mut one);
    assert_eq!(one[0], 1_234_567u64.to_le_bytes()[1]);
    device.read_config(u32::MAX, &mut one);
    assert_eq!(one[0], 0);
}

#[test]
fn a_saved_device_is_known_again() {
    let dir = tempfile::tempdir().unwrap();
    let device = device(dir.path());
    let mut state = Vec::new();
    device.save(&mut state).unwrap();
    device.load(&mut state.as_slice()).unwrap();
    assert!(device.restored.load(Ordering::Acquire));
    assert!(device.load(&mut &b"something else"[..]).is_err());
}

#[test]
fn sockets_go_with_the_device_and_stale_ones_do_not_matter() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("host");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    drop(device(dir.path()));
    assert!(!path.exists());
}
