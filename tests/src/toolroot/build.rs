//! Building a tool root with `mmdebstrap`, once, into the cache.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal};

use super::{Recipe, ToolRoot};

/// The distribution whose kernels and peers were tried; a newer one is a deliberate change.
const SUITE: &str = "forky";
/// Changes when the steps after unpacking change, so that old roots are not used.
const LAYOUT: u32 = 1;
/// Kernel packages are replaced in the archive now and then while a download runs.
const ATTEMPTS: u32 = 3;
/// What a root and the packages it is unpacked from take.
const ROOM_MIB: u64 = 900;
/// How often a running `mmdebstrap` is looked at.
const POLL: Duration = Duration::from_millis(20);
/// For how long a failed build is not repeated.
const FAILURE_IS_REMEMBERED: Duration = Duration::from_secs(300);

/// The modules a guest may load, in loading order. Those built into a kernel are simply absent.
const MODULES: [&str; 9] = [
    "failover",
    "net_failover",
    "virtio_net",
    "virtio_blk",
    "vsock",
    "vmw_vsock_virtio_transport_common",
    "vmw_vsock_virtio_transport",
    "fuse",
    "virtiofs",
];

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n";
const GROUP: &str = "root:x:0:\nnogroup:x:65534:\n";
const NSSWITCH: &str = "passwd: files\ngroup: files\nhosts: files dns\n";

/// The path of the finished root of `recipe`, built now if it is not in the cache.
pub(super) fn cached(recipe: &Recipe, stop: Option<&AtomicBool>) -> Result<PathBuf> {
    finished(recipe, None, stop)
}

/// As [`cached`], but all the root has is the program of the Debian source package `source`, built in it.
pub(super) fn compiled(recipe: &Recipe, source: &str) -> Result<PathBuf> {
    finished(recipe, Some(source), None)
}

fn finished(recipe: &Recipe, source: Option<&str>, stop: Option<&AtomicBool>) -> Result<PathBuf> {
    let mut hasher = DefaultHasher::new();
    (recipe.packages, SUITE, LAYOUT).hash(&mut hasher);
    if !recipe.kept.is_empty() {
        recipe.kept.hash(&mut hasher);
    }
    let cache = cache_dir()?;
    let root = cache.join(format!("{}-{:016x}", recipe.name, hasher.finish()));
    if root.exists() {
        return Ok(root);
    }
    fs::create_dir_all(&cache).with_context(|| format!("create {}", cache.display()))?;
    let lock = File::create(cache.join(format!("{}.lock", recipe.name)))?;
    lock.lock().context("lock the cache")?;
    if root.exists() {
        return Ok(root);
    }
    let note = cache.join(format!("{}.failed", recipe.name));
    if stop.is_none()
        && let Some(why) = recent_failure(&note)
    {
        bail!("{why} (to try again at once, remove {})", note.display());
    }
    let never = AtomicBool::new(false);
    let stop = stop.unwrap_or(&never);
    build((recipe, source), &cache, &root, stop).inspect_err(|error| {
        // A person's wish is no reason not to try again.
        if !stop.load(Ordering::Relaxed) {
            let _ = fs::write(&note, format!("{error:#}"));
        }
    })?;
    remove_file(&note)?;
    Ok(root)
}

/// Why the last attempt failed, if it was so recent that each of a hundred tests should not repeat
/// it. A time stamp of the future counts as old.
fn recent_failure(note: &Path) -> Option<String> {
    let age = fs::metadata(note).ok()?.modified().ok()?.elapsed().ok()?;
    (age < FAILURE_IS_REMEMBERED).then(|| fs::read_to_string(note).ok())?
}

/// `$OUTBOARD_CACHE`, else `~/.cache/outboard`.
pub(crate) fn cache_dir() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("OUTBOARD_CACHE") {
        return Ok(dir.into());
    }
    let home = std::env::var_os("HOME").context("neither OUTBOARD_CACHE nor HOME is set")?;
    Ok(PathBuf::from(home).join(".cache/outboard"))
}

fn build(
    (recipe, source): (&Recipe, Option<&str>),
    cache: &Path,
    root: &Path,
    stop: &AtomicBool,
) -> Result<()> {
    let mirror = mirror()?;
    ensure_room(cache)?;
    let partial = cache.join(format!("{}.partial", recipe.name));
    for attempt in 1..=ATTEMPTS {
        remove_tree(&partial)?;
        progress(&format!("building {} (attempt {attempt} of {ATTEMPTS})", root.display()));
        match unpack((recipe, source), &partial, &mirror, stop) {
            Ok(()) => break,
            Err(error) if attempt == ATTEMPTS || stop.load(Ordering::Relaxed) => {
                remove_tree(&partial)?;
                return Err(error);
            }
            Err(error) => {
                progress(&format!("{error:#}; trying again"));
                std::thread::sleep(Duration::from_secs(u64::from(attempt) * 5));
            }
        }
    }
    furnish(&partial).context("furnish the tool root")?;
    keep(recipe, &partial).context("keep packages in the tool root")?;
    if let Some(source) = source {
        compile(&partial, source).with_context(|| format!("build {source}"))?;
    }
    fs::rename(&partial, root).context("put the tool root in place")?;
    // Modules are unpacked by the root's own tools, so the root is in place first; it is taken
    // away again when that fails.
    if recipe.kernels {
        collect_modules(root).inspect_err(|_| {
            let _ = fs::remove_dir_all(root);
        })?;
    }
    progress("the tool root is ready");
    Ok(())
}

/// `tar` does not say why it failed, so that the usual reason is looked for first.
fn ensure_room(cache: &Path) -> Result<()> {
    let disk = rustix::fs::statvfs(cache).context("look for room")?;
    let free_mib = (disk.f_bavail * disk.f_frsize) >> 20;
    ensure!(
        free_mib >= ROOM_MIB,
        "{free_mib} MiB are free in {}, and the guest's tools need {ROOM_MIB} while they are unpacked: \
         make room there, or set OUTBOARD_CACHE to another place",
        cache.display()
    );
    Ok(())
}

/// Builds the program of `./source` into `./usr/bin/NAME`, and leaves nothing else in the root.
fn compile(root: &Path, name: &str) -> Result<()> {
    let source = root.join("source");
    let archive = only_entry(&source)?;
    let unpacked = Command::new("tar").arg("-xf").arg(&archive).current_dir(&source).status();
    if !unpacked.context("start tar")?.success() {
        bail!("tar cannot unpack {}", archive.display());
    }
    let script = format!(
        "cd /source/{name}-*/ && ./configure --disable-native --disable-optimizations \
         && make -j \"$(nproc)\" {name} && cp {name} /source/{name}"
    );
    progress(&format!("compiling {name}"));
    let output = ToolRoot { path: root.to_owned() }
        .command_with("sh", &[(&source, "/source")])?
        .args(["-euc", &script])
        .stdin(Stdio::null())
        .output()
        .context("run a shell in the tool root")?;
    if !output.status.success() {
        let complaints = String::from_utf8_lossy(&output.stderr).into_owned();
        let last: Vec<&str> = complaints.lines().rev().take(5).collect();
        bail!("{}: {}", output.status, last.join(" / "));
    }
    let program = fs::read(source.join(name)).context("the program")?;
    for entry in fs::read_dir(root)? {
        let path = entry?.path();
        if path.is_dir() && !path.is_symlink() {
            remove_tree(&path)?;
        }
    }
    let kept = root.join("usr/bin").join(name);
    fs::create_dir_all(root.join("usr/bin"))?;
    fs::write(&kept, program)?;
    fs::set_permissions(&kept, PermissionsExt::from_mode(0o755))?;
    Ok(())
}

/// The Debian mirror this machine's apt is set up with, or `$OUTBOARD_MIRROR`.
fn mirror() -> Result<String> {
    if let Ok(mirror) = std::env::var("OUTBOARD_MIRROR") {
        return Ok(mirror);
    }
    let targets = Command::new("apt-get")
        .args(["indextargets", "--format", "$(ORIGIN) $(REPO_URI)", "Created-By: Packages"])
        .output()
        .context("ask apt-get for this machine's mirror (set OUTBOARD_MIRROR elsewhere)")?;
    String::from_utf8_lossy(&targets.stdout)
        .lines()
        .filter_map(|line| line.strip_prefix("Debian "))
        .find(|uri| !uri.contains("security"))
        .map(str::to_owned)
        .context("apt on this machine has no Debian mirror: set OUTBOARD_MIRROR to one")
}

/// Unpacks the packages; their maintainer scripts never run.
fn unpack(
    (recipe, source): (&Recipe, Option<&str>),
    root: &Path,
    mirror: &str,
    stop: &AtomicBool,
) -> Result<()> {
    let mut command = Command::new("mmdebstrap");
    if !rustix::process::geteuid().is_root() {
        // No chroot is entered, as no package's script runs; so a user needs no further rights or tools.
        command.arg("--mode=chrootless");
    }
    let mut child = command
        .arg("--variant=extract")
        .arg("--aptopt=Acquire::Check-Valid-Until \"false\"")
        .arg("--aptopt=Acquire::Retries \"3\"")
        .arg("--aptopt=APT::Install-Recommends \"false\"")
        // Documentation and translations are a fifth of the root.
        .args(
            ["/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*"]
                .map(|path| format!("--dpkgopt=path-exclude={path}")),
        )
        // The packages themselves are taken care of in `keep`.
        .arg("--skip=cleanup/apt/cache")
        .arg(format!("--include={}", recipe.packages.join(",")))
        .args(source.map(|name| {
            format!(
                "--extract-hook=mkdir \"$1/source\" && cd \"$1/source\" && \
                 APT_CONFIG=\"$MMDEBSTRAP_APT_CONFIG\" apt-get source --download-only --tar-only {name}"
            )
        }))
        .args([SUITE.as_ref(), root.as_os_str()])
        .args(match source {
            None => vec![mirror.to_owned()],
            Some(_) => {
                ["deb", "deb-src"].map(|kind| format!("{kind} {mirror} {SUITE} main")).to_vec()
            }
        })
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("start mmdebstrap (Debian package mmdebstrap; `./x test` installs it)")?;
    let stderr = child.stderr.take();
    let reader = std::thread::spawn(move || {
        let lines = stderr.map(BufReader::new).into_iter().flat_map(BufRead::lines);
        let mut complaints = Vec::new();
        for line in lines.map_while(Result::ok) {
            match line.strip_prefix("I: ") {
                Some(step) => progress(step),
                None => complaints.push(line),
            }
        }
        complaints
    });
    let status = wait_unless(&mut child, stop)?;
    let complaints = reader.join().unwrap_or_default();
    if !status.success() {
        // apt's own errors say most; without one, whatever there was.
        let errors: Vec<&str> =
            complaints.iter().filter_map(|line| line.strip_prefix("E: ")).take(1).collect();
        let why = if errors.is_empty() { complaints.join("; ") } else { errors.join("; ") };
        bail!("mmdebstrap failed ({status}): {why}");
    }
    Ok(())
}

/// Waits for `child`; once `stop` is set, asks it to end, and it tidies up.
fn wait_unless(child: &mut Child, stop: &AtomicBool) -> Result<ExitStatus> {
    let mut asked = false;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if !asked && stop.load(Ordering::Relaxed) {
            asked = true;
            rustix::process::kill_process(Pid::from_child(child), Signal::TERM)?;
        }
        std::thread::sleep(POLL);
    }
}

/// What the packages' maintainer scripts would have made, as far as it is needed.
fn furnish(root: &Path) -> Result<()> {
    for (file, text) in [("passwd", PASSWD), ("group", GROUP), ("nsswitch.conf", NSSWITCH)] {
        fs::write(root.join("etc").join(file), text)?;
    }
    for dir in ["stage", "guest", "usr/lib/busybox"] {
        fs::DirBuilder::new().recursive(true).mode(0o755).create(root.join(dir))?;
    }
    for link in ["bin", "sbin", "lib", "lib64"] {
        if !root.join(link).exists() {
            symlink(format!("usr/{link}"), root.join(link))?;
        }
    }
    let applets = Command::new(root.join("usr/bin/busybox")).arg("--list").output()?;
    for applet in String::from_utf8_lossy(&applets.stdout).lines() {
        symlink("../../bin/busybox", root.join("usr/lib/busybox").join(applet))?;
    }
    if !root.join("usr/bin/sh").exists() {
        symlink("busybox", root.join("usr/bin/sh"))?;
    }
    Ok(())
}

/// Moves the packages that are kept to `/guest/debs`, and removes the others.
fn keep(recipe: &Recipe, root: &Path) -> Result<()> {
    let (archives, debs) = (root.join("var/cache/apt/archives"), root.join("guest/debs"));
    fs::create_dir_all(&debs)?;
    let mut count = 0;
    for entry in fs::read_dir(&archives).with_context(|| format!("read {}", archives.display()))? {
        let name = entry?.file_name();
        // NAME_VERSION_ARCHITECTURE.deb, where the name itself may end with a version.
        let package = name.to_string_lossy();
        let package = package.split('_').next().unwrap_or_default();
        let same = |kept: &&str| {
            let rest = package.strip_prefix(*kept);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
        };
        if recipe.kept.iter().any(same) {
            fs::rename(archives.join(&name), debs.join(&name))?;
            count += 1;
        }
    }
    if count < recipe.kept.len() {
        bail!("{} does not have all of {:?}", archives.display(), recipe.kept);
    }
    remove_tree(&archives)
}

/// Puts each kernel's modules, unpacked and in loading order, where the guests look for them:
/// `/guest/{uml,qemu}/NN-name.ko`, and the kernel of QEMU's guests at `/guest/qemu/vmlinuz`.
fn collect_modules(root: &Path) -> Result<()> {
    for (guest, modules) in [("uml", "usr/lib/uml/modules"), ("qemu", "usr/lib/modules")] {
        if !root.join(modules).exists() {
            continue; // not a root with this kind of guest
        }
        let target = root.join("guest").join(guest);
        fs::create_dir_all(&target)?;
        let version = only_entry(&root.join(modules))?;
        let mut files = Vec::new();
        list_files(&version, &mut files)?;
        for (order, name) in MODULES.iter().enumerate() {
            let found = files.iter().find(|path| {
                path.file_name().and_then(|file| file.to_str()).is_some_and(|file| {
                    file == format!("{name}.ko") || file == format!("{name}.ko.xz")
                })
            });
            if let Some(path) = found {
                let bytes = module_bytes(root, path)?;
                fs::write(target.join(format!("{order:02}-{name}.ko")), bytes)?;
            }
        }
        if guest == "qemu" {
            fs::copy(version.join("vmlinuz"), target.join("vmlinuz")).context("copy the kernel")?;
        }
    }
    Ok(())
}

/// A module's bytes, uncompressed with the root's `xz` where needed.
fn module_bytes(root: &Path, path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_some_and(|extension| extension == "ko") {
        return Ok(fs::read(path)?);
    }
    let output = ToolRoot { path: root.to_owned() }
        .command("xz")?
        .arg("-dc")
        .stdin(File::open(path)?)
        .output()
        .context("run xz in the tool root")?;
    if !output.status.success() {
        bail!("xz -dc {}: {}", path.display(), String::from_utf8_lossy(&output.stderr));
    }
    Ok(output.stdout)
}

fn only_entry(dir: &Path) -> Result<PathBuf> {
    let mut entries: Vec<_> = fs::read_dir(dir)
        .with_context(|| format!("read {}", dir.display()))?
        .collect::<std::io::Result<_>>()?;
    match (entries.pop(), entries.len()) {
        (Some(entry), 0) => Ok(entry.path()),
        _ => bail!("{} does not hold exactly one thing", dir.display()),
    }
}

fn list_files(dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => list_files(&entry.path(), files)?,
            false => files.push(entry.path()),
        }
    }
    Ok(())
}

fn remove_tree(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// A line for the person who waits; never captured by the test harness.
fn progress(line: &str) {
    let _ = writeln!(std::io::stderr(), "tool root: {line}");
}
