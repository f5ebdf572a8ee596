//! QEMU: a chardev for each socket, and guest memory that other processes can map.

use super::{VmmCommand, file_option, socket, words};
use crate::layout::Layout;
use crate::pod::{Nic, Pod, Storage, VSOCK_NAME};

/// How soon QEMU connects again to a daemon that was restarted. Only blk and net do so: QEMU's file
/// system and vsock devices have no handler for it.
const RECONNECT: &str = ",reconnect-ms=1000";

/// Ring entries of a file system; QEMU's default of 128 holds up a guest that reads ahead.
const FS_QUEUE_SIZE: u16 = 1024;

pub(super) fn command(pod: &Pod, layout: &Layout, extra: &[String]) -> VmmCommand {
    let (arch, guest) = (std::env::consts::ARCH, &pod.guest);
    let machine = if arch == "x86_64" { "q35" } else { "virt" };
    let memory = guest.memory_mib;
    let mut arguments = vec![
        "-machine".to_owned(),
        format!("{machine},memory-backend=mem"),
        "-object".to_owned(),
        format!("memory-backend-memfd,id=mem,size={memory}M,share=on"),
        "-m".to_owned(),
        format!("{memory}M"),
        "-smp".to_owned(),
        guest.cpus.to_string(),
    ];
    arguments.extend(file_option("-kernel", guest.kernel.as_ref()));
    arguments.extend(file_option("-initrd", guest.initrd.as_ref()));
    if let Some(cmdline) = &guest.cmdline {
        arguments.extend(words(["-append", cmdline]));
    }
    for volume in &pod.volumes {
        let name = &volume.name;
        let (reconnect, device) = match &volume.storage {
            Storage::Shared { tag, .. } => (
                "",
                format!(
                    "vhost-user-fs-pci,chardev=chr-{name},tag={tag},queue-size={FS_QUEUE_SIZE}"
                ),
            ),
            Storage::Image { .. } | Storage::Device { .. } => {
                (RECONNECT, format!("vhost-user-blk-pci,chardev=chr-{name}"))
            }
        };
        arguments.extend(chardev(layout, name, reconnect));
        arguments.extend(words(["-device", &device]));
    }
    for nic in &pod.nics {
        arguments.extend(network_card(layout, nic));
    }
    if pod.vsock.is_some() {
        arguments.extend(chardev(layout, VSOCK_NAME, ""));
        let device = format!("vhost-user-vsock-pci,chardev=chr-{VSOCK_NAME}");
        arguments.extend(words(["-device", &device]));
    }
    arguments.extend_from_slice(extra);
    VmmCommand { program: format!("qemu-system-{arch}"), arguments, file: None }
}

fn chardev(layout: &Layout, name: &str, reconnect: &str) -> Vec<String> {
    let path = socket(layout, name);
    words(["-chardev", &format!("socket,id=chr-{name},path={path}{reconnect}")])
}

fn network_card(layout: &Layout, nic: &Nic) -> Vec<String> {
    let (name, pairs) = (&nic.name, nic.queue_pairs);
    let mut arguments = chardev(layout, name, RECONNECT);
    let mut device = format!("virtio-net-pci,netdev=net-{name}");
    let mut netdev = format!("vhost-user,id=net-{name},chardev=chr-{name}");
    if pairs > 1 {
        netdev += &format!(",queues={pairs}");
        // An interrupt for each ring, one for the configuration and one for the control queue.
        device += &format!(",mq=on,vectors={}", 2 * pairs + 2);
    }
    if let Some(mac) = &nic.mac {
        device += &format!(",mac={mac}");
    }
    arguments.extend(words(["-netdev", &netdev, "-device", &device]));
    arguments
}
