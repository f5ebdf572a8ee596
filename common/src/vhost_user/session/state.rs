//! The session as a value: saved with its descriptors, and resumed from them, in this process or
//! another one that they were sent to.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use super::migration::{Inflight, duplicate};
use super::vring::{Kick, Vring};
use super::{Session, SessionOptions};
use crate::device::Device;
use crate::metrics::QueueMetrics;
use crate::ring::VringAddresses;
use crate::sys::EventFd;
use crate::vhost_user::backend_channel::{BackendChannel, ChannelFeatures};
use crate::vhost_user::memory::{DirtyLog, GuestMemory, Region, RegionInfo};
use crate::vhost_user::wire::InflightBody;

/// Which descriptor of the list belongs here.
type FdIndex = usize;

/// A vring of a [`SavedSession`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SavedVring {
    size: u16,
    base: u32,
    addresses: Option<VringAddresses>,
    /// `None`: stopped. `Some(None)`: polled.
    kick: Option<Option<FdIndex>>,
    call: Option<FdIndex>,
    err: Option<FdIndex>,
    enabled: bool,
}

/// Everything a session is, as plain data; descriptors are numbers in the list that goes with it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SavedSession {
    /// Layout of this structure; only the same one can be resumed.
    version: u32,
    features: Option<u64>,
    protocol_features: u64,
    status: u8,
    regions: Vec<(RegionInfo, FdIndex)>,
    vrings: Vec<SavedVring>,
    /// Size, offset, queues, entries, descriptor.
    inflight: Option<(u64, u64, u16, u16, FdIndex)>,
    /// Offset, size, descriptor.
    log: Option<(u64, u64, FdIndex)>,
    channel: Option<(ChannelFeatures, FdIndex)>,
    /// Answers on the channel that nobody waits for any more.
    #[serde(default)]
    late_answers: u32,
    connection: FdIndex,
}

const VERSION: u32 = 1;

/// A list of descriptors under construction.
#[derive(Debug, Default)]
struct Fds(Vec<OwnedFd>);

impl Fds {
    fn add(&mut self, fd: impl AsFd) -> io::Result<FdIndex> {
        self.0.push(fd.as_fd().try_clone_to_owned()?);
        Ok(self.0.len() - 1)
    }

    fn add_event(&mut self, fd: Option<&Arc<EventFd>>) -> io::Result<Option<FdIndex>> {
        fd.map(|fd| self.add(&**fd)).transpose()
    }
}

impl Session {
    /// Stops all rings and turns the session into data and descriptors. The front end notices nothing
    /// but a pause, as long as somebody resumes it. The device keeps what it knows of the guest, its
    /// channel included, so that it can be saved next.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn save(mut self) -> anyhow::Result<(SavedSession, Vec<OwnedFd>)> {
        self.end_workers();
        let mut fds = Fds::default();
        let mut vrings = Vec::new();
        for v in &self.vrings {
            let kick = match &v.kick {
                Kick::None => None,
                Kick::Poll => Some(None),
                Kick::Fd(fd) | Kick::Own(fd) => Some(Some(fds.add(&**fd)?)),
            };
            vrings.push(SavedVring {
                size: v.size,
                base: v.base,
                addresses: v.addresses,
                kick,
                call: fds.add_event(v.call.as_ref())?,
                err: fds.add_event(v.err.as_ref())?,
                enabled: v.enabled,
            });
        }
        let mut regions = Vec::new();
        for region in self.memory.load().regions() {
            let file = region.file().context("a memory region without a file")?;
            regions.push((region.info(), fds.add(file)?));
        }
        let inflight = match &self.inflight {
            Some(i) => {
                fds.0.push(duplicate(i.file().context("an inflight area without a file")?)?);
                Some((
                    i.body.mmap_size,
                    i.body.mmap_offset,
                    i.body.num_queues,
                    i.body.queue_size,
                    fds.0.len() - 1,
                ))
            }
            None => None,
        };
        let log = match self.log.as_ref().and_then(|l| l.backing()) {
            Some((file, offset, size)) => Some((offset, size, fds.add(file)?)),
            None => None,
        };
        let channel = match &self.channel {
            Some(c) => Some((c.features(), fds.add(c.duplicate_socket()?)?)),
            None => None,
        };
        let saved = SavedSession {
            version: VERSION,
            features: self.features,
            protocol_features: self.protocol_features,
            status: self.status,
            regions,
            vrings,
            inflight,
            log,
            channel,
            late_answers: self.channel.as_ref().map_or(0, |c| c.late_answers()),
            connection: fds.add(&self.connection)?,
        };
        Ok((saved, fds.0))
    }

    /// Takes a saved session up again: its rings start at once.
    ///
    /// # Errors
    /// Another version's data, descriptors missing, or memory that cannot be mapped.
    pub fn resume(
        device: Arc<dyn Device>,
        saved: &SavedSession,
        fds: &[OwnedFd],
        metrics: Vec<Arc<QueueMetrics>>,
        options: SessionOptions,
    ) -> anyhow::Result<Self> {
        anyhow::ensure!(
            saved.version == VERSION,
            "the saved session has version {}, not {VERSION}",
            saved.version
        );
        let get = |i: FdIndex| -> anyhow::Result<OwnedFd> {
            Ok(fds.get(i).context("a descriptor of the saved session is missing")?.try_clone()?)
        };
        let event = |i: Option<FdIndex>| {
            i.map(|i| get(i).map(|fd| Arc::new(EventFd::from(fd)))).transpose()
        };
        let mut session =
            Self::new(device, UnixStream::from(get(saved.connection)?), metrics, options);
        session.features = saved.features;
        session.protocol_features = saved.protocol_features;
        session.status = saved.status;
        let mut regions = Vec::new();
        for (info, fd) in &saved.regions {
            regions.push(Arc::new(Region::map(*info, get(*fd)?)?));
        }
        session.memory.publish(GuestMemory::new(regions, None)?);
        for (vring, old) in session.vrings.iter_mut().zip(&saved.vrings) {
            *vring = Vring {
                size: old.size,
                base: old.base,
                addresses: old.addresses,
                kick: match old.kick {
                    None => Kick::None,
                    Some(None) => Kick::Poll,
                    Some(Some(fd)) => Kick::Fd(Arc::new(EventFd::from(get(fd)?))),
                },
                call: event(old.call)?,
                err: event(old.err)?,
                enabled: old.enabled,
                running: false,
            };
        }
        if let Some((mmap_size, mmap_offset, num_queues, queue_size, fd)) = saved.inflight {
            let body = InflightBody { mmap_size, mmap_offset, num_queues, queue_size, padding: 0 };
            session.inflight = Some(Inflight::map(body, get(fd)?)?);
        }
        if let Some((offset, size, fd)) = saved.log {
            session.log = Some(Arc::new(DirtyLog::map(get(fd)?, offset, size)?));
            session.update_log();
        }
        if let Some((features, fd)) = saved.channel {
            let channel = Arc::new(BackendChannel::new(get(fd)?, features)?);
            channel.expect_late(saved.late_answers);
            session.channel = Some(channel.clone());
            session.device.set_channel(Some(channel));
        }
        if let Some(features) = session.features {
            session.device.negotiated(features);
        }
        session.start_ready();
        Ok(session)
    }
}
