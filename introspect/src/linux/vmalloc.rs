//! The vmalloc space: `vmap_area` and `vm_struct` (mm/vmalloc.c).

use super::Linux;
use super::lookup::Lookup;
use super::read::physical_end;
use crate::memory::{MemoryError, PAGE_SHIFT, PAGE_SIZE, PhysicalMemory, Va};
use std::ops::ControlFlow;

/// More areas than any address space of 32 TiB with guard pages in use by real guests; a list beyond it is damage.
const MAX_AREAS: usize = 16 << 20;
/// Most trees the areas are spread over: one per CPU (`vmap_init_nodes`).
const MAX_TREES: u32 = 8192;
/// A red-black tree of 2^64 nodes is no deeper.
const MAX_DEPTH: usize = 128;

/// `vm_struct.flags` (include/linux/vmalloc.h).
const VM_ALLOC: u64 = 0x2;
/// `vm_struct.flags`: vmap made it.
pub const VM_MAP: u64 = 0x4;
const VM_NO_GUARD: u64 = 0x40;

/// `vmap_area.flags` (mm/vmalloc.c); the bits above tell which node an area is from.
const VMAP_RAM: u64 = 0x1;
const VMAP_BLOCK: u64 = 0x2;

/// Who made an area of the vmalloc space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Made {
    /// vmalloc, or per-CPU memory for a chunk: its pages are its own.
    Alloc,
    /// vmap.
    Map,
    /// vm_map_ram.
    MapRam,
    /// A CPU, for what vm_map_ram maps of few pages.
    Block,
    /// One of the last two: before 6.3 the kernel does not say which.
    MapRamOrBlock,
    /// Somebody else, such as ioremap.
    Other,
}

impl Made {
    /// `flags` are those of the `vm_struct`, where there is one; `own` those of the `vmap_area`, where it has any.
    fn new(has_vm: bool, flags: u64, own: Option<u64>) -> Self {
        match (has_vm, own) {
            (true, _) if flags & VM_ALLOC != 0 => Self::Alloc,
            (true, _) if flags & VM_MAP != 0 => Self::Map,
            (true, _) => Self::Other,
            (false, None) => Self::MapRamOrBlock,
            (false, Some(own)) if own & VMAP_BLOCK != 0 => Self::Block,
            (false, Some(own)) if own & VMAP_RAM != 0 => Self::MapRam,
            (false, Some(_)) => Self::Other,
        }
    }

    /// Areas that are, or have in them, what `vmap` and `vm_map_ram` return.
    pub fn may_be_vmap(self) -> bool {
        matches!(self, Self::Map | Self::MapRam | Self::Block | Self::MapRamOrBlock)
    }

    /// Areas that are just that.
    pub fn is_vmap(self) -> bool {
        matches!(self, Self::Map | Self::MapRam)
    }
}

/// A busy area of the vmalloc space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Area {
    /// First address.
    pub start: Va,
    /// Size in bytes without the guard page.
    pub size: u64,
    /// The `vm_struct`; None for `vm_map_ram` and per-CPU chunk areas that have none.
    pub vm: Option<Va>,
    /// The `vmap_area` object.
    pub vmap_area: Va,
    /// `vm_struct.flags` (VM_ALLOC 2, VM_MAP 4, VM_IOREMAP 1; include/linux/vmalloc.h).
    pub flags: u64,
    /// Who made it.
    pub made: Made,
    /// Guest frames of the backing pages, for VM_ALLOC areas.
    pub frames: Vec<u64>,
}

/// Offsets and addresses this room needs.
pub(super) struct Layout {
    trees: Trees,
    va_start: u64,
    va_end: u64,
    list: u64,
    vm: u64,
    /// Since 6.3.
    flags: Option<u64>,
    rb_node: u64,
    rb_left: u64,
    rb_right: u64,
    vm_size: u64,
    vm_flags: u64,
    idle: Idle,
}

/// Where areas hang that are not in use: free address space, and areas given back whose mappings are still to be purged.
struct Idle {
    /// List heads of their own.
    lists: Vec<Va>,
    /// List heads in each node: the lazy and the purge list, and the pools by size.
    in_nodes: Vec<u64>,
    /// The per-CPU pointer to a spare `vmap_area` (`ne_fit_preload_node`). It has not been cleared since it described the
    /// area that was cut up or merged last, and so may hold the address of a block that is in use by now.
    spare: Option<u64>,
}

impl Idle {
    fn new(lookup: &Lookup<'_>) -> Self {
        let names = ["free_vmap_area_list", "purge_vmap_area_list"];
        let lists = names.into_iter().filter_map(|name| lookup.symbol_if_any(name)).collect();
        // Since 6.9 a node has lists of its own, and keeps areas of up to 256 pages for the next request of that size.
        let member = |path| lookup.offset("vmap_node", path).ok();
        let mut in_nodes: Vec<u64> = ["lazy.head", "purge_list"].into_iter().filter_map(member).collect();
        if let (Some(start), Some(end)) = (member("pool"), member("pool_lock"))
            && let Ok(stride) = lookup.size_of("vmap_pool")
        {
            in_nodes.extend((start..end).step_by(stride.max(1) as usize));
        }
        Self { lists, in_nodes, spare: lookup.percpu_if_any("ne_fit_preload_node") }
    }
}

/// Where the busy areas hang.
enum Trees {
    /// One list and one tree.
    One { list: Va, root: Va },
    /// Since 6.9: an array of nodes, areas spread over it by address.
    Nodes { array: Va, count: Va, stride: u64, list: u64, root: u64 },
}

/// A `vmap_area` and what its `vm_struct` adds.
pub(super) struct Extent {
    pub start: Va,
    pub end: Va,
    /// Without guard page.
    pub size: u64,
    pub vm: Option<Va>,
    pub flags: u64,
}

impl Layout {
    pub fn new(lookup: &Lookup<'_>) -> anyhow::Result<Self> {
        let area = |member| lookup.offset("vmap_area", member);
        let trees = match lookup.symbol_if_any("vmap_nodes") {
            Some(array) => Trees::Nodes {
                array,
                count: lookup.symbol("nr_vmap_nodes")?,
                stride: lookup.size_of("vmap_node")?,
                list: lookup.offset("vmap_node", "busy.head")?,
                root: lookup.offset("vmap_node", "busy.root")?,
            },
            None => {
                Trees::One { list: lookup.symbol("vmap_area_list")?, root: lookup.symbol("vmap_area_root")? }
            }
        };
        Ok(Self {
            trees,
            va_start: area("va_start")?,
            va_end: area("va_end")?,
            list: area("list")?,
            vm: area("vm")?,
            flags: area("flags").ok(),
            rb_node: area("rb_node")?,
            rb_left: lookup.offset("rb_node", "rb_left")?,
            rb_right: lookup.offset("rb_node", "rb_right")?,
            vm_size: lookup.offset("vm_struct", "size")?,
            vm_flags: lookup.offset("vm_struct", "flags")?,
            idle: Idle::new(lookup),
        })
    }
}

impl Linux {
    /// All busy areas, ascending by address; bounded.
    ///
    /// # Errors
    /// A damaged list, with its address.
    pub fn vmalloc_areas(&self, memory: &impl PhysicalMemory) -> Result<Vec<Area>, MemoryError> {
        let busy = self.busy_vmap_areas(memory)?;
        let mut areas: Vec<Area> =
            busy.into_iter().map(|area| self.area(memory, area)).collect::<Result<_, _>>()?;
        areas.sort_by_key(|a| a.start);
        Ok(areas)
    }

    /// The `vmap_area`s in use, unsorted, bounded.
    pub(super) fn busy_vmap_areas(&self, memory: &impl PhysicalMemory) -> Result<Vec<Va>, MemoryError> {
        let mut areas = Vec::new();
        for (list, _) in self.vmap_trees(memory)? {
            // Before vmalloc_init a node's list is not set up.
            if self.read_va(memory, list)? == Va(0) {
                continue;
            }
            let nodes = self.list(memory, list, MAX_AREAS - areas.len())?;
            areas.extend(nodes.into_iter().map(|node| node - self.vmalloc.list));
        }
        Ok(areas)
    }

    /// `vmap_area`s that describe unused address space (free, or given back and not purged yet) or nothing. Their addresses
    /// are the neighbours' or those of other times, no references. Unsorted, bounded.
    ///
    /// # Errors
    /// A damaged list, with its address.
    pub fn idle_vmap_areas(&self, memory: &impl PhysicalMemory) -> Result<Vec<Va>, MemoryError> {
        let layout = &self.vmalloc;
        let mut heads = layout.idle.lists.clone();
        if let Trees::Nodes { list, .. } = layout.trees {
            for (busy, _) in self.vmap_trees(memory)? {
                heads.extend(layout.idle.in_nodes.iter().map(|&offset| busy - list + offset));
            }
        }
        let mut areas = Vec::new();
        for head in heads {
            // Before vmalloc_init a node's lists are not set up.
            if self.read_va(memory, head)? == Va(0) {
                continue;
            }
            let nodes = self.list(memory, head, MAX_AREAS - areas.len())?;
            areas.extend(nodes.into_iter().map(|node| node - layout.list));
        }
        if let Some(spare) = layout.idle.spare {
            for cpu in 0..self.cpu_count(memory)? {
                areas.push(self.read_va(memory, self.percpu_base(memory, cpu)? + spare)?);
            }
            areas.retain(|&area| area != Va(0));
        }
        Ok(areas)
    }

    /// Size in bytes of the vmalloc block at `va` as its `vm_struct` says (without guard page), for an allocation
    /// whose entry was not seen; walks `vmap_area`s by the guest's own tree, so it is O(log n).
    ///
    /// # Errors
    /// A damaged tree, with its address.
    pub fn vmalloc_size(&self, memory: &impl PhysicalMemory, va: Va) -> Result<Option<u64>, MemoryError> {
        for (_, root) in self.vmap_trees(memory)? {
            if let Some(area) = self.find_area(memory, root, va)? {
                return Ok(Some(self.extent(memory, area)?.size));
            }
        }
        Ok(None)
    }

    /// List head and tree root of each set of busy areas.
    fn vmap_trees(&self, memory: &impl PhysicalMemory) -> Result<Vec<(Va, Va)>, MemoryError> {
        match self.vmalloc.trees {
            Trees::One { list, root } => Ok(vec![(list, root)]),
            Trees::Nodes { array, count, stride, list, root } => {
                let nodes = self.read_va(memory, array)?;
                let n = self.read_u32(memory, count)?;
                if n > MAX_TREES {
                    return Err(MemoryError::Corrupt { va: count, what: "too many sets of vmalloc areas" });
                }
                let node = |i: u32| nodes + u64::from(i) * stride;
                Ok((0..n).map(|i| (node(i) + list, node(i) + root)).collect())
            }
        }
    }

    /// The `vmap_area` that starts at `va` in the tree at `root`.
    fn find_area(&self, memory: &impl PhysicalMemory, root: Va, va: Va) -> Result<Option<Va>, MemoryError> {
        let layout = &self.vmalloc;
        let mut node = self.read_va(memory, root)?;
        for _ in 0..MAX_DEPTH {
            if node == Va(0) {
                return Ok(None);
            }
            let area = node - layout.rb_node;
            let start = self.read_va(memory, area + layout.va_start)?;
            if start == va {
                return Ok(Some(area));
            }
            node = self.read_va(memory, node + if va < start { layout.rb_left } else { layout.rb_right })?;
        }
        Err(MemoryError::Corrupt { va: root, what: "the tree of vmalloc areas is too deep" })
    }

    fn area(&self, memory: &impl PhysicalMemory, vmap_area: Va) -> Result<Area, MemoryError> {
        let Extent { start, end, size, vm, flags } = self.extent(memory, vmap_area)?;
        let own = self.vmalloc.flags.map(|offset| self.read_u64(memory, vmap_area + offset)).transpose()?;
        let made = match (Made::new(vm.is_some(), flags, own), vm) {
            (Made::Map, Some(vm)) if self.is_static(memory, vm)? => Made::Other,
            (made, _) => made,
        };
        let frames = match made {
            Made::Alloc => self.backing_frames(memory, start, end - start)?,
            _ => Vec::new(),
        };
        Ok(Area { start, size, vm, vmap_area, flags, made, frames })
    }

    /// Of the image: arm64 declares its segments like that (`declare_kernel_vmas`, arch/arm64/mm/mmu.c).
    fn is_static(&self, memory: &impl PhysicalMemory, vm: Va) -> Result<bool, MemoryError> {
        let direct = self.direct_map_base(memory)?;
        Ok(vm.0.checked_sub(direct.0).is_none_or(|offset| offset >= physical_end(memory)))
    }

    pub(super) fn extent(&self, memory: &impl PhysicalMemory, vmap_area: Va) -> Result<Extent, MemoryError> {
        let layout = &self.vmalloc;
        let start = self.read_va(memory, vmap_area + layout.va_start)?;
        let end = self.read_va(memory, vmap_area + layout.va_end)?;
        if end <= start || !self.space.is_canonical(start) {
            return Err(MemoryError::Corrupt { va: vmap_area, what: "a vmalloc area ends before it starts" });
        }
        let vm = self.read_va(memory, vmap_area + layout.vm)?;
        if vm == Va(0) {
            return Ok(Extent { start, end, size: end - start, vm: None, flags: 0 });
        }
        let flags = self.read_u64(memory, vm + layout.vm_flags)?;
        let size = self.read_u64(memory, vm + layout.vm_size)?;
        let guard = if flags & VM_NO_GUARD == 0 { PAGE_SIZE } else { 0 };
        if size < guard || size > end - start {
            return Err(MemoryError::Corrupt { va: vm, what: "a vm_struct is larger than its area" });
        }
        Ok(Extent { start, end, size: size - guard, vm: Some(vm), flags })
    }

    /// Frames mapped at `[start, start + size)`, by the page tables: `vm_struct.pages` is not set for every kind of area.
    fn backing_frames(
        &self,
        memory: &impl PhysicalMemory,
        start: Va,
        size: u64,
    ) -> Result<Vec<u64>, MemoryError> {
        let limit = (physical_end(memory) >> PAGE_SHIFT) as usize;
        let mut frames = Vec::new();
        self.space.leaves(memory, start, size, |leaf| {
            let first = leaf.va.max(start);
            let end = (leaf.va + leaf.size).min(start + size);
            let frame = (leaf.pa + (first - leaf.va)).0 >> PAGE_SHIFT;
            frames.extend(frame..frame + ((end - first) >> PAGE_SHIFT));
            if frames.len() > limit { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        if frames.len() > limit {
            return Err(MemoryError::Corrupt { va: start, what: "a vmalloc area has more pages than RAM" });
        }
        Ok(frames)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_say_who_made_an_area() {
        for (has_vm, flags, own, made) in [
            (true, VM_ALLOC, None, Made::Alloc),
            // VM_MAP_PUT_PAGES: it frees its pages, which somebody else allocated.
            (true, 0x200 | VM_MAP, Some(0x100), Made::Map),
            (true, 0x1, None, Made::Other),
            (false, 0, None, Made::MapRamOrBlock),
            (false, 0, Some(0x100 | VMAP_RAM), Made::MapRam),
            (false, 0, Some(VMAP_RAM | VMAP_BLOCK), Made::Block),
            (false, 0, Some(0x100), Made::Other),
        ] {
            assert_eq!(Made::new(has_vm, flags, own), made, "{has_vm} {flags:#x} {own:?}");
        }
        assert!(Made::MapRam.is_vmap() && Made::MapRam.may_be_vmap());
        assert!(!Made::Block.is_vmap() && Made::Block.may_be_vmap() && !Made::Alloc.may_be_vmap());
    }
}
