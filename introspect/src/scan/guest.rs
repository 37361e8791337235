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
        let len = range.end.0.saturating_sub(range.start.0);
        if self.direct.contains(&range.start.0) {
            let len = len.min(self.direct.end - range.start.0);
            return if len == 0 { Vec::new() } else { vec![self.direct_extent(range.start.0, len)] };
        }
        let mut extents: Vec<Extent> = Vec::new();
        let mut total = 0;
        let end = range.start.0.saturating_add(len);
        let add = |leaf: Leaf| {
            let first = leaf.va.max(range.start);
            let (start, len) =
                (leaf.pa + (first - leaf.va), (leaf.size - (first - leaf.va)).min(end - first.0));
            match extents.last_mut() {
                Some(last) if last.start + last.len == start => last.len += len,
                _ => extents.push(Extent { start, len }),
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
        extents
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
    fn pieces<'a>(&'a self, va: u64, len: u64, visit: &mut impl FnMut(&'a [u8])) {
        if self.direct.contains(&va)
            && let Some(bytes) = self.bytes(self.direct_extent(va, len))
        {
            return visit(bytes);
        }
        for copy in self.copies(Va(va)) {
            let range = copy..Va(copy.0.saturating_add(len));
            self.extents(range).into_iter().filter_map(|extent| self.bytes(extent)).for_each(&mut *visit);
        }
    }
}
