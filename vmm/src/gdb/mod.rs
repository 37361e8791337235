//! `run --gdb ADDR`: gdb's remote protocol, one debugger at a time. Each vCPU is a thread.
//!
//! What gdb reads is the kernel's own memory: traps of the tracer, and breakpoints, are not in it. While no debugger is
//! connected the machine runs as ever; one that vanishes leaves it running.

mod address;
mod breakpoints;
mod target;

pub use address::{Address, Client, Listener, SocketFile};

use crate::console::Commands;
use crate::machine::{Guest, Stop, TrapInstruction, Why};
use crate::tracer::breakpoint::Breakpoints;
use anyhow::{Context, Result};
use gdbstub::common::Signal;
use gdbstub::conn::ConnectionExt;
use gdbstub::stub::run_blocking::{BlockingEventLoop, Event, WaitForStopReasonError};
use gdbstub::stub::{DisconnectReason, GdbStub, MultiThreadStopReason};
use introspect::linux::Linux;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use target::Target;

/// How often a running machine's debugger is asked whether it wants something.
const POLL: Duration = Duration::from_millis(20);

/// What a debugger sees and may use.
pub struct Parts {
    /// The guest, which allows a debugger.
    pub guest: Arc<Guest>,
    /// Its kernel.
    pub linux: Arc<Linux>,
    /// The traps of the tracer, which gdb does not see.
    pub traps: Arc<Breakpoints>,
    /// What software breakpoints are made of.
    pub instruction: TrapInstruction,
    /// Whether debug registers work on this host.
    pub hardware: bool,
    /// Carries out `monitor COMMAND`.
    pub commands: Arc<dyn Commands>,
}

/// Serves debuggers, one after the other, on a thread of its own until the process ends.
///
/// # Errors
/// No thread to be had.
pub fn serve(parts: Parts, listener: Listener) -> Result<()> {
    let mut target = Target::new(parts);
    let serve = move || {
        loop {
            match listener.accept() {
                Ok(client) => target.serve(client),
                // Out of descriptors, most likely.
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
    };
    std::thread::Builder::new().name("gdb".into()).spawn(serve).context("Cannot serve debuggers")?;
    Ok(())
}

/// A debugger's bytes.
type Connection = Box<dyn ConnectionExt<Error = io::Error>>;

impl Target {
    /// One debugger from its coming to its going. The machine stops when it comes, as gdb expects.
    fn serve(&mut self, client: Client) {
        let connection: Connection = match client {
            Client::Tcp(stream) => Box::new(stream),
            Client::Unix(stream) => Box::new(stream),
        };
        if let Err(error) = self.parts.guest.debugger_stops() {
            eprintln!("kleak-vmm: warning: A debugger cannot stop the machine: {error:#}");
            return;
        }
        let ended = GdbStub::new(connection).run_blocking::<Loop>(self);
        self.leave();
        // One that goes away without a word has gone, too.
        if let Ok(DisconnectReason::Kill) = ended {
            self.parts.guest.stop();
        }
    }
}

/// Waits for what comes first: the machine, or a word of the debugger's.
enum Loop {}

impl BlockingEventLoop for Loop {
    type Target = Target;
    type Connection = Connection;
    type StopReason = MultiThreadStopReason<u64>;

    fn wait_for_stop_reason(
        target: &mut Target,
        connection: &mut Connection,
    ) -> Result<Event<Self::StopReason>, WaitForStopReasonError<anyhow::Error, io::Error>> {
        loop {
            if let Some(stop) = target.parts.guest.debugger_waits(POLL) {
                return Ok(Event::TargetStopped(target.reason(stop)));
            }
            let word = connection.peek().map_err(WaitForStopReasonError::Connection)?;
            if word.is_some() {
                let byte = connection.read().map_err(WaitForStopReasonError::Connection)?;
                return Ok(Event::IncomingData(byte));
            }
        }
    }

    fn on_interrupt(target: &mut Target) -> Result<Option<Self::StopReason>, anyhow::Error> {
        target.parts.guest.debugger_stops()?;
        let first = target::thread(0);
        Ok(Some(MultiThreadStopReason::SignalWithThread { tid: first, signal: Signal::SIGINT }))
    }
}

impl Target {
    /// A stop in gdb's words.
    fn reason(&self, stop: Stop) -> MultiThreadStopReason<u64> {
        match stop {
            Stop::Ended => MultiThreadStopReason::Exited(0),
            Stop::Cpu(cpu, Why::Breakpoint) => MultiThreadStopReason::SwBreak(target::thread(cpu)),
            Stop::Cpu(cpu, Why::Point(point)) => self.at_point(cpu, point),
            Stop::Cpu(cpu, Why::Step) => {
                MultiThreadStopReason::SignalWithThread { tid: target::thread(cpu), signal: Signal::SIGTRAP }
            }
        }
    }
}
