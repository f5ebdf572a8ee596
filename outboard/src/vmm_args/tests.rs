//! Against the syntax each VMM documents: QEMU's qemu-options.hx and device properties,
//! cloud-hypervisor's `--help` and docs/generic-vhost-user.md, Firecracker's
//! docs/api_requests/block-vhost-user.md and its configuration file, crosvm's book (vhost-user
//! devices), the kernel's `virtio_uml.device` parameter.

use super::*;
use crate::pod::{DiskLimits, Guest, Network, Nic, Storage, Volume, Vsock};

fn volume(name: &str, storage: Storage) -> Volume {
    Volume { name: name.to_owned(), readonly: false, storage }
}

fn image(name: &str) -> Volume {
    let limits = DiskLimits::default();
    volume(name, Storage::Image { path: "/disk".into(), format: "raw", limits })
}

fn pod() -> Pod {
    let nic = Nic {
        name: "eth0".into(),
        network: Network::Tap("tap0".into()),
        netns: None,
        mac: Some("52:54:00:12:34:56".into()),
        mtu: None,
        queue_pairs: 2,
        pps: None,
        bps: None,
    };
    let shared = Storage::Shared { dir: "/d".into(), tag: "work".into(), cache: "auto" };
    Pod {
        name: "web".into(),
        run_dir: None,
        guest: Guest {
            memory_mib: 1024,
            cpus: 2,
            kernel: Some("/boot/vmlinuz".into()),
            initrd: Some("/boot/initrd".into()),
            cmdline: Some("console=ttyS0 root=/dev/vda".into()),
        },
        volumes: vec![volume("src", shared), image("root"), image("data-1")],
        nics: vec![nic],
        vsock: Some(Vsock { cid: 7, uds_path: None }),
    }
}

fn line(vmm: Vmm, pod: &Pod) -> String {
    let layout = Layout { dir: "/run/web".into() };
    command(vmm, pod, &layout, &["--last".to_owned()]).unwrap().shell_line()
}

#[test]
fn qemu() {
    let line = line(Vmm::Qemu, &pod());
    let (program, arguments) = line.split_once(' ').unwrap();
    assert_eq!(program, format!("qemu-system-{}", std::env::consts::ARCH));
    let arguments = arguments.strip_prefix("-machine q35,").unwrap_or(arguments);
    assert_eq!(
        arguments.strip_prefix("-machine virt,").unwrap_or(arguments),
        "memory-backend=mem -object memory-backend-memfd,id=mem,size=1024M,share=on -m 1024M \
         -smp 2 -kernel /boot/vmlinuz -initrd /boot/initrd -append 'console=ttyS0 root=/dev/vda' \
         -chardev socket,id=chr-src,path=/run/web/src.sock \
         -device vhost-user-fs-pci,chardev=chr-src,tag=work,queue-size=1024 \
         -chardev socket,id=chr-root,path=/run/web/root.sock,reconnect-ms=1000 \
         -device vhost-user-blk-pci,chardev=chr-root \
         -chardev socket,id=chr-data-1,path=/run/web/data-1.sock,reconnect-ms=1000 \
         -device vhost-user-blk-pci,chardev=chr-data-1 \
         -chardev socket,id=chr-eth0,path=/run/web/eth0.sock,reconnect-ms=1000 \
         -netdev vhost-user,id=net-eth0,chardev=chr-eth0,queues=2 \
         -device virtio-net-pci,netdev=net-eth0,mq=on,vectors=6,mac=52:54:00:12:34:56 \
         -chardev socket,id=chr-vsock,path=/run/web/vsock.sock \
         -device vhost-user-vsock-pci,chardev=chr-vsock --last"
    );
}

#[test]
fn cloud_hypervisor() {
    assert_eq!(
        line(Vmm::CloudHypervisor, &pod()),
        "cloud-hypervisor --cpus boot=2 --memory size=1024M,shared=on --kernel /boot/vmlinuz \
         --initramfs /boot/initrd --cmdline 'console=ttyS0 root=/dev/vda' \
         --disk vhost_user=on,socket=/run/web/root.sock vhost_user=on,socket=/run/web/data-1.sock \
         --fs tag=work,socket=/run/web/src.sock,num_queues=1,queue_size=1024 \
         --net vhost_user=on,socket=/run/web/eth0.sock,vhost_mode=client,num_queues=4,mac=52:54:00:12:34:56 \
         --generic-vhost-user \
         'socket=/run/web/vsock.sock,device_type=vsock,queue_sizes=[256,256,256]' --last"
    );
}

#[test]
fn crosvm() {
    assert_eq!(
        line(Vmm::Crosvm, &pod()),
        "crosvm run --mem size=1024 --cpus num-cores=2 --initrd /boot/initrd \
         --params 'console=ttyS0 root=/dev/vda' \
         --vhost-user type=fs,socket=/run/web/src.sock,max-queue-size=256 \
         --vhost-user type=block,socket=/run/web/root.sock,max-queue-size=256 \
         --vhost-user type=block,socket=/run/web/data-1.sock,max-queue-size=256 \
         --vhost-user type=net,socket=/run/web/eth0.sock,max-queue-size=256 \
         --vhost-user type=vsock,socket=/run/web/vsock.sock,max-queue-size=256 \
         --last /boot/vmlinuz"
    );
}

#[test]
fn uml() {
    let mut pod = pod();
    let layout = Layout { dir: "/run/web".into() };
    let error = command(Vmm::Uml, &pod, &layout, &[]).unwrap_err().to_string();
    assert_eq!(error, "User Mode Linux cannot take cpus = 2; it runs one; write cpus = 1");
    pod.guest.cpus = 1;
    assert_eq!(
        line(Vmm::Uml, &pod),
        "/boot/vmlinuz mem=1024M initrd=/boot/initrd console=ttyS0 root=/dev/vda \
         virtio_uml.device=/run/web/src.sock:26 virtio_uml.device=/run/web/root.sock:2 \
         virtio_uml.device=/run/web/data-1.sock:2 virtio_uml.device=/run/web/eth0.sock:1 \
         virtio_uml.device=/run/web/vsock.sock:19 --last"
    );
    pod.guest.kernel = None;
    assert!(line(Vmm::Uml, &pod).starts_with("linux.uml mem="));
}

#[test]
fn firecracker_takes_disks_and_says_what_it_does_not_take() {
    let mut pod = pod();
    let layout = Layout { dir: "/run/web".into() };
    let error = command(Vmm::Firecracker, &pod, &layout, &[]).unwrap_err().to_string();
    assert!(
        error.starts_with(
            "Firecracker cannot take the shared volume src, the network card eth0, \
             the vsock device; its vhost-user devices are disks alone"
        ),
        "{error}"
    );
    pod.volumes.remove(0);
    pod.nics.clear();
    pod.vsock = None;
    let fire = command(Vmm::Firecracker, &pod, &layout, &[]).unwrap();
    assert_eq!(fire.arguments, ["--no-api", "--config-file", "/run/web/firecracker.json"]);
    let (path, text) = fire.file.clone().unwrap();
    assert_eq!(path, layout.firecracker_config());
    let config: serde_json::Value = serde_json::from_str(&text).unwrap();
    let drive =
        |id, socket| serde_json::json!({"drive_id": id, "socket": socket, "is_root_device": false});
    assert_eq!(
        config,
        serde_json::json!({
            "boot-source": {
                "kernel_image_path": "/boot/vmlinuz",
                "initrd_path": "/boot/initrd",
                "boot_args": "console=ttyS0 root=/dev/vda",
            },
            "drives": [
                drive("root", "/run/web/root.sock"),
                drive("data_2d1", "/run/web/data-1.sock"),
            ],
            "machine-config": { "vcpu_count": 2, "mem_size_mib": 1024 },
        })
    );
    let line = fire.shell_line();
    let end = " >/run/web/firecracker.json && firecracker --no-api --config-file \
               /run/web/firecracker.json";
    assert!(line.starts_with("printf %s '{") && line.ends_with(end), "{line}");

    pod.guest.kernel = None;
    let error = command(Vmm::Firecracker, &pod, &layout, &[]).unwrap_err().to_string();
    assert!(error.contains("needs `kernel` in [guest]"), "{error}");
}

/// The oracle is a shell.
#[test]
fn a_shell_reads_the_words_back() {
    let words = ["plain", "two words", "", "it's", "$HOME `x` \"q\" \\ *", "a\nb", "[1,2]", "~"];
    let command = VmmCommand {
        program: "printf".into(),
        arguments: std::iter::once("%s\\0").chain(words).map(str::to_owned).collect(),
        file: None,
    };
    let output =
        std::process::Command::new("sh").args(["-c", &command.shell_line()]).output().unwrap();
    let read: Vec<&str> = std::str::from_utf8(&output.stdout).unwrap().split('\0').collect();
    assert_eq!(read, words.into_iter().chain([""]).collect::<Vec<_>>());
}
