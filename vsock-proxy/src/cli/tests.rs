use clap::CommandFactory;

use super::*;

fn vms(line: &str) -> anyhow::Result<Vec<Served>> {
    VsockArgs::try_parse_from(std::iter::once("vsock-proxy").chain(line.split_whitespace()))?.vms()
}

#[test]
fn the_command_is_well_formed() {
    VsockArgs::command().debug_assert();
}

#[test]
fn one_vm_in_the_other_proxys_words() {
    let line = "--guest-cid=5 --socket=/tmp/v --uds-path=/tmp/h --tx-buffer-size=65536 \
                --queue-size 256 --groups a+b";
    let served = vms(line).unwrap();
    assert_eq!(served.len(), 1);
    assert_eq!(served[0].socket, SocketChoice::Listen("/tmp/v".into()));
    assert_eq!(served[0].config.guest_cid.get(), 5);
    assert_eq!(served[0].config.tx_buffer_size, 65536);
    assert_eq!(served[0].config.queue_size, 256);
    assert_eq!(served[0].config.groups, ["a", "b"]);
    let forwarded = vms("--socket=/tmp/v --forward-cid=1 --forward-listen=9001").unwrap();
    assert_eq!(
        forwarded[0].config.host,
        crate::config::HostSide::Vsock { cid: 1, listen: vec![crate::packet::Port(9001)] }
    );
}

#[test]
fn several_vms() {
    let served =
        vms("--vm cid=3,socket=/a,uds-path=/b --vm guest-cid=4,socket=/c,uds_path=/d").unwrap();
    assert_eq!(served.len(), 2);
    assert!(vms("--vm cid=3,socket=/a,uds-path=/b --uds-path=/c").is_err());
    assert!(vms("--vm cid=3,socket=/a,uds-path=/b --socket-path=/c").is_err());
}

#[test]
fn the_usual_options_work_for_one_vm() {
    let served = vms("--fd=7 --uds-path=/tmp/h").unwrap();
    assert_eq!(served[0].socket, SocketChoice::Inherited(7));
    let served = vms("--socket-path=/tmp/v --client --uds-path=/tmp/h").unwrap();
    assert_eq!(served[0].socket, SocketChoice::Dial("/tmp/v".into()));
}
