//! crosvm: one option a device; the kernel is the last argument.

use super::{VmmCommand, file_option, socket, words};
use crate::layout::Layout;
use crate::pod::{Pod, Storage, VSOCK_NAME};

pub(super) fn command(pod: &Pod, layout: &Layout, extra: &[String]) -> VmmCommand {
    let guest = &pod.guest;
    let mut arguments = words(["run", "--mem"]);
    arguments.push(format!("size={}", guest.memory_mib));
    arguments.push("--cpus".to_owned());
    arguments.push(format!("num-cores={}", guest.cpus));
    arguments.extend(file_option("--initrd", guest.initrd.as_ref()));
    if let Some(cmdline) = &guest.cmdline {
        arguments.extend(words(["--params", cmdline]));
    }
    let volumes = pod.volumes.iter().map(|volume| {
        let kind = match volume.storage {
            Storage::Shared { .. } => "fs",
            Storage::Image { .. } | Storage::Device { .. } => "block",
        };
        (kind, volume.name.as_str())
    });
    let cards = pod.nics.iter().map(|nic| ("net", nic.name.as_str()));
    let vsock = pod.vsock.iter().map(|_| ("vsock", VSOCK_NAME));
    for (kind, name) in volumes.chain(cards).chain(vsock) {
        let path = socket(layout, name);
        arguments.push("--vhost-user".to_owned());
        arguments.push(format!("type={kind},socket={path},max-queue-size=256"));
    }
    arguments.extend_from_slice(extra);
    arguments.extend(guest.kernel.iter().map(|path| path.to_string_lossy().into_owned()));
    VmmCommand { program: "crosvm".to_owned(), arguments, file: None }
}
