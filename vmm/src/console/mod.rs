//! Console commands: one parser, one executor, four surfaces (monitor, control socket, `ctl`,
//! the guest's second serial port).
//!
//! ```text
//! line -> Request::parse -> execute(&dyn Target) -> Reply
//!   monitor: mux + editor        control socket: socket + client (ctl)        guest: guest_port
//! ```
//!
//! Replies are the same on every surface; what ends them differs (see the surface's module).

mod account;
pub mod client;
pub mod command;
mod editor;
pub mod execute;
pub mod guest_port;
pub mod mux;
mod parse;
pub mod signals;
pub mod socket;
pub mod terminal;

#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod socket_tests;
#[cfg(test)]
mod surfaces_tests;
#[cfg(test)]
mod tests;

pub use account::{Account, When};
pub use command::{Annotation, Command, Request, SaveAs, TopBy};
pub use execute::{Commands, Executor, Reply, execute};
pub use guest_port::GuestPort;
pub use mux::ConsoleMux;
pub use socket::ControlServer;

use introspect::memory::Va;
use std::path::Path;

/// What the commands act on; the detector is it. Implementations serialise commands themselves: any surface may
/// call at any time, never on a vCPU thread.
pub trait Target: Send + Sync {
    /// Runs a scan; number of new suspected leaks.
    fn scan(&self) -> anyhow::Result<usize>;
    /// All unreferenced objects, kmemleak's text.
    fn report_text(&self) -> anyhow::Result<String>;
    /// The `kleak-report/1` document.
    fn report_json(&self) -> anyhow::Result<serde_json::Value>;
    /// Paints all currently reported objects gray; how many.
    fn clear(&self) -> anyhow::Result<usize>;
    /// Stops tracking.
    fn off(&self) -> anyhow::Result<()>;
    /// Resumes tracking, re-seeding the registry from the guest's own metadata; objects seeded.
    fn on(&self) -> anyhow::Result<usize>;
    /// Task stack scanning.
    fn set_stack(&self, on: bool) -> anyhow::Result<()>;
    /// Whether types of objects count.
    fn set_typed(&self, on: bool) -> anyhow::Result<()>;
    /// Period of automatic scans in seconds, 0 for none.
    fn set_scan_period(&self, seconds: u64) -> anyhow::Result<()>;
    /// Stops the automatic scans, or resumes them at the last period that was not 0 (600 s if there was none);
    /// the period now in force in seconds, 0 for none.
    fn set_periodic_scan(&self, on: bool) -> anyhow::Result<u64>;
    /// Everything known of the object at or around `address`.
    fn dump(&self, address: Va) -> anyhow::Result<Answer>;
    /// A shortest chain of references to the object at or around `address`.
    fn path(&self, address: Va) -> anyhow::Result<Answer>;
    /// What each part of the roots contributes, and what is not read.
    fn roots(&self) -> anyhow::Result<Answer>;
    /// Objects that are in use only by a pointer into their middle.
    fn possible(&self) -> anyhow::Result<Answer>;
    /// Hides what refers to the canary, scans, and puts it back; an error if it was not found.
    fn canary(&self) -> anyhow::Result<Answer>;
    /// Tracer, hooks, objects, bytes, events, last scan, dropped events, as key and value in print order.
    fn status(&self) -> anyhow::Result<Vec<(String, serde_json::Value)>>;
    /// Registry against the guest's slab and per-CPU metadata.
    fn audit(&self) -> anyhow::Result<Audit>;
    /// Live memory by allocation site or cache.
    fn top(&self, by: TopBy) -> anyhow::Result<Answer>;
    /// Live objects of the slab cache of this name, by backtrace.
    fn alloc_calls(&self, cache: &str) -> anyhow::Result<Answer>;
    /// What keeps growing from scan to scan.
    fn growth(&self) -> anyhow::Result<Answer>;
    /// Treats the object at or around `address` otherwise.
    fn annotate(&self, how: Annotation, address: Va) -> anyhow::Result<Answer>;
    /// The guest's accounting.
    fn accounting(&self, account: Account, when: When) -> anyhow::Result<Answer>;
    /// `kmem -s` of the caches of this name.
    fn kmem_cache(&self, name: &str, when: When) -> anyhow::Result<Answer>;
    /// The reference count of the object at or around `address`, and who refers to it.
    fn refs(&self, address: Va) -> anyhow::Result<Answer>;
    /// Objects of the slab cache of this name whose reference count is higher than the references found.
    fn refs_of(&self, cache: &str) -> anyhow::Result<Answer>;
    /// Remembers the accounting of now.
    fn mark(&self) -> anyhow::Result<()>;
    /// Tasks.
    fn ps(&self) -> anyhow::Result<Answer>;
    /// Processes by the memory they map.
    fn procrank(&self) -> anyhow::Result<Answer>;
    /// Backtrace of the tasks with this pid, or of those that run.
    fn backtrace(&self, pid: Option<i32>) -> anyhow::Result<Answer>;
    /// Registers of every vCPU.
    fn regs(&self) -> anyhow::Result<Answer>;
    /// Writes the machine to a file.
    fn save(&self, how: SaveAs, path: &Path) -> anyhow::Result<Answer>;
    /// Stops the machine until it is resumed; false when it was stopped so already.
    fn pause(&self) -> anyhow::Result<bool>;
    /// Lets it go on; false when it was not stopped.
    fn resume(&self) -> anyhow::Result<bool>;
    /// Has the machine powered off (`quit`); returns at once.
    fn quit(&self);
}

/// A reply in both its forms.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// Lines for people.
    pub text: String,
    /// The same for programs.
    pub json: serde_json::Value,
}

/// Result of `audit`.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Audit {
    /// Slab objects the guest says are allocated and the registry has.
    pub tracked: usize,
    /// Allocated in the guest, unknown to the registry.
    pub missing: usize,
    /// In the registry, free in the guest.
    pub stale: usize,
    /// The first few of the last two, for the reader.
    pub examples: Vec<String>,
}
