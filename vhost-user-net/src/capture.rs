//! `--pcap`: every frame of the device, both ways, in a file that rotates.
//!
//! The format is classic pcap with nanoseconds, Ethernet link type: tcpdump and Wireshark read it.
//! Frames are recorded as they cross the device, so super-frames are long and checksums that the
//! other side fills in are partial. A full disk ends the capture, not the device.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{Mode, OFlags, open, openat, renameat};

/// Bytes of each frame that are kept.
const SNAP_LENGTH: usize = 262_144;
/// Magic number of pcap with nanoseconds.
const MAGIC: u32 = 0xa1b2_3c4d;
/// LINKTYPE_ETHERNET.
const LINK_TYPE: u32 = 1;

/// Why a capture cannot start.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the capture file {path}")]
pub struct CaptureError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// A running capture, shared by the workers.
#[derive(Debug)]
pub struct Capture {
    state: Mutex<Option<Files>>,
}

/// The file written, and where its predecessor goes. The directory is open, so that rotation works
/// inside a sandbox.
#[derive(Debug)]
struct Files {
    directory: OwnedFd,
    name: OsString,
    file: File,
    written: u64,
    most: u64,
    record: Vec<u8>,
}

impl Capture {
    /// Starts a capture to `path`, replacing what is there. When the file reaches `most` bytes it is
    /// renamed to `path.1`, replacing the one before, and a new one begins.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn open(path: &Path, most: u64) -> Result<Self, CaptureError> {
        let error = |source| CaptureError { path: path.to_owned(), source };
        let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = open(parent.unwrap_or(Path::new(".")), flags, Mode::empty())
            .map_err(|e| error(e.into()))?;
        let name = path.file_name().ok_or_else(|| error(io::ErrorKind::IsADirectory.into()))?;
        let file = create(&directory, name).map_err(error)?;
        let files = Files {
            directory,
            name: name.to_owned(),
            file,
            written: HEADER_BYTES,
            most,
            record: Vec::new(),
        };
        Ok(Self { state: Mutex::new(Some(files)) })
    }

    /// Records a frame of `len` bytes; `copy` appends at most the given number of its bytes.
    pub fn record(&self, len: usize, copy: impl FnOnce(&mut Vec<u8>, usize)) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(files) = state.as_mut() else { return };
        if let Err(error) = files.record(len, copy) {
            tracing::error!(%error, "cannot write the capture; it ends here");
            *state = None;
        }
    }
}

/// Bytes of the file header.
const HEADER_BYTES: u64 = 24;

/// Makes a capture file with its header.
fn create(directory: &OwnedFd, name: &OsStr) -> io::Result<File> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC;
    let fd = openat(directory, name, flags, Mode::RUSR | Mode::WUSR)?;
    let mut file = File::from(fd);
    let mut header = Vec::new();
    header.extend(MAGIC.to_le_bytes());
    // Version 2.4.
    header.extend([2, 0, 4, 0]);
    header.extend([0; 8]);
    header.extend(u32::try_from(SNAP_LENGTH).unwrap_or(u32::MAX).to_le_bytes());
    header.extend(LINK_TYPE.to_le_bytes());
    file.write_all(&header)?;
    Ok(file)
}

impl Files {
    fn record(&mut self, len: usize, copy: impl FnOnce(&mut Vec<u8>, usize)) -> io::Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.record.clear();
        // pcap's seconds have 32 bits.
        let seconds = u32::try_from(now.as_secs()).unwrap_or(u32::MAX);
        self.record.extend(seconds.to_le_bytes());
        self.record.extend(now.subsec_nanos().to_le_bytes());
        self.record.extend([0; 4]);
        self.record.extend(u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
        copy(&mut self.record, len.min(SNAP_LENGTH));
        let kept = u32::try_from(self.record.len() - 16).unwrap_or(u32::MAX);
        self.record[8..12].copy_from_slice(&kept.to_le_bytes());
        let bytes = self.record.len() as u64;
        if self.written + bytes > self.most {
            self.rotate()?;
        }
        self.file.write_all(&self.record)?;
        self.written += bytes;
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        let mut old = self.name.clone();
        old.push(".1");
        renameat(&self.directory, &self.name, &self.directory, &old)?;
        self.file = create(&self.directory, &self.name)?;
        self.written = HEADER_BYTES;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(file: &[u8]) -> Vec<Vec<u8>> {
        assert_eq!(file[..4], MAGIC.to_le_bytes());
        assert_eq!(file[20..24], [1, 0, 0, 0]);
        let mut rest = &file[24..];
        let mut frames = Vec::new();
        while !rest.is_empty() {
            let kept = u32::from_le_bytes(rest[8..12].try_into().unwrap()) as usize;
            frames.push(rest[16..16 + kept].to_vec());
            rest = &rest[16 + kept..];
        }
        frames
    }

    #[test]
    fn frames_are_recorded_and_the_file_rotates() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.pcap");
        let capture = Capture::open(&path, 24 + 2 * (16 + 60)).unwrap();
        for i in 0..5u8 {
            capture.record(60, |out, most| {
                assert_eq!(most, 60);
                out.extend([i; 60]);
            });
        }
        assert_eq!(frames(&std::fs::read(&path).unwrap()), [[4u8; 60]]);
        let old = std::fs::read(dir.path().join("a.pcap.1")).unwrap();
        assert_eq!(frames(&old), [[2u8; 60], [3; 60]]);
    }

    #[test]
    fn a_place_that_cannot_be_written_is_an_error() {
        let error = Capture::open(Path::new("/nonexistent/x.pcap"), 1).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/x.pcap"));
        assert!(Capture::open(Path::new("/"), 1).is_err());
    }
}
