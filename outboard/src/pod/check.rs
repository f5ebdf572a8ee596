//! From the tables of a file to a checked [`Pod`]. The only I/O is to look whether paths exist.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use outboard_common::cli::values::Size;
use outboard_common::rate_limiter::Limit;

use super::reader::{At, Mistakes, Section};
use super::{
    CID_MAX, CID_MIN, DiskLimits, Guest, Network, Nic, Pod, Storage, VSOCK_NAME, Volume, Vsock,
};

const MIB: u64 = 1 << 20;
/// Longest name of a device: it must fit a socket's path beside the run directory.
const NAME_MAX: usize = 32;
/// Longest tag of a file system. Virtio 1.3, 5.11.4.
const TAG_MAX: usize = 36;
/// Longest name of a network interface (IFNAMSIZ - 1).
const INTERFACE_MAX: usize = 15;
/// Most queue pairs of `vhost-user-net`.
const QUEUE_PAIRS_MAX: u16 = 64;
/// How long a worker of a device of tier `device` polls unless the file says otherwise.
const POLL_US_DEFAULT: u32 = 50;
/// The first bytes of a qcow2 image.
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

#[derive(Debug, Clone, Copy)]
enum Tier {
    Shared,
    Image,
    Device,
}

/// Reads the tables of one file.
pub(super) struct Checker<'t> {
    /// The file's directory, where relative paths begin.
    base: PathBuf,
    /// The file's name without its extension.
    stem: String,
    mistakes: &'t Mistakes,
    /// What must not be there twice, with the kind of thing it is.
    seen: BTreeMap<(&'static str, String), ()>,
}

impl<'t> Checker<'t> {
    pub(super) fn new(file: &Path, mistakes: &'t Mistakes) -> Self {
        let absolute = std::path::absolute(file).unwrap_or_else(|_| file.to_owned());
        Self {
            base: absolute.parent().map(Path::to_owned).unwrap_or_default(),
            stem: file.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default(),
            mistakes,
            seen: BTreeMap::new(),
        }
    }

    /// The whole file. `None` only with a mistake.
    pub(super) fn pod(mut self, root: Section<'t>) -> Option<Pod> {
        let name = match root.text("name") {
            Some(name) => self.name(&name),
            None => self.name(&At { value: self.stem.clone(), span: 0..0 }),
        };
        let run_dir = root.text("run-dir").and_then(|dir| self.run_dir(&dir));
        let guest = self.guest(root.section("guest"));
        // The vsock device's name is taken first, so that the volume of that name is the mistake.
        let vsock = root.section("vsock").map(|section| self.vsock(section));
        let volumes: Vec<Option<Volume>> =
            root.sections("volume").into_iter().map(|section| self.volume(section)).collect();
        let nics: Vec<Option<Nic>> =
            root.sections("nic").into_iter().map(|section| self.nic(section)).collect();
        if !["volume", "nic", "vsock"].iter().any(|key| root.has(key)) {
            self.mistakes
                .add(&(0..0), "the pod has no device; add a [[volume]], [[nic]] or [vsock]");
        }
        root.finish("a pod file");
        Some(Pod {
            name: name?,
            run_dir,
            guest: guest?,
            volumes: volumes.into_iter().collect::<Option<_>>()?,
            nics: nics.into_iter().collect::<Option<_>>()?,
            vsock: match vsock {
                Some(vsock) => Some(vsock?),
                None => None,
            },
        })
    }

    /// A name that can be part of a path and of any VMM's arguments.
    fn name(&self, name: &At<String>) -> Option<String> {
        let text = &name.value;
        let good = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if text.is_empty()
            || text.len() > NAME_MAX
            || !text.chars().all(good)
            || !text.starts_with(|c: char| c.is_ascii_alphanumeric())
        {
            let rule = "letters, digits, - _ and . , a letter or digit first";
            let message = format!("the name {text:?} is not usable; write 1 to {NAME_MAX} {rule}");
            self.mistakes.add(&name.span, message);
            return None;
        }
        Some(text.clone())
    }

    /// Notes that a thing is used; twice is a mistake.
    fn once(&mut self, kind: &'static str, what: &str, span: &Range<usize>, advice: &str) {
        if self.seen.insert((kind, what.to_owned()), ()).is_some() {
            self.mistakes.add(span, format!("two devices have the {kind} {what:?}; {advice}"));
        }
    }

    fn device_name(&mut self, section: &Section<'t>) -> Option<String> {
        let given = section.required("name", section.text("name"), "give the device a name")?;
        let name = self.name(&given)?;
        self.once("name", &name, &given.span, "names are also those of sockets: give each its own");
        Some(name)
    }

    fn path(&self, text: &str) -> PathBuf {
        self.base.join(text)
    }

    fn run_dir(&self, dir: &At<String>) -> Option<PathBuf> {
        let path = self.path(&dir.value);
        if let Err(why) = crate::layout::check_dir(&path) {
            self.mistakes.add(&dir.span, format!("`run-dir`: {why}"));
            return None;
        }
        Some(path)
    }

    fn guest(&self, section: Option<Section<'t>>) -> Option<Guest> {
        let Some(section) = section else {
            return Some(Guest {
                memory_mib: 1024,
                cpus: 1,
                kernel: None,
                initrd: None,
                cmdline: None,
            });
        };
        let memory = section.parsed("memory", memory_mib);
        let cpus = section.parsed("cpus", |text| in_range(text, 1, 1024));
        let file = |key| section.text(key).and_then(|path| self.existing_file(key, &path));
        let guest = Guest {
            memory_mib: memory.map_or(1024, |at| at.value),
            cpus: cpus.map_or(1, |at| at.value),
            kernel: file("kernel"),
            initrd: file("initrd"),
            cmdline: section.text("cmdline").map(|at| at.value),
        };
        section.finish("[guest]");
        Some(guest)
    }

    /// A file that is there.
    fn existing_file(&self, key: &str, path: &At<String>) -> Option<PathBuf> {
        let full = self.path(&path.value);
        match fs::metadata(&full) {
            Ok(meta) if !meta.is_dir() => Some(full),
            Ok(_) => self.bad_path(key, path, &full, "is a directory; name a file"),
            Err(error) => self.bad_path(key, path, &full, &missing(&error)),
        }
    }

    fn bad_path<T>(&self, key: &str, path: &At<String>, full: &Path, why: &str) -> Option<T> {
        self.mistakes.add(&path.span, format!("`{key}`: {} {why}", full.display()));
        None
    }

    fn volume(&mut self, section: Section<'t>) -> Option<Volume> {
        let name = self.device_name(&section);
        let tiers = [("shared", Tier::Shared), ("image", Tier::Image), ("device", Tier::Device)];
        let hint =
            "write \"shared\" (a directory), \"image\" (a file) or \"device\" (a block device)";
        let tier = section.required("tier", section.choice("tier", &tiers), hint);
        let path = section.required("path", section.text("path"), "say what the volume is made of");
        let readonly = section.flag("readonly");
        let Some(tier) = tier else {
            // Without the tier nobody knows which other keys are right.
            return None;
        };
        let storage = match tier.value {
            Tier::Shared => self.shared(&section, name.as_deref(), path),
            Tier::Image => self.image(&section, path),
            Tier::Device => self.device(&section, path),
        };
        section.finish(match tier.value {
            Tier::Shared => "a volume of tier \"shared\"",
            Tier::Image => "a volume of tier \"image\"",
            Tier::Device => "a volume of tier \"device\"",
        });
        Some(Volume { name: name?, readonly, storage: storage? })
    }

    fn shared(
        &mut self,
        section: &Section<'t>,
        name: Option<&str>,
        path: Option<At<String>>,
    ) -> Option<Storage> {
        let caches = ["auto", "always", "never", "metadata"].map(|word| (word, word));
        let cache = section.choice("cache", &caches).map_or("auto", |at| at.value);
        let tag = match section.text("tag") {
            Some(tag) => self.tag(&tag),
            None => name.map(str::to_owned),
        };
        if let Some(tag) = &tag {
            let span = section.place("tag");
            self.once("tag", tag, &span, "the guest mounts by it: give each its own");
        }
        let path = path?;
        let full = self.path(&path.value);
        let dir = match fs::metadata(&full) {
            Ok(meta) if meta.is_dir() => Some(full),
            Ok(_) => {
                let advice = "is no directory; name one, or write tier = \"image\"";
                self.bad_path("path", &path, &full, advice)
            }
            Err(error) => self.bad_path("path", &path, &full, &missing(&error)),
        };
        Some(Storage::Shared { dir: dir?, tag: tag?, cache })
    }

    fn tag(&self, tag: &At<String>) -> Option<String> {
        let text = &tag.value;
        let good = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if text.is_empty() || text.len() > TAG_MAX || !text.chars().all(good) {
            let rule = format!("write 1 to {TAG_MAX} letters, digits, - _ and .");
            self.mistakes.add(&tag.span, format!("the tag {text:?} is not usable; {rule}"));
            return None;
        }
        Some(text.clone())
    }

    fn image(&mut self, section: &Section<'t>, path: Option<At<String>>) -> Option<Storage> {
        let formats = [("raw", "raw"), ("qcow2", "qcow2")];
        let format = section.choice("format", &formats).map(|at| at.value);
        let limits = disk_limits(section);
        let path = path?;
        let full = self.existing_file("path", &path)?;
        if fs::metadata(&full).is_ok_and(|meta| meta.file_type().is_block_device()) {
            let advice = "is a block device; write tier = \"device\"";
            return self.bad_path("path", &path, &full, advice);
        }
        // Not guessed: the guest of a raw image could write the header of another one into it.
        if format.is_none() && begins_with_magic(&full) {
            let advice = "looks like qcow2; write format = \"qcow2\", or \"raw\" if it is the \
                          guest's data";
            return self.bad_path("path", &path, &full, advice);
        }
        self.exclusive(&full, section, &path);
        Some(Storage::Image { path: full, format: format.unwrap_or("raw"), limits })
    }

    fn device(&mut self, section: &Section<'t>, path: Option<At<String>>) -> Option<Storage> {
        let limits = disk_limits(section);
        let poll_us = section.parsed("poll-us", |text| in_range(text, 0, 1_000_000));
        let path = path?;
        let full = self.existing_file("path", &path)?;
        if !fs::metadata(&full).is_ok_and(|meta| meta.file_type().is_block_device()) {
            let advice = "is no block device; name one, or write tier = \"image\"";
            return self.bad_path("path", &path, &full, advice);
        }
        self.exclusive(&full, section, &path);
        let poll_us = poll_us.map_or(POLL_US_DEFAULT, |at| at.value);
        Some(Storage::Device { path: full, poll_us, limits })
    }

    /// Two disks of one file would destroy each other's file system.
    fn exclusive(&mut self, full: &Path, section: &Section<'t>, path: &At<String>) {
        if !section.flag("readonly") {
            let real = fs::canonicalize(full).unwrap_or_else(|_| full.to_owned());
            let advice = "give each its own, or write readonly = true";
            self.once("disk", &real.to_string_lossy(), &path.span, advice);
        }
    }

    fn nic(&mut self, section: Section<'t>) -> Option<Nic> {
        let name = self.device_name(&section);
        let network = self.network(&section);
        let is_user = matches!(network, Some(Network::User { .. }));
        let netns = section.text("netns").and_then(|path| self.existing_file("netns", &path));
        if netns.is_some() && matches!(network, Some(Network::Macvtap(_))) {
            let message =
                "`netns` does not go with `macvtap`, which is a device file; leave it out";
            self.mistakes.add(&section.place("netns"), message);
        }
        if netns.is_some() && is_user {
            let message =
                "`netns` does not go with `user`, which uses the launcher's; leave it out";
            self.mistakes.add(&section.place("netns"), message);
        }
        let mac = section.parsed("mac", mac);
        if let Some(mac) = &mac {
            self.once("mac", &mac.value, &mac.span, "give each card its own");
        }
        let pairs = section.parsed("queue-pairs", |text| in_range(text, 1, QUEUE_PAIRS_MAX));
        if is_user && pairs.as_ref().is_some_and(|pairs| pairs.value > 1) {
            let message = "`user` has one queue pair; leave `queue-pairs` out";
            self.mistakes.add(&section.place("queue-pairs"), message);
        }
        let mtu = section.parsed("mtu", |text| in_range(text, 68, u16::MAX));
        let (pps, bps) = (section.parsed("pps", limit), section.parsed("bps", limit));
        section.finish("a network card");
        Some(Nic {
            name: name?,
            network: network?,
            netns,
            mac: mac.map(|at| at.value),
            mtu: mtu.map(|at| at.value),
            queue_pairs: pairs.map_or(1, |at| at.value),
            pps: pps.map(|at| at.value),
            bps: bps.map(|at| at.value),
        })
    }

    fn network(&mut self, section: &Section<'t>) -> Option<Network> {
        let tap = section.text("tap");
        let macvtap = section.text("macvtap");
        let packet = section.text("packet");
        let user = section.flag("user");
        let [tcp, udp] = ["user-tcp", "user-udp"].map(|key| section.list(key, forwarded_ports));
        for key in ["user-tcp", "user-udp"] {
            if section.has(key) && !section.has("user") {
                let message = format!("`{key}` goes with `user = true` only; leave it out");
                self.mistakes.add(&section.place(key), message);
            }
        }
        let given = [&tap, &macvtap, &packet].into_iter().flatten().count() + usize::from(user);
        if given != 1 {
            let message = "a network card has one of `tap`, `macvtap`, `packet` and `user = true`; write just one";
            self.mistakes.add(&section.span, message);
            return None;
        }
        if user {
            return Some(Network::User { tcp, udp });
        }
        if let Some(device) = macvtap {
            let path = self.existing_file("macvtap", &device)?;
            self.once("network", &device.value, &device.span, "give each card its own");
            return Some(Network::Macvtap(path));
        }
        let interface = tap.as_ref().or(packet.as_ref())?;
        let name = &interface.value;
        let good = |c: char| c.is_ascii_graphic() && c != '/';
        if name.is_empty() || name.len() > INTERFACE_MAX || !name.chars().all(good) {
            let rule = format!("write 1 to {INTERFACE_MAX} characters without blanks and /");
            self.mistakes.add(&interface.span, format!("{name:?} is no interface; {rule}"));
            return None;
        }
        self.once("network", name, &interface.span, "give each card its own");
        Some(match tap {
            Some(_) => Network::Tap(name.clone()),
            None => Network::Packet(name.clone()),
        })
    }

    fn vsock(&mut self, section: Section<'t>) -> Option<Vsock> {
        self.once("name", VSOCK_NAME, &section.span, "the vsock device is called so");
        let cid = section.parsed("cid", |text| {
            in_range(text, CID_MIN, CID_MAX).map_err(|why| format!("{why}: 0 to 2 are reserved"))
        });
        let cid = section.required("cid", cid, "write the guest's address, 3 or more");
        let uds =
            section.text("uds-path").map(|at| At { value: self.path(&at.value), span: at.span });
        if let Some(uds) = &uds {
            let checked = outboard_common::cli::values::check_socket_path(&uds.value);
            if let Err(why) = checked {
                self.mistakes.add(&uds.span, format!("`uds-path`: {why}"));
            }
            if !uds.value.parent().is_some_and(Path::is_dir) {
                let message = "`uds-path`: its directory is not there; create it";
                self.mistakes.add(&uds.span, message);
            }
        }
        section.finish("[vsock]");
        Some(Vsock { cid: cid?.value, uds_path: uds.map(|at| at.value) })
    }
}

fn missing(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::NotFound => "does not exist; create it, or correct the path".to_owned(),
        _ => format!("cannot be used: {error}"),
    }
}

fn begins_with_magic(path: &Path) -> bool {
    let mut start = [0; 4];
    fs::File::open(path).is_ok_and(|mut file| file.read_exact(&mut start).is_ok())
        && start == QCOW2_MAGIC
}

fn disk_limits(section: &Section<'_>) -> DiskLimits {
    DiskLimits {
        iops: section.parsed("iops", limit).map(|at| at.value),
        bps: section.parsed("bps", limit).map(|at| at.value),
    }
}

fn limit(text: &str) -> Result<Limit, String> {
    text.parse().map_err(|error: outboard_common::rate_limiter::LimitError| error.to_string())
}

fn memory_mib(text: &str) -> Result<u64, String> {
    let bytes = text.parse::<Size>().map_err(|error| error.to_string())?.bytes();
    if !bytes.is_multiple_of(MIB) || !(16 * MIB..=(MIB << 20) * 16).contains(&bytes) {
        return Err("write whole MiB, from 16M to 16T".to_owned());
    }
    Ok(bytes / MIB)
}

fn in_range<T>(text: &str, least: T, most: T) -> Result<T, String>
where
    T: std::str::FromStr + PartialOrd + std::fmt::Display,
{
    match text.parse::<T>() {
        Ok(number) if number >= least && number <= most => Ok(number),
        _ => Err(format!("write a number from {least} to {most}")),
    }
}

/// Ports of the host, as passt has them: `[ADDRESS/]PORTS`, PORTS with a comma between, each a port or a
/// range, after a colon the guest's.
fn forwarded_ports(text: &str) -> Result<String, String> {
    let wrong =
        || "write ports as passt does, like 8080, 8022:22, 1000-1010 or 127.0.0.1/8080".to_owned();
    let (address, ports) = text.rsplit_once('/').unwrap_or(("0.0.0.0", text));
    // An address may have an interface behind it, which nobody can check here.
    let ip = address.split_once('%').map_or(address, |(ip, _)| ip);
    let is_port = |word: &str| word.parse::<u16>().is_ok_and(|port| port > 0);
    let is_range = |range: &str| match range.split_once('-') {
        Some((first, last)) => is_port(first) && is_port(last),
        None => is_port(range),
    };
    let is_forward = |part: &str| match part.trim_start_matches('~').split_once(':') {
        Some((host, guest)) => is_range(host) && is_range(guest),
        None => is_range(part),
    };
    let all_good = matches!(ports, "all" | "auto" | "none") || ports.split(',').all(is_forward);
    let has_address = ip.is_empty() || ip.parse::<std::net::IpAddr>().is_ok();
    if all_good && has_address { Ok(text.to_owned()) } else { Err(wrong()) }
}

/// Six bytes in hexadecimal; a group address is nobody's own.
fn mac(text: &str) -> Result<String, String> {
    let wrong = || "write an address like 52:54:00:12:34:56".to_owned();
    let bytes: Vec<u8> = text
        .split(':')
        .map(|part| match part.len() {
            2 => u8::from_str_radix(part, 16).ok(),
            _ => None,
        })
        .collect::<Option<_>>()
        .ok_or_else(wrong)?;
    match bytes.as_slice() {
        [first, _, _, _, _, _] if first & 1 == 1 => {
            Err("this is a group address; make the first byte even".to_owned())
        }
        [_, _, _, _, _, _] => Ok(text.to_ascii_lowercase()),
        _ => Err(wrong()),
    }
}
