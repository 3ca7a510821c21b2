//! As much of HTTP/1.1 (RFC 9112) as a request and a response without streaming need.

use std::io::{self, Read, Write};

/// Longest head (request line or status line, and header fields) in bytes.
const HEAD_MAX: usize = 8 << 10;
/// Longest request body in bytes. No request has one today.
const BODY_MAX: usize = 64 << 10;
const HEADERS_MAX: usize = 32;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Reads.
    Get,
    /// Acts.
    Post,
}

impl Method {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Method::Get => "GET",
            Method::Post => "POST",
        }
    }
}

/// A request's first line; the body is read and dropped.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// As sent, for example `GET`.
    pub method: String,
    /// As sent, for example `/status`.
    pub path: String,
}

/// Why there is no request.
#[derive(Debug)]
pub(super) enum ReadError {
    /// The connection ended or was too slow.
    Io(io::Error),
    /// Answer with this status and text.
    Bad(u16, &'static str),
}

impl From<io::Error> for ReadError {
    fn from(error: io::Error) -> Self {
        ReadError::Io(error)
    }
}

fn ended() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the connection ended")
}

/// Reads one request with its body.
pub(super) fn read_request(stream: &mut impl Read) -> Result<Request, ReadError> {
    let mut bytes = Vec::new();
    loop {
        let mut chunk = [0; 1024];
        let count = stream.read(&mut chunk)?;
        if count == 0 {
            return Err(ended().into());
        }
        bytes.extend(chunk.iter().take(count));
        let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
        let mut request = httparse::Request::new(&mut headers);
        match request.parse(&bytes) {
            Ok(httparse::Status::Complete(head)) => {
                let length = body_length(request.headers)?;
                let parsed = Request {
                    method: request.method.unwrap_or_default().to_owned(),
                    path: request.path.unwrap_or_default().to_owned(),
                };
                let missing = (head + length).saturating_sub(bytes.len());
                let missing = u64::try_from(missing).unwrap_or(u64::MAX);
                io::copy(&mut stream.take(missing), &mut io::sink())?;
                return Ok(parsed);
            }
            Ok(httparse::Status::Partial) if bytes.len() > HEAD_MAX => {
                return Err(ReadError::Bad(431, "the head is too long"));
            }
            Ok(httparse::Status::Partial) => {}
            Err(_) => return Err(ReadError::Bad(400, "this is not HTTP/1.1")),
        }
    }
}

fn body_length(headers: &[httparse::Header<'_>]) -> Result<usize, ReadError> {
    for header in headers {
        if header.name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(ReadError::Bad(411, "send the body with a Content-Length"));
        }
        if header.name.eq_ignore_ascii_case("content-length") {
            return std::str::from_utf8(header.value)
                .ok()
                .and_then(|text| text.trim().parse().ok())
                .filter(|length| *length <= BODY_MAX)
                .ok_or(ReadError::Bad(413, "the body is too long"));
        }
    }
    Ok(0)
}

/// Writes a response and says that the connection ends.
pub(super) fn write_response(stream: &mut impl Write, status: u16, body: &str) -> io::Result<()> {
    let reason = match status {
        200 => "OK",
        404 => "Not Found",
        405 => "Method Not Allowed",
        409 => "Conflict",
        _ => "Bad Request",
    };
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\n\
         Content-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )
}

/// Splits a whole response into status and body.
pub(super) fn parse_response(bytes: &[u8]) -> io::Result<(u16, &[u8])> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut response = httparse::Response::new(&mut headers);
    match response.parse(bytes) {
        Ok(httparse::Status::Complete(head)) => Ok((
            response.code.unwrap_or_default(),
            bytes.get(head..).unwrap_or_default(),
        )),
        Ok(httparse::Status::Partial) => Err(ended()),
        Err(error) => Err(io::Error::new(io::ErrorKind::InvalidData, error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives a byte at a time, the worst that a socket may do.
    struct Slow<'a>(&'a [u8]);

    impl Read for Slow<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let Some((first, rest)) = self.0.split_first() else {
                return Ok(0);
            };
            buffer[0] = *first;
            self.0 = rest;
            Ok(1)
        }
    }

    #[test]
    fn a_request_may_come_in_pieces_and_with_a_body() {
        let text = b"POST /quit HTTP/1.1\r\nHost: x\r\ncontent-length: 3\r\n\r\nabcNEXT";
        let mut stream = Slow(text);
        let request = read_request(&mut stream).unwrap();
        assert_eq!((&*request.method, &*request.path), ("POST", "/quit"));
        assert_eq!(stream.0, b"NEXT");
    }

    #[test]
    fn what_is_not_a_request_is_answered_or_dropped() {
        let read = |bytes: &[u8]| read_request(&mut &*bytes).unwrap_err();
        assert!(matches!(read(b""), ReadError::Io(_)));
        assert!(matches!(read(b"GET / HTTP/1.1\r\n"), ReadError::Io(_)));
        assert!(matches!(read(b"\x00\xff\r\n\r\n"), ReadError::Bad(400, _)));
        let long = format!("GET /{} HTTP/1.1", "x".repeat(HEAD_MAX));
        assert!(matches!(read(long.as_bytes()), ReadError::Bad(431, _)));
        for header in [
            "Transfer-Encoding: chunked",
            "Content-Length: 99999999999",
            "Content-Length: x",
        ] {
            let text = format!("POST / HTTP/1.1\r\n{header}\r\n\r\n");
            assert!(
                matches!(read(text.as_bytes()), ReadError::Bad(411 | 413, _)),
                "{header}"
            );
        }
    }

    #[test]
    fn a_response_reads_back() {
        let mut bytes = Vec::new();
        write_response(&mut bytes, 404, "{}").unwrap();
        assert_eq!(parse_response(&bytes).unwrap(), (404, &b"{}"[..]));
        assert!(parse_response(b"HTTP/1.1 200").is_err());
    }
}
