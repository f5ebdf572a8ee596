//! cloud-hypervisor. An option that may come several times is given once with all its values, which
//! every release understands.

use super::{VmmCommand, file_option, socket, words};
use crate::layout::Layout;
use crate::pod::{Nic, Pod, Storage, VSOCK_NAME};

/// Of receive, transmit and event queue: nothing tells the VMM how many the device has.
const VSOCK_QUEUES: &str = "[256,256,256]";

pub(super) fn command(pod: &Pod, layout: &Layout, extra: &[String]) -> VmmCommand {
    let guest = &pod.guest;
    let mut arguments = vec![
        "--cpus".to_owned(),
        format!("boot={}", guest.cpus),
        "--memory".to_owned(),
        format!("size={}M,shared=on", guest.memory_mib),
    ];
    arguments.extend(file_option("--kernel", guest.kernel.as_ref()));
    arguments.extend(file_option("--initramfs", guest.initrd.as_ref()));
    if let Some(cmdline) = &guest.cmdline {
        arguments.extend(words(["--cmdline", cmdline]));
    }
    let (mut disks, mut shares) = (Vec::new(), Vec::new());
    for volume in &pod.volumes {
        let path = socket(layout, &volume.name);
        match &volume.storage {
            Storage::Shared { tag, .. } => {
                shares.push(format!("tag={tag},socket={path},num_queues=1,queue_size=1024"));
            }
            Storage::Image { .. } | Storage::Device { .. } => {
                disks.push(format!("vhost_user=on,socket={path}"));
            }
        }
    }
    let cards: Vec<String> = pod.nics.iter().map(|nic| network_card(layout, nic)).collect();
    let vsock = pod.vsock.as_ref().map(|_| {
        // Releases that have no `device_type` call it `virtio_id=19`.
        let path = socket(layout, VSOCK_NAME);
        format!("socket={path},device_type=vsock,queue_sizes={VSOCK_QUEUES}")
    });
    for (option, values) in [
        ("--disk", disks),
        ("--fs", shares),
        ("--net", cards),
        ("--generic-vhost-user", vsock.into_iter().collect()),
    ] {
        if !values.is_empty() {
            arguments.push(option.to_owned());
            arguments.extend(values);
        }
    }
    arguments.extend_from_slice(extra);
    VmmCommand { program: "cloud-hypervisor".to_owned(), arguments, file: None }
}

fn network_card(layout: &Layout, nic: &Nic) -> String {
    let path = socket(layout, &nic.name);
    let queues = 2 * nic.queue_pairs;
    let mac = nic.mac.as_ref().map_or_else(String::new, |mac| format!(",mac={mac}"));
    format!("vhost_user=on,socket={path},vhost_mode=client,num_queues={queues}{mac}")
}
