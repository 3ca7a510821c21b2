//! Answers on the control socket, on threads of its own.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use serde_json::{Value, json};

use super::Target;
use super::http::{ReadError, Request, read_request, write_response};

/// A client that is slower than this is dropped.
const PATIENCE: Duration = Duration::from_secs(5);
/// Connections served at once; more wait in the listen queue.
const CONNECTIONS_MAX: usize = 16;

/// Listens until it is dropped, which removes the socket.
#[derive(Debug)]
pub struct ControlServer {
    path: PathBuf,
    /// Its end tells the thread to stop.
    running: Option<UnixStream>,
    acceptor: Option<JoinHandle<()>>,
}

impl ControlServer {
    /// Listens at `path`, which only this user may connect to. A stale socket there is replaced;
    /// whether it is stale, the caller has found out.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn start(path: &Path, target: Arc<dyn Target>) -> io::Result<Self> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        let (running, stopped) = UnixStream::pair()?;
        let acceptor = thread::Builder::new()
            .name("control".into())
            .spawn(move || accept(&listener, &stopped, &target))?;
        Ok(Self {
            path: path.to_owned(),
            running: Some(running),
            acceptor: Some(acceptor),
        })
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        drop(self.running.take());
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        let _ = fs::remove_file(&self.path);
    }
}

fn accept(listener: &UnixListener, stopped: &UnixStream, target: &Arc<dyn Target>) {
    let active = Arc::new(AtomicUsize::new(0));
    loop {
        let mut fds = [
            PollFd::new(stopped, PollFlags::IN),
            PollFd::new(listener, PollFlags::IN),
        ];
        if let Err(error) = poll(&mut fds, None)
            && error != rustix::io::Errno::INTR
        {
            tracing::warn!("the control socket stops listening: {error}");
            return;
        }
        if !fds[0].revents().is_empty() {
            return;
        }
        let Ok((stream, _)) = listener.accept() else {
            continue;
        };
        if active.fetch_add(1, Ordering::AcqRel) >= CONNECTIONS_MAX {
            // Rather than hold everybody up: the client sees the connection end.
            active.fetch_sub(1, Ordering::AcqRel);
            continue;
        }
        let (target, done) = (Arc::clone(target), Arc::clone(&active));
        let serving = thread::Builder::new()
            .name("control-client".into())
            .spawn(move || {
                serve(stream, &*target);
                done.fetch_sub(1, Ordering::AcqRel);
            });
        if serving.is_err() {
            active.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

/// Answers one request. A client that goes away is its own problem.
fn serve(mut stream: UnixStream, target: &dyn Target) {
    // The listener's non-blocking mode is not inherited on Linux, but nothing is lost by saying so.
    let ready = stream
        .set_nonblocking(false)
        .and_then(|()| stream.set_read_timeout(Some(PATIENCE)))
        .and_then(|()| stream.set_write_timeout(Some(PATIENCE)));
    if ready.is_err() {
        return;
    }
    let mut quit = false;
    let (status, body) = match read_request(&mut stream) {
        Ok(request) => {
            quit = request.method == "POST" && request.path == "/quit";
            answer(&request, target)
        }
        Err(ReadError::Bad(status, text)) => (status, json!({ "error": text })),
        Err(ReadError::Io(error)) => {
            tracing::debug!("a client of the control socket went away: {error}");
            return;
        }
    };
    let _ = write_response(&mut stream, status, &format!("{body}\n"));
    drop(stream);
    if quit {
        target.quit();
    }
}

fn answer(request: &Request, target: &dyn Target) -> (u16, Value) {
    let allowed = match request.path.as_str() {
        "/status" | "/stats" => "GET",
        "/power-button" | "/quit" => "POST",
        path => {
            let known = "/status, /stats, /power-button and /quit";
            let error = format!("there is no `{path}`: there are {known}");
            return (404, json!({ "error": error }));
        }
    };
    if request.method != allowed {
        let error = format!("use {allowed} for {}", request.path);
        return (405, json!({ "error": error }));
    }
    match request.path.as_str() {
        "/status" => (200, target.status()),
        "/stats" => (200, target.stats()),
        "/power-button" => match target.power_button() {
            Ok(()) => (200, json!({})),
            Err(error) => (409, json!({ "error": error })),
        },
        _ => (200, json!({})),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::sync::mpsc;

    use super::super::{ControlError, Method, request};
    use super::*;

    struct Fake {
        said: mpsc::Sender<&'static str>,
        deaf: bool,
    }

    impl Target for Fake {
        fn status(&self) -> Value {
            json!({ "name": "fake" })
        }

        fn stats(&self) -> Value {
            json!({ "exits": 7 })
        }

        fn power_button(&self) -> Result<(), String> {
            if self.deaf {
                return Err("the guest does not listen".into());
            }
            self.said.send("button").unwrap();
            Ok(())
        }

        fn quit(&self) {
            self.said.send("quit").unwrap();
        }
    }

    fn server(
        deaf: bool,
    ) -> (
        tempfile::TempDir,
        PathBuf,
        ControlServer,
        mpsc::Receiver<&'static str>,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        let (said, heard) = mpsc::channel();
        let server = ControlServer::start(&path, Arc::new(Fake { said, deaf })).unwrap();
        (folder, path, server, heard)
    }

    #[test]
    fn requests_reach_the_target() {
        let (_folder, path, server, heard) = server(false);
        assert_eq!(
            request(&path, Method::Get, "/status").unwrap()["name"],
            "fake"
        );
        assert_eq!(request(&path, Method::Get, "/stats").unwrap()["exits"], 7);
        request(&path, Method::Post, "/power-button").unwrap();
        assert_eq!(heard.recv(), Ok("button"));
        request(&path, Method::Post, "/quit").unwrap();
        assert_eq!(heard.recv(), Ok("quit"));
        drop(server);
        assert!(!path.exists());
        assert!(matches!(
            request(&path, Method::Get, "/status"),
            Err(ControlError::Io { .. })
        ));
    }

    #[test]
    fn refusals_say_why() {
        let (_folder, path, _server, _heard) = server(true);
        let refused = |method, target| request(&path, method, target).unwrap_err().to_string();
        assert_eq!(
            refused(Method::Post, "/power-button"),
            "the guest does not listen"
        );
        assert_eq!(refused(Method::Get, "/quit"), "use POST for /quit");
        assert!(refused(Method::Get, "/reset").starts_with("there is no `/reset`"));
        let mut raw = UnixStream::connect(&path).unwrap();
        raw.write_all(b"hello\r\n\r\n").unwrap();
        let mut answer = String::new();
        raw.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    }

    #[test]
    fn only_this_user_may_connect() {
        let (_folder, path, _server, _heard) = server(false);
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
