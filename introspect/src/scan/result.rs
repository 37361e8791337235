//! What a scan found.

use super::typed::TypedStatistics;
use crate::registry::{Object, Paint, Registry};
use std::time::Duration;

/// An object that cannot be reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leak {
    /// The object as registered.
    pub object: Object,
    /// Name of its slab cache.
    pub cache: Option<String>,
    /// No unreachable object outside its own cycle refers to it.
    pub direct: bool,
    /// Objects of one cycle have the same number, all others one each.
    pub component: u32,
    /// Bytes that it keeps from being freed: of its cycle and all that is only reached through this cycle. A per-CPU object
    /// counts with the copies of all CPUs.
    pub retained: u64,
    /// Its first [`HEAD_BYTES`](super::HEAD_BYTES) bytes, or fewer; of a per-CPU object the first CPU's.
    pub head: Vec<u8>,
    /// CRC-32 of its contents as kmemleak computes it (`crc32(0, ...)`, not inverted); of a per-CPU object that of
    /// each copy, XORed.
    pub checksum: u32,
}

/// What one region of the roots contributed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootStatistics {
    /// Region.
    pub name: String,
    /// Bytes read.
    pub bytes: u64,
    /// Words that refer to an object.
    pub references: u64,
}

/// Result of [`scan`](super::scan).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ScanResult {
    /// Unreachable objects, in allocation order.
    pub leaks: Vec<Leak>,
    /// `jiffies` at the scan.
    pub jiffies: u64,
    /// By region of the roots.
    pub roots: Vec<RootStatistics>,
    /// Objects looked at.
    pub objects: u64,
    /// Their sizes added up.
    pub object_bytes: u64,
    /// Unreachable objects that are too young to be reported.
    pub young: u64,
    /// Bytes read, roots and objects.
    pub bytes_scanned: u64,
    /// Only pages that were written since the scan before were read.
    pub again: bool,
    /// Words that lie where objects are, in the roots and in what was reached, each of which was looked up.
    pub candidates: u64,
    /// Those of them that refer to none: to free slots, and to what is between objects.
    pub no_object: u64,
    /// What knowing types did.
    pub typed: TypedStatistics,
    /// Time to collect roots and build the index.
    pub prepare: Duration,
    /// Time to mark.
    pub mark: Duration,
    /// Time to sort out the unreachable.
    pub graph: Duration,
}

impl ScanResult {
    /// Whether another scan of the same machine found the same, whatever it read and however long it took.
    pub fn agrees(&self, other: &Self) -> bool {
        let none = Duration::ZERO;
        let found = |result: &Self| Self {
            bytes_scanned: 0,
            again: false,
            prepare: none,
            mark: none,
            graph: none,
            ..result.clone()
        };
        found(self) == found(other)
    }

    /// Drops leaks that were freed, cleared or painted since the scan: what a later `report` shows.
    pub fn keep_reportable(&mut self, registry: &Registry) {
        let same =
            |leak: &Leak, now: Object| now.sequence == leak.object.sequence && now.paint == Paint::Normal;
        self.leaks.retain(|leak| registry.get(leak.object.address).is_some_and(|now| same(leak, now)));
    }
}
