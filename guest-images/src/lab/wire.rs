//! Frames and messages between the outside process and the relay inside the nested host.
//!
//! Both ends are the same executable, so there is no compatibility to keep between versions: the
//! [`VERSION`] only guards against a mistake. A frame is a header of nine bytes (kind, stream
//! number and payload length, little endian) and its payload.

use std::ffi::OsString;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Sent in [`ToOutside::Hello`]; both ends must have the same.
pub(super) const VERSION: &str = concat!("ringside-lab-2/", env!("CARGO_PKG_VERSION"));

const HEADER: usize = 9;

/// The most bytes that one data frame carries.
pub(super) const MAX_DATA: usize = 32 * 1024;

/// The most bytes that a control frame carries. A command's arguments and environment must fit
/// into it: the kernel's own limit for them is 2 MiB, and JSON spells out each byte.
pub(super) const MAX_CONTROL: usize = 16 << 20;

/// Names one byte stream. The outside process opens even ones, the relay odd ones; a number is
/// never used twice.
pub(super) type StreamId = u32;

/// Names one command of a session.
pub(super) type CommandId = u32;

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Frame {
    /// A message of [`ToInside`] or [`ToOutside`], as JSON.
    Control(Vec<u8>),
    /// Bytes of a stream; they use up the receiver's credit.
    Data(StreamId, Vec<u8>),
    /// The receiver has consumed so many bytes of the stream: the sender may send as many more.
    Credit(StreamId, u32),
    /// The sender has no more bytes for this stream.
    Eof(StreamId),
    /// The sender of this frame takes no more bytes of this stream.
    Stop(StreamId),
}

const CONTROL: u8 = 1;
const DATA: u8 = 2;
const CREDIT: u8 = 3;
const EOF: u8 = 4;
const STOP: u8 = 5;

/// Why bytes from the other end are not a frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum WireError {
    /// A kind that does not exist.
    #[error("unknown frame kind {0:#04x}")]
    Kind(u8),
    /// A payload longer than its kind allows, or of another length than its kind has.
    #[error("frame of kind {kind} with {length} bytes")]
    Length {
        /// The frame's kind.
        kind: u8,
        /// The length in its header.
        length: usize,
    },
    /// A control frame that is no message.
    #[error("malformed message: {0}")]
    Message(String),
    /// More data than the receiver gave credit for.
    #[error("stream {0} overran its credit")]
    Overrun(StreamId),
    /// A frame for a stream that does not exist.
    #[error("no stream {0}")]
    NoStream(StreamId),
}

impl Frame {
    /// Appends the frame's bytes.
    ///
    /// # Errors
    /// [`WireError::Length`] for a payload that the other end would refuse.
    pub(super) fn encode(&self, out: &mut impl Extend<u8>) -> Result<(), WireError> {
        let credit;
        let (kind, stream, payload): (u8, StreamId, &[u8]) = match self {
            Self::Control(message) => (CONTROL, 0, message),
            Self::Data(stream, bytes) => (DATA, *stream, bytes),
            Self::Credit(stream, bytes) => {
                credit = bytes.to_le_bytes();
                (CREDIT, *stream, &credit)
            }
            Self::Eof(stream) => (EOF, *stream, &[]),
            Self::Stop(stream) => (STOP, *stream, &[]),
        };
        check_length(kind, payload.len())?;
        let length = u32::try_from(payload.len()).map_err(|_| WireError::Length {
            kind,
            length: payload.len(),
        })?;
        out.extend([kind]);
        out.extend(stream.to_le_bytes());
        out.extend(length.to_le_bytes());
        out.extend(payload.iter().copied());
        Ok(())
    }
}

fn check_length(kind: u8, length: usize) -> Result<(), WireError> {
    let good = match kind {
        CONTROL => length <= MAX_CONTROL,
        DATA => (1..=MAX_DATA).contains(&length),
        CREDIT => length == 4,
        EOF | STOP => length == 0,
        _ => return Err(WireError::Kind(kind)),
    };
    if good {
        Ok(())
    } else {
        Err(WireError::Length { kind, length })
    }
}

/// Cuts a byte stream into frames.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    buffer: Vec<u8>,
    /// Bytes at the front of `buffer` that were already returned.
    used: usize,
}

impl Decoder {
    /// Adds bytes from the wire.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        if self.used > 0 {
            self.buffer.drain(..self.used);
            self.used = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame, if it has arrived.
    ///
    /// # Errors
    /// The bytes are not a frame. The wire is then of no further use.
    pub(super) fn next(&mut self) -> Result<Option<Frame>, WireError> {
        let rest = self.buffer.get(self.used..).unwrap_or_default();
        let Some((header, rest)) = rest.split_first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let [kind, s0, s1, s2, s3, l0, l1, l2, l3] = *header;
        let stream = u32::from_le_bytes([s0, s1, s2, s3]);
        let length = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3])).map_err(|_| {
            WireError::Length {
                kind,
                length: usize::MAX,
            }
        })?;
        check_length(kind, length)?;
        let Some(payload) = rest.get(..length) else {
            return Ok(None);
        };
        let frame = match kind {
            CONTROL => Frame::Control(payload.to_vec()),
            DATA => Frame::Data(stream, payload.to_vec()),
            CREDIT => {
                let bytes = payload
                    .try_into()
                    .map_err(|_| WireError::Length { kind, length })?;
                Frame::Credit(stream, u32::from_le_bytes(bytes))
            }
            EOF => Frame::Eof(stream),
            _ => Frame::Stop(stream),
        };
        self.used += HEADER + length;
        Ok(Some(frame))
    }
}

/// Reads the message of a control frame.
///
/// # Errors
/// [`WireError::Message`] when it is none.
pub(super) fn decode_message<T: DeserializeOwned>(json: &[u8]) -> Result<T, WireError> {
    serde_json::from_slice(json).map_err(|error| WireError::Message(error.to_string()))
}

/// Makes the control frame of a message.
///
/// # Errors
/// [`WireError::Message`] when it cannot be written as JSON.
pub(super) fn encode_message<T: Serialize>(message: &T) -> Result<Frame, WireError> {
    serde_json::to_vec(message)
        .map(Frame::Control)
        .map_err(|error| WireError::Message(error.to_string()))
}

/// From the outside process to the relay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum ToInside {
    /// First of all: how to make the nested host look like the machine.
    Setup(Setup),
    /// Start a command.
    Spawn(Box<Spawn>),
    /// Send a signal to a command.
    Signal {
        /// The command.
        command: CommandId,
        /// The signal's number.
        signal: i32,
    },
    /// The terminal has another size now.
    Resize {
        /// The command.
        command: CommandId,
        /// The new size.
        size: WindowSize,
    },
    /// Somebody connected to the socket `socket` of the command outside: connect to it inside and
    /// carry its bytes on `stream`.
    Connect {
        /// A new stream.
        stream: StreamId,
        /// The command.
        command: CommandId,
        /// Index in [`Spawn::sockets`].
        socket: usize,
    },
    /// Outside there is a socket at `path` now: listen inside.
    OutwardUp {
        /// The command.
        command: CommandId,
        /// Where to listen.
        path: OsString,
    },
    /// The socket at `path` is gone.
    OutwardDown {
        /// The command.
        command: CommandId,
        /// Where to listen no more.
        path: OsString,
    },
    /// Say [`ToOutside::Pong`].
    Ping,
}

/// From the relay to the outside process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum ToOutside {
    /// The relay runs.
    Hello {
        /// Its [`VERSION`].
        version: String,
    },
    /// [`ToInside::Setup`] is done.
    Ready,
    /// [`ToInside::Setup`] failed.
    SetupFailed {
        /// Why.
        problem: String,
    },
    /// A command could not be started.
    SpawnFailed {
        /// The command.
        command: CommandId,
        /// Why.
        problem: String,
    },
    /// A command has ended, and all that it wrote has been sent.
    Exited {
        /// The command.
        command: CommandId,
        /// How it ended.
        status: super::Exit,
    },
    /// The command now listens on this socket.
    Listening {
        /// The command.
        command: CommandId,
        /// Index in [`Spawn::sockets`].
        socket: usize,
        /// Permission bits of the socket.
        mode: u32,
    },
    /// The command no longer listens on this socket.
    Gone {
        /// The command.
        command: CommandId,
        /// Index in [`Spawn::sockets`].
        socket: usize,
    },
    /// Somebody inside connected to `path`, which belongs to a socket outside.
    Incoming {
        /// A new stream.
        stream: StreamId,
        /// The path of [`ToInside::OutwardUp`] or [`Spawn::outward`].
        path: OsString,
    },
    /// The answer to [`ToInside::Ping`]: the nested host lives.
    Pong,
}

/// How to make the nested host look like the machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Setup {
    /// The machine's name.
    pub(super) hostname: OsString,
    /// virtio-9p shares to mount read-write.
    pub(super) shares: Vec<Share>,
    /// virtio-blk disks to put in the place of their image files.
    pub(super) disks: Vec<DiskNode>,
}

/// A writable folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Share {
    /// The share's mount tag.
    pub(super) tag: String,
    /// Where it is mounted.
    pub(super) path: OsString,
}

/// A disk image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct DiskNode {
    /// The virtio-blk serial number by which the disk is found.
    pub(super) serial: String,
    /// The path of the image file, over which the device node is bound.
    pub(super) path: OsString,
}

/// A command to start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Spawn {
    /// Its number.
    pub(super) command: CommandId,
    /// Program and arguments.
    pub(super) argv: Vec<OsString>,
    /// The whole environment.
    pub(super) env: Vec<(OsString, OsString)>,
    /// Working folder.
    pub(super) cwd: OsString,
    /// File mode creation mask.
    pub(super) umask: u32,
    /// Standard input, output and error.
    pub(super) stdio: [SpawnStdio; 3],
    /// A terminal, if any of `stdio` is one.
    pub(super) terminal: Option<SpawnTerminal>,
    /// Sockets on which the command will listen.
    pub(super) sockets: Vec<OsString>,
    /// Sockets that exist outside and to which the command may connect.
    pub(super) outward: Vec<OsString>,
}

/// One of a command's standard files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum SpawnStdio {
    /// `/dev/null`.
    Null,
    /// A pipe, carried on this stream.
    Pipe(StreamId),
    /// The command's terminal.
    Terminal,
}

/// A command's terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SpawnTerminal {
    /// Carries both directions.
    pub(super) stream: StreamId,
    /// Its first size.
    pub(super) size: WindowSize,
}

/// The size of a terminal.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct WindowSize {
    /// Lines of text.
    pub(super) rows: u16,
    /// Characters a line.
    pub(super) columns: u16,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frames() -> impl Strategy<Value = Frame> {
        prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..2000).prop_map(Frame::Control),
            (
                any::<u32>(),
                proptest::collection::vec(any::<u8>(), 1..2000)
            )
                .prop_map(|(stream, bytes)| Frame::Data(stream, bytes)),
            (any::<u32>(), any::<u32>()).prop_map(|(stream, bytes)| Frame::Credit(stream, bytes)),
            any::<u32>().prop_map(Frame::Eof),
            any::<u32>().prop_map(Frame::Stop),
        ]
    }

    proptest! {
        #[test]
        fn frames_survive_any_cutting(
            frames in proptest::collection::vec(frames(), 0..20),
            cuts in proptest::collection::vec(1..500_usize, 1..50),
        ) {
            let mut bytes = Vec::new();
            for frame in &frames {
                frame.encode(&mut bytes).unwrap();
            }
            let mut decoder = Decoder::default();
            let mut decoded = Vec::new();
            let mut rest = bytes.as_slice();
            for cut in cuts.iter().cycle() {
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                decoder.push(now);
                while let Some(frame) = decoder.next().unwrap() {
                    decoded.push(frame);
                }
                rest = later;
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(decoded, frames);
        }

        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut decoder = Decoder::default();
            decoder.push(&bytes);
            while let Ok(Some(_)) = decoder.next() {}
        }
    }

    #[test]
    fn bad_headers_are_errors_before_their_payload_arrives() {
        for (header, error) in [
            ([9, 0, 0, 0, 0, 0, 0, 0, 0], WireError::Kind(9)),
            (
                [DATA, 2, 0, 0, 0, 1, 128, 0, 0],
                WireError::Length {
                    kind: DATA,
                    length: MAX_DATA + 1,
                },
            ),
            (
                [DATA, 2, 0, 0, 0, 0, 0, 0, 0],
                WireError::Length {
                    kind: DATA,
                    length: 0,
                },
            ),
            (
                [CREDIT, 2, 0, 0, 0, 5, 0, 0, 0],
                WireError::Length {
                    kind: CREDIT,
                    length: 5,
                },
            ),
            (
                [CONTROL, 0, 0, 0, 0, 0, 0, 0, 255],
                WireError::Length {
                    kind: CONTROL,
                    length: 255 << 24,
                },
            ),
        ] {
            let mut decoder = Decoder::default();
            decoder.push(&header);
            assert_eq!(decoder.next(), Err(error));
        }
    }

    #[test]
    fn messages_carry_names_that_are_not_unicode() {
        use std::os::unix::ffi::OsStringExt;
        let message = ToInside::OutwardUp {
            command: 1,
            path: OsString::from_vec(vec![b'/', 0xff, b'x']),
        };
        let Frame::Control(json) = encode_message(&message).unwrap() else {
            panic!("not a control frame");
        };
        assert_eq!(decode_message::<ToInside>(&json).unwrap(), message);
        assert!(decode_message::<ToOutside>(&json).is_err());
    }
}
