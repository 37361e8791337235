//! The memory of a frozen guest, as the marker and the roots want it.

use super::mark::Contents;
use crate::arch::Leaf;
use crate::linux::Linux;
use crate::linux::percpu::PercpuChunk;
use crate::memory::{FrozenMemory, MemoryError, Pa, Va};
use std::ops::{ControlFlow, Range};

/// A contiguous part of guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First address.
    pub start: Pa,
    /// Length in bytes.
    pub len: u64,
}

/// An extent and where the kernel sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// Kernel address of its first byte.
    pub va: Va,
    /// The memory there.
    pub extent: Extent,
}

/// A frozen guest's memory by kernel virtual address.
pub struct GuestMemory<'m, M> {
    linux: &'m Linux,
    memory: &'m M,
    direct: Range<u64>,
    /// Ascending by cookie.
    percpu: Vec<PercpuChunk>,
}

impl<'m, M: FrozenMemory> GuestMemory<'m, M> {
    /// Finds the direct map and the chunks of per-CPU memory.
    ///
    /// # Errors
    /// The guest's variable that says where the direct map starts cannot be read, or a chunk is damaged.
    pub fn new(linux: &'m Linux, memory: &'m M) -> Result<Self, MemoryError> {
        let start = linux.direct_map_base(memory)?.0;
        let ram_end = memory.ranges().last().map_or(0, |r| r.start.0 + r.len);
        let mut percpu = linux.percpu_chunks(memory)?;
        percpu.sort_by_key(|chunk| chunk.cookie);
        Ok(Self { linux, memory, direct: start..start.saturating_add(ram_end), percpu })
    }

    /// Addresses of the direct map, as far as there is RAM.
    pub fn direct(&self) -> &Range<u64> {
        &self.direct
    }

    /// All chunks of per-CPU memory.
    pub fn percpu(&self) -> &[PercpuChunk] {
        &self.percpu
    }

    /// Where the object at `va` lies: there, or when `va` is the cookie of a per-CPU allocation at each CPU's copy.
    pub fn copies(&self, va: Va) -> Vec<Va> {
        match self.chunk(va) {
            Some(chunk) => chunk.copies.iter().map(|&copy| copy + (va - chunk.cookie)).collect(),
            None => vec![va],
        }
    }

    /// The chunk a cookie points into; None for addresses.
    fn chunk(&self, va: Va) -> Option<&PercpuChunk> {
        let number = self.percpu.partition_point(|chunk| chunk.cookie <= va).checked_sub(1)?;
        self.percpu.get(number).filter(|chunk| va - chunk.cookie < chunk.size)
    }

    /// What is mapped at a range of kernel addresses, in its order; holes are left out. No more than all of RAM,
    /// whatever length a confused guest claims.
    pub fn extents(&self, range: Range<Va>) -> Vec<Extent> {
        self.mappings(range).into_iter().map(|mapping| mapping.extent).collect()
    }

    /// [`GuestMemory::extents`] with their addresses.
    pub fn mappings(&self, range: Range<Va>) -> Vec<Mapping> {
        let len = range.end.0.saturating_sub(range.start.0);
        if self.direct.contains(&range.start.0) {
            let len = len.min(self.direct.end - range.start.0);
            let mapping = Mapping { va: range.start, extent: self.direct_extent(range.start.0, len) };
            return if len == 0 { Vec::new() } else { vec![mapping] };
        }
        let mut mappings: Vec<Mapping> = Vec::new();
        let mut total = 0;
        let end = range.start.0.saturating_add(len);
        let add = |leaf: Leaf| {
            let va = leaf.va.max(range.start);
            let (start, len) = (leaf.pa + (va - leaf.va), (leaf.size - (va - leaf.va)).min(end - va.0));
            let follows =
                |m: &&mut Mapping| m.extent.start + m.extent.len == start && m.va + m.extent.len == va;
            match mappings.last_mut().filter(follows) {
                Some(last) => last.extent.len += len,
                None => mappings.push(Mapping { va, extent: Extent { start, len } }),
            }
            total += len;
            if total > self.direct.end - self.direct.start {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        };
        // A damaged table ends what can be read, as a hole would.
        let _ = self.linux.space.leaves(self.memory, range.start, len, add);
        mappings
    }

    /// Where in a range of kernel addresses the memory at `pa` is mapped.
    pub fn address_in(&self, range: Range<Va>, pa: Pa) -> Option<Va> {
        self.mappings(range).into_iter().find_map(|Mapping { va, extent }| {
            let inside = pa.0.checked_sub(extent.start.0).filter(|&inside| inside < extent.len)?;
            Some(va + inside)
        })
    }

    /// Bytes of an extent; None when it is no RAM (device memory mapped by the guest).
    pub fn bytes(&self, extent: Extent) -> Option<&'m [u8]> {
        self.memory.slice(extent.start, usize::try_from(extent.len).ok()?).ok()
    }

    fn direct_extent(&self, va: u64, len: u64) -> Extent {
        Extent { start: Pa(va - self.direct.start), len }
    }
}

impl<M: FrozenMemory> Contents for GuestMemory<'_, M> {
    fn pieces<'a>(&'a self, va: u64, len: u64, visit: &mut impl FnMut(u64, &'a [u8])) {
        if self.direct.contains(&va)
            && let Some(bytes) = self.bytes(self.direct_extent(va, len))
        {
            return visit(va, bytes);
        }
        for copy in self.copies(Va(va)) {
            for mapping in self.mappings(copy..Va(copy.0.saturating_add(len))) {
                if let Some(bytes) = self.bytes(mapping.extent) {
                    visit(va + (mapping.va - copy), bytes);
                }
            }
        }
    }

    fn whole(&self) -> Vec<(u64, &[u8])> {
        let ranges = self.memory.ranges().iter();
        let lent = ranges.filter_map(|range| {
            let bytes = self.memory.slice(range.start, usize::try_from(range.len).ok()?).ok()?;
            Some((self.direct.start.checked_add(range.start.0)?, bytes))
        });
        lent.collect()
    }
}
