//! The archive a QEMU guest boots from: busybox, drivers, the job, and the tools it names.
//!
//! The format is cpio "newc" (the kernel's Documentation/driver-api/early-userspace/buffer-format),
//! uncompressed, because unpacking is what a guest under emulation is slowest at.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result, bail};

use super::Job;
use crate::toolroot::ToolRoot;

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const LINK: u32 = 0o120_000;

/// Mount points and directories of every guest.
const DIRS: [&str; 9] = ["proc", "sys", "dev", "tmp", "run", "mnt", "root", "etc", "var"];

/// A cpio archive under construction. Parent directories are added by themselves.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    names: BTreeSet<String>,
}

impl Archive {
    /// Adds a directory, and those above it.
    pub fn dir(&mut self, name: &str) {
        let name = name.trim_matches('/');
        if name.is_empty() || self.names.contains(name) {
            return;
        }
        self.parents(name);
        self.entry(name, DIRECTORY | 0o755, &[]);
    }

    /// Adds a file that all may run.
    pub fn file(&mut self, name: &str, content: &[u8]) {
        self.add(name, REGULAR | 0o755, content);
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, name: &str, target: &str) {
        self.add(name, LINK | 0o777, target.as_bytes());
    }

    /// The finished archive.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn add(&mut self, name: &str, mode: u32, content: &[u8]) {
        let name = name.trim_matches('/');
        if !self.names.contains(name) {
            self.parents(name);
            self.entry(name, mode, content);
        }
    }

    fn parents(&mut self, name: &str) {
        if let Some((parent, _)) = name.rsplit_once('/') {
            self.dir(parent);
        }
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.names.insert(name.to_owned());
        let inode = self.names.len();
        let (size, name_size) = (content.len(), name.len() + 1);
        // magic, inode, mode, uid, gid, links, mtime, size, 4 device numbers, name size, checksum
        let header = format!(
            "070701{inode:08x}{mode:08x}{0:08x}{0:08x}{1:08x}{0:08x}{size:08x}\
             {0:08x}{0:08x}{0:08x}{0:08x}{name_size:08x}{0:08x}",
            0, 1
        );
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// The archive for a QEMU guest that runs `job`.
///
/// # Errors
/// When a tool of the job is not in the tool root.
pub fn for_job(root: &ToolRoot, job: &Job) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for dir in DIRS {
        archive.dir(dir);
    }
    for link in ["bin", "sbin", "lib", "lib64"] {
        archive.link(link, &format!("usr/{link}"));
    }
    copy_file(root, "/usr/bin/busybox", &mut archive)?;
    for applet in fs::read_dir(root.host_path("/usr/lib/busybox"))? {
        let name = applet?.file_name();
        archive.link(&format!("usr/lib/busybox/{}", name.to_string_lossy()), "../../bin/busybox");
    }
    archive.link("usr/bin/sh", "busybox");
    for module in fs::read_dir(root.host_path("/guest/qemu"))? {
        let path = module?.path();
        if path.extension().is_some_and(|extension| extension == "ko") {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            archive.file(&format!("guest/qemu/{name}"), &fs::read(&path)?);
        }
    }
    for file in ["/etc/passwd", "/etc/group"] {
        copy_file(root, file, &mut archive)?;
    }
    for tool in job.tools() {
        copy_program(root, tool, &mut archive)?;
    }
    for (name, text) in job.files("qemu")? {
        archive.file(&format!("job/{name}"), text.as_bytes());
    }
    for (name, path) in job.programs() {
        // Where the root's loader sees it too.
        let copy = tempfile::NamedTempFile::new()?;
        fs::copy(path, copy.path())?;
        copy_libraries(root, &copy.path().to_string_lossy(), &mut archive)?;
        archive.file(&format!("job/{name}"), &fs::read(path)?);
    }
    archive.link("init", "job/init");
    Ok(archive.finish())
}

/// Copies a program with its loader and every library it is linked with.
fn copy_program(root: &ToolRoot, program: &str, archive: &mut Archive) -> Result<()> {
    copy_file(root, program, archive)?;
    copy_libraries(root, program, archive)
}

fn copy_libraries(root: &ToolRoot, program: &str, archive: &mut Archive) -> Result<()> {
    const LOADER: &str = "/usr/lib64/ld-linux-x86-64.so.2";
    copy_file(root, LOADER, archive)?;
    let output = root.command(LOADER)?.args(["--list", program]).output()?;
    if !output.status.success() {
        bail!("libraries of {program}: {}", String::from_utf8_lossy(&output.stderr));
    }
    // Lines are `name => /path (0x…)`.
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let path = line.split_once("=> ").and_then(|(_, path)| path.split(' ').next());
        if let Some(path) = path {
            copy_file(root, &merged(path), archive)?;
        }
    }
    Ok(())
}

/// `path` below `/usr`, where the merged directories are links to.
fn merged(path: &str) -> String {
    match path.strip_prefix("/lib") {
        Some(rest) => format!("/usr/lib{rest}"),
        None => path.to_owned(),
    }
}

fn copy_file(root: &ToolRoot, path: &str, archive: &mut Archive) -> Result<()> {
    let host_path = root.host_path(path);
    let read = |path: &Path| -> std::io::Result<(Vec<u8>, u32)> {
        Ok((fs::read(path)?, fs::metadata(path)?.permissions().mode() & 0o7777))
    };
    let (content, mode) =
        read(&host_path).with_context(|| format!("{path} is not in the tool root"))?;
    archive.add(path, REGULAR | mode, &content);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The oracle is an archive reader that everybody uses.
    #[test]
    fn cpio_reads_what_we_write() {
        let Some(root) = ToolRoot::for_test() else { return };
        let mut archive = Archive::default();
        archive.file("a/b/three", b"abc");
        archive.file("a/b/empty", b"");
        archive.link("a/link", "b/three");
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("archive");
        fs::write(&file, archive.finish()).unwrap();
        let status = std::process::Command::new(root.host_path("/usr/bin/busybox"))
            .args(["cpio", "-i", "-d"])
            .current_dir(dir.path())
            .stdin(fs::File::open(&file).unwrap())
            .status()
            .unwrap();
        assert!(status.success());
        assert_eq!(fs::read(dir.path().join("a/link")).unwrap(), b"abc");
        assert_eq!(fs::read(dir.path().join("a/b/empty")).unwrap(), b"");
    }
}
