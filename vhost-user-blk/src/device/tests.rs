use outboard_common::metrics::Registry;

use super::*;
use crate::store::memory;

fn device(write_cache: bool, read_only: bool) -> BlkDevice {
    let options = DeviceOptions {
        name: "disk".to_owned(),
        serial: [0; ID_LEN],
        read_only,
        num_queues: 4,
        queue_size: 256,
        write_cache,
        discard: true,
        limits: Limits::default(),
        register_memory: false,
    };
    let metrics = Registry::new("test").device("disk");
    BlkDevice::new(options, memory::open(1 << 20).unwrap(), Arc::default(), metrics).unwrap()
}

const FLUSH: u64 = bit(spec::VIRTIO_BLK_F_FLUSH);
const WCE: u64 = bit(spec::VIRTIO_BLK_F_CONFIG_WCE);

#[test]
fn writes_go_through_unless_the_driver_can_flush() {
    for (cache, features, through) in [
        (true, 0, true),
        (true, WCE, true),
        (true, FLUSH, false),
        (true, FLUSH | WCE, false),
        (false, FLUSH, true),
        (false, FLUSH | WCE, true),
    ] {
        let device = device(cache, false);
        device.negotiated(features);
        assert_eq!(device.shared().is_write_through(), through, "{cache} {features:#x}");
    }
}

#[test]
fn the_driver_switches_the_cache_and_a_reset_forgets_that() {
    let device = device(true, false);
    device.negotiated(FLUSH | WCE);
    device.write_config(32, &[0]).unwrap();
    assert!(device.shared().is_write_through());
    device.write_config(32, &[1]).unwrap();
    assert!(!device.shared().is_write_through());
    device.write_config(32, &[0]).unwrap();
    device.reset();
    device.negotiated(FLUSH | WCE);
    assert!(!device.shared().is_write_through());
}

#[test]
fn features_follow_the_options() {
    let (disk, cd) = (device(true, false).features(), device(true, true).features());
    for (feature, on_disk, on_cd) in [
        (spec::VIRTIO_BLK_F_RO, false, true),
        (spec::VIRTIO_BLK_F_DISCARD, true, false),
        (spec::VIRTIO_BLK_F_WRITE_ZEROES, true, false),
        (spec::VIRTIO_BLK_F_FLUSH, true, true),
        (spec::VIRTIO_BLK_F_MQ, true, true),
    ] {
        assert_eq!(
            (disk & bit(feature) != 0, cd & bit(feature) != 0),
            (on_disk, on_cd),
            "{feature}"
        );
    }
}

#[test]
fn every_queue_has_a_worker_of_few() {
    let device = device(true, false);
    for queue in 0..4 {
        assert!(device.worker_of(queue) < device.workers);
    }
}

#[test]
fn the_cache_mode_goes_with_the_state() {
    let old = device(true, false);
    old.negotiated(FLUSH | WCE);
    old.write_config(32, &[0]).unwrap();
    let mut state = Vec::new();
    old.save(&mut state).unwrap();
    let new = device(true, false);
    new.negotiated(FLUSH | WCE);
    new.load(&mut state.as_slice()).unwrap();
    assert!(new.shared().is_write_through());
    assert!(new.load(&mut &[][..]).is_err());
    assert!(new.load(&mut &[2][..]).is_err());
    assert!(new.shared().is_write_through(), "a state that is refused changes nothing");
}
