//! The host's side of a vsock test: the proxy in a directory of its own, its services and clients.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::daemon::{Daemon, bin};
use crate::driver::vsock::{GuestStream, VsockGuest, VsockOptions, op};
use crate::toolroot::ToolRoot;

/// With this in the environment the tests run vhost-device-vsock in place of vsock-proxy: to see that they
/// find what is known to be wrong there. Decision 0041 has what they say.
const PEER: &str = "OUTBOARD_VSOCK_PEER";

/// How long anything may take that should take no time.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// A running proxy of one VM.
#[derive(Debug)]
pub struct VsockHost {
    /// Its sockets.
    pub dir: TempDir,
    /// The proxy.
    pub daemon: Daemon,
}

impl VsockHost {
    /// Starts the proxy for a guest with CID 3, with `arguments` besides.
    ///
    /// # Errors
    /// It does not start.
    pub fn start(arguments: &[&str]) -> Result<Self> {
        if std::env::var_os(PEER).is_some() {
            let mut command = ToolRoot::guests()?.command("vhost-device-vsock")?;
            command.args(arguments);
            return Self::start_program("vhost-device-vsock", command);
        }
        let dir = tempfile::tempdir()?;
        let host = dir.path().join("host");
        let host = format!("--uds-path={}", host.display());
        let arguments: Vec<&str> = arguments.iter().copied().chain([host.as_str()]).collect();
        let daemon = Daemon::start("vsock-proxy", &dir.path().join("vmm"), &arguments)?;
        Ok(Self { dir, daemon })
    }

    /// As [`Self::start`], with another program that takes vhost-device-vsock's options.
    ///
    /// # Errors
    /// It does not start.
    pub fn start_program(name: &str, mut command: Command) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let socket = dir.path().join("vmm");
        command.arg("--socket").arg(&socket).arg("--uds-path").arg(dir.path().join("host"));
        let daemon = Daemon::start_command(name, command, &socket)?;
        Ok(Self { dir, daemon })
    }

    /// The path of a service of the host, or of any other file beside the sockets.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Boots a guest.
    ///
    /// # Errors
    /// The proxy does not follow the protocol.
    pub fn guest(&self, options: VsockOptions) -> Result<VsockGuest> {
        VsockGuest::start(self.daemon.socket(), options)
    }

    /// Listens on `port` of the host.
    ///
    /// # Errors
    /// The path is taken.
    pub fn listen(&self, port: u32) -> Result<UnixListener> {
        Ok(UnixListener::bind(self.path(&format!("host_{port}")))?)
    }

    /// Comes to the proxy, and says nothing.
    ///
    /// # Errors
    /// It does not listen.
    pub fn dial(&self) -> Result<UnixStream> {
        let stream = UnixStream::connect(self.path("host"))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(stream)
    }

    /// Comes to the proxy and asks for `port`.
    ///
    /// # Errors
    /// It does not listen.
    pub fn ask(&self, port: u32) -> Result<UnixStream> {
        let mut stream = self.dial()?;
        stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
        Ok(stream)
    }

    /// A connection from the host to `port` of the guest, both ends.
    ///
    /// # Errors
    /// Refused by either.
    pub fn connect(&self, guest: &mut VsockGuest, port: u32) -> Result<(UnixStream, GuestStream)> {
        let mut stream = self.ask(port)?;
        let request = guest.expect(op::REQUEST)?;
        ensure!(request.dst_port == port, "{request:?}");
        let theirs = GuestStream::accept(guest, &request)?;
        read_ok(&mut stream)?;
        Ok((stream, theirs))
    }

    /// A connection from `guest_port` of the guest to `port` of the host, both ends.
    ///
    /// # Errors
    /// Refused by either.
    pub fn serve(
        &self,
        guest: &mut VsockGuest,
        guest_port: u32,
        port: u32,
    ) -> Result<(UnixStream, GuestStream)> {
        let listener = self.listen(port)?;
        let theirs = GuestStream::connect(guest, guest_port, crate::driver::vsock::HOST, port)?;
        let (stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        std::fs::remove_file(self.path(&format!("host_{port}")))?;
        Ok((stream, theirs))
    }
}

/// Reads `OK <port>` and nothing more; the port.
///
/// # Errors
/// Something else came, or nothing.
pub fn read_ok(stream: &mut UnixStream) -> Result<u32> {
    let mut line = Vec::new();
    let mut byte = [0];
    while line.last() != Some(&b'\n') {
        ensure!(stream.read(&mut byte)? == 1, "closed after {:?}", String::from_utf8_lossy(&line));
        line.push(byte[0]);
    }
    let line = String::from_utf8(line)?;
    let port = line.trim_end().strip_prefix("OK ").with_context(|| format!("{line:?}"))?;
    Ok(port.parse()?)
}

/// The proxy's program, to be run with arguments that it may refuse.
///
/// # Errors
/// It cannot be built.
pub fn program() -> Result<Command> {
    Ok(Command::new(bin("vsock-proxy")?))
}
