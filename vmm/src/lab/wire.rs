//! What travels between the host and the agent in the lab, over one serial port.
//!
//! A frame is a header of 12 bytes, all little endian, and a payload:
//!
//! | bytes | |
//! | --- | --- |
//! | 0..2 | [`MAGIC`] |
//! | 2 | kind |
//! | 3 | zero |
//! | 4..8 | stream, zero where the kind has none |
//! | 8..12 | length of the payload, at most [`MAX_PAYLOAD`] |
//!
//! The lab runs a guest that may be hostile, so neither side trusts lengths or kinds.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

/// Version of everything in this file; both sides are the same binary, unless someone mixes them.
pub const VERSION: u32 = 3;
/// Begins each frame.
pub const MAGIC: [u8; 2] = *b"kL";
/// Longest payload, bytes. A job with many arguments is the longest there is.
pub const MAX_PAYLOAD: usize = 1 << 20;
const HEADER: usize = 12;

/// A stream's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Stream(pub u32);

impl Stream {
    /// Standard input of the job, to the lab.
    pub const STDIN: Self = Self(0);
    /// Standard output, from the lab.
    pub const STDOUT: Self = Self(1);
    /// Standard error, from the lab.
    pub const STDERR: Self = Self(2);
    /// The first number of those the host gives to control connections.
    pub const FIRST_CONTROL: Self = Self(0x100);
    /// The first number of those the host gives to debuggers.
    pub const FIRST_DEBUGGER: Self = Self(0x2000_0000);
    /// The first number of those the lab gives to what the job saves.
    pub const FIRST_EXPORT: Self = Self(0x4000_0000);
    /// The first number of those the lab gives to files.
    pub const FIRST_FILE: Self = Self(0x8000_0000);
}

/// What the agent is to run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobSpec {
    /// Arguments, the program's name first; the program is this binary.
    pub argv: Vec<String>,
    /// Environment, all of it.
    pub env: Vec<(String, String)>,
    /// Working directory.
    pub cwd: String,
    /// Which of standard input, output and error are terminals.
    pub tty: [bool; 3],
    /// Files and folders whose changes go to the host, absolute.
    pub outputs: Vec<String>,
    /// The job's control socket, absolute.
    pub control: Option<String>,
}

/// A file that follows as a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileHead {
    /// Where it goes on the host, absolute; one of the job's outputs, or within one, or saved.
    pub path: String,
    /// It is the guest's memory, saved by a command: anywhere, but a core; the host says what became of it.
    pub saved: bool,
    /// Its size in bytes.
    pub size: u64,
}

/// A message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// From the lab, first: the agent is up and speaks this version.
    Hello(u32),
    /// From the host, once: what to run.
    Job(JobSpec),
    /// Bytes of a stream.
    Data(Stream, Vec<u8>),
    /// That many bytes of a stream, all zero, at most [`MAX_PAYLOAD`]: of memory most are.
    Zeros(Stream, u32),
    /// No more bytes will come.
    Close(Stream),
    /// The receiver of a stream has dealt with this many bytes.
    Credit(Stream, u32),
    /// From the host: someone connected to the control socket.
    Control(Stream),
    /// From the host: someone connected to debug the guest.
    Debugger(Stream),
    /// From the lab: a file follows.
    File(Stream, FileHead),
    /// From the host: a signal for the job.
    Signal(i32),
    /// From the host: the terminal's rows and columns.
    Resize(u16, u16),
    /// From the lab, last: how the job ended, an exit code or 128 + a signal.
    Exit(i32),
    /// From the lab: what went wrong with the agent itself.
    Trouble(String),
    /// From the lab, now and then: it has not hung.
    Alive,
    /// From the host: what became of a file that was saved; empty when it is in its place.
    Placed(Stream, String),
}

mod kind {
    pub const HELLO: u8 = 1;
    pub const JOB: u8 = 2;
    pub const DATA: u8 = 3;
    pub const CLOSE: u8 = 4;
    pub const CREDIT: u8 = 5;
    pub const CONTROL: u8 = 6;
    pub const FILE: u8 = 7;
    pub const SIGNAL: u8 = 8;
    pub const RESIZE: u8 = 9;
    pub const EXIT: u8 = 10;
    pub const TROUBLE: u8 = 11;
    pub const ALIVE: u8 = 12;
    pub const PLACED: u8 = 13;
    pub const ZEROS: u8 = 14;
    pub const DEBUGGER: u8 = 15;
}

fn invalid(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

impl Frame {
    /// Writes the frame in one call.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        out.write_all(&self.encode()?)?;
        out.flush()
    }

    fn encode(&self) -> io::Result<Vec<u8>> {
        let none = Stream(0);
        let json = |value: serde_json::Result<Vec<u8>>| value.map_err(io::Error::other);
        let (kind, stream, payload) = match self {
            Self::Hello(version) => (kind::HELLO, none, version.to_le_bytes().to_vec()),
            Self::Job(job) => (kind::JOB, none, json(serde_json::to_vec(job))?),
            Self::Data(stream, bytes) => (kind::DATA, *stream, bytes.clone()),
            Self::Zeros(stream, count) => (kind::ZEROS, *stream, count.to_le_bytes().to_vec()),
            Self::Close(stream) => (kind::CLOSE, *stream, Vec::new()),
            Self::Credit(stream, bytes) => (kind::CREDIT, *stream, bytes.to_le_bytes().to_vec()),
            Self::Control(stream) => (kind::CONTROL, *stream, Vec::new()),
            Self::Debugger(stream) => (kind::DEBUGGER, *stream, Vec::new()),
            Self::File(stream, head) => (kind::FILE, *stream, json(serde_json::to_vec(head))?),
            Self::Signal(number) => (kind::SIGNAL, none, number.to_le_bytes().to_vec()),
            Self::Resize(rows, columns) => {
                (kind::RESIZE, none, [rows.to_le_bytes(), columns.to_le_bytes()].concat())
            }
            Self::Exit(code) => (kind::EXIT, none, code.to_le_bytes().to_vec()),
            Self::Trouble(text) => (kind::TROUBLE, none, text.clone().into_bytes()),
            Self::Alive => (kind::ALIVE, none, Vec::new()),
            Self::Placed(stream, text) => (kind::PLACED, *stream, text.clone().into_bytes()),
        };
        if payload.len() > MAX_PAYLOAD {
            return Err(invalid(format!("a message of {} bytes is too long for the lab", payload.len())));
        }
        let mut bytes = Vec::with_capacity(HEADER + payload.len());
        bytes.extend(MAGIC);
        bytes.extend([kind, 0]);
        bytes.extend(stream.0.to_le_bytes());
        bytes.extend((payload.len() as u32).to_le_bytes());
        bytes.extend(payload);
        Ok(bytes)
    }

    /// Reads the next frame; `None` where the other side has ended between two frames.
    ///
    /// Errors of kind `InvalidData` on anything that is no frame, `UnexpectedEof` on half of one.
    pub fn read(input: &mut impl Read) -> io::Result<Option<Self>> {
        let mut header = [0; HEADER];
        let first = loop {
            match input.read(&mut header) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other?,
            }
        };
        if first == 0 {
            return Ok(None);
        }
        input.read_exact(&mut header[first..])?;
        if header[..2] != MAGIC || header[3] != 0 {
            return Err(invalid("bytes on the line that are no message of the lab"));
        }
        let word =
            |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let (kind, stream, length) = (header[2], Stream(word(4)), word(8) as usize);
        if length > MAX_PAYLOAD {
            return Err(invalid(format!("a message of {length} bytes from the lab")));
        }
        let mut payload = vec![0; length];
        input.read_exact(&mut payload)?;
        Self::decode(kind, stream, payload).map(Some)
    }

    fn decode(kind: u8, stream: Stream, payload: Vec<u8>) -> io::Result<Self> {
        fn number<const N: usize>(payload: &[u8]) -> io::Result<[u8; N]> {
            payload.try_into().map_err(|_| invalid(format!("{} bytes where {N} belong", payload.len())))
        }
        let json = |error: serde_json::Error| invalid(error.to_string());
        Ok(match kind {
            kind::HELLO => Self::Hello(u32::from_le_bytes(number(&payload)?)),
            kind::JOB => Self::Job(serde_json::from_slice(&payload).map_err(json)?),
            kind::DATA => Self::Data(stream, payload),
            kind::ZEROS => match u32::from_le_bytes(number(&payload)?) {
                count if count as usize <= MAX_PAYLOAD => Self::Zeros(stream, count),
                count => return Err(invalid(format!("{count} bytes in one message from the lab"))),
            },
            kind::CLOSE => Self::Close(stream),
            kind::CREDIT => Self::Credit(stream, u32::from_le_bytes(number(&payload)?)),
            kind::CONTROL => Self::Control(stream),
            kind::DEBUGGER => Self::Debugger(stream),
            kind::FILE => Self::File(stream, serde_json::from_slice(&payload).map_err(json)?),
            kind::SIGNAL => Self::Signal(i32::from_le_bytes(number(&payload)?)),
            kind::RESIZE => {
                let [a, b, c, d] = number(&payload)?;
                Self::Resize(u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]))
            }
            kind::EXIT => Self::Exit(i32::from_le_bytes(number(&payload)?)),
            kind::TROUBLE => Self::Trouble(String::from_utf8_lossy(&payload).into_owned()),
            kind::ALIVE => Self::Alive,
            kind::PLACED => Self::Placed(stream, String::from_utf8_lossy(&payload).into_owned()),
            other => return Err(invalid(format!("a message of unknown kind {other}"))),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frames() -> impl Strategy<Value = Frame> {
        let stream = any::<u32>().prop_map(Stream);
        let text = "[ -~é]{0,20}";
        let job =
            (proptest::collection::vec(text, 0..4), text, any::<[bool; 3]>(), proptest::option::of(text));
        let job = job.prop_map(|(argv, cwd, tty, control)| JobSpec {
            env: argv.iter().map(|value| ("KEY".to_owned(), value.clone())).collect(),
            outputs: argv.clone(),
            argv,
            cwd,
            tty,
            control,
        });
        prop_oneof![
            any::<u32>().prop_map(Frame::Hello),
            job.prop_map(Frame::Job),
            (stream.clone(), proptest::collection::vec(any::<u8>(), 0..300))
                .prop_map(|(s, b)| Frame::Data(s, b)),
            (stream.clone(), 0..=MAX_PAYLOAD as u32).prop_map(|(s, n)| Frame::Zeros(s, n)),
            stream.clone().prop_map(Frame::Close),
            (stream.clone(), any::<u32>()).prop_map(|(s, n)| Frame::Credit(s, n)),
            stream.clone().prop_map(Frame::Control),
            stream.clone().prop_map(Frame::Debugger),
            (stream.clone(), text, any::<bool>(), any::<u64>())
                .prop_map(|(s, path, saved, size)| Frame::File(s, FileHead { path, saved, size })),
            (stream, text).prop_map(|(s, t)| Frame::Placed(s, t)),
            any::<i32>().prop_map(Frame::Signal),
            any::<(u16, u16)>().prop_map(|(r, c)| Frame::Resize(r, c)),
            any::<i32>().prop_map(Frame::Exit),
            text.prop_map(Frame::Trouble),
            Just(Frame::Alive),
        ]
    }

    /// All frames of `bytes`, and the error that ended them.
    fn read_all(mut bytes: &[u8]) -> (Vec<Frame>, Option<io::ErrorKind>) {
        let mut frames = Vec::new();
        loop {
            match Frame::read(&mut bytes) {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => return (frames, None),
                Err(error) => return (frames, Some(error.kind())),
            }
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(sent in proptest::collection::vec(frames(), 0..6)) {
            let mut bytes = Vec::new();
            for frame in &sent {
                frame.write(&mut bytes).unwrap();
            }
            prop_assert_eq!(read_all(&bytes), (sent, None));
        }

        #[test]
        fn truncated_streams_end_in_an_error(frame in frames(), cut in any::<proptest::sample::Index>()) {
            let bytes = frame.encode().unwrap();
            let cut = cut.index(bytes.len());
            let (frames, error) = read_all(&bytes[..cut]);
            prop_assert!(frames.is_empty());
            prop_assert_eq!(error, (cut > 0).then_some(io::ErrorKind::UnexpectedEof));
        }

        #[test]
        fn mutated_streams_never_panic(
            sent in proptest::collection::vec(frames(), 1..4),
            changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..6),
        ) {
            let mut bytes: Vec<u8> = sent.iter().flat_map(|frame| frame.encode().unwrap()).collect();
            for (place, value) in changes {
                let place = place.index(bytes.len());
                bytes[place] = value;
            }
            let (frames, _) = read_all(&bytes);
            prop_assert!(frames.len() <= bytes.len() / HEADER);
        }

        #[test]
        fn noise_is_no_frame(bytes in proptest::collection::vec(any::<u8>(), 12..200)) {
            prop_assume!(bytes[..2] != MAGIC);
            prop_assert_eq!(read_all(&bytes), (vec![], Some(io::ErrorKind::InvalidData)));
        }
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_before_memory_is_taken() {
        let mut bytes = Frame::Data(Stream(1), vec![]).encode().unwrap();
        bytes[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(read_all(&bytes).1, Some(io::ErrorKind::InvalidData));
        assert!(Frame::Data(Stream(1), vec![0; MAX_PAYLOAD + 1]).encode().is_err());
    }
}
