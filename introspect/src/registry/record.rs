//! What is kept of one live object, beside its address and size: three words.

use super::{Kind, Object, Paint, StackId};
use crate::memory::Va;

/// Largest number of distinct caches and task names that have their own id; 0 means "some other".
pub(super) const CACHE_BITS: u32 = 12;
/// See [`CACHE_BITS`].
pub(super) const COMM_BITS: u32 = 16;
const JIFFIES_BITS: u32 = 36;
const PID_BITS: u32 = 22;

pub(super) const KINDS: [Kind; 8] = [
    Kind::Slab,
    Kind::Large,
    Kind::Vmalloc,
    Kind::Percpu,
    Kind::Page,
    Kind::Memblock,
    Kind::Ioremap,
    Kind::Vmap,
];
const PAINTS: [Paint; 3] = [Paint::Normal, Paint::Gray, Paint::Black];

/// One object in 24 bytes. The fields are what Linux can make of them: pids below 2^22 (`PID_MAX_LIMIT`), 36 bits of
/// jiffies (two years at 1000 Hz), 42 bits of event order (50 days at a million events per second).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Record {
    /// Bits 0-11 offset in the page, 12-14 kind, 15-16 paint, 17 no_scan, 18 reported, 19 taken, 32-63 backtrace.
    what: u64,
    /// Bits 0-41 sequence, 42-63 pid.
    order: u64,
    /// Bits 0-35 jiffies, 36-47 cache, 48-63 comm.
    origin: u64,
}

const OFFSET: u64 = (1 << 12) - 1;
const KIND: u32 = 12;
const PAINT: u32 = 15;
const NO_SCAN: u64 = 1 << 17;
const REPORTED: u64 = 1 << 18;
const TAKEN: u64 = 1 << 19;
const STACK: u32 = 32;
const SEQUENCE: u64 = (1 << (64 - PID_BITS)) - 1;
const JIFFIES: u64 = (1 << JIFFIES_BITS) - 1;

/// What a record is made of.
pub(super) struct New {
    pub address: Va,
    pub kind: Kind,
    pub stack: StackId,
    pub sequence: u64,
    pub pid: i32,
    pub jiffies: u64,
    pub cache: u32,
    pub comm: u32,
}

impl Record {
    /// A place that holds no object.
    pub(super) const VACANT: Self = Self { what: 0, order: 0, origin: 0 };

    pub(super) fn new(new: &New) -> Self {
        let kind = KINDS.iter().position(|&k| k == new.kind).unwrap_or(0) as u64;
        Self {
            what: (new.address.0 & OFFSET) | kind << KIND | TAKEN | u64::from(new.stack.0) << STACK,
            order: (new.sequence & SEQUENCE) | (new.pid as u64) << (64 - PID_BITS),
            origin: (new.jiffies & JIFFIES)
                | u64::from(new.cache) << JIFFIES_BITS
                | u64::from(new.comm) << (JIFFIES_BITS + CACHE_BITS),
        }
    }

    /// True when it is the record of an object at this offset in its page.
    #[inline]
    pub(super) fn is_at(&self, offset: u64) -> bool {
        self.what & (TAKEN | OFFSET) == TAKEN | offset
    }

    #[inline]
    pub(super) fn is_vacant(&self) -> bool {
        self.what & TAKEN == 0
    }

    /// Where in its page the object starts.
    #[inline]
    pub(super) fn offset(&self) -> u64 {
        self.what & OFFSET
    }

    #[inline]
    pub(super) fn cache_id(&self) -> u32 {
        (self.origin >> JIFFIES_BITS) as u32 & ((1 << CACHE_BITS) - 1)
    }

    pub(super) fn set_paint(&mut self, paint: Paint) {
        let code = PAINTS.iter().position(|&p| p == paint).unwrap_or(0) as u64;
        self.what = self.what & !(3 << PAINT) | code << PAINT;
    }

    pub(super) fn set_no_scan(&mut self) {
        self.what |= NO_SCAN;
    }

    pub(super) fn set_reported(&mut self) {
        self.what |= REPORTED;
    }

    /// The public form; `cache` comes from the registry's side table.
    pub(super) fn object(&self, address: Va, size: u64, cache: Va) -> Object {
        Object {
            address,
            size,
            kind: KINDS[(self.what >> KIND & 7) as usize % KINDS.len()],
            cache,
            comm: (self.origin >> (JIFFIES_BITS + CACHE_BITS)) as u32,
            pid: (self.order >> (64 - PID_BITS)) as i32,
            jiffies: self.origin & JIFFIES,
            stack: StackId((self.what >> STACK) as u32),
            paint: PAINTS[(self.what >> PAINT & 3) as usize % PAINTS.len()],
            no_scan: self.what & NO_SCAN != 0,
            reported: self.what & REPORTED != 0,
            sequence: self.order & SEQUENCE,
        }
    }
}
