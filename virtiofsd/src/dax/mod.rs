//! DAX: files shown in a window of the guest's address space, straight from the host's page cache.
//!
//! # Theory of operation
//! The window is shared memory region 0 of the device. The guest's kernel asks for a range of it to
//! show a part of a file (SETUPMAPPING), and the VMM maps it when we ask over the back-end channel. From
//! then on the guest reads and writes the host's page cache without a request. What can go wrong is
//! all at the end of the file:
//!
//! - A VMM that checks (QEMU) refuses a mapping past the file's end; one that would reach past it after a
//!   truncation dies of SIGBUS. So only whole pages inside the file are mapped, and mappings are cut
//!   *before* a file is truncated, and extended *after* it has grown, before the guest gets its answer.
//! - The page in which a file ends cannot be mapped so. It is shown from a copy ([`tails`]).
//! - A mapping that is not there reads as zeroes, which must never happen inside the file: so every
//!   answer that tells the guest of a new size comes after the mappings fit that size.
//!
//! A VMM that maps plainly (crosvm) needs none of that: [`Vmm::Plain`] maps what was asked for.
//!
//! The VMM's answer may wait for memory changes on the main socket; those never wait for us. When the
//! rings are being stopped the channel is interrupted, and the request is put back into its ring
//! (`EINTR`, see the worker). The one lock here is held meanwhile; the session's thread never takes it
//! while a ring runs. A VMM that does not answer costs one request its time limit (`ETIMEDOUT`) and the
//! others nothing; what it may have mapped is taken back when it answers again.

pub mod claims;
pub mod state;
pub mod tails;
mod window;

pub use window::{ChannelWindow, is_interrupted, take_interrupted};

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use self::claims::{Claim, ClaimError, Claims, PAGE, Pieces};
use self::tails::Tails;
use crate::fuse::extension::{DaxWindow, MapRequest, not_supported};

/// Which files the guest may map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// None.
    #[default]
    Never,
    /// Those that we mark, when mounted with `dax=inode`.
    Inode,
    /// All of them, when mounted with `dax=always`; marks as for `Inode`.
    Always,
}

/// How the VMM maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Vmm {
    /// Like QEMU: whole pages inside the file, from descriptors open for writing, a limited number of
    /// mappings.
    #[default]
    Strict,
    /// Like crosvm: `mmap` as it is asked for.
    Plain,
}

/// What the operator wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Options {
    /// Which files.
    pub mode: Mode,
    /// Bytes of the window: a power of two.
    pub window: u64,
    /// How the VMM maps.
    pub vmm: Vmm,
}

/// The largest window that a strict VMM can take: QEMU ends above 512 memory regions, and each 2 MiB
/// range of Linux can take two.
pub const MAX_STRICT_WINDOW: u64 = 256 << 20;
/// Mappings that a strict VMM is asked to hold at the most, whatever sizes the guest asks for.
const MAX_STRICT_MAPPINGS: usize = 400;
/// Mappings of one range whose file has grown, before they become one again.
const MAX_PARTS: usize = 4;
/// Inodes of which is remembered whether they can be opened for writing.
const MOST_OPENED: usize = 16_384;
/// Smaller files are not worth a mapping: a range of the window is 2 MiB.
const WORTH_BYTES: u64 = 2 << 20;

impl Options {
    /// Checks the operator's choice.
    ///
    /// # Errors
    /// A sentence.
    pub fn check(&self, readonly: bool) -> Result<(), String> {
        if self.mode == Mode::Never {
            return Ok(());
        }
        if readonly && self.vmm == Vmm::Strict {
            return Err("--readonly: QEMU maps only files that are open for writing; leave --dax out, or use \
                        --dax-vmm=plain for a VMM that maps read-only files"
                .to_owned());
        }
        if !self.window.is_power_of_two() || self.window < WORTH_BYTES {
            return Err(format!("--dax-window: {} is not a power of two from 2M on", self.window));
        }
        if self.vmm == Vmm::Strict && self.window > MAX_STRICT_WINDOW {
            return Err(format!(
                "--dax-window: QEMU ends when a window above {} MiB is used; choose a smaller one, or --dax-vmm=plain for a VMM that can",
                MAX_STRICT_WINDOW >> 20
            ));
        }
        Ok(())
    }
}

type Window = Arc<dyn DaxWindow + Send + Sync>;

struct State {
    claims: Claims,
    tails: Tails,
    /// Ranges and lengths that the VMM may have mapped and nobody wants: those of a guest that is gone,
    /// and those of requests that were interrupted before the VMM's answer came.
    stale: Vec<(u64, u64)>,
    /// Files whose mappings were to be refreshed when the rings were being stopped, or the VMM did not
    /// answer.
    owed: Vec<u64>,
    /// The way to the VMM, under a lock of its own: the session changes it while a mapping waits.
    window: Arc<Mutex<Option<Window>>>,
}

impl State {
    fn window(&self) -> Option<Window> {
        self.window.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The mappings of `inode` are to be refreshed with the next request.
    fn owe(&mut self, inode: u64) {
        if !self.owed.contains(&inode) {
            self.owed.push(inode);
        }
    }

    /// Unmaps what nobody wants. The VMM refuses what it does not have, which is as good.
    fn settle(&mut self) -> io::Result<()> {
        while let (Some(&(offset, len)), Some(window)) = (self.stale.last(), self.window()) {
            match window.unmap(offset, len) {
                Err(error) if is_open(&error) => return Err(error),
                _ => self.stale.pop(),
            };
        }
        Ok(())
    }
}

/// Whether nobody knows what the VMM did, or will do: the rings are being stopped, or it is silent.
fn is_open(error: &io::Error) -> bool {
    is_stop(error) || is_silent(error)
}

/// The VMM does not answer.
fn is_silent(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ETIMEDOUT)
}

/// `done`, which may be late when the VMM does not answer, but must not be skipped when the request
/// is done again anyway.
fn or_later(done: io::Result<()>) -> io::Result<()> {
    done.or_else(|error| if is_silent(&error) { Ok(()) } else { Err(error) })
}

/// The rings are being stopped: the request will be done again, from its start.
fn is_stop(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EINTR)
}

/// The window and what is in it.
pub struct Dax {
    options: Options,
    /// Claims there are: 0 is the way out of every call on the hot path.
    active: AtomicUsize,
    /// There is a way to the VMM. Asked for every attribute, so it never waits for a mapping.
    ready: AtomicBool,
    window: Arc<Mutex<Option<Window>>>,
    /// Files that were tried for whether they can be opened as the VMM needs it, by inode.
    opened: Mutex<HashMap<u64, bool>>,
    state: Mutex<State>,
}

impl std::fmt::Debug for Dax {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dax")
            .field("options", &self.options)
            .field("active", &self.active)
            .finish_non_exhaustive()
    }
}

fn refused(error: ClaimError) -> io::Error {
    tracing::debug!(%error, "a mapping request was refused");
    io::Error::from_raw_os_error(libc::EINVAL)
}

fn size_of(file: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(u64::try_from(rustix::fs::fstat(file)?.st_size).unwrap_or(0))
}

impl Dax {
    /// An empty window.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn new(options: Options) -> io::Result<Self> {
        let window = Arc::default();
        let state = State {
            claims: Claims::new(options.window),
            tails: Tails::new()?,
            stale: Vec::new(),
            owed: Vec::new(),
            window: Arc::clone(&window),
        };
        let (active, ready) = (AtomicUsize::new(0), AtomicBool::new(false));
        let (opened, state) = (Mutex::default(), Mutex::new(state));
        Ok(Self { options, active, ready, window, opened, state })
    }

    /// The state, with nothing mapped that nobody wants.
    fn settled(&self) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.lock();
        state.settle()?;
        Ok(state)
    }

    /// What the operator wants.
    #[must_use]
    pub fn options(&self) -> Options {
        self.options
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a file of `size` bytes is safe and worth mapping: FUSE_ATTR_DAX. A strict VMM shows the last
    /// page of an odd-sized file from a copy, which is no sharing and not exactly the file.
    #[must_use]
    pub fn marks(&self, size: u64) -> bool {
        size >= WORTH_BYTES && (self.options.vmm == Vmm::Plain || size.is_multiple_of(PAGE))
    }

    /// Whether inode `id` can be opened as the VMM needs it. Found out by `try_it` the first time: opening
    /// for writing can be seen by others, and every answer with the file's attributes asks for it.
    pub fn can_open(&self, id: u64, try_it: impl FnOnce() -> io::Result<()>) -> bool {
        if !self.needs_writable() {
            return true;
        }
        if let Some(&known) = self.opened().get(&id) {
            return known;
        }
        let can = try_it().is_ok();
        let mut opened = self.opened();
        if opened.len() >= MOST_OPENED {
            opened.clear();
        }
        opened.insert(id, can);
        can
    }

    /// Inode `id` could not be opened when it was to be mapped: it is marked no longer.
    pub fn cannot_open(&self, id: u64) {
        self.opened().insert(id, false);
    }

    fn opened(&self) -> MutexGuard<'_, HashMap<u64, bool>> {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the VMM needs descriptors that are open for writing.
    #[must_use]
    pub fn needs_writable(&self) -> bool {
        self.options.vmm == Vmm::Strict
    }

    /// The way to the VMM is there, or gone with all that it had mapped. It may come while a mapping
    /// waits for the VMM, which may wait for us; it goes when no ring runs.
    pub fn set_window(&self, window: Option<Window>) {
        self.ready.store(window.is_some(), Ordering::Release);
        let gone = window.is_none();
        *self.window.lock().unwrap_or_else(PoisonError::into_inner) = window;
        if gone {
            let mut state = self.lock();
            state.stale.clear();
            state.owed.clear();
            self.drop_claims(&mut state, false);
        }
    }

    /// Whether there is a way to the VMM.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Acquire)
    }

    /// The guest is gone; the VMM may still have its mappings. They are taken back when the next guest
    /// starts, on a thread that may wait.
    pub fn forget_guest(&self) {
        let mut state = self.lock();
        state.owed.clear();
        self.opened().clear();
        self.drop_claims(&mut state, true);
    }

    fn drop_claims(&self, state: &mut State, remember: bool) {
        for offset in state.claims.all() {
            let Some(claim) = state.claims.remove(offset) else { continue };
            if let Err(error) = sync_tail(state, &claim) {
                tracing::warn!(%error, "the last page of a mapped file could not be written back");
            }
            if remember {
                state.stale.extend(claim.pieces.ranges(offset));
            }
            if let Some(slot) = claim.pieces.tail {
                state.tails.release(slot);
            }
        }
        self.active.store(0, Ordering::Release);
    }

    /// A new guest starts: what an older one left mapped goes.
    ///
    /// # Errors
    /// The rings are being stopped.
    pub fn start_guest(&self) -> io::Result<()> {
        self.settled().map(drop)
    }

    /// SETUPMAPPING, of the file `file`.
    ///
    /// # Errors
    /// EINVAL for a range that cannot be; ENOMEM when the VMM holds enough; what the VMM answered.
    pub fn set_up(&self, request: &MapRequest, file: OwnedFd) -> io::Result<()> {
        let end = request.file_offset.checked_add(request.len);
        // No file is that long, and a plain VMM would be left to find out.
        let possible = end.is_some_and(|end| i64::try_from(end).is_ok());
        if !possible || !request.file_offset.is_multiple_of(PAGE) {
            return Err(refused(ClaimError::BadRange));
        }
        let mut state = self.settled()?;
        let old = state.claims.covered(request.window_offset, request.len).map_err(refused)?;
        let strict = self.options.vmm == Vmm::Strict;
        if strict && state.claims.budget() + 2 > MAX_STRICT_MAPPINGS && old.is_empty() {
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        for offset in old {
            self.take_out(&mut state, offset)?;
        }
        let claim = Claim {
            len: request.len,
            inode: request.inode,
            file_offset: request.file_offset,
            write: request.write,
            file: Arc::new(file),
            pieces: Pieces::default(),
        };
        state.claims.insert(request.window_offset, claim);
        self.active.fetch_add(1, Ordering::AcqRel);
        let shown = self.show(&mut state, request.window_offset, None);
        if shown.is_err() {
            // Whatever was mapped of it before the failure goes with it.
            let _ = self.take_out(&mut state, request.window_offset);
        }
        shown
    }

    /// REMOVEMAPPING of one range.
    ///
    /// # Errors
    /// EINVAL for a range that cuts one that was set up; what the VMM answered.
    pub fn remove(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut state = self.settled()?;
        for offset in state.claims.covered(offset, len).map_err(refused)? {
            self.take_out(&mut state, offset)?;
        }
        Ok(())
    }

    /// Unmaps and forgets the claim at `offset`.
    fn take_out(&self, state: &mut State, offset: u64) -> io::Result<()> {
        hide(state, offset)?;
        if state.claims.remove(offset).is_some() {
            self.active.fetch_sub(1, Ordering::AcqRel);
        }
        Ok(())
    }

    /// Makes the mappings of the claim at `offset` fit a file of `size` bytes (`None`: as it is now).
    fn show(&self, state: &mut State, offset: u64, size: Option<u64>) -> io::Result<()> {
        let Some(claim) = state.claims.get_mut(offset).cloned() else { return Ok(()) };
        let file = claim.file.as_fd();
        if self.options.vmm == Vmm::Plain {
            let whole = if claim.pieces.parts.is_empty() { claim.len } else { 0 };
            return extend(state, offset, &claim, whole, claim.write);
        }
        let size = match size {
            Some(size) => size,
            None => size_of(file)?,
        };
        let (whole, tail) = claim.wanted(size);
        let shown = claim.pieces.file();
        let same_tail = match (&tail, claim.pieces.tail) {
            (None, None) => true,
            (Some(range), Some(slot)) => state.tails.shows(slot, claim.inode, range),
            _ => false,
        };
        if shown == whole && same_tail {
            return Ok(());
        }
        // What is right already stays, since the guest may be reading it: a growing file gets
        // another mapping behind, until there are too many.
        let (now, parts) = (claim.pieces.count().max(2), claim.pieces.parts.len());
        let fits = state.claims.budget() - now + parts + 2 <= MAX_STRICT_MAPPINGS;
        let keep = whole >= shown && parts < MAX_PARTS && (fits || parts + 2 <= now);
        if keep {
            hide_tail(state, offset)?;
        } else {
            hide(state, offset)?;
        }
        let shown = if keep { shown } else { 0 };
        extend(state, offset, &claim, whole - shown, true)?;
        tail.map_or(Ok(()), |range| show_tail(state, offset + whole, offset, &claim, range))
    }

    /// Runs `each` for every claim of `inode`, if there may be any.
    #[inline]
    fn each(
        &self,
        inode: u64,
        each: impl FnMut(&mut State, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        if self.active.load(Ordering::Acquire) == 0 {
            return Ok(());
        }
        self.each_claimed(inode, each)
    }

    #[cold]
    fn each_claimed(
        &self,
        inode: u64,
        mut each: impl FnMut(&mut State, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut state = self.lock();
        or_later(state.settle())?;
        or_later(self.pay(&mut state))?;
        for offset in state.claims.of_inode(inode) {
            let done = each(&mut state, offset);
            if done.as_ref().is_err_and(is_silent) {
                // A piece of it may be missing now, which the guest must not go on reading.
                state.owe(inode);
            }
            done?;
        }
        Ok(())
    }

    /// Refreshes what could not be when it should have been.
    fn pay(&self, state: &mut State) -> io::Result<()> {
        while let Some(&inode) = state.owed.last() {
            for offset in state.claims.of_inode(inode) {
                self.show(state, offset, None)?;
                sync_claim(state, offset)?;
            }
            state.owed.pop();
        }
        Ok(())
    }

    /// As [`Self::refresh`], after an operation that must not be done twice: when the rings are being
    /// stopped, the next request does the rest.
    ///
    /// # Errors
    /// The VMM refused, or the file cannot be read.
    pub fn refresh_later(&self, inode: u64) -> io::Result<()> {
        match self.refresh(inode) {
            Err(error) if is_stop(&error) && take_interrupted() => {
                self.lock().owe(inode);
                Ok(())
            }
            done => done,
        }
    }

    /// Writes back what the guest changed in copied pages of any file.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn write_back(&self) -> io::Result<()> {
        if self.active.load(Ordering::Acquire) == 0 {
            return Ok(());
        }
        let mut state = self.lock();
        for offset in state.claims.all() {
            sync_claim(&mut state, offset)?;
        }
        Ok(())
    }

    /// Before the file gets `size` bytes: nothing past that may stay mapped.
    ///
    /// # Errors
    /// The VMM refused, or does not answer; then the file must not be truncated.
    #[inline]
    pub fn before_resize(&self, inode: u64, size: u64) -> io::Result<()> {
        self.certain()?;
        self.each(inode, |state, offset| {
            sync_claim(state, offset)?;
            let now = state.claims.get_mut(offset).map(|c| c.file.clone());
            let now = now.map_or(Ok(0), |file| size_of(file.as_fd()))?;
            if size < now { self.show(state, offset, Some(size - size % PAGE)) } else { Ok(()) }
        })
    }

    /// Before an operation that may move the file's end or contents in a way of its own.
    ///
    /// # Errors
    /// The VMM refused, or does not answer; then the operation must not be done.
    #[inline]
    pub fn before_upheaval(&self, inode: u64) -> io::Result<()> {
        self.certain()?;
        self.each(inode, hide)
    }

    /// Nothing is mapped that we do not know of.
    fn certain(&self) -> io::Result<()> {
        self.settled().map(drop)
    }

    /// After anything that may have changed the file's size or contents, and before the guest hears of
    /// it: the mappings fit the file again.
    ///
    /// # Errors
    /// The VMM refused, or the file cannot be read.
    #[inline]
    pub fn refresh(&self, inode: u64) -> io::Result<()> {
        self.each(inode, |state, offset| {
            self.show(state, offset, None)?;
            sync_claim(state, offset)
        })
    }
}

/// Maps, when nothing that is not wanted is in the way any more.
fn map(
    state: &mut State,
    file: BorrowedFd<'_>,
    file_offset: u64,
    (at, len): (u64, u64),
    write: bool,
) -> io::Result<()> {
    state.settle()?;
    let window = state.window().ok_or_else(not_supported)?;
    let done = window.map(file, file_offset, at, len, write);
    if done.as_ref().is_err_and(is_open) {
        state.stale.push((at, len));
    }
    done
}

/// Unmaps. When no answer comes, nobody wants the mapping any more, and it may be gone or not.
fn unmap(state: &mut State, at: u64, len: u64) -> io::Result<()> {
    let done = state.window().map_or(Ok(()), |window| window.unmap(at, len));
    if done.as_ref().is_err_and(is_open) {
        state.stale.push((at, len));
    }
    done
}

/// Maps `len` bytes of the file behind what the claim at `offset` shows of it. `claim` is a copy of it.
fn extend(state: &mut State, offset: u64, claim: &Claim, len: u64, write: bool) -> io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    let shown = state.claims.get_mut(offset).map_or(0, |c| c.pieces.file());
    let range = (offset + shown, len);
    map(state, claim.file.as_fd(), claim.file_offset + shown, range, write)?;
    if let Some(claim) = state.claims.get_mut(offset) {
        claim.pieces.parts.push(len);
    }
    Ok(())
}

/// Maps a copy of the partial page `range` of the file at `at`.
fn show_tail(
    state: &mut State,
    at: u64,
    offset: u64,
    claim: &Claim,
    range: Range<u64>,
) -> io::Result<()> {
    state.settle()?;
    let slot = state.tails.acquire(claim.inode, claim.file.as_fd(), range)?;
    let memory = state.tails.memory_handle();
    if let Err(error) = map(state, memory.as_fd(), slot.live_offset(), (at, PAGE), true) {
        state.tails.release(slot);
        return Err(error);
    }
    if let Some(claim) = state.claims.get_mut(offset) {
        claim.pieces.tail = Some(slot);
    }
    Ok(())
}

fn sync_tail(state: &State, claim: &Claim) -> io::Result<()> {
    claim.pieces.tail.map_or(Ok(()), |slot| state.tails.sync(slot, claim.file.as_fd()))
}

fn sync_claim(state: &mut State, offset: u64) -> io::Result<()> {
    let Some(claim) = state.claims.get_mut(offset).cloned() else { return Ok(()) };
    sync_tail(state, &claim)
}

/// Unmaps the copied page of the claim at `offset`.
fn hide_tail(state: &mut State, offset: u64) -> io::Result<()> {
    sync_claim(state, offset)?;
    let Some(claim) = state.claims.get_mut(offset) else { return Ok(()) };
    let (Some(slot), at) = (claim.pieces.tail, offset + claim.pieces.file()) else { return Ok(()) };
    let done = unmap(state, at, PAGE);
    if done.as_ref().is_err_and(|error| !is_open(error)) {
        return done;
    }
    if let Some(claim) = state.claims.get_mut(offset) {
        claim.pieces.tail = None;
    }
    state.tails.release(slot);
    done
}

/// Unmaps everything of the claim at `offset`, which stays a claim.
fn hide(state: &mut State, offset: u64) -> io::Result<()> {
    hide_tail(state, offset)?;
    while let Some(claim) = state.claims.get_mut(offset) {
        let Some(&len) = claim.pieces.parts.last() else { break };
        let at = offset + claim.pieces.file() - len;
        let done = unmap(state, at, len);
        if done.as_ref().is_err_and(|error| !is_open(error)) {
            return done;
        }
        if let Some(claim) = state.claims.get_mut(offset) {
            claim.pieces.parts.pop();
        }
        done?;
    }
    Ok(())
}
