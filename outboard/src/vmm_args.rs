//! The command line of each VMM for a pod whose daemons run. Pure: nothing is looked at or started.
//!
//! What a VMM cannot take is an error that names all of it, before anything starts.

mod cloud_hypervisor;
mod crosvm;
mod firecracker;
mod qemu;
#[cfg(test)]
mod tests;
mod uml;

use std::fmt;
use std::path::PathBuf;

use clap::ValueEnum;

use crate::layout::Layout;
use crate::pod::Pod;

/// A VMM that takes vhost-user devices.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Vmm {
    /// QEMU.
    #[default]
    Qemu,
    /// cloud-hypervisor.
    CloudHypervisor,
    /// Firecracker: block devices only.
    Firecracker,
    /// crosvm.
    Crosvm,
    /// User Mode Linux: the guest's kernel is an ordinary process.
    Uml,
}

impl fmt::Display for Vmm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Qemu => "QEMU",
            Self::CloudHypervisor => "cloud-hypervisor",
            Self::Firecracker => "Firecracker",
            Self::Crosvm => "crosvm",
            Self::Uml => "User Mode Linux",
        })
    }
}

/// A pod that a VMM cannot take as it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VmmError {
    /// Some of it cannot be attached.
    #[error("{vmm} cannot take {}; {advice}", what.join(", "))]
    Unsupported {
        /// The VMM.
        vmm: Vmm,
        /// All of it.
        what: Vec<String>,
        /// What to do.
        advice: &'static str,
    },
    /// The VMM needs a kernel.
    #[error("{0} needs `kernel` in [guest]; name the guest's kernel image there")]
    NoKernel(Vmm),
}

/// A command that boots the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmmCommand {
    /// The program, to be found in `$PATH` unless it is a path.
    pub program: String,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// A file that it reads, and what is in it.
    pub file: Option<(PathBuf, String)>,
}

/// The command that boots `pod` with `vmm`; `extra` arguments come after ours.
///
/// # Errors
/// The VMM cannot take all of the pod.
pub fn command(
    vmm: Vmm,
    pod: &Pod,
    layout: &Layout,
    extra: &[String],
) -> Result<VmmCommand, VmmError> {
    match vmm {
        Vmm::Qemu => Ok(qemu::command(pod, layout, extra)),
        Vmm::CloudHypervisor => Ok(cloud_hypervisor::command(pod, layout, extra)),
        Vmm::Firecracker => firecracker::command(pod, layout, extra),
        Vmm::Crosvm => Ok(crosvm::command(pod, layout, extra)),
        Vmm::Uml => uml::command(pod, layout, extra),
    }
}

impl VmmCommand {
    /// One line for a shell. A file that the VMM reads is written by the line itself.
    #[must_use]
    pub fn shell_line(&self) -> String {
        let words = std::iter::once(&self.program).chain(&self.arguments);
        let run = words.map(|word| quote(word)).collect::<Vec<_>>().join(" ");
        match &self.file {
            None => run,
            Some((path, text)) => {
                format!("printf %s {} >{} && {run}", quote(text), quote(&path.to_string_lossy()))
            }
        }
    }
}

/// A word as a POSIX shell reads it.
fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "%+,-./:=@_".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// The path of a device's socket, which [`Layout::of`] made sure is plain text.
fn socket(layout: &Layout, name: &str) -> String {
    layout.socket(name).to_string_lossy().into_owned()
}

/// Words with their owner's favourite conversion.
fn words<const N: usize>(words: [&str; N]) -> Vec<String> {
    words.map(str::to_owned).to_vec()
}

/// `option path`, if there is a path.
fn file_option(option: &str, path: Option<&PathBuf>) -> Vec<String> {
    path.map(|path| vec![option.to_owned(), path.to_string_lossy().into_owned()])
        .unwrap_or_default()
}
