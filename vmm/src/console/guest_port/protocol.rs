//! What is said on the port, without threads and clocks: bytes, openings and times in, actions out.
//!
//! The host sees the driver open and close the port, not who does it or why, so a protocol of times tells writers
//! from readers:
//!
//! | seen | taken for | done |
//! | --- | --- | --- |
//! | a line | a command | carried out; its reply waits until the port has stayed open for `settle` |
//! | closed before that | `echo scan > /dev/ttyS1` | the reply waits for the next opener |
//! | opened, silent for `settle` | `cat /dev/ttyS1` | gets the waiting reply, or the report |
//! | a line behind a reply sent | a program that keeps the port open | gets its reply at once |
//!
//! A tty loses unread input when its last user closes it (`tty_port_close_start` flushes the line discipline), hence
//! the waiting. Replies not fetched are dropped when a later opener writes a command of its own.

use super::super::command::{Command, Request};
use super::super::execute::Reply;
use super::echo::Echo;
use std::mem;
use std::time::Duration;

/// Ends a reply: canonical mode's end of file, so that `cat` ends too.
pub const EOT: u8 = 4;
/// A canonical-mode tty holds lines of up to 4095 bytes (N_TTY_BUF_SIZE - 1); longer ones lose their end.
pub const MAX_REPLY_LINE: usize = 4000;
/// Longest command.
const MAX_LINE: usize = 1024;
/// Replies that are not read: beyond so many bytes, or so many of them, commands are not carried out.
const MAX_UNREAD: usize = 4 << 20;
const MAX_UNREAD_REPLIES: usize = 256;
/// Lines in a row that are no command, after which the port is taken for something else (a login prompt, the
/// kernel's messages) and errors are no longer answered.
const MAX_ERRORS: u32 = 16;

/// Time since the machine started.
pub type Time = Duration;

/// What the port wants done, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Carry out a command and hand its reply to [`Protocol::on_reply`].
    Run(String),
    /// Get the report and hand it to [`Protocol::on_report`].
    Report,
    /// Send bytes to the guest.
    Send(Vec<u8>),
}

/// A reply not sent yet.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Pending {
    text: String,
    /// It is that of `scan`: a reader gets the report too.
    scan: bool,
}

/// From opening to closing.
#[derive(Debug, Clone, Copy)]
struct Session {
    since: Time,
    /// Something was written, so this is no silent reader.
    wrote: bool,
    /// A command was answered while its writer was there: the program keeps the port open, and further replies need
    /// not wait. Merely being open for long says less: a shell may be slow to write.
    steady: bool,
    /// It was served as a reader already.
    served: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Protocol {
    settle: Duration,
    session: Option<Session>,
    /// The line being received; None while the rest of an overlong one is skipped.
    line: Option<Vec<u8>>,
    echo: Echo,
    errors: u32,
    /// Replies waiting, all of one session.
    pending: Vec<Pending>,
    /// They are those of a session that ended.
    left_over: bool,
    /// A command was refused because of them, and that was said.
    refused: bool,
    /// No reply before this.
    ready_at: Time,
    /// The last sends of this session: what the driver has not taken of them when it closes waits again.
    sent: Vec<(Vec<Pending>, usize)>,
    actions: Vec<Action>,
}

impl Protocol {
    /// A closed port.
    pub fn new(settle: Duration) -> Self {
        Self {
            settle,
            session: None,
            line: Some(Vec::new()),
            echo: Echo::default(),
            errors: 0,
            pending: Vec::new(),
            left_over: false,
            refused: false,
            ready_at: Time::ZERO,
            sent: Vec::new(),
            actions: Vec::new(),
        }
    }

    /// What is to be done now.
    pub fn take_actions(&mut self) -> Vec<Action> {
        mem::take(&mut self.actions)
    }

    /// The driver opened the port.
    pub fn on_open(&mut self, now: Time) {
        self.line = Some(Vec::new());
        self.echo.reset();
        self.left_over = true;
        self.sent.clear();
        self.session = Some(Session { since: now, wrote: false, steady: false, served: false });
    }

    /// The driver closed the port without having taken the last `unread` bytes sent.
    pub fn on_close(&mut self, unread: usize) {
        if self.session.take().is_none() {
            return;
        }
        self.wait_again(unread);
        // `printf scan > /dev/ttyS1` has no newline.
        if let Some(line) = self.line.replace(Vec::new()) {
            let text = String::from_utf8_lossy(&line).trim().to_owned();
            if Request::parse(&text).command.is_ok() {
                self.forget_left_overs();
                self.actions.push(Action::Run(text));
            }
        }
    }

    /// The replies that hold the last `unread` bytes sent wait for the next opener.
    fn wait_again(&mut self, unread: usize) {
        let mut left = unread;
        while left > 0
            && let Some((replies, len)) = self.sent.pop()
        {
            self.pending.splice(0..0, replies);
            left = left.saturating_sub(len);
        }
        self.sent.clear();
    }

    /// Output was lost: the line it was part of is no command.
    pub fn on_lost_output(&mut self) {
        self.line = None;
    }

    /// The guest sent bytes.
    pub fn on_output(&mut self, now: Time, bytes: &[u8]) {
        // The kernel's own messages (console=ttyS1) come without an opener.
        let Some(session) = &mut self.session else { return };
        session.wrote |= !session.served;
        for &byte in bytes {
            match (byte, &mut self.line) {
                (b'\n' | b'\r', line) => {
                    if let Some(line) = line.replace(Vec::new()) {
                        self.on_line(now, &line);
                    }
                }
                (_, Some(line)) if line.len() < MAX_LINE => line.push(byte),
                (_, line) => *line = None,
            }
        }
    }

    fn on_line(&mut self, now: Time, line: &[u8]) {
        let Some(line) = command_text(line) else { return };
        if self.echo.swallow(now, line.as_bytes()) {
            return;
        }
        let request = Request::parse(line);
        if request.command.is_ok() {
            self.errors = 0;
        } else {
            // An error that was echoed must not be answered with another one.
            let ours = line.starts_with("error: ") || line.starts_with("{\"error\":");
            self.errors += 1;
            if ours || self.errors > MAX_ERRORS || self.echo.is_under_way(now) {
                return;
            }
        }
        self.forget_left_overs();
        self.actions.push(Action::Run(line.to_owned()));
    }

    /// A new command: replies that an earlier opener did not fetch are not wanted any more.
    fn forget_left_overs(&mut self) {
        if mem::take(&mut self.left_over) {
            self.pending.clear();
        }
    }

    /// The command was carried out; the guest ran on only from `now`, so it is now that its silence begins to count.
    pub fn on_reply(&mut self, now: Time, command: &str, text: String) {
        let scan = Request::parse(command) == Request { command: Ok(Command::Scan), json: false };
        self.pending.push(Pending { text, scan });
        self.refused = false;
        self.ready_at = now;
    }

    /// True when so much waits to be read, `outgoing` bytes of it on their way, that a command is to be refused: the guest
    /// may ask for ever and read nothing.
    pub fn is_full(&self, outgoing: usize) -> bool {
        let waiting: usize = self.pending.iter().map(|reply| reply.text.len()).sum();
        self.pending.len() >= MAX_UNREAD_REPLIES || waiting + outgoing >= MAX_UNREAD
    }

    /// The command was not carried out; the first of several is told.
    pub fn on_refused(&mut self, now: Time, command: &str) {
        if !self.refused {
            let why = "too many replies wait to be read: read them first";
            self.on_reply(now, command, Reply::error(why, Request::parse(command).json).body);
            self.refused = true;
        }
    }

    /// When [`Protocol::on_time`] has something to do; None: not before the next event.
    pub fn deadline(&self) -> Option<Time> {
        let session = self.session.as_ref()?;
        let reader = session.since + self.settle;
        match (self.pending.is_empty(), self.left_over) {
            (false, false) if session.steady => Some(self.ready_at),
            (false, false) => Some(self.ready_at.max(session.since) + self.settle),
            _ if session.wrote || session.served => None,
            _ => Some(reader.max(self.ready_at)),
        }
    }

    /// Does what is due.
    pub fn on_time(&mut self, now: Time) {
        if self.deadline().is_none_or(|deadline| now < deadline) {
            return;
        }
        let to_writer = !self.pending.is_empty() && !self.left_over;
        if to_writer {
            // The writer of the commands is still there: each reply gets an end of its own.
            for reply in mem::take(&mut self.pending) {
                let text = reply.text.clone();
                self.send(now, &text, vec![reply]);
            }
        } else if self.pending.is_empty() || self.pending.iter().any(|reply| reply.scan) {
            self.actions.push(Action::Report);
        } else {
            self.on_report(now, "");
        }
        if let Some(session) = &mut self.session {
            session.served = true;
            session.steady |= to_writer;
        }
    }

    /// Serves a reader: what was left over for it, and `report`, all with one end.
    pub fn on_report(&mut self, now: Time, report: &str) {
        let replies = mem::take(&mut self.pending);
        let text: String = replies.iter().map(|reply| reply.text.as_str()).chain([report]).collect();
        // A report that was not read is fetched anew; only replies wait.
        self.send(now, &text, replies);
        self.left_over = false;
    }

    /// Sends a text, and remembers which replies are in it.
    fn send(&mut self, now: Time, text: &str, replies: Vec<Pending>) {
        const REMEMBERED: usize = 8;
        let text = fold_lines(text);
        self.echo.sent(now, &text);
        let mut bytes = text.into_bytes();
        bytes.push(EOT);
        if self.sent.len() == REMEMBERED {
            self.sent.remove(0);
        }
        self.sent.push((replies, bytes.len()));
        self.actions.push(Action::Send(bytes));
    }
}

/// A received line without surrounding white space and the echo of EOT (a terminal in raw mode with echo shows it
/// as `^D`). None for an empty line and for line noise: what a driver's probing leaves is no text.
fn command_text(line: &[u8]) -> Option<&str> {
    let mut text =
        std::str::from_utf8(line).ok()?.trim_matches(|c: char| c.is_whitespace() || c == char::from(EOT));
    while let Some(rest) = text.strip_prefix("^D") {
        text = rest.trim_start();
    }
    let is_text = !text.is_empty() && text.bytes().all(|byte| byte == b'\t' || (b' '..=b'~').contains(&byte));
    is_text.then_some(text)
}

/// Breaks lines that a canonical-mode terminal cannot hold; JSON is spread over lines where white space may stand.
fn fold_lines(text: &str) -> String {
    let mut folded = String::with_capacity(text.len());
    for line in text.lines() {
        if line.len() <= MAX_REPLY_LINE {
            push_line(&mut folded, line);
            continue;
        }
        let spread = serde_json::from_str::<serde_json::Value>(line).ok().map(|value| format!("{value:#}"));
        for line in spread.as_deref().unwrap_or(line).lines() {
            let mut rest = line;
            while rest.len() > MAX_REPLY_LINE {
                let at =
                    (0..=MAX_REPLY_LINE).rev().find(|&at| rest.is_char_boundary(at)).unwrap_or(rest.len());
                push_line(&mut folded, &rest[..at]);
                rest = &rest[at..];
            }
            push_line(&mut folded, rest);
        }
    }
    folded
}

fn push_line(text: &mut String, line: &str) {
    text.push_str(line);
    text.push('\n');
}
