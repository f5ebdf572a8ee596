//! A daemon's life after its arguments are read: sessions on threads, signals in the main one.
//!
//! The start-up order, the same in every daemon: arguments → log → open files and sockets → sandbox →
//! threads → serve. [`run`] is the last two; everything before is in each daemon's `lib.rs`, in that
//! order, in one function.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::device::Device;
use crate::metrics::QueueMetrics;
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
}

impl Endpoint {
    /// An endpoint with fresh counters.
    #[must_use]
    pub fn new(device: Arc<dyn Device>, transport: Transport, options: SessionOptions) -> Self {
        let metrics = (0..device.queue_count()).map(|_| Arc::default()).collect();
        Self { device, transport, options, metrics }
    }
}

/// What SIGHUP does.
pub type Reload = Box<dyn Fn() + Send>;

/// Serves all endpoints until SIGTERM or SIGINT, or until every one of them is done for good (a
/// connected `--fd` whose front end left). SIGHUP calls `reload`. A second SIGTERM leaves at once.
///
/// # Errors
/// The system has no thread or descriptor for us.
pub fn run(endpoints: Vec<Endpoint>, reload: Option<Reload>) -> anyhow::Result<()> {
    let shutdown = Arc::new(EventFd::new().context("event descriptor")?);
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).context("signal handlers")?;
    let handle = signals.handle();
    let mut threads = Vec::new();
    let left = Arc::new(std::sync::atomic::AtomicUsize::new(endpoints.len()));
    for endpoint in endpoints {
        threads.push(serve_on_thread(endpoint, &shutdown, &left, &handle)?);
    }
    for signal in signals.forever() {
        if signal == SIGHUP {
            if let Some(reload) = &reload {
                reload();
            }
            continue;
        }
        tracing::info!("leaving: finishing what is in flight");
        shutdown.signal();
        break;
    }
    watch_impatience(signals);
    for thread in threads {
        if thread.join().is_err() {
            tracing::error!("a session thread panicked");
        }
    }
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
fn serve_on_thread(
    mut endpoint: Endpoint,
    shutdown: &Arc<EventFd>,
    left: &Arc<std::sync::atomic::AtomicUsize>,
    signals: &signal_hook::iterator::Handle,
) -> anyhow::Result<JoinHandle<()>> {
    let (shutdown, left, signals) = (shutdown.clone(), left.clone(), signals.clone());
    let name = endpoint.device.name().to_owned();
    std::thread::Builder::new()
        .name(name.clone())
        .spawn(move || {
            serve(&mut endpoint, &shutdown);
            if left.fetch_sub(1, std::sync::atomic::Ordering::SeqCst) == 1 {
                signals.close();
            }
        })
        .with_context(|| format!("thread {name}"))
}

/// Serves front ends one after another.
fn serve(endpoint: &mut Endpoint, shutdown: &EventFd) {
    let name = endpoint.device.name().to_owned();
    loop {
        let socket = match endpoint.transport.next(shutdown) {
            Ok(Some(socket)) => socket,
            Ok(None) => return,
            Err(error) => {
                tracing::error!(device = name, %error, "no front end can come any more");
                return;
            }
        };
        tracing::debug!(device = name, "a front end is here");
        let session = Session::new(
            endpoint.device.clone(),
            socket,
            endpoint.metrics.clone(),
            endpoint.options.clone(),
        );
        match session.serve(shutdown) {
            Ended::ShutDown => return,
            Ended::FrontendLeft => tracing::debug!(device = name, "the front end left"),
        }
        if matches!(endpoint.transport, Transport::Dial(_)) {
            // A front end that accepts and closes at once must not make us spin.
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
