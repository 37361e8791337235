//! The other end of the control socket: what `kleak-vmm ctl` uses, and the lab to reach the machine inside.

use super::command::Request;
use super::execute::Reply;
use super::socket::END_OF_REPLY;
use anyhow::{Context, ensure};
use serde_json::Value;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// A connection to a control socket, or to anything that speaks its protocol.
#[derive(Debug)]
pub struct Client<R, W> {
    input: BufReader<R>,
    output: W,
}

impl Client<UnixStream, UnixStream> {
    /// Connects to a socket.
    ///
    /// # Errors
    /// Nobody listens there, or no permission.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        Ok(Self::new(stream.try_clone()?, stream))
    }
}

impl<R: Read, W: Write> Client<R, W> {
    /// A client on two halves of a stream.
    pub fn new(input: R, output: W) -> Self {
        Self { input: BufReader::new(input), output }
    }

    /// Sends one command and waits for its reply.
    ///
    /// # Errors
    /// The connection ends or fails before the reply does.
    pub fn request(&mut self, line: &str) -> io::Result<Reply> {
        let line = line.replace('\n', " ");
        let request = Request::parse(&line);
        let sent = self.output.write_all(format!("{line}\n").as_bytes()).and_then(|()| self.output.flush());
        let body = if request.json { self.line() } else { self.text() };
        // Who refuses to listen says why before he hangs up.
        let body = body.map_err(|error| sent.err().unwrap_or(error))?;
        let failed = body.starts_with("error: ") || request.json && body.starts_with("{\"error\":");
        let quit = !failed && request.command == Ok(super::Command::Quit);
        Ok(Reply { body, failed, quit })
    }

    /// Sends one command and waits for its reply in JSON, which may be an `error`.
    ///
    /// # Errors
    /// As [`Client::request`]; or the reply is no JSON.
    pub fn json(&mut self, command: &str) -> anyhow::Result<Value> {
        let reply = self.request(&format!("json {command}"))?;
        ensure!(!reply.body.starts_with("error: "), "{}", reply.body.trim_end());
        serde_json::from_str(&reply.body).with_context(|| format!("The reply to {command} is no JSON"))
    }

    fn text(&mut self) -> io::Result<String> {
        let mut body = String::new();
        loop {
            let line = self.line()?;
            if line == END_OF_REPLY {
                return Ok(body);
            }
            body.push_str(&line);
        }
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = Vec::new();
        self.input.read_until(b'\n', &mut line)?;
        if !line.ends_with(b"\n") {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the virtual machine ended before its reply",
            ));
        }
        String::from_utf8(line).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "reply is not UTF-8"))
    }
}
