//! Entering a tool root between fork and exec.
//!
//! Everything is planned before the fork: afterwards only system calls with ready-made paths run,
//! because the child of a threaded process must not allocate.
#![allow(unsafe_code, reason = "the mounts happen between fork and exec, which std marks unsafe")]

use std::ffi::{CStr, CString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::Result;
use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::process::Signal;
use rustix::thread::UnshareFlags;

/// Directories of the tool root that are seen read-only at the same place.
const TOOL_DIRS: [&str; 3] = ["usr", "etc", "guest"];
/// Links that a merged-usr system has at its top.
const USR_LINKS: [&str; 4] = ["bin", "sbin", "lib", "lib64"];
/// Directories of the host that are seen as they are.
const HOST_DIRS: [&str; 4] = ["/proc", "/sys", "/dev", "/tmp"];

/// One step of making the new root; paths are those of the host.
#[derive(Debug)]
enum Step {
    Mkdir(CString),
    Link { target: CString, at: CString },
    Bind { from: CString, at: CString },
    ReadOnly(CString),
}

/// Every system call that enters a root, ready to be made.
#[derive(Debug)]
pub(super) struct Plan {
    stage: CString,
    steps: Vec<Step>,
    /// `(uid_map, gid_map)` when a user name space is needed to be allowed to mount.
    user_maps: Option<(String, String)>,
}

impl Plan {
    pub(super) fn new(root: &Path, binds: &[(&Path, &str)]) -> Result<Self> {
        let stage = root.join("stage");
        let mut plan = Self { stage: c_path(&stage)?, steps: Vec::new(), user_maps: None };
        for dir in TOOL_DIRS {
            plan.bind(&root.join(dir), &stage.join(dir))?;
            plan.steps.push(Step::ReadOnly(c_path(&stage.join(dir))?));
        }
        for link in USR_LINKS {
            let target = CString::new(format!("usr/{link}"))?;
            plan.steps.push(Step::Link { target, at: c_path(&stage.join(link))? });
        }
        for dir in ["run", "root", "mnt", "var"] {
            plan.steps.push(Step::Mkdir(c_path(&stage.join(dir))?));
        }
        let temp = std::env::temp_dir();
        let extra_temp = (!temp.starts_with("/tmp")).then_some(temp.as_path());
        for dir in HOST_DIRS.iter().map(Path::new).chain(extra_temp) {
            plan.bind(dir, &in_stage(&stage, dir))?;
        }
        for (from, at) in binds {
            plan.bind(from, &in_stage(&stage, Path::new(at)))?;
        }
        if !rustix::process::geteuid().is_root() {
            let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
            plan.user_maps =
                Some((format!("0 {} 1", uid.as_raw()), format!("0 {} 1", gid.as_raw())));
        }
        Ok(plan)
    }

    /// Mounts `from` at `at`, with the directories that lead there.
    fn bind(&mut self, from: &Path, at: &Path) -> Result<()> {
        let stage = Path::new(std::ffi::OsStr::from_bytes(self.stage.as_bytes())).to_owned();
        let mut dirs: Vec<&Path> = at.ancestors().take_while(|dir| *dir != stage).collect();
        dirs.reverse();
        for dir in dirs {
            self.steps.push(Step::Mkdir(c_path(dir)?));
        }
        self.steps.push(Step::Bind { from: c_path(from)?, at: c_path(at)? });
        Ok(())
    }

    /// Makes `command` enter the root before it is executed.
    pub(super) fn apply(self, command: &mut Command) {
        // SAFETY: the closure makes only system calls on memory allocated before the fork.
        unsafe { command.pre_exec(move || self.enter().map_err(io::Error::from)) };
    }

    fn enter(&self) -> rustix::io::Result<()> {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        let mut spaces = UnshareFlags::NEWNS;
        if self.user_maps.is_some() {
            spaces |= UnshareFlags::NEWUSER;
        }
        // SAFETY: the child has one thread and shares no fs or descriptor table with another.
        unsafe { rustix::thread::unshare_unsafe(spaces)? };
        if let Some((uids, gids)) = &self.user_maps {
            write_file(c"/proc/self/setgroups", b"deny")?;
            write_file(c"/proc/self/uid_map", uids.as_bytes())?;
            write_file(c"/proc/self/gid_map", gids.as_bytes())?;
        }
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        rustix::mount::mount_change(c"/", private)?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        rustix::mount::mount(c"tmpfs", &*self.stage, c"tmpfs", flags, c"mode=0755,size=1m")?;
        for step in &self.steps {
            step.run()?;
        }
        rustix::process::chdir(&*self.stage)?;
        rustix::process::pivot_root(c".", c".")?;
        rustix::mount::unmount(c".", UnmountFlags::DETACH)?;
        rustix::process::chdir(c"/")
    }
}

impl Step {
    fn run(&self) -> rustix::io::Result<()> {
        match self {
            Self::Mkdir(dir) => match rustix::fs::mkdir(&**dir, Mode::from_raw_mode(0o755)) {
                Err(rustix::io::Errno::EXIST) => Ok(()),
                other => other,
            },
            Self::Link { target, at } => rustix::fs::symlink(&**target, &**at),
            Self::Bind { from, at } => rustix::mount::mount_bind_recursive(&**from, &**at),
            Self::ReadOnly(at) => {
                let flags = MountFlags::BIND | MountFlags::RDONLY;
                rustix::mount::mount_remount(&**at, flags, c"")
            }
        }
    }
}

fn in_stage(stage: &Path, path: &Path) -> std::path::PathBuf {
    stage.join(path.strip_prefix("/").unwrap_or(path))
}

fn c_path(path: &Path) -> Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

fn write_file(path: &CStr, text: &[u8]) -> rustix::io::Result<()> {
    let file = rustix::fs::open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::write(&file, text).map(drop)
}
