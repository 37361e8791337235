//! The guest's second serial port, on which a test script inside the guest drives the detector as it would drive
//! kmemleak:
//!
//! ```text
//! echo clear > /dev/ttyS1; run-my-test; echo scan > /dev/ttyS1; cat /dev/ttyS1
//! ```
//!
//! Lines are commands, replies end with EOT (0x04), which ends `cat`; reading without a command before gives the
//! report. [`protocol`] has the rules, [`echo`] keeps the guest's echo apart from commands. A program that keeps the
//! port open should write its first command right after opening it, or it is taken for a reader.
//!
//! Commands run on a thread of the port's own, never on a vCPU's.

mod echo;
mod protocol;
#[cfg(test)]
pub(super) mod tests;

use super::execute::Commands;
use crate::devices::{SerialInput, SerialSink, Unread};
use anyhow::Context;
use protocol::{Action, Protocol, Time};
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a port must be open and silent to be a reader's. A shell needs a few milliseconds between its `open`
/// and its `write`; a guest whose every allocation is traced needs more.
pub const SETTLE: Duration = Duration::from_millis(200);
/// Output of the guest that waits to be looked at; a flood beyond it is dropped.
const MAX_WAITING: usize = 64 << 10;
/// Openings and closings that wait; only a guest that plays with the port makes so many.
const MAX_EVENTS: usize = 1024;

/// Input the port holds for the guest at most.
const MAX_PUSHED: usize = 64 << 10;
/// How often a port that is full is looked at again.
const REFILL: Duration = Duration::from_millis(5);

/// What the vCPU threads saw on the port.
#[derive(Debug, PartialEq, Eq)]
enum Event {
    Output(Vec<u8>),
    LostOutput,
    Open,
    Close { unread: usize },
}

/// Events on their way to the port's thread.
#[derive(Debug, Default)]
struct Inbox {
    events: VecDeque<(Time, Event)>,
    /// Bytes in the `Output`s.
    bytes: usize,
    closed: bool,
}

impl Inbox {
    fn output(&mut self, now: Time, bytes: &[u8]) {
        if self.bytes + bytes.len() > MAX_WAITING {
            if !matches!(self.events.back(), Some((_, Event::LostOutput))) {
                self.events.push_back((now, Event::LostOutput));
            }
            return;
        }
        self.bytes += bytes.len();
        match self.events.back_mut() {
            Some((_, Event::Output(waiting))) => waiting.extend_from_slice(bytes),
            _ => self.events.push_back((now, Event::Output(bytes.to_vec()))),
        }
    }

    fn event(&mut self, now: Time, event: Event) {
        if self.events.len() >= MAX_EVENTS {
            *self = Self { closed: self.closed, ..Self::default() };
            self.events.push_back((now, Event::Close { unread: 0 }));
        }
        self.events.push_back((now, event));
    }

    fn pop(&mut self) -> Option<(Time, Event)> {
        let next = self.events.pop_front();
        if let Some((_, Event::Output(bytes))) = &next {
            self.bytes -= bytes.len();
        }
        next
    }
}

#[derive(Debug)]
struct Shared {
    start: Instant,
    inbox: Mutex<Inbox>,
    changed: Condvar,
}

impl Shared {
    /// Nothing under this lock can panic halfway, so a poisoned one is as good as new.
    fn lock(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Time {
        self.start.elapsed()
    }
}

/// What happened first.
enum Next {
    Event(Time, Event),
    Deadline,
    Closed,
}

impl Shared {
    /// Waits for an event or the deadline. Events that happened come first, however late it is.
    fn next(&self, deadline: Option<Time>) -> Next {
        let mut inbox = self.lock();
        loop {
            if inbox.closed {
                return Next::Closed;
            }
            if let Some((time, event)) = inbox.pop() {
                return Next::Event(time, event);
            }
            inbox = match deadline.map(|deadline| deadline.checked_sub(self.now())) {
                None => self.changed.wait(inbox).unwrap_or_else(PoisonError::into_inner),
                Some(None | Some(Duration::ZERO)) => return Next::Deadline,
                Some(Some(left)) => {
                    self.changed.wait_timeout(inbox, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}

/// See the module. Dropping it ends the service.
#[derive(Debug)]
pub struct GuestPort {
    shared: Arc<Shared>,
}

impl GuestPort {
    /// A port that nobody serves yet; what the guest sends waits.
    pub fn new() -> Self {
        Self {
            shared: Arc::new(Shared {
                start: Instant::now(),
                inbox: Mutex::default(),
                changed: Condvar::new(),
            }),
        }
    }

    /// What stands behind the guest's second serial port.
    pub fn sink(&self) -> Box<dyn SerialSink> {
        Box::new(Sink(Arc::clone(&self.shared)))
    }

    /// Carries out commands from now on. `settle` is [`SETTLE`], or more for a guest that is slow.
    ///
    /// # Errors
    /// No thread to be had.
    pub fn serve(
        &self,
        input: Arc<dyn SerialInput>,
        commands: Arc<dyn Commands>,
        settle: Duration,
    ) -> anyhow::Result<()> {
        let shared = Arc::clone(&self.shared);
        let run = move || serve(&shared, input.as_ref(), commands.as_ref(), Protocol::new(settle));
        let thread = std::thread::Builder::new().name("guest port".into()).spawn(run);
        thread.map(drop).context("Cannot serve the guest's second serial port")
    }
}

impl Default for GuestPort {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for GuestPort {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
    }
}

struct Sink(Arc<Shared>);

impl SerialSink for Sink {
    fn output(&mut self, bytes: &[u8]) {
        let now = self.0.now();
        self.0.lock().output(now, bytes);
        self.0.changed.notify_all();
    }

    fn open_changed(&mut self, open: bool, unread: usize) -> Unread {
        let now = self.0.now();
        self.0.lock().event(now, if open { Event::Open } else { Event::Close { unread } });
        self.0.changed.notify_all();
        // Replies that were not read are kept by the protocol, whole.
        Unread::Drop
    }
}

fn serve(shared: &Shared, input: &dyn SerialInput, commands: &dyn Commands, mut protocol: Protocol) {
    let mut outgoing = Outgoing { bytes: VecDeque::new(), input };
    loop {
        let refill = outgoing.refill().then(|| shared.now() + REFILL);
        let deadline = [protocol.deadline(), refill].into_iter().flatten().min();
        match shared.next(deadline) {
            Next::Closed => return,
            Next::Deadline => protocol.on_time(shared.now()),
            Next::Event(time, Event::Output(bytes)) => protocol.on_output(time, &bytes),
            Next::Event(_, Event::LostOutput) => protocol.on_lost_output(),
            Next::Event(time, Event::Open) => protocol.on_open(time),
            Next::Event(_, Event::Close { unread }) => protocol.on_close(unread + outgoing.clear()),
        }
        let unread = outgoing.bytes.len();
        carry_out(&mut protocol, commands, unread, || shared.now(), |bytes| outgoing.bytes.extend(bytes));
    }
}

/// A reply on its way. The port gets it in pieces as the guest drains it, so that a long report does not pile up
/// there.
struct Outgoing<'a> {
    bytes: VecDeque<u8>,
    input: &'a dyn SerialInput,
}

impl Outgoing<'_> {
    /// Gives the port what it has room for; whether more is left.
    fn refill(&mut self) -> bool {
        if !self.bytes.is_empty() {
            let room = MAX_PUSHED.saturating_sub(self.input.pending()).min(self.bytes.len());
            let piece: Vec<u8> = self.bytes.drain(..room).collect();
            self.input.push(&piece);
        }
        !self.bytes.is_empty()
    }

    /// Drops what the port did not get; how much that was.
    fn clear(&mut self) -> usize {
        let left = self.bytes.len();
        self.bytes.clear();
        left
    }
}

/// Does what the protocol wants, and what follows from that. The guest has not taken `unread` bytes yet.
fn carry_out(
    protocol: &mut Protocol,
    commands: &dyn Commands,
    unread: usize,
    now: impl Fn() -> Time,
    mut send: impl FnMut(&[u8]),
) {
    loop {
        let actions = protocol.take_actions();
        if actions.is_empty() {
            return;
        }
        for action in actions {
            match action {
                Action::Run(line) if protocol.is_full(unread) => protocol.on_refused(now(), &line),
                Action::Run(line) => {
                    let reply = commands.answer(&line);
                    protocol.on_reply(now(), &line, reply.body);
                    if reply.quit {
                        commands.quit();
                    }
                }
                Action::Report => protocol.on_report(now(), &commands.answer("report").body),
                Action::Send(bytes) => send(&bytes),
            }
        }
    }
}
