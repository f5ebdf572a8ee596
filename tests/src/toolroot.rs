//! A private root of Debian binaries: kernels, VMMs, peers and guest tools.
//!
//! Theory of operation. The guests and the peers the daemons are compared with need a newer
//! distribution than most machines run, so they are unpacked (never installed) into a cached
//! directory and run there. A command enters the root with its own mount name space and
//! `pivot_root`, which leaves its process id, network and user as they are: it sees the tools at
//! `/usr`, and the host's `/proc`, `/sys`, `/dev` and temporary directory where they always are,
//! so Unix sockets and images are shared by path. The daemons under test run on the host.
//!
//! [`build`] makes the root, once a machine; [`enter`] runs a command in it.

mod build;
mod enter;

pub(crate) use build::cache_dir;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, anyhow};

use crate::skip;

/// Where commands in the root are looked up.
const TOOL_PATH: &str = "/usr/sbin:/usr/bin:/usr/libexec:/usr/lib/busybox";

/// What a root contains; two recipes are two cached directories.
#[derive(Debug)]
struct Recipe {
    /// Name of the root in the cache directory.
    name: &'static str,
    /// Debian packages, or apt patterns of them: names of kernel packages change with each upload.
    packages: &'static [&'static str],
    /// Packages that are also kept as they came, in `/guest/debs`.
    kept: &'static [&'static str],
    /// It has kernels, whose modules are made ready for guests.
    kernels: bool,
}

/// DPDK's testpmd, as a driver and generator that polls. Apart, since few need it.
const DPDK: Recipe =
    Recipe { name: "dpdk", packages: &["dpdk-dev", "busybox-static"], kept: &[], kernels: false };

/// The program that sets a guest's network queues. Apart, since one test needs it.
const ETHTOOL: Recipe =
    Recipe { name: "ethtool", packages: &["ethtool", "busybox-static"], kept: &[], kernels: false };

/// What fio is built with: Debian's own has no libblkio.
const FIO: Recipe = Recipe {
    name: "fio",
    kernels: false,
    kept: &[],
    packages: &[
        "gcc",
        "make",
        "libc6-dev",
        "libblkio-dev",
        "zlib1g-dev",
        "pkgconf",
        "busybox-static",
    ],
};

/// Guests, VMMs, the peers and the guests' tools: everything but DPDK.
const GUESTS: Recipe = Recipe {
    name: "guests",
    kernels: true,
    packages: &[
        "user-mode-linux",
        "qemu-system-x86",
        "qemu-utils",
        "qemu-block-extra",
        "?name(^linux-binary-[0-9.]+.deb14-cloud-amd64$)",
        "?name(^linux-modules-[0-9.]+.deb14-cloud-amd64$)",
        "virtiofsd",
        "vhost-device-vsock",
        "passt",
        "busybox-static",
        "xz-utils",
        "e2fsprogs",
        "fio",
        "iperf3",
        "iproute2",
        "socat",
    ],
    kept: &[],
};

/// User Mode Linux with programs that try file systems, and packages to be unpacked.
const SUITES: Recipe = Recipe {
    name: "suites",
    kernels: true,
    packages: &[
        "user-mode-linux",
        "busybox-static",
        "coreutils",
        "diffutils",
        "dpkg",
        "findutils",
        "git",
        "stress-ng",
        "tar",
    ],
    kept: &["diffutils", "findutils", "git-man", "perl-modules"],
};

/// A tool root that exists and is complete.
#[derive(Debug)]
pub struct ToolRoot {
    path: PathBuf,
}

impl ToolRoot {
    /// The root with the guests and peers, built on first use (about half a minute and 550 MiB).
    ///
    /// # Errors
    /// When it cannot be built: no `mmdebstrap`, no package mirror, no room, no privileges.
    pub fn guests() -> Result<&'static Self> {
        Self::guests_with(None)
    }

    /// As [`ToolRoot::guests`], for a person who waits: building ends early, and leaves nothing, when
    /// `stop` is set, and is tried again though it failed a moment ago.
    ///
    /// # Errors
    /// As [`ToolRoot::guests`], or it was stopped.
    pub fn guests_unless(stop: &AtomicBool) -> Result<&'static Self> {
        Self::guests_with(Some(stop))
    }

    fn guests_with(stop: Option<&AtomicBool>) -> Result<&'static Self> {
        static ROOT: OnceLock<Result<ToolRoot>> = OnceLock::new();
        ROOT.get_or_init(|| build::cached(&GUESTS, stop).map(|path| Self { path }))
            .as_ref()
            .map_err(|error| anyhow!("{error:#}"))
    }

    /// The root with DPDK, built on first use.
    ///
    /// # Errors
    /// As [`Self::guests`].
    pub fn dpdk() -> Result<&'static Self> {
        static ROOT: OnceLock<Result<ToolRoot>> = OnceLock::new();
        ROOT.get_or_init(|| build::cached(&DPDK, None).map(|path| Self { path }))
            .as_ref()
            .map_err(|error| anyhow!("{error:#}"))
    }

    /// A command that runs fio with its libblkio engine inside this root, built on first use (about a
    /// minute).
    ///
    /// # Errors
    /// When it cannot be built; see [`ToolRoot::guests`].
    pub fn fio_with_libblkio(&self) -> Result<Command> {
        static ROOT: OnceLock<Result<PathBuf>> = OnceLock::new();
        let fio = ROOT.get_or_init(|| build::compiled(&FIO, "fio")).as_ref();
        let fio = fio.map_err(|error| anyhow!("{error:#}"))?.join("usr/bin");
        self.command_with("/built/fio", &[(&fio, "/built")])
    }

    /// The program `ethtool` for a guest that boots from this root, or `None` after the test was counted as
    /// skipped. Unpacked on first use.
    #[must_use]
    pub fn ethtool_for_test(&self) -> Option<PathBuf> {
        let program = build::cached(&ETHTOOL, None).map(|root| root.join("usr/sbin/ethtool"));
        program.map_err(|error| skip::skip(&format!("no ethtool: {error:#}"))).ok()
    }

    /// The root for a test, or `None` after the test was counted as skipped.
    #[must_use]
    pub fn for_test() -> Option<&'static Self> {
        or_skip(Self::guests())
    }

    /// The root with the suites that try file systems, for a test, or `None` after the test was counted
    /// as skipped. Built on first use (about half a minute and 700 MiB).
    #[must_use]
    pub fn suites_for_test() -> Option<&'static Self> {
        static ROOT: OnceLock<Result<ToolRoot>> = OnceLock::new();
        let root = ROOT.get_or_init(|| build::cached(&SUITES, None).map(|path| Self { path }));
        or_skip(root.as_ref().map_err(|error| anyhow!("{error:#}")))
    }

    /// The host's path of `path` of the root, for reading.
    #[must_use]
    pub fn host_path(&self, path: &str) -> PathBuf {
        self.path.join(path.trim_start_matches('/'))
    }

    /// A command that runs `program` inside the root and dies with the thread that started it.
    ///
    /// # Errors
    /// When a path has a NUL byte.
    pub fn command(&self, program: &str) -> Result<Command> {
        self.command_with(program, &[])
    }

    /// As [`ToolRoot::command`], with host directories mounted at further places of the root.
    ///
    /// # Errors
    /// When a path has a NUL byte.
    pub fn command_with(&self, program: &str, binds: &[(&Path, &str)]) -> Result<Command> {
        let plan = enter::Plan::new(&self.path, binds).context("plan the tool root's mounts")?;
        let mut command = Command::new(program);
        command.env("PATH", TOOL_PATH).env_remove("LD_LIBRARY_PATH");
        plan.apply(&mut command);
        Ok(command)
    }
}

fn or_skip(root: Result<&'static ToolRoot>) -> Option<&'static ToolRoot> {
    root.map_err(|error| skip::skip(&format!("no tool root: {error:#}"))).ok()
}
