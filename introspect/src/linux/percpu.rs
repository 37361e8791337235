//! Per-CPU memory: which parts of it are allocated (mm/percpu.c).
//!
//! A chunk is one address range per CPU, all handed out alike; its allocation map has a bit for every four bytes, and
//! its bound map one where each allocation starts. What `free_percpu` gave back keeps its contents, so only what the
//! maps say is allocated may hold references.
//!
//! What `alloc_percpu` returns is no address but a cookie: a copy's address less its CPU's `__per_cpu_offset`.

use super::Linux;
use super::lookup::Lookup;
use crate::memory::{MemoryError, PAGE_SIZE, PhysicalMemory, Va};
use std::ops::Range;

/// Bytes per bit of the allocation map, and what sizes are rounded up to (`PCPU_MIN_ALLOC_SIZE`,
/// include/linux/percpu.h).
pub const MIN_ALLOC: u64 = 4;
/// Largest allocation, bytes (`PCPU_MIN_UNIT_SIZE`, include/linux/percpu.h).
pub const MAX_ALLOC: u64 = 32 << 10;
/// Bounds against damaged metadata: list heads, chunks in all lists, pages of one chunk, and what all chunks together
/// may cost to read: bytes of their maps, and copies of their allocations.
const MAX_SLOTS: u64 = 256;
const MAX_CHUNKS: usize = 1 << 12;
const MAX_PAGES: u64 = 1 << 14;
const MAX_COST: usize = 1 << 23;

/// Lists from that of free chunks on, itself included (`pcpu_setup_first_chunk`, 5.14 and later).
const BEHIND_FREE_SLOT: u64 = 2;

/// Offsets and variables; run-time addresses.
pub(super) struct Layout {
    /// `pcpu_slot` before 5.9. (From 5.9 to 5.13 there is a second set of lists behind them, for memory that counts
    /// against a memory cgroup; it is not read.)
    lists: Va,
    /// Where the number of lists is, less this.
    slots: (Va, u64),
    unit_offsets: Va,
    reserved: Option<Va>,
    list: u64,
    base: u64,
    map: u64,
    bounds: u64,
    start: u64,
    end: u64,
    pages: u64,
}

impl Layout {
    pub fn new(lookup: &Lookup<'_>) -> anyhow::Result<Self> {
        let chunk = |member| lookup.offset("pcpu_chunk", member);
        let lists = lookup.symbol_if_any("pcpu_chunk_lists");
        Ok(Self {
            lists: lists.map_or_else(|| lookup.symbol("pcpu_slot"), Ok)?,
            slots: match lookup.symbol_if_any("pcpu_nr_slots") {
                Some(variable) => (variable, 0),
                None => (lookup.symbol("pcpu_free_slot")?, BEHIND_FREE_SLOT),
            },
            unit_offsets: lookup.symbol("pcpu_unit_offsets")?,
            reserved: lookup.symbol_if_any("pcpu_reserved_chunk"),
            list: chunk("list")?,
            base: chunk("base_addr")?,
            map: chunk("alloc_map")?,
            bounds: chunk("bound_map")?,
            start: chunk("start_offset")?,
            end: chunk("end_offset")?,
            pages: chunk("nr_pages")?,
        })
    }
}

/// A chunk of per-CPU memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PercpuChunk {
    /// The cookie of offset 0.
    pub cookie: Va,
    /// Where each possible CPU's copy starts, by CPU.
    pub copies: Vec<Va>,
    /// Size of one copy, bytes.
    pub size: u64,
    /// Allocations, as offsets into a copy; ascending and disjoint.
    pub allocated: Vec<Range<u64>>,
}

impl PercpuChunk {
    /// Cookies of the allocations, with the size of one copy.
    pub fn objects(&self) -> impl Iterator<Item = (Va, u64)> + '_ {
        self.allocated.iter().map(|part| (self.cookie + part.start, part.end - part.start))
    }
}

impl Linux {
    /// All chunks, that of the modules' static variables included; none before the allocator is set up.
    ///
    /// # Errors
    /// A damaged list or chunk, with its address.
    pub fn percpu_chunks(&self, memory: &impl PhysicalMemory) -> Result<Vec<PercpuChunk>, MemoryError> {
        let layout = &self.percpu;
        let lists = self.read_va(memory, layout.lists)?;
        let offsets = self.read_va(memory, layout.unit_offsets)?;
        if lists == Va(0) || offsets == Va(0) {
            return Ok(Vec::new());
        }
        let (variable, more) = layout.slots;
        let slots = u64::from(self.read_u32(memory, variable)?) + more;
        if slots > MAX_SLOTS {
            return Err(MemoryError::Corrupt {
                va: variable,
                what: "the number of per-CPU chunk lists is out of range",
            });
        }
        let mut found = Vec::new();
        for slot in 0..slots {
            let head = lists + slot * 16;
            let nodes = self.list(memory, head, MAX_CHUNKS - found.len())?;
            found.extend(nodes.into_iter().map(|node| node - layout.list));
        }
        if let Some(variable) = layout.reserved {
            let chunk = self.read_va(memory, variable)?;
            if chunk != Va(0) && !found.contains(&chunk) {
                found.push(chunk);
            }
        }
        let cpus = self.cpu_count(memory)? as u64;
        let units = (0..cpus).map(|cpu| self.read_u64(memory, offsets + cpu * 8));
        let units: Vec<u64> = units.collect::<Result<_, _>>()?;
        let distance = self.percpu_base(memory, 0)?;
        let (mut chunks, mut left) = (Vec::new(), MAX_COST);
        for chunk in found {
            let read = self.percpu_chunk(memory, chunk, &units, distance)?;
            let map = (read.size / MIN_ALLOC / 8) as usize;
            left = left
                .checked_sub(map + read.allocated.len().saturating_mul(units.len()))
                .ok_or(MemoryError::Corrupt { va: chunk, what: "there are too many per-CPU allocations" })?;
            chunks.push(read);
        }
        Ok(chunks)
    }

    /// The cookie of the allocation whose copy for some CPU is around `va`; None when it is in no chunk, or these cannot
    /// be read now.
    pub fn percpu_cookie(&self, memory: &impl PhysicalMemory, va: Va) -> Option<Va> {
        let chunks = self.percpu_chunks(memory).ok()?;
        chunks.iter().find_map(|chunk| {
            let copy = chunk.copies.iter().find(|&&copy| va - copy < chunk.size)?;
            Some(chunk.cookie + (va - *copy))
        })
    }

    /// `units` are the copies' distances from the base address, `distance` that of the first copy from its cookie.
    fn percpu_chunk(
        &self,
        memory: &impl PhysicalMemory,
        chunk: Va,
        units: &[u64],
        distance: Va,
    ) -> Result<PercpuChunk, MemoryError> {
        let layout = &self.percpu;
        let pages = u64::from(self.read_u32(memory, chunk + layout.pages)?);
        let start = u64::from(self.read_u32(memory, chunk + layout.start)?);
        let end = u64::from(self.read_u32(memory, chunk + layout.end)?);
        let size = pages * PAGE_SIZE;
        if pages > MAX_PAGES || start + end > size {
            return Err(MemoryError::Corrupt { va: chunk, what: "a per-CPU chunk has an impossible size" });
        }
        let base = self.read_va(memory, chunk + layout.base)?;
        let map_at = self.read_va(memory, chunk + layout.map)?;
        let bounds_at = self.read_va(memory, chunk + layout.bounds)?;
        let mut map = vec![0; (size / MIN_ALLOC / 8) as usize];
        let mut bounds = map.clone();
        self.read(memory, map_at, &mut map)?;
        self.read(memory, bounds_at, &mut bounds)?;
        // What lies before `start` and after the end's margin belongs to neighbours and is marked as taken.
        let allocated = areas(&map, &bounds).map(|bits| {
            let offset = |bit: u64| (bit * MIN_ALLOC).clamp(start, size - end);
            offset(bits.start)..offset(bits.end)
        });
        // One more than all may be, so that the caller sees it.
        let allocated = allocated.filter(|part| part.start < part.end).take(MAX_COST + 1).collect();
        let copies: Vec<Va> = units.iter().map(|&unit| base + unit).collect();
        let cookie = Va(copies.first().copied().unwrap_or(base) - distance);
        Ok(PercpuChunk { cookie, copies, size, allocated })
    }
}

/// Runs of set bits of `map`, each cut where `bounds` has a bit set; least significant bit of the first byte first.
fn areas<'a>(map: &'a [u8], bounds: &'a [u8]) -> impl Iterator<Item = Range<u64>> + 'a {
    let bits = map.len() as u64 * 8;
    let set =
        |map: &[u8], bit: u64| map.get((bit / 8) as usize).is_some_and(|byte| byte >> (bit % 8) & 1 != 0);
    let mut at = 0;
    std::iter::from_fn(move || {
        let start = (at..bits).find(|&bit| set(map, bit))?;
        let ends = |&bit: &u64| !set(map, bit) || set(bounds, bit);
        at = (start + 1..bits).find(ends).unwrap_or(bits);
        Some(start..at)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn runs_of_bits_end_at_bounds() {
        let map = [0b0000_0110, 0, 0b1000_0000, 0b0000_0001];
        assert_eq!(areas(&map, &[0; 4]).collect::<Vec<_>>(), [1..3, 23..25]);
        assert_eq!(areas(&map, &[0b1000_0110, 0, 0, 1]).collect::<Vec<_>>(), [1..2, 2..3, 23..24, 24..25]);
        assert_eq!(areas(&[0xff], &[]).next(), Some(0..8));
        assert_eq!(areas(&[], &[]).count(), 0);
    }

    proptest! {
        #[test]
        fn areas_hold_exactly_the_set_bits(map: Vec<u8>, bounds: Vec<u8>) {
            let bit = |map: &[u8], b: u64| map.get((b / 8) as usize).is_some_and(|byte| byte >> (b % 8) & 1 != 0);
            let all: Vec<Range<u64>> = areas(&map, &bounds).collect();
            let listed: Vec<u64> = all.iter().cloned().flatten().collect();
            let naive: Vec<u64> = (0..map.len() as u64 * 8).filter(|&b| bit(&map, b)).collect();
            prop_assert_eq!(listed, naive);
            for area in all {
                let first = area.start == 0 || !bit(&map, area.start - 1) || bit(&bounds, area.start);
                prop_assert!(first && (area.start + 1..area.end).all(|b| !bit(&bounds, b)));
            }
        }
    }
}
