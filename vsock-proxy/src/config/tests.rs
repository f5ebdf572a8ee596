use super::*;

fn check(text: &str) -> Result<VmConfig, String> {
    VmEntry::parse(text).and_then(|e| e.check(None)).map_err(|e| e.to_string())
}

#[test]
fn the_other_proxys_keys_mean_the_same() {
    let vm = check(
        "guest_cid=4,socket=/tmp/v,uds_path=/tmp/h,tx_buffer_size=32768,queue-size=256,groups=a+b",
    )
    .unwrap();
    assert_eq!(vm.guest_cid.get(), 4);
    assert_eq!(vm.host, HostSide::Unix("/tmp/h".into()));
    assert_eq!((vm.tx_buffer_size, vm.queue_size), (32768, 256));
    assert_eq!(vm.groups, ["a", "b"]);
    let vm = check("socket=/tmp/v,forward-cid=1,forward-listen=9001+9002").unwrap();
    assert_eq!(vm.host, HostSide::Vsock { cid: 1, listen: vec![Port(9001), Port(9002)] });
    assert_eq!(vm.guest_cid.get(), DEFAULT_GUEST_CID);
    assert_eq!(vm.groups, [DEFAULT_GROUP]);
}

#[test]
fn services_may_be_elsewhere() {
    let vm = check("uds-path=/h,map=514:/run/logs,map=1:/one,connect-only=true").unwrap();
    assert_eq!(vm.policy.map[&514], PathBuf::from("/run/logs"));
    assert!(vm.policy.connect_only && !vm.policy.guest_may_reach(Port(1)));
}

#[test]
fn what_cannot_be_served_is_said() {
    for (text, part) in [
        ("", "key=value"),
        ("cid", "key=value"),
        ("cid=3", "uds-path"),
        ("cid=x,uds-path=/h", "number"),
        ("cid=0,uds-path=/h", "reserved"),
        ("uds-path=/h,forward-cid=1", "exclude"),
        ("uds-path=/h,forward-listen=1", "exclude"),
        ("uds-path=/h,queue-size=3", "power of two"),
        ("uds-path=/h,tx-buffer-size=9999999999", "tx-buffer-size"),
        ("uds-path=/h,map=1", "PORT:PATH"),
        ("uds-path=/h,connect-only=yes", "neither"),
        ("uds-path=/h,colour=red", "colour"),
    ] {
        let said = check(text).unwrap_err();
        assert!(said.contains(part), "{text}: {said}");
    }
}

#[test]
fn vms_must_not_share() {
    let vm = |text| check(text).unwrap();
    let a = vm("cid=3,socket=/a,uds-path=/h");
    assert!(check_together(&[a.clone(), vm("cid=4,socket=/b,uds-path=/i")]).is_ok());
    assert!(check_together(&[a.clone(), vm("cid=3,socket=/b,uds-path=/i")]).is_err());
    assert!(check_together(&[a.clone(), vm("cid=4,socket=/a,uds-path=/i")]).is_err());
    assert!(check_together(&[a, vm("cid=4,socket=/b,uds-path=/h")]).is_err());
    assert!(check_together(&[]).is_err());
}
