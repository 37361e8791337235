//! Live objects of the guest and where each was allocated.
//!
//! Built for events: an allocation or a free of a slab object touches one of its page's 24-byte records ([`slabs`],
//! [`record`]); backtraces, task names and caches are each stored once. Everything else, some thousand objects, is in a
//! plain map. Scans freeze their own index over it ([`crate::scan`]).
//!
//! Blocks of the page allocator are kept apart ([`blocks`]): slabs, large kmallocs and vmalloc blocks are made of them,
//! so that they and other objects have the same addresses; and they may be given back in parts.

mod areas;
mod audit;
mod blocks;
mod depot;
mod intern;
mod reconcile;
mod record;
mod saved;
mod slabs;
#[cfg(test)]
mod tests;

pub use areas::ScanAreas;
pub use audit::{Audit, Mismatch, Truth, is_vmap};
pub use depot::{StackDepot, StackId};
pub use reconcile::Gap;
pub use saved::{MAX_DEVICE, SavedRegistry};

use crate::memory::Va;
use blocks::Blocks;
use hashbrown::HashMap;
use intern::Interner;
use record::{CACHE_BITS, COMM_BITS, New, Record};
use rustc_hash::FxBuildHasher;
use serde::{Deserialize, Serialize};
use slabs::{Slabs, Stored};

/// Number of frames kept of a backtrace (kmemleak's MAX_TRACE).
pub const MAX_FRAMES: usize = 16;

/// What kind of memory an object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "the names are the report's")]
pub enum Kind {
    Slab,
    Large,
    Vmalloc,
    Percpu,
    Page,
    Memblock,
    Ioremap,
    /// Pages that exist otherwise, by a second address.
    Vmap,
}

impl Kind {
    /// The word used in reports and profiles.
    pub fn name(self) -> &'static str {
        match self {
            Self::Slab => "slab",
            Self::Large => "large",
            Self::Vmalloc => "vmalloc",
            Self::Percpu => "percpu",
            Self::Page => "page",
            Self::Memblock => "memblock",
            Self::Ioremap => "ioremap",
            Self::Vmap => "vmap",
        }
    }

    /// What stands where slab objects have their cache.
    pub fn instead_of_cache(self) -> String {
        format!("({})", self.name())
    }
}

#[cfg(test)]
impl Object {
    /// A slab object of 96 bytes, for tests to say what matters to them.
    pub(crate) fn sample() -> Self {
        Self {
            address: Va(0x1000),
            size: 96,
            kind: Kind::Slab,
            cache: Va(1),
            comm: 0,
            pid: 0,
            jiffies: 0,
            stack: StackId(0),
            paint: Paint::Normal,
            no_scan: false,
            reported: false,
            sequence: 0,
        }
    }
}

/// An allocation that was just made.
#[derive(Debug, Clone, Copy)]
pub struct AllocEvent<'a> {
    /// Start of the object.
    pub address: Va,
    /// Size in bytes: the cache's object size for slab objects, as kmemleak has it.
    pub size: u64,
    /// Kind of memory.
    pub kind: Kind,
    /// `struct kmem_cache` for slab objects, else 0.
    pub cache: Va,
    /// `comm` of the allocating context: the task's, or kmemleak's "hardirq" / "softirq" when interrupted.
    pub comm: [u8; 16],
    /// Its pid; 0 in interrupts as kmemleak has it.
    pub pid: i32,
    /// `jiffies` at the allocation.
    pub jiffies: u64,
    /// Who allocated.
    pub stack: Backtrace<'a>,
}

/// A backtrace that an event has.
#[derive(Debug, Clone, Copy)]
pub enum Backtrace<'a> {
    /// Return addresses, innermost first, at most [`MAX_FRAMES`].
    Frames(&'a [Va]),
    /// One that [`Registry::stacks`] has already.
    Stored(StackId),
}

/// How an object is treated by scans.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Paint {
    /// Reported when unreferenced.
    Normal,
    /// Never reported, always scanned (kmemleak_not_leak, `clear`).
    Gray,
    /// Never reported, never scanned (kmemleak_ignore, objects waiting for kfree_rcu).
    Black,
}

/// A live object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Object {
    /// Start.
    pub address: Va,
    /// Size, bytes.
    pub size: u64,
    /// Kind.
    pub kind: Kind,
    /// `struct kmem_cache`, or 0.
    pub cache: Va,
    /// Index into [`Registry::comm`].
    pub comm: u32,
    /// pid.
    pub pid: i32,
    /// jiffies at allocation.
    pub jiffies: u64,
    /// Backtrace, in [`Registry::stacks`].
    pub stack: StackId,
    /// Treatment.
    pub paint: Paint,
    /// Do not scan its contents (kmemleak_no_scan).
    pub no_scan: bool,
    /// Already reported by an earlier scan (kmemleak reports an object as new once).
    pub reported: bool,
    /// Place in the order of all events: allocation order.
    pub sequence: u64,
}

/// Counters since boot; `dropped` stays 0 or is said loudly.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Allocations recorded.
    pub allocs: u64,
    /// Frees of known objects.
    pub frees: u64,
    /// Frees of addresses never seen allocated.
    pub unknown_frees: u64,
    /// Allocations at an address already live: a free was missed.
    pub overwrites: u64,
    /// Events lost.
    pub dropped: u64,
}

/// The live objects.
#[derive(Default)]
pub struct Registry {
    /// Backtraces, each stored once.
    pub stacks: StackDepot,
    /// Counters.
    pub counters: Counters,
    areas: ScanAreas,
    slabs: Slabs,
    blocks: Blocks,
    /// Sizes and records of objects of other kinds, and of slab objects that [`Slabs`] refused, by address.
    others: HashMap<Va, (u64, Record), FxBuildHasher>,
    comms: Interner<[u8; 16], COMM_BITS>,
    caches: Interner<Va, CACHE_BITS>,
    /// Events seen; every allocation and free takes the next number.
    sequence: u64,
}

impl Registry {
    /// Records an allocation. An object already live at the address, or block of pages that it meets, is replaced, and
    /// counted as an overwrite.
    pub fn alloc(&mut self, event: &AllocEvent<'_>) {
        self.counters.allocs += 1;
        self.sequence += 1;
        let stack = match event.stack {
            Backtrace::Frames(frames) => self.stacks.intern(&frames[..frames.len().min(MAX_FRAMES)]),
            Backtrace::Stored(stack) => stack,
        };
        let record = Record::new(&New {
            address: event.address,
            kind: event.kind,
            stack,
            sequence: self.sequence,
            pid: event.pid,
            jiffies: event.jiffies,
            cache: self.caches.intern(event.cache),
            comm: self.comms.intern(event.comm),
        });
        self.areas.remove(event.address);
        let replaced = match event.kind {
            Kind::Page => self.blocks.insert(event.address, event.size, record),
            kind => self.insert(event.address, event.size, kind, record),
        };
        self.counters.overwrites += u64::from(replaced);
    }

    /// Return addresses, innermost first.
    pub fn frames<'a>(&'a self, backtrace: &Backtrace<'a>) -> &'a [Va] {
        match *backtrace {
            Backtrace::Frames(frames) => frames,
            Backtrace::Stored(stack) => self.stacks.get(stack),
        }
    }

    /// Records a free by start address; returns what it was.
    pub fn free(&mut self, address: Va) -> Option<Object> {
        self.sequence += 1;
        let Some((size, record)) = self.remove(address) else {
            self.counters.unknown_frees += 1;
            return None;
        };
        self.counters.frees += 1;
        self.areas.remove(address);
        Some(self.object(address, size, &record))
    }

    /// Records that the pages of `size` bytes from `start` on are given back; what else their block has stays. Pages never
    /// seen allocated are no news: the boot allocator gives its memory away this way.
    pub fn free_pages(&mut self, start: Va, size: u64) {
        self.sequence += 1;
        self.counters.frees += u64::from(self.blocks.remove(start, size));
    }

    /// Object starting at `address`: of a block of pages and what lies in it, the latter.
    pub fn get(&self, address: Va) -> Option<Object> {
        let other = || self.others.get(&address).map(|(size, record)| (*size, record));
        let found = self.slabs.get(address).or_else(other).or_else(|| self.blocks.get(address));
        found.map(|(size, record)| self.object(address, size, record))
    }

    /// Object whose memory contains `address`: of a block of pages and what lies in it, the latter. Looks at every object:
    /// for `dump=`, not for scans.
    pub fn containing(&self, address: Va) -> Option<Object> {
        let object = self.objects().find(|o| address - o.address < o.size);
        object.or_else(|| self.block_with(address))
    }

    /// The block of pages whose memory contains `address`.
    pub fn block_with(&self, address: Va) -> Option<Object> {
        self.blocks.containing(address).map(|(start, size, record)| self.object(start, size, record))
    }

    /// Changes the treatment of the object starting at `address`; false when there is none.
    pub fn paint(&mut self, address: Va, paint: Paint) -> bool {
        self.change(address, |r| r.set_paint(paint))
    }

    /// Sets `no_scan`; false when no object starts at `address`.
    pub fn set_no_scan(&mut self, address: Va) -> bool {
        self.change(address, Record::set_no_scan)
    }

    /// Parts of objects that are read instead of the whole.
    pub fn scan_areas(&self) -> &ScanAreas {
        &self.areas
    }

    /// Of the object that `start` points into, `size` bytes from there on are read, and other areas of it; `u64::MAX` stands
    /// for all to its end. False when there is no such object, or not so much of it.
    pub fn add_scan_area(&mut self, start: Va, size: u64) -> bool {
        let Some(object) = self.get(start).or_else(|| self.containing(start)) else { return false };
        let first = start - object.address;
        let size = if size == u64::MAX { object.size - first } else { size };
        if size == 0 || size > object.size - first {
            return false;
        }
        let added = self.areas.add(object.address, first..first + size);
        self.counters.dropped += u64::from(!added);
        added
    }

    /// Sets `reported`.
    pub fn set_reported(&mut self, address: Va) {
        self.change(address, Record::set_reported);
    }

    /// Every live object but blocks of pages: slab objects, ascending, and then all others, ascending.
    pub fn objects(&self) -> impl Iterator<Item = Object> + '_ {
        let slabs = self.slabs.iter().map(|(va, size, record)| self.object(va, size, record));
        slabs.chain(self.others())
    }

    /// Those of them that are not kept with the other slab objects of their page: all of other kinds, which are few.
    /// Ascending.
    pub fn others(&self) -> impl Iterator<Item = Object> + '_ {
        let mut others: Vec<_> =
            self.others.iter().map(|(&va, (size, record))| (va, *size, record)).collect();
        others.sort_unstable_by_key(|&(va, ..)| va);
        others.into_iter().map(|(va, size, record)| self.object(va, size, record))
    }

    /// Every block of pages, whoever has it: a cache's slabs, page cache and user memory are among them. Ascending.
    pub fn blocks(&self) -> impl Iterator<Item = Object> + '_ {
        self.blocks.iter().map(|(start, size, record)| self.object(start, size, record))
    }

    /// Number of live objects, blocks of pages not among them.
    pub fn len(&self) -> usize {
        self.slabs.len() + self.others.len()
    }

    /// True when nothing is live.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The `comm` stored for [`Object::comm`].
    pub fn comm(&self, id: u32) -> [u8; 16] {
        self.comms.get(id)
    }

    /// Forgets every object (`off`). Backtraces stay, because reports still name them, and so do the counters.
    pub fn clear(&mut self) {
        self.areas = ScanAreas::default();
        self.slabs = Slabs::default();
        self.blocks = Blocks::default();
        self.others = HashMap::default();
    }

    /// Events seen so far: the sequence number of the newest.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Bytes of host memory held, backtraces included.
    pub fn memory(&self) -> usize {
        let others = self.others.allocation_size();
        self.slabs.memory() + others + self.blocks.memory() + self.stacks.memory()
    }

    /// Stores a record; true when it replaces one of the same address.
    fn insert(&mut self, address: Va, size: u64, kind: Kind, record: Record) -> bool {
        let size_in_slab = u32::try_from(size).ok().filter(|&size| kind == Kind::Slab && size > 0);
        match size_in_slab.map_or(Stored::Refused, |size| self.slabs.insert(address, size, record)) {
            Stored::Replaced => true,
            Stored::New => !self.others.is_empty() && self.others.remove(&address).is_some(),
            Stored::Refused => {
                let in_slab = self.slabs.remove(address).is_some();
                self.others.insert(address, (size, record)).is_some() || in_slab
            }
        }
    }

    fn remove(&mut self, address: Va) -> Option<(u64, Record)> {
        self.slabs.remove(address).or_else(|| self.others.remove(&address))
    }

    fn change(&mut self, address: Va, change: impl FnOnce(&mut Record)) -> bool {
        let Self { slabs, others, blocks, .. } = self;
        let record = slabs
            .get_mut(address)
            .or_else(|| others.get_mut(&address).map(|(_, record)| record))
            .or_else(|| blocks.get_mut(address));
        record.map(change).is_some()
    }

    #[inline]
    fn object(&self, address: Va, size: u64, record: &Record) -> Object {
        record.object(address, size, self.caches.get(record.cache_id()))
    }
}
