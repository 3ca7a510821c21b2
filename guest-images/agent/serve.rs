//! Accepts connections and answers requests, each in a thread of its own.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use crate::protocol::{Info, Malformed, Message, Shutdown, VSOCK_PORT};
use crate::sys::{self, POLLIN, PollFd};
use crate::{exec, files};

/// More connections than this at a time are refused.
const MAX_CONNECTIONS: usize = 256;
/// A connection that does not say what it wants is closed after this time.
const REQUEST_TIMEOUT_MS: i32 = 30_000;
/// How long the host may take to close a connection whose request is done.
const LINGER_MS: i32 = 5_000;
/// Requests are small jobs: poll loops and copies.
const STACK: usize = 256 << 10;

/// How much is given to the socket at a time, in bytes. Linux makes one packet of what a system
/// call writes to vsock; from 6.12.x on, one above 32 KiB lies in several buffers, and not every
/// VMM's vsock device takes that.
pub const WRITE: usize = 16 << 10;

static CONNECTIONS: AtomicUsize = AtomicUsize::new(0);

/// Whether the agent may shut the machine down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Guest,
    Test,
}

/// Serves the guest's host.
pub fn on_vsock() -> io::Result<()> {
    let listener = sys::listen_vsock(VSOCK_PORT)?;
    serve(&listener, Place::Guest)
}

/// Serves a Unix socket.
pub fn on_unix(path: &Path) -> io::Result<()> {
    let listener = UnixListener::bind(path)?;
    serve(&OwnedFd::from(listener), Place::Test)
}

fn serve(listener: &OwnedFd, place: Place) -> io::Result<()> {
    loop {
        let mut connection = match sys::accept(listener.as_fd()) {
            Ok(connection) => File::from(connection),
            // The peer may be gone already, or descriptors may be short for a while.
            Err(_) => {
                thread::sleep(Duration::from_millis(10));
                continue;
            }
        };
        if CONNECTIONS.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
            CONNECTIONS.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let spawned = thread::Builder::new().stack_size(STACK).spawn(move || {
            // A peer that went away or that sent garbage has nobody to tell about it.
            let _ = answer(&mut connection, place);
            linger(&mut connection);
            CONNECTIONS.fetch_sub(1, Ordering::Relaxed);
        });
        if spawned.is_err() {
            CONNECTIONS.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

fn answer(connection: &mut File, place: Place) -> io::Result<()> {
    let mut ready = [PollFd::new(Some(connection.as_fd()), POLLIN)];
    if sys::poll(&mut ready, REQUEST_TIMEOUT_MS)? == 0 {
        return Ok(());
    }
    let request = match Message::read_from(connection) {
        Ok(Some(request)) => request,
        Ok(None) => return Ok(()),
        Err(error) => return send_error(connection, &error),
    };
    let result = match request {
        Message::Exec(request) => exec::run(connection, &request),
        Message::Put { path, mode, size } => files::put(connection, &path, mode, size),
        Message::Get { path } => files::get(connection, &path),
        Message::Info => info().and_then(|info| Message::InfoReply(info).write_to(connection)),
        Message::Shutdown(how) => shut_down(connection, how, place),
        _ => Err(Malformed("not a request").into()),
    };
    result.or_else(|error| send_error(connection, &error))
}

/// Waits until the host has closed its end, and drops what it still sends: closing first could
/// reset the connection and take the answer with it.
fn linger(connection: &mut File) {
    let mut rest = [0; 4096];
    loop {
        let mut ready = [PollFd::new(Some(connection.as_fd()), POLLIN)];
        match sys::poll(&mut ready, LINGER_MS) {
            Ok(1..) => {}
            _ => return,
        }
        if !matches!(connection.read(&mut rest), Ok(1..)) {
            return;
        }
    }
}

fn send_error(connection: &mut File, error: &io::Error) -> io::Result<()> {
    let message = Message::Error {
        errno: error.raw_os_error().unwrap_or(0),
        text: error.to_string(),
    };
    message.write_to(connection)
}

fn info() -> io::Result<Info> {
    let uptime = fs::read_to_string("/proc/uptime")?;
    let seconds = uptime
        .split_whitespace()
        .next()
        .and_then(|text| text.parse::<f64>().ok());
    Ok(Info {
        agent_version: env!("RINGSIDE_AGENT_VERSION").to_owned(),
        kernel_release: fs::read_to_string("/proc/sys/kernel/osrelease")?
            .trim()
            .to_owned(),
        uptime_ms: (seconds.unwrap_or(0.0) * 1000.0) as u64,
    })
}

/// Tells process 1, with the signals that busybox's `poweroff` and `reboot` use too.
fn shut_down(connection: &mut File, how: Shutdown, place: Place) -> io::Result<()> {
    if place == Place::Test {
        return Err(io::Error::other("this agent is not in a guest"));
    }
    Message::Done.write_to(connection)?;
    sys::kill(
        1,
        match how {
            Shutdown::PowerOff => sys::SIGUSR2,
            Shutdown::Reboot => sys::SIGTERM,
        },
    )
}
