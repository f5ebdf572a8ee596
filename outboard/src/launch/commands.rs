//! The command line of each daemon of a pod. Pure.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use outboard_common::rate_limiter::Limit;
use serde::{Deserialize, Serialize};

use crate::layout::Layout;
use crate::pod::{DiskLimits, Network, Nic, Pod, Storage, VSOCK_NAME, Volume, Vsock};

/// The kind of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A directory.
    Fs,
    /// A disk.
    Blk,
    /// A network card.
    Net,
    /// Sockets.
    Vsock,
}

impl Kind {
    /// The program that serves it.
    #[must_use]
    pub fn program(self) -> &'static str {
        match self {
            Self::Fs => "virtiofsd",
            Self::Blk => "vhost-user-blk",
            Self::Net => "vhost-user-net",
            Self::Vsock => "vsock-proxy",
        }
    }

    /// A short word for tables.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Fs => "fs",
            Self::Blk => "blk",
            Self::Net => "net",
            Self::Vsock => "vsock",
        }
    }
}

/// A daemon to be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DaemonSpec {
    /// The device's name.
    pub name: String,
    /// Its kind.
    pub kind: Kind,
    /// All arguments.
    pub arguments: Vec<OsString>,
    /// Where the VMM comes.
    pub socket: PathBuf,
    /// Where its counters are.
    pub metrics: PathBuf,
    /// Where its log goes.
    pub log: PathBuf,
    /// Where a newer process takes over from it.
    pub handover: PathBuf,
}

/// The daemons of a pod, one a device, in the order of [`Pod::device_names`].
#[must_use]
pub fn daemons(pod: &Pod, layout: &Layout) -> Vec<DaemonSpec> {
    let volumes = pod.volumes.iter().map(|volume| {
        let kind = match volume.storage {
            Storage::Shared { .. } => Kind::Fs,
            Storage::Image { .. } | Storage::Device { .. } => Kind::Blk,
        };
        spec(layout, &volume.name, kind, volume_arguments(volume))
    });
    let cards = pod.nics.iter().map(|nic| spec(layout, &nic.name, Kind::Net, nic_arguments(nic)));
    let vsock = pod
        .vsock
        .iter()
        .map(|vsock| spec(layout, VSOCK_NAME, Kind::Vsock, vsock_arguments(vsock, layout)));
    volumes.chain(cards).chain(vsock).collect()
}

fn spec(layout: &Layout, name: &str, kind: Kind, own: Vec<OsString>) -> DaemonSpec {
    let (socket, metrics) = (layout.socket(name), layout.metrics(name));
    let handover = layout.handover(name);
    let mut arguments = vec![
        option("--socket-path", &socket),
        option("--metrics-socket", &metrics),
        option("--handover-socket", &handover),
    ];
    arguments.extend(own);
    let log = layout.log(name);
    DaemonSpec { name: name.to_owned(), kind, arguments, socket, metrics, log, handover }
}

fn option(name: &str, value: impl AsRef<Path>) -> OsString {
    let mut option = OsString::from(name);
    option.push("=");
    option.push(value.as_ref());
    option
}

/// A limit as every daemon reads it.
fn text(limit: Limit) -> String {
    format!("{}:{}", limit.rate(), limit.burst())
}

fn volume_arguments(volume: &Volume) -> Vec<OsString> {
    match &volume.storage {
        Storage::Shared { dir, tag, cache } => {
            let mut arguments =
                vec![option("--shared-dir", dir), option("--tag", tag), option("--cache", cache)];
            if volume.readonly {
                arguments.push("--readonly".into());
            }
            arguments
        }
        Storage::Image { path, format, limits } => {
            let keys = format!("format={format}");
            vec![option("--blk-file", disk(volume, path, &keys, limits))]
        }
        Storage::Device { path, poll_us, limits } => vec![
            option("--blk-file", disk(volume, path, "format=raw,cache=direct", limits)),
            option("--poll-us", poll_us.to_string()),
        ],
    }
}

/// The value of `--blk-file`.
fn disk(volume: &Volume, path: &Path, keys: &str, limits: &DiskLimits) -> String {
    // A comma of the path is written twice.
    let path = path.to_string_lossy().replace(',', ",,");
    let mut disk = format!("{path},name={},{keys}", volume.name);
    if volume.readonly {
        disk += ",readonly=on";
    }
    if let Some(limit) = limits.iops {
        disk += &format!(",iops={}", text(limit));
    }
    if let Some(limit) = limits.bps {
        disk += &format!(",bps={}", text(limit));
    }
    disk
}

fn nic_arguments(nic: &Nic) -> Vec<OsString> {
    let mut arguments = match &nic.network {
        Network::Tap(name) => vec![option("--tap", name)],
        Network::Macvtap(path) => vec![option("--macvtap", path)],
        Network::Packet(name) => vec![option("--packet", name)],
        Network::User { tcp, udp } => {
            let tcp = tcp.iter().map(|ports| option("--user-tcp", ports));
            let udp = udp.iter().map(|ports| option("--user-udp", ports));
            std::iter::once("--user".into()).chain(tcp).chain(udp).collect()
        }
    };
    arguments.extend(nic.netns.iter().map(|path| option("--netns", path)));
    arguments.extend(nic.mac.iter().map(|mac| option("--mac", mac)));
    arguments.extend(nic.mtu.iter().map(|mtu| option("--mtu", mtu.to_string())));
    // One is all that there is with `--user`, which does not take the option.
    if !matches!(nic.network, Network::User { .. }) {
        arguments.push(option("--queue-pairs", nic.queue_pairs.to_string()));
    }
    for (limit, names) in
        [(nic.pps, ["--tx-packets", "--rx-packets"]), (nic.bps, ["--tx-bytes", "--rx-bytes"])]
    {
        arguments.extend(limit.iter().flat_map(|&limit| names.map(|n| option(n, text(limit)))));
    }
    arguments
}

fn vsock_arguments(vsock: &Vsock, layout: &Layout) -> Vec<OsString> {
    let uds = vsock.uds_path.clone().unwrap_or_else(|| layout.vsock_uds());
    vec![option("--guest-cid", vsock.cid.to_string()), option("--uds-path", uds)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::Guest;

    fn lines(volumes: Vec<Volume>, nics: Vec<Nic>, vsock: Option<Vsock>) -> Vec<String> {
        let guest = Guest { memory_mib: 64, cpus: 1, kernel: None, initrd: None, cmdline: None };
        let pod = Pod { name: "p".into(), run_dir: None, guest, volumes, nics, vsock };
        let layout = Layout { dir: "/r".into() };
        daemons(&pod, &layout)
            .iter()
            .map(|daemon| {
                let words = daemon.arguments.iter().map(|word| word.to_str().unwrap());
                format!("{} {}", daemon.kind.program(), words.collect::<Vec<_>>().join(" "))
            })
            .collect()
    }

    #[test]
    fn every_key_of_a_volume_reaches_its_daemon() {
        let limits =
            DiskLimits { iops: Some("10K:20K".parse().unwrap()), bps: Some("1M".parse().unwrap()) };
        let dir = Storage::Shared { dir: "/d".into(), tag: "work".into(), cache: "never" };
        let image = Storage::Image { path: "/a,b".into(), format: "qcow2", limits };
        let device =
            Storage::Device { path: "/dev/x".into(), poll_us: 7, limits: DiskLimits::default() };
        let volume =
            |name: &str, readonly, storage| Volume { name: name.into(), readonly, storage };
        let lines = lines(
            vec![volume("d", true, dir), volume("i", true, image), volume("n", false, device)],
            Vec::new(),
            None,
        );
        assert_eq!(
            lines,
            [
                "virtiofsd --socket-path=/r/d.sock --metrics-socket=/r/d.metrics --handover-socket=/r/d.handover --shared-dir=/d \
                 --tag=work --cache=never --readonly",
                "vhost-user-blk --socket-path=/r/i.sock --metrics-socket=/r/i.metrics --handover-socket=/r/i.handover \
                 --blk-file=/a,,b,name=i,format=qcow2,readonly=on,iops=10240:20480,bps=1048576:104858",
                "vhost-user-blk --socket-path=/r/n.sock --metrics-socket=/r/n.metrics --handover-socket=/r/n.handover \
                 --blk-file=/dev/x,name=n,format=raw,cache=direct --poll-us=7",
            ]
        );
    }

    #[test]
    fn every_key_of_a_network_card_and_of_vsock_reaches_its_daemon() {
        let nic = Nic {
            name: "eth".into(),
            network: Network::Tap("t0".into()),
            netns: Some("/run/netns/a".into()),
            mac: Some("52:54:00:12:34:56".into()),
            mtu: Some(9000),
            queue_pairs: 2,
            pps: Some("1K:1K".parse().unwrap()),
            bps: Some("1M:2M".parse().unwrap()),
        };
        let user = Nic {
            name: "u".into(),
            network: Network::User {
                tcp: vec!["8022:22".into(), "80".into()],
                udp: vec!["53".into()],
            },
            netns: None,
            mtu: None,
            queue_pairs: 1,
            pps: None,
            bps: None,
            ..nic.clone()
        };
        let vsock = Vsock { cid: 7, uds_path: None };
        assert_eq!(
            lines(Vec::new(), vec![nic, user], Some(vsock)),
            [
                "vhost-user-net --socket-path=/r/eth.sock --metrics-socket=/r/eth.metrics \
                 --handover-socket=/r/eth.handover --tap=t0 --netns=/run/netns/a --mac=52:54:00:12:34:56 --mtu=9000 --queue-pairs=2 \
                 --tx-packets=1024:1024 --rx-packets=1024:1024 --tx-bytes=1048576:2097152 \
                 --rx-bytes=1048576:2097152",
                "vhost-user-net --socket-path=/r/u.sock --metrics-socket=/r/u.metrics --handover-socket=/r/u.handover \
                 --user --user-tcp=8022:22 --user-tcp=80 --user-udp=53 --mac=52:54:00:12:34:56",
                "vsock-proxy --socket-path=/r/vsock.sock --metrics-socket=/r/vsock.metrics \
                 --handover-socket=/r/vsock.handover --guest-cid=7 --uds-path=/r/vsock.host",
            ]
        );
    }
}
