//! The other side of the control socket.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::Method;
use super::http::parse_response;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// Longest answer in bytes.
const ANSWER_MAX: u64 = 64 << 20;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Nobody answers.
    #[error("the control socket {} does not answer: {source}", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
    /// The guest's process refused.
    #[error("{0}")]
    Refused(String),
}

/// Makes one request.
///
/// # Errors
/// Nobody answers in 30 s, or the answer is a refusal.
pub fn request(socket: &Path, method: Method, path: &str) -> Result<Value, ControlError> {
    let bytes = exchange(socket, method, path).map_err(|source| ControlError::Io {
        path: socket.to_owned(),
        source,
    })?;
    let malformed = |source: io::Error| ControlError::Io {
        path: socket.to_owned(),
        source,
    };
    let (status, body) = parse_response(&bytes).map_err(malformed)?;
    let value: Value = serde_json::from_slice(body).map_err(|error| malformed(error.into()))?;
    if status == 200 {
        return Ok(value);
    }
    let error = value.get("error").and_then(Value::as_str);
    Err(ControlError::Refused(
        error.unwrap_or("refused without a reason").to_owned(),
    ))
}

fn exchange(socket: &Path, method: Method, path: &str) -> io::Result<Vec<u8>> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let method = method.as_str();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: ringside\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    )?;
    let mut bytes = Vec::new();
    stream.take(ANSWER_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}
