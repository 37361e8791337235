//! What is kept of one live object: four words.

use super::{Kind, Object, Paint, StackId};
use crate::memory::Va;

/// Sizes from here on do not fit the record and live in a side table.
pub(super) const OVERSIZE: u32 = u32::MAX;
/// Largest number of distinct caches and task names that have their own id; 0 means "some other".
pub(super) const CACHE_BITS: u32 = 12;
/// See [`CACHE_BITS`].
pub(super) const COMM_BITS: u32 = 16;
const JIFFIES_BITS: u32 = 36;
const PID_BITS: u32 = 22;

const KINDS: [Kind; 7] =
    [Kind::Slab, Kind::Large, Kind::Vmalloc, Kind::Percpu, Kind::Page, Kind::Memblock, Kind::Ioremap];
const PAINTS: [Paint; 3] = [Paint::Normal, Paint::Gray, Paint::Black];

/// One object in 32 bytes. The fields are what Linux can make of them: addresses whose top byte is all ones or
/// all zeros (canonical even with five-level paging), pids below 2^22 (`PID_MAX_LIMIT`), 36 bits of jiffies
/// (two years at 1000 Hz), 42 bits of event order (50 days at a million events per second).
#[derive(Clone, Copy)]
pub(super) struct Record {
    /// Bits 0-55 address, 56 its top byte (sign), 57-59 kind, 60-61 paint, 62 no_scan, 63 reported.
    place: u64,
    pub(super) size: u32,
    pub(super) stack: StackId,
    /// Bits 0-41 sequence, 42-63 pid.
    order: u64,
    /// Bits 0-35 jiffies, 36-47 cache, 48-63 comm.
    origin: u64,
}

const ADDRESS: u64 = (1 << 56) - 1;
const SIGN: u32 = 56;
const KIND: u32 = 57;
const PAINT: u32 = 60;
const NO_SCAN: u64 = 1 << 62;
const REPORTED: u64 = 1 << 63;
const SEQUENCE: u64 = (1 << (64 - PID_BITS)) - 1;
const JIFFIES: u64 = (1 << JIFFIES_BITS) - 1;

/// Pid -1 and the last sequence number: no event has both.
const VACANT: u64 = u64::MAX;

/// What a record is made of.
pub(super) struct New {
    pub address: Va,
    pub size: u32,
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
    pub(super) const VACANT: Self = Self { place: 0, size: 0, stack: StackId(0), order: VACANT, origin: 0 };

    pub(super) fn new(new: &New) -> Self {
        let kind = KINDS.iter().position(|&k| k == new.kind).unwrap_or(0) as u64;
        let sign = u64::from(new.address.0 >> 63 != 0);
        Self {
            place: (new.address.0 & ADDRESS) | sign << SIGN | kind << KIND,
            size: new.size,
            stack: new.stack,
            order: (new.sequence & SEQUENCE) | (new.pid as u64) << (64 - PID_BITS),
            origin: (new.jiffies & JIFFIES)
                | u64::from(new.cache) << JIFFIES_BITS
                | u64::from(new.comm) << (JIFFIES_BITS + CACHE_BITS),
        }
    }

    /// The part of this block of pages from `start` on that has `size` bytes.
    pub(super) fn part(mut self, start: Va, size: u32) -> Self {
        self.place = self.place & !ADDRESS | (start.0 & ADDRESS);
        self.size = size;
        self
    }

    pub(super) fn is_vacant(&self) -> bool {
        self.order == VACANT
    }

    pub(super) fn address(&self) -> Va {
        let top = if self.place >> SIGN & 1 == 1 { !ADDRESS } else { 0 };
        Va(self.place & ADDRESS | top)
    }

    pub(super) fn kind(&self) -> Kind {
        KINDS[(self.place >> KIND & 7) as usize % KINDS.len()]
    }

    pub(super) fn cache_id(&self) -> u32 {
        (self.origin >> JIFFIES_BITS) as u32 & ((1 << CACHE_BITS) - 1)
    }

    pub(super) fn set_paint(&mut self, paint: Paint) {
        let code = PAINTS.iter().position(|&p| p == paint).unwrap_or(0) as u64;
        self.place = self.place & !(3 << PAINT) | code << PAINT;
    }

    pub(super) fn set_no_scan(&mut self) {
        self.place |= NO_SCAN;
    }

    pub(super) fn set_reported(&mut self) {
        self.place |= REPORTED;
    }

    /// The public form; `size` and `cache` come from the registry's side tables.
    pub(super) fn object(&self, size: u64, cache: Va) -> Object {
        Object {
            address: self.address(),
            size,
            kind: self.kind(),
            cache,
            comm: (self.origin >> (JIFFIES_BITS + CACHE_BITS)) as u32,
            pid: (self.order >> (64 - PID_BITS)) as i32,
            jiffies: self.origin & JIFFIES,
            stack: self.stack,
            paint: PAINTS[(self.place >> PAINT & 3) as usize % PAINTS.len()],
            no_scan: self.place & NO_SCAN != 0,
            reported: self.place & REPORTED != 0,
            sequence: self.order & SEQUENCE,
        }
    }
}
