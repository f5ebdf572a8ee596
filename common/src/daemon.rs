//! A daemon's life after its arguments are read: sessions on threads, signals in the main one.
//!
//! The start-up order, the same in every daemon: arguments → log → open files and sockets → sandbox →
//! threads → serve. [`run`] is the last two; everything before is in each daemon's `lib.rs`, in that
//! order, in one function.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};

use crate::device::Device;
use crate::handover::{DeviceState, Handover, Inherited};
use crate::metrics::{QueueMetrics, Registry};
use crate::sandbox::namespaces::deliver_signals;
use crate::sys::EventFd;
use crate::transport::Transport;
use crate::vhost_user::session::{Ended, Session, SessionOptions};

/// One device and the way its front ends come.
#[derive(Debug)]
pub struct Endpoint {
    /// The device.
    pub device: Arc<dyn Device>,
    /// How front ends reach it.
    pub transport: Transport,
    /// For its sessions.
    pub options: SessionOptions,
    /// One entry a queue; made by [`Endpoint::new`], to be given to an exporter.
    pub metrics: Vec<Arc<QueueMetrics>>,
    /// A session to go on with, from the daemon before this one.
    pub inherited: Option<Inherited>,
}

impl Endpoint {
    /// An endpoint with fresh counters.
    #[must_use]
    pub fn new(device: Arc<dyn Device>, transport: Transport, options: SessionOptions) -> Self {
        let metrics = (0..device.queue_count()).map(|_| Arc::default()).collect();
        Self { device, transport, options, metrics, inherited: None }
    }

    /// The same endpoint, counted in `registry` under its device's name, for the metrics socket.
    #[must_use]
    pub fn counted_in(mut self, registry: &Registry) -> Self {
        let device = registry.device(self.device.name());
        self.metrics = (0..self.device.queue_count()).map(|i| device.queue(i)).collect();
        self
    }
}

/// What SIGHUP does.
pub type Reload = Box<dyn Fn() + Send>;

/// What [`run`] does besides serving.
#[derive(Default)]
pub struct RunOptions {
    /// SIGHUP calls this.
    pub reload: Option<Reload>,
    /// A successor may take the sessions over here.
    pub handover: Option<Arc<Handover>>,
}

impl std::fmt::Debug for RunOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RunOptions").field("handover", &self.handover).finish_non_exhaustive()
    }
}

/// What the threads of a daemon share.
#[derive(Clone)]
struct Shared {
    shutdown: Arc<EventFd>,
    /// Endpoints that are not done for good.
    left: Arc<AtomicUsize>,
    signals: Handle,
    handover: Option<Arc<Handover>>,
}

/// Serves all endpoints until SIGTERM or SIGINT, until a successor took them over, or until every one
/// of them is done for good (a connected `--fd` whose front end left). SIGHUP reloads. A second
/// SIGTERM leaves at once.
///
/// # Errors
/// The system has no thread or descriptor for us.
pub fn run(endpoints: Vec<Endpoint>, options: RunOptions) -> anyhow::Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).context("signal handlers")?;
    deliver_signals().context("signal mask")?;
    let shared = Shared {
        shutdown: Arc::new(EventFd::new().context("event descriptor")?),
        left: Arc::new(AtomicUsize::new(endpoints.len())),
        signals: signals.handle(),
        handover: options.handover,
    };
    let successor = shared.handover.clone().map(|h| await_successor(h, &shared)).transpose()?;
    let mut threads = Vec::new();
    for endpoint in endpoints {
        threads.push(serve_on_thread(endpoint, &shared)?);
    }
    for signal in signals.forever() {
        if signal == SIGHUP {
            if let Some(reload) = &options.reload {
                reload();
            }
            continue;
        }
        tracing::info!("leaving: finishing what is in flight");
        shared.shutdown.signal();
        break;
    }
    watch_impatience(signals);
    for thread in threads {
        if thread.join().is_err() {
            tracing::error!("a session thread panicked");
        }
    }
    send_to_successor(shared.handover.as_deref(), successor)
}

type SuccessorThread = JoinHandle<std::os::unix::net::UnixStream>;

/// Waits for a successor on a thread; its arrival stops all sessions.
fn await_successor(handover: Arc<Handover>, shared: &Shared) -> anyhow::Result<SuccessorThread> {
    let shared = shared.clone();
    std::thread::Builder::new()
        .name("handover".to_owned())
        .spawn(move || {
            let stream = handover.wait();
            tracing::info!("a new daemon takes over");
            shared.shutdown.signal();
            shared.signals.close();
            stream
        })
        .context("thread for the hand-over")
}

/// Sends everything collected, if a successor waits for it. The stream stays open until the process
/// ends, which is what the successor waits for.
fn send_to_successor(
    handover: Option<&Handover>,
    thread: Option<SuccessorThread>,
) -> anyhow::Result<()> {
    let (Some(handover), Some(thread)) = (handover.filter(|h| h.is_wanted()), thread) else {
        return Ok(());
    };
    let Ok(stream) = thread.join() else { anyhow::bail!("the hand-over thread panicked") };
    handover.send(&stream).context("handing over")?;
    std::mem::forget(stream);
    Ok(())
}

/// A second signal while draining ends the process at once: the operator, or a stuck disk, says so.
/// What is in flight stays recorded in the inflight file.
fn watch_impatience(mut signals: Signals) {
    std::thread::spawn(move || {
        for signal in signals.forever() {
            if signal != SIGHUP {
                // The default action of the signal, as if we had never caught it.
                let _ = signal_hook::low_level::emulate_default_handler(signal);
            }
        }
    });
}

/// Serves one endpoint on its own thread; the last one to end for good ends the main loop.
fn serve_on_thread(mut endpoint: Endpoint, shared: &Shared) -> anyhow::Result<JoinHandle<()>> {
    let shared = shared.clone();
    let name = endpoint.device.name().to_owned();
    std::thread::Builder::new()
        .name(name.clone())
        .spawn(move || {
            serve(&mut endpoint, &shared);
            if let (true, Transport::Listen { path, .. }) =
                (is_handing_over(&shared), &mut endpoint.transport)
            {
                // The socket file is the successor's now: not to be removed with the transport.
                path.take();
            }
            if shared.left.fetch_sub(1, Ordering::SeqCst) == 1 {
                shared.signals.close();
            }
        })
        .with_context(|| format!("thread {name}"))
}

fn is_handing_over(shared: &Shared) -> bool {
    shared.handover.as_deref().is_some_and(Handover::is_wanted)
}

/// Serves front ends one after another.
fn serve(endpoint: &mut Endpoint, shared: &Shared) {
    let name = endpoint.device.name().to_owned();
    let mut inherited = endpoint.inherited.take();
    loop {
        let session = match inherited.take().map(|i| resume(endpoint, &i)) {
            Some(Ok(session)) => session,
            Some(Err(error)) => {
                tracing::error!(
                    device = name,
                    error = format!("{error:#}"),
                    "cannot go on with the session taken over"
                );
                continue;
            }
            None => match next_session(endpoint, shared) {
                Some(session) => session,
                None => return,
            },
        };
        tracing::debug!(device = name, "a front end is here");
        if serve_session(endpoint, session, shared) {
            return;
        }
        if matches!(endpoint.transport, Transport::Dial(_)) {
            // A front end that accepts and closes at once must not make us spin.
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Goes on with a session taken over.
fn resume(endpoint: &Endpoint, inherited: &Inherited) -> anyhow::Result<Session> {
    let fds = inherited.device_fds.iter().map(|fd| fd.try_clone());
    let fds = fds.collect::<std::io::Result<_>>().context("the device's descriptors")?;
    endpoint
        .device
        .load_from_predecessor(&mut inherited.state.as_slice(), fds)
        .context("the device's state")?;
    Session::resume(
        endpoint.device.clone(),
        &inherited.session,
        &inherited.fds,
        endpoint.metrics.clone(),
        endpoint.options.clone(),
    )
}

/// Waits for the next front end. `None`: there will be none.
fn next_session(endpoint: &mut Endpoint, shared: &Shared) -> Option<Session> {
    let name = endpoint.device.name();
    match endpoint.transport.next(&shared.shutdown) {
        Ok(Some(socket)) => Some(Session::new(
            endpoint.device.clone(),
            socket,
            endpoint.metrics.clone(),
            endpoint.options.clone(),
        )),
        Ok(None) => {
            hand_over(endpoint, None, shared);
            None
        }
        Err(error) => {
            tracing::error!(device = name, %error, "no front end can come any more");
            None
        }
    }
}

/// Serves one session to its end; true if the daemon is to end too.
fn serve_session(endpoint: &Endpoint, mut session: Session, shared: &Shared) -> bool {
    match session.serve_until(&shared.shutdown) {
        Ended::ShutDown => {
            hand_over(endpoint, Some(session), shared);
            true
        }
        Ended::FrontendLeft => {
            session.close();
            tracing::debug!(device = endpoint.device.name(), "the front end left");
            false
        }
    }
}

/// The end of an endpoint: saved for a successor if there is one, closed if not.
fn hand_over(endpoint: &Endpoint, session: Option<Session>, shared: &Shared) {
    let Some(handover) = shared.handover.as_deref().filter(|h| h.is_wanted()) else {
        if let Some(mut session) = session {
            session.close();
        }
        return;
    };
    let (mut state, mut device_fds) = (Vec::new(), Vec::new());
    let saved = session.map(|s| {
        let saved = s.save()?;
        endpoint.device.save_for_successor(&mut state, &mut device_fds)?;
        anyhow::Ok(saved)
    });
    endpoint.device.set_channel(None);
    let saved = saved.transpose().unwrap_or_else(|error| {
        tracing::error!(
            error = format!("{error:#}"),
            "a session cannot be handed over; its front end has to reconnect"
        );
        None
    });
    let listener = match &endpoint.transport {
        Transport::Listen { listener, .. } => Some(listener),
        Transport::Dial(_) | Transport::Connected(_) => None,
    };
    let device = DeviceState { state, fds: device_fds };
    if let Err(error) = handover.add(endpoint.device.name(), listener, saved, device) {
        tracing::error!(%error, "an endpoint cannot be handed over");
    }
}
