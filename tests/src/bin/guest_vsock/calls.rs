//! A ttrpc server in the guest, as the agents of pods are: made by the crate that they are made with.

use std::collections::HashMap;
use std::os::fd::IntoRawFd;
use std::sync::mpsc::{SyncSender, sync_channel};

use anyhow::Result;
use testkit::vsock_stream::{CALLS, PORTS};
use ttrpc::{MethodHandler, Request, Response, Server, TtrpcContext};

use crate::socket;

/// Answers with what it gets.
struct Echo;

impl MethodHandler for Echo {
    fn handler(&self, ctx: TtrpcContext, request: Request) -> ttrpc::Result<()> {
        let mut response = Response::new();
        response.payload = request.payload;
        ctx.respond(ctx.mh.stream_id, response)
    }
}

/// Answers, and says that it is over.
struct Over(SyncSender<()>);

impl MethodHandler for Over {
    fn handler(&self, ctx: TtrpcContext, _request: Request) -> ttrpc::Result<()> {
        ctx.respond(ctx.mh.stream_id, Response::new())?;
        let _ = self.0.try_send(());
        Ok(())
    }
}

/// Serves calls until one says that it is over.
pub(crate) fn serve() -> Result<()> {
    let (sender, over) = sync_channel(1);
    let (service, echo, end) = CALLS;
    let path = |method: &str| format!("/{service}/{method}");
    let methods: HashMap<String, Box<dyn MethodHandler + Send + Sync>> = HashMap::from([
        (path(echo), Box::new(Echo) as _),
        (path(end), Box::new(Over(sender)) as _),
    ]);
    let listener = socket::listen(libc::SOCK_STREAM, PORTS.calls)?;
    let mut server = Server::new().add_listener(listener.into_raw_fd())?.register_service(methods);
    server.start()?;
    crate::say("listening")?;
    over.recv()?;
    // Its answer is on its way yet.
    std::thread::sleep(std::time::Duration::from_millis(200));
    server.shutdown();
    crate::say("no more calls")
}
