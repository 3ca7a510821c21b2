//! What the host and the guest agent say to each other.
//!
//! This file is compiled into both sides. One connection carries one request. Every message is a
//! frame: one byte of kind, four bytes of payload length (little endian, at most [`MAX_PAYLOAD`]),
//! then the payload. Numbers are little endian; strings are a 32-bit length and bytes.
//!
//! ```text
//! exec   host:  Exec, then Stdin* StdinClose, Signal*, Window*      agent: Started, Stdout*, Stderr*,
//!                                                                          StdinCredit*, Exited
//! put    host:  Put, Data*, End                                     agent: Ready, then Done
//! get    host:  Get                                                 agent: FileInfo, Data*, End
//! info   host:  Info                                                agent: InfoReply
//! shutdown host: Shutdown                                           agent: Done
//! ```
//!
//! Instead of any answer the agent may send `Error`, which ends the request. Standard input has a
//! window so that a program which does not read never keeps a signal from arriving: the host may
//! have [`STDIN_WINDOW`] bytes on the way, and `StdinCredit` gives bytes back.

use std::io::{self, Read, Write};

/// The version of this protocol; a request carries it, and a side that speaks another refuses.
pub const VERSION: u8 = 1;
/// The vsock port on which the agent listens.
pub const VSOCK_PORT: u32 = 1024;
/// The largest payload of a frame, in bytes.
pub const MAX_PAYLOAD: usize = 1 << 20;
/// How much file or stream data a sender puts in one frame, in bytes.
pub const CHUNK: usize = 64 << 10;
/// How many bytes of standard input may be on the way.
pub const STDIN_WINDOW: usize = 256 << 10;

/// The bytes before a frame's payload.
pub const FRAME_HEADER: usize = 5;

/// The size of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// It returned this code (0 to 255).
    Code(u8),
    /// This signal ended it.
    Signal(u8),
}

/// How the guest is to go down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shutdown {
    /// Switch the machine off.
    PowerOff,
    /// Start the machine again.
    Reboot,
}

/// A program to run.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ExecRequest {
    /// Program and arguments; the program is looked up in PATH.
    pub argv: Vec<Vec<u8>>,
    /// Variables to set on top of the agent's environment.
    pub env: Vec<(Vec<u8>, Vec<u8>)>,
    /// Working directory; empty: the agent's.
    pub cwd: Vec<u8>,
    /// Run it on a new terminal of this size; standard output and error are then one.
    pub tty: Option<Window>,
}

/// What the agent knows about its guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// The agent's version.
    pub agent_version: String,
    /// The kernel's release, as `uname -r` prints it.
    pub kernel_release: String,
    /// Time since the guest's start, in milliseconds.
    pub uptime_ms: u64,
}

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Run a program.
    Exec(ExecRequest),
    /// Write a file of `size` bytes.
    Put { path: Vec<u8>, mode: u32, size: u64 },
    /// Read a file.
    Get { path: Vec<u8> },
    /// Say who you are.
    Info,
    /// Stop the guest.
    Shutdown(Shutdown),
    /// Bytes for the program's standard input.
    Stdin(Vec<u8>),
    /// No more standard input.
    StdinClose,
    /// Send a signal to the program's process group.
    Signal(u8),
    /// The terminal has a new size.
    Window(Window),
    /// Bytes of a file.
    Data(Vec<u8>),
    /// The file is complete.
    End,
    /// The program runs.
    Started { pid: u32 },
    /// Bytes of the program's standard output.
    Stdout(Vec<u8>),
    /// Bytes of the program's standard error.
    Stderr(Vec<u8>),
    /// The program has taken so many bytes of its standard input.
    StdinCredit(u32),
    /// The program has ended.
    Exited(Exit),
    /// The agent waits for the file.
    Ready,
    /// The file exists; its content follows.
    FileInfo { mode: u32, size: u64 },
    /// The request is done.
    Done,
    /// Answer to `Info`.
    InfoReply(Info),
    /// The request failed. `errno` is 0 where no system call did.
    Error { errno: i32, text: String },
}

/// The peer sent something that is not a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed(pub &'static str);

impl std::fmt::Display for Malformed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "malformed message: {}", self.0)
    }
}

impl std::error::Error for Malformed {}

impl From<Malformed> for io::Error {
    fn from(error: Malformed) -> Self {
        Self::new(io::ErrorKind::InvalidData, error)
    }
}

impl Message {
    /// Appends the message's frame to `out`.
    ///
    /// Fails when the payload would be larger than [`MAX_PAYLOAD`].
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), Malformed> {
        let start = out.len();
        out.extend_from_slice(&[0; FRAME_HEADER]);
        let mut payload = Encoder(out);
        let kind = self.encode_payload(&mut payload)?;
        let length = out.len() - start - FRAME_HEADER;
        let length32 = u32::try_from(length).ok().filter(|_| length <= MAX_PAYLOAD);
        let Some(length32) = length32 else {
            out.truncate(start);
            return Err(Malformed("too large to send"));
        };
        out[start] = kind;
        out[start + 1..start + FRAME_HEADER].copy_from_slice(&length32.to_le_bytes());
        Ok(())
    }

    fn encode_payload(&self, out: &mut Encoder<'_>) -> Result<u8, Malformed> {
        Ok(match self {
            Self::Exec(request) => {
                out.u8(VERSION);
                out.count(request.argv.len())?;
                for argument in &request.argv {
                    out.bytes(argument)?;
                }
                out.count(request.env.len())?;
                for (name, value) in &request.env {
                    out.bytes(name)?;
                    out.bytes(value)?;
                }
                out.bytes(&request.cwd)?;
                out.u8(u8::from(request.tty.is_some()));
                if let Some(window) = request.tty {
                    out.window(window);
                }
                1
            }
            Self::Put { path, mode, size } => {
                out.u8(VERSION);
                out.bytes(path)?;
                out.u32(*mode);
                out.u64(*size);
                2
            }
            Self::Get { path } => {
                out.u8(VERSION);
                out.bytes(path)?;
                3
            }
            Self::Info => {
                out.u8(VERSION);
                4
            }
            Self::Shutdown(how) => {
                out.u8(VERSION);
                out.u8(match how {
                    Shutdown::PowerOff => 0,
                    Shutdown::Reboot => 1,
                });
                5
            }
            Self::Stdin(data) => out.rest(data, 16),
            Self::StdinClose => 17,
            Self::Signal(number) => {
                out.u8(*number);
                18
            }
            Self::Window(window) => {
                out.window(*window);
                19
            }
            Self::Data(data) => out.rest(data, 20),
            Self::End => 21,
            Self::Started { pid } => {
                out.u32(*pid);
                32
            }
            Self::Stdout(data) => out.rest(data, 33),
            Self::Stderr(data) => out.rest(data, 34),
            Self::StdinCredit(bytes) => {
                out.u32(*bytes);
                35
            }
            Self::Exited(exit) => {
                let (how, number) = match exit {
                    Exit::Code(code) => (0, *code),
                    Exit::Signal(signal) => (1, *signal),
                };
                out.u8(how);
                out.u8(number);
                36
            }
            Self::Ready => 37,
            Self::FileInfo { mode, size } => {
                out.u32(*mode);
                out.u64(*size);
                38
            }
            Self::Done => 39,
            Self::InfoReply(info) => {
                out.bytes(info.agent_version.as_bytes())?;
                out.bytes(info.kernel_release.as_bytes())?;
                out.u64(info.uptime_ms);
                40
            }
            Self::Error { errno, text } => {
                out.u32(errno.cast_unsigned());
                out.bytes(text.as_bytes())?;
                41
            }
        })
    }

    fn decode(kind: u8, payload: &[u8]) -> Result<Self, Malformed> {
        let mut input = Decoder(payload);
        if (1..=5).contains(&kind) && input.u8()? != VERSION {
            return Err(Malformed("another protocol version"));
        }
        let message = match kind {
            1 => Self::Exec(input.exec_request()?),
            2 => Self::Put {
                path: input.bytes()?,
                mode: input.u32()?,
                size: input.u64()?,
            },
            3 => Self::Get {
                path: input.bytes()?,
            },
            4 => Self::Info,
            5 => Self::Shutdown(match input.u8()? {
                0 => Shutdown::PowerOff,
                1 => Shutdown::Reboot,
                _ => return Err(Malformed("unknown shutdown")),
            }),
            16 => Self::Stdin(input.rest()),
            17 => Self::StdinClose,
            18 => Self::Signal(input.u8()?),
            19 => Self::Window(input.window()?),
            20 => Self::Data(input.rest()),
            21 => Self::End,
            32 => Self::Started { pid: input.u32()? },
            33 => Self::Stdout(input.rest()),
            34 => Self::Stderr(input.rest()),
            35 => Self::StdinCredit(input.u32()?),
            36 => Self::Exited(match (input.u8()?, input.u8()?) {
                (0, code) => Exit::Code(code),
                (1, signal) => Exit::Signal(signal),
                _ => return Err(Malformed("unknown exit")),
            }),
            37 => Self::Ready,
            38 => Self::FileInfo {
                mode: input.u32()?,
                size: input.u64()?,
            },
            39 => Self::Done,
            40 => Self::InfoReply(Info {
                agent_version: input.text()?,
                kernel_release: input.text()?,
                uptime_ms: input.u64()?,
            }),
            41 => Self::Error {
                errno: input.u32()?.cast_signed(),
                text: input.text()?,
            },
            _ => return Err(Malformed("unknown kind")),
        };
        match input.0.is_empty() {
            true => Ok(message),
            false => Err(Malformed("bytes left over")),
        }
    }

    /// Writes the message to a blocking stream.
    pub fn write_to(&self, stream: &mut impl Write) -> io::Result<()> {
        let mut frame = Vec::new();
        self.encode(&mut frame)?;
        stream.write_all(&frame)
    }

    /// Reads the next message from a blocking stream; `None` at its end.
    pub fn read_from(stream: &mut impl Read) -> io::Result<Option<Self>> {
        let mut header = [0; FRAME_HEADER];
        let mut have = 0;
        while have < FRAME_HEADER {
            match stream.read(&mut header[have..]) {
                Ok(0) if have == 0 => return Ok(None),
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => have += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        let mut payload = vec![0; payload_length(&header)?];
        stream.read_exact(&mut payload)?;
        Ok(Some(Self::decode(header[0], &payload)?))
    }
}

fn payload_length(header: &[u8; FRAME_HEADER]) -> Result<usize, Malformed> {
    let [_, length @ ..] = *header;
    usize::try_from(u32::from_le_bytes(length))
        .ok()
        .filter(|length| *length <= MAX_PAYLOAD)
        .ok_or(Malformed("frame too long"))
}

/// Bytes that have arrived and are not yet messages, for non-blocking streams.
#[derive(Debug, Default)]
pub struct Inbox {
    bytes: Vec<u8>,
    start: usize,
}

impl Inbox {
    /// Adds bytes that have arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.start);
        self.start = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// Takes the next complete message.
    pub fn next(&mut self) -> Result<Option<Message>, Malformed> {
        let Some(bytes) = self.bytes.get(self.start..) else {
            return Ok(None);
        };
        let Some((header, rest)) = bytes.split_first_chunk::<FRAME_HEADER>() else {
            return Ok(None);
        };
        let length = payload_length(header)?;
        let Some(payload) = rest.get(..length) else {
            return Ok(None);
        };
        let message = Message::decode(header[0], payload)?;
        self.start += FRAME_HEADER + length;
        Ok(Some(message))
    }
}

struct Encoder<'a>(&'a mut Vec<u8>);

impl Encoder<'_> {
    fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn count(&mut self, count: usize) -> Result<(), Malformed> {
        let count = u32::try_from(count).map_err(|_| Malformed("too large to send"))?;
        self.u32(count);
        Ok(())
    }

    fn bytes(&mut self, bytes: &[u8]) -> Result<(), Malformed> {
        self.count(bytes.len())?;
        self.0.extend_from_slice(bytes);
        Ok(())
    }

    fn rest(&mut self, bytes: &[u8], kind: u8) -> u8 {
        self.0.extend_from_slice(bytes);
        kind
    }

    fn window(&mut self, window: Window) {
        self.0.extend_from_slice(&window.rows.to_le_bytes());
        self.0.extend_from_slice(&window.columns.to_le_bytes());
    }
}

struct Decoder<'a>(&'a [u8]);

impl Decoder<'_> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (array, rest) = self.0.split_first_chunk().ok_or(Malformed("cut off"))?;
        self.0 = rest;
        Ok(*array)
    }

    fn u8(&mut self) -> Result<u8, Malformed> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn u16(&mut self) -> Result<u16, Malformed> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_le_bytes)
    }

    fn bytes(&mut self) -> Result<Vec<u8>, Malformed> {
        let length = usize::try_from(self.u32()?).map_err(|_| Malformed("cut off"))?;
        let (bytes, rest) = self
            .0
            .split_at_checked(length)
            .ok_or(Malformed("cut off"))?;
        self.0 = rest;
        Ok(bytes.to_vec())
    }

    fn text(&mut self) -> Result<String, Malformed> {
        String::from_utf8(self.bytes()?).map_err(|_| Malformed("text is not UTF-8"))
    }

    fn rest(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.0).to_vec()
    }

    fn window(&mut self) -> Result<Window, Malformed> {
        Ok(Window {
            rows: self.u16()?,
            columns: self.u16()?,
        })
    }

    // The lists grow only as their elements are found, so a count that lies allocates nothing.
    fn exec_request(&mut self) -> Result<ExecRequest, Malformed> {
        let mut request = ExecRequest::default();
        for _ in 0..self.u32()? {
            request.argv.push(self.bytes()?);
        }
        for _ in 0..self.u32()? {
            request.env.push((self.bytes()?, self.bytes()?));
        }
        request.cwd = self.bytes()?;
        request.tty = match self.u8()? {
            0 => None,
            1 => Some(self.window()?),
            _ => return Err(Malformed("unknown terminal flag")),
        };
        Ok(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<Message> {
        let window = Window {
            rows: 24,
            columns: 80,
        };
        let request = ExecRequest {
            argv: vec![b"sh".to_vec(), vec![0xff, 0]],
            env: vec![(b"A".to_vec(), b"b=c".to_vec())],
            cwd: b"/tmp".to_vec(),
            tty: Some(window),
        };
        vec![
            Message::Exec(request),
            Message::Exec(ExecRequest::default()),
            Message::Put {
                path: b"/x".to_vec(),
                mode: 0o755,
                size: u64::MAX,
            },
            Message::Get {
                path: b"/x".to_vec(),
            },
            Message::Info,
            Message::Shutdown(Shutdown::PowerOff),
            Message::Shutdown(Shutdown::Reboot),
            Message::Stdin(vec![1, 2, 3]),
            Message::StdinClose,
            Message::Signal(9),
            Message::Window(window),
            Message::Data(vec![0; 10]),
            Message::End,
            Message::Started { pid: 7 },
            Message::Stdout(vec![]),
            Message::Stderr(b"e".to_vec()),
            Message::StdinCredit(u32::MAX),
            Message::Exited(Exit::Code(255)),
            Message::Exited(Exit::Signal(15)),
            Message::Ready,
            Message::FileInfo {
                mode: 0o644,
                size: 5,
            },
            Message::Done,
            Message::InfoReply(Info {
                agent_version: "1".into(),
                kernel_release: "6.12".into(),
                uptime_ms: 1,
            }),
            Message::Error {
                errno: -2,
                text: "no".into(),
            },
        ]
    }

    #[test]
    fn every_message_survives_the_way() {
        let mut bytes = Vec::new();
        for message in all() {
            message.encode(&mut bytes).unwrap();
        }
        let mut stream = bytes.as_slice();
        for message in all() {
            assert_eq!(Message::read_from(&mut stream).unwrap(), Some(message));
        }
        assert_eq!(Message::read_from(&mut stream).unwrap(), None);

        // The same in pieces of every size.
        for size in 1..40 {
            let mut inbox = Inbox::default();
            let mut found = Vec::new();
            for piece in bytes.chunks(size) {
                inbox.push(piece);
                while let Some(message) = inbox.next().unwrap() {
                    found.push(message);
                }
            }
            assert_eq!(found, all());
        }
    }

    #[test]
    fn cut_and_garbled_payloads_are_refused() {
        for message in all() {
            let mut frame = Vec::new();
            message.encode(&mut frame).unwrap();
            let (kind, payload) = (frame[0], &frame[FRAME_HEADER..]);
            let is_data = matches!(kind, 16 | 20 | 33 | 34);
            for cut in 0..payload.len() {
                assert!(is_data || Message::decode(kind, &payload[..cut]).is_err());
            }
            let mut longer = payload.to_vec();
            longer.push(0);
            assert!(is_data || Message::decode(kind, &longer).is_err());
        }
        for kind in 0..=255 {
            // Whatever this is, it must not panic nor allocate what it announces.
            let _ = Message::decode(kind, &[VERSION, 0xff, 0xff, 0xff, 0xff, 0xff]);
        }
        assert_eq!(
            Message::decode(4, &[9]),
            Err(Malformed("another protocol version"))
        );
    }

    #[test]
    fn frames_are_bounded() {
        let header = [16, 1, 0, 16, 0];
        assert_eq!(payload_length(&header), Err(Malformed("frame too long")));
        assert!(Message::read_from(&mut header.as_slice()).is_err());
        let mut inbox = Inbox::default();
        inbox.push(&header);
        assert!(inbox.next().is_err());
        let mut out = vec![1];
        let large = Message::Data(vec![0; MAX_PAYLOAD + 1]);
        assert!(large.encode(&mut out).is_err());
        assert_eq!(out, [1]);
        assert!(Message::Data(vec![0; MAX_PAYLOAD]).encode(&mut out).is_ok());
    }
}
