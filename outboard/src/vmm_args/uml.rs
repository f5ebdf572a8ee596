//! User Mode Linux: the kernel is the program, and devices are words of its command line.

use super::{Vmm, VmmCommand, VmmError, socket};
use crate::layout::Layout;
use crate::pod::{Pod, Storage, VSOCK_NAME};

/// Numbers of device types. Virtio 1.3, 5.
const NET: u8 = 1;
const BLOCK: u8 = 2;
const VSOCK: u8 = 19;
const FS: u8 = 26;

pub(super) fn command(
    pod: &Pod,
    layout: &Layout,
    extra: &[String],
) -> Result<VmmCommand, VmmError> {
    let guest = &pod.guest;
    if guest.cpus > 1 {
        return Err(VmmError::Unsupported {
            vmm: Vmm::Uml,
            what: vec![format!("cpus = {}", guest.cpus)],
            advice: "it runs one; write cpus = 1",
        });
    }
    let mut arguments = vec![format!("mem={}M", guest.memory_mib)];
    arguments.extend(guest.initrd.iter().map(|path| format!("initrd={}", path.display())));
    // A word with blanks keeps them: the kernel sees the arguments joined.
    arguments.extend(guest.cmdline.iter().flat_map(|line| line.split(' ')).map(str::to_owned));
    let volumes = pod.volumes.iter().map(|volume| {
        let id = match volume.storage {
            Storage::Shared { .. } => FS,
            Storage::Image { .. } | Storage::Device { .. } => BLOCK,
        };
        (id, volume.name.as_str())
    });
    let cards = pod.nics.iter().map(|nic| (NET, nic.name.as_str()));
    let vsock = pod.vsock.iter().map(|_| (VSOCK, VSOCK_NAME));
    for (id, name) in volumes.chain(cards).chain(vsock) {
        arguments.push(format!("virtio_uml.device={}:{id}", socket(layout, name)));
    }
    arguments.extend_from_slice(extra);
    let kernel = guest.kernel.as_ref().map(|path| path.to_string_lossy().into_owned());
    let program = kernel.unwrap_or_else(|| "linux.uml".to_owned());
    Ok(VmmCommand { program, arguments, file: None })
}
