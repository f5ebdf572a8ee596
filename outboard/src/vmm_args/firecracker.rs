//! Firecracker: a configuration file with vhost-user drives, and nothing else that is vhost-user.

use serde_json::json;

use super::{Vmm, VmmCommand, VmmError, socket, words};
use crate::layout::Layout;
use crate::pod::{Pod, Storage};

pub(super) fn command(
    pod: &Pod,
    layout: &Layout,
    extra: &[String],
) -> Result<VmmCommand, VmmError> {
    let what = unsupported(pod);
    if !what.is_empty() {
        let advice = "its vhost-user devices are disks alone: make volumes tier = \"image\" or \
                      \"device\", and give it its own network and vsock devices";
        return Err(VmmError::Unsupported { vmm: Vmm::Firecracker, what, advice });
    }
    let guest = &pod.guest;
    let kernel = guest.kernel.as_ref().ok_or(VmmError::NoKernel(Vmm::Firecracker))?;
    let drives: Vec<serde_json::Value> = pod
        .volumes
        .iter()
        .map(|volume| {
            // A drive's id is letters, digits and _; names are unique with their place before.
            json!({
                "drive_id": drive_id(&volume.name),
                "socket": socket(layout, &volume.name),
                "is_root_device": false,
            })
        })
        .collect();
    let mut boot = json!({ "kernel_image_path": kernel.to_string_lossy() });
    if let Some(initrd) = &guest.initrd {
        boot["initrd_path"] = json!(initrd.to_string_lossy());
    }
    if let Some(cmdline) = &guest.cmdline {
        boot["boot_args"] = json!(cmdline);
    }
    let config = json!({
        "boot-source": boot,
        "drives": drives,
        "machine-config": { "vcpu_count": guest.cpus, "mem_size_mib": guest.memory_mib },
    });
    let path = layout.firecracker_config();
    let mut arguments = words(["--no-api", "--config-file"]);
    arguments.push(path.to_string_lossy().into_owned());
    arguments.extend_from_slice(extra);
    let file = Some((path, config.to_string()));
    Ok(VmmCommand { program: "firecracker".to_owned(), arguments, file })
}

fn unsupported(pod: &Pod) -> Vec<String> {
    let shared = |volume: &&crate::pod::Volume| matches!(volume.storage, Storage::Shared { .. });
    let volumes = pod.volumes.iter().filter(shared);
    let mut what: Vec<String> =
        volumes.map(|volume| format!("the shared volume {}", volume.name)).collect();
    what.extend(pod.nics.iter().map(|nic| format!("the network card {}", nic.name)));
    what.extend(pod.vsock.iter().map(|_| "the vsock device".to_owned()));
    what
}

/// Letters, digits and `_`; other characters by their number, so that ids stay different.
fn drive_id(name: &str) -> String {
    name.chars()
        .map(|c| match c {
            c if c.is_ascii_alphanumeric() => c.to_string(),
            other => format!("_{:02x}", u32::from(other)),
        })
        .collect()
}
