//! A pod as its users see it: all four daemons of the workspace serve one guest at once.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::fs;
use std::io::Read;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::thread::{JoinHandle, sleep};
use std::time::Duration;

use testkit::guests::{GuestResult, VirtioId};
use testkit::netns::NetNs;
use testkit::pod::{HOST_ADDRESS, Pod};
use testkit::toolroot::ToolRoot;

/// Far above what a boot takes, so that only a hang reaches it.
const TIMEOUT: Duration = Duration::from_secs(20);
/// QEMU emulates the CPU.
const EMULATED_TIMEOUT: Duration = Duration::from_secs(180);
/// The file that is carried through the devices.
const CARRIED_BYTES: usize = 16 << 20;

/// Bytes that no offset error leaves equal.
fn content() -> Vec<u8> {
    let mut state = 1_u64;
    let words = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 32).to_le_bytes()
    });
    words.flatten().take(CARRIED_BYTES).collect()
}

/// Everything one client sends.
fn receive(mut stream: impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

/// Carries a file through all four devices and checks every copy of it.
fn carry(pod: &Pod, namespace: &NetNs, run: impl FnOnce(&Pod) -> GuestResult) -> GuestResult {
    let content = content();
    fs::write(pod.shared().join("from-host"), &content).unwrap();
    let unix = UnixListener::bind(pod.vsock_service(1234)).unwrap();
    let vsock: JoinHandle<Vec<u8>> = std::thread::spawn(move || receive(unix.accept().unwrap().0));
    let tcp = namespace.run(|| TcpListener::bind((HOST_ADDRESS, 5000)).unwrap()).unwrap();
    let net = std::thread::spawn(move || receive(tcp.accept().unwrap().0));

    let result = run(pod);
    // Before the threads are waited for, which a guest that failed never ends.
    result.expect_success();
    assert!(vsock.join().unwrap() == content, "what came over vsock differs");
    assert!(net.join().unwrap() == content, "what came over the network differs");
    let back = fs::read(pod.shared().join("from-guest")).unwrap();
    assert!(back == content, "what came back to the shared directory differs");
    result
}

fn expect_clean_end(mut pod: Pod) {
    for id in [VirtioId::Fs, VirtioId::Blk, VirtioId::Net, VirtioId::Vsock] {
        let daemon = pod.daemon_mut(id).unwrap();
        let status = daemon.terminate(Duration::from_secs(5)).unwrap();
        assert!(status.success(), "{id:?}: {status}; its log:\n{}", daemon.log());
    }
}

#[test]
fn one_uml_guest_after_another_uses_all_four() {
    let Some(root) = ToolRoot::for_test() else { return };
    let Some(namespace) = NetNs::for_test(root) else { return };
    let pod = Pod::start(root, &namespace).unwrap();
    let job = Pod::job("pod-carry").unwrap();
    carry(&pod, &namespace, |pod| pod.uml().run(&job, TIMEOUT).unwrap());
    // The same daemons serve the next boot.
    fs::remove_file(pod.vsock_service(1234)).unwrap();
    carry(&pod, &namespace, |pod| pod.uml().run(&job, TIMEOUT).unwrap());
    expect_clean_end(pod);
}

#[test]
fn a_qemu_guest_uses_all_four_with_two_queues() {
    let Some(root) = ToolRoot::for_test() else { return };
    let Some(namespace) = NetNs::for_test(root) else { return };
    let pod = Pod::start(root, &namespace).unwrap();
    let job = Pod::job("pod-carry").unwrap();
    let result = carry(&pod, &namespace, |pod| pod.qemu().run(&job, EMULATED_TIMEOUT).unwrap());
    assert_eq!(result.value("disk_queues"), Some("2"), "{}", result.console);
    assert_eq!(result.value("net_queues"), Some("2"), "{}", result.console);
    expect_clean_end(pod);
}

#[test]
fn a_disks_daemon_crashes_twice_and_the_guest_reads_what_it_wrote() {
    let Some(root) = ToolRoot::for_test() else { return };
    let Some(namespace) = NetNs::for_test(root) else { return };
    let mut pod = Pod::start(root, &namespace).unwrap();
    let guest = pod.qemu().reconnect_ms(50);
    let mut guest = guest.start(&Pod::job("blk-verify").unwrap()).unwrap();
    guest.wait_for("writing now", EMULATED_TIMEOUT).unwrap();
    for _ in 0..2 {
        sleep(Duration::from_millis(1500));
        pod.crash(VirtioId::Blk).unwrap();
    }
    let result = guest.wait(EMULATED_TIMEOUT).unwrap();
    result.expect_success();
    assert_eq!(result.value("verified"), Some("1"), "{}", result.console);
}
