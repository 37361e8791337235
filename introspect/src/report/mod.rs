//! Reports: kmemleak's text and JSON (`kleak-report/1`), from one model.
//!
//! [`Report::new`] joins what a scan found with names; [`Report::text`] and [`Report::json`] print it.

mod build;
mod group;
#[cfg(test)]
mod tests;
mod text;

pub use build::{ReportInput, comm_text};
pub use text::{TextStyle, plural};

use crate::memory::Va;
use crate::registry::{Audit, Kind};
use serde::{Serialize, Serializer};

/// Name and version of the JSON form.
pub const SCHEMA: &str = "kleak-report/1";

/// Everything one scan has to tell. Field names are those of the JSON form; sizes are bytes, times milliseconds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: &'static str,
    /// What was scanned.
    pub guest: GuestInfo,
    /// What it ran on.
    pub host: HostInfo,
    /// How the scan went.
    pub scan: ScanInfo,
    /// The registry compared with the guest's metadata at the same pause, where that was asked for.
    pub audit: Option<Audit>,
    /// Unreachable objects in allocation order, without the suppressed ones.
    pub leaks: Vec<Leak>,
    /// The same by where they came from, in the order asked for.
    pub groups: Vec<Group>,
    /// Suppressions that covered a leak.
    pub suppressed: Vec<SuppressionUse>,
    /// How the guest's own kmemleak would print.
    #[serde(skip)]
    pub style: TextStyle,
}

/// The guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct GuestInfo {
    /// `uname -r`.
    pub release: String,
    /// The kernel's banner.
    pub version: String,
    /// Architecture as Linux names it (`x86_64`).
    pub arch: String,
    /// vCPUs.
    pub cpus: u32,
    /// RAM, bytes.
    pub mem_bytes: u64,
    /// Where KASLR moved the kernel, relative to its link address.
    #[serde(serialize_with = "hex")]
    pub kaslr_offset: u64,
}

/// The host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct HostInfo {
    /// Which KVM.
    pub kvm: String,
    /// Tracer in use.
    pub tracer: String,
    /// Trap instruction in use.
    pub trap: String,
    /// The lab it ran in, if any.
    pub lab: Option<String>,
}

/// How groups are ordered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Order {
    /// The one that keeps most memory first.
    #[default]
    Retained,
    /// The one of which an object was allocated first is the first.
    Allocation,
}

/// The scan.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ScanInfo {
    /// Counts scans from 1.
    pub number: u64,
    /// `jiffies` when the machine was paused.
    pub jiffies: u64,
    /// How long the machine was paused.
    pub pause_ms: u64,
    /// How long the scan itself took.
    pub scan_ms: u64,
    /// Bytes of guest memory read.
    pub bytes_scanned: u64,
    /// Live objects.
    pub objects: u64,
    /// Their sizes added up.
    pub object_bytes: u64,
    /// Unreachable objects, suppressed ones included.
    pub white: u64,
    /// All others.
    pub gray: u64,
    /// Allocations seen since boot.
    pub events_alloc: u64,
    /// Frees seen since boot.
    pub events_free: u64,
    /// Events lost: the report is incomplete unless this is 0.
    pub events_dropped: u64,
}

/// An unreachable object.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Leak {
    /// Start; the cookie of a per-CPU object.
    #[serde(serialize_with = "hex_va")]
    pub address: Va,
    /// Size, bytes; of a per-CPU object that of one copy.
    pub size: u64,
    /// Kind of memory.
    pub kind: Kind,
    /// Slab cache.
    pub cache: Option<String>,
    /// Task that allocated it, or "hardirq" or "softirq".
    pub comm: String,
    /// That task's pid.
    pub pid: i32,
    /// `jiffies` at the allocation.
    pub jiffies: u64,
    /// Age at the scan.
    pub age_ms: u64,
    /// Its first bytes, two digits each; of a per-CPU object those of the first CPU's copy.
    #[serde(rename = "hex", serialize_with = "hex_bytes")]
    pub head: Vec<u8>,
    /// CRC-32 of its contents as kmemleak has it.
    #[serde(skip)]
    pub checksum: u32,
    /// No unreachable object outside its own cycle refers to it.
    pub direct: bool,
    /// What it keeps from being freed: itself, its cycle, and what is only reached through it. Per-CPU objects count with
    /// the copies of all possible CPUs.
    pub retained_bytes: u64,
    /// Its [`Group::id`].
    pub group: String,
    /// Not reported by an earlier scan.
    pub new: bool,
    /// Where it was allocated, innermost first.
    pub backtrace: Vec<Frame>,
}

/// One return address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Frame {
    /// The address.
    #[serde(serialize_with = "hex_va")]
    pub ip: Va,
    /// Function, when it has a name.
    pub symbol: Option<String>,
    /// Distance from the function's start.
    pub offset: u64,
    /// Size of the function.
    pub size: u64,
    /// Its module; None for the kernel.
    pub module: Option<String>,
}

/// Leaks of one kind and size class with the same functions in their backtraces.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Group {
    /// 64-bit FNV-1a, 16 hexadecimal digits, of kind, size class (next power of two) and the functions and modules of
    /// the backtrace: the same over reboots, KASLR and rebuilds.
    pub id: String,
    /// Number of leaks.
    pub count: u64,
    /// How many of them are direct.
    pub direct: u64,
    /// Their sizes added up.
    pub bytes: u64,
    /// What its direct leaks retain, cycles counted once.
    pub retained_bytes: u64,
    /// Kind of memory.
    pub kind: Kind,
    /// Slab cache of the first.
    pub cache: Option<String>,
    /// Backtrace of the first.
    pub backtrace: Vec<Frame>,
}

/// A suppression that was of use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SuppressionUse {
    /// Its name.
    pub name: String,
    /// Where it is written: `FILE:LINE`, or the line of a guest profile.
    pub place: String,
    /// Leaks it covered.
    pub count: u64,
    /// Their sizes added up.
    pub bytes: u64,
}

impl Report {
    /// The JSON form, on one line.
    ///
    /// # Errors
    /// None in practice: every value has a JSON form.
    pub fn json(&self) -> serde_json::Result<String> {
        serde_json::to_string(self)
    }

    /// Leaks that no earlier scan reported: what `scan` replies.
    pub fn new_leaks(&self) -> usize {
        self.leaks.iter().filter(|l| l.new).count()
    }
}

fn hex<S: Serializer>(value: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{value:#x}"))
}

fn hex_va<S: Serializer>(va: &Va, serializer: S) -> Result<S::Ok, S::Error> {
    hex(&va.0, serializer)
}

fn hex_bytes<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&bytes.iter().map(|b| format!("{b:02x}")).collect::<String>())
}
