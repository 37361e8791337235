//! What /proc/vmallocinfo shows of the vmalloc space: who made each area, and what is behind it.

use super::Linux;
use super::vmalloc::Extent;
use crate::memory::{PhysicalMemory, Va};
use rustc_hash::FxHashSet;

/// `vm_struct.flags` and the words the file has for them (include/linux/vmalloc.h, mm/vmalloc.c).
const FLAGS: [(u64, &str); 6] = [
    (0x1, "ioremap"),
    (0x2, "vmalloc"),
    (0x4, "vmap"),
    (0x1000, "sparse"),
    (0x8, "user"),
    (0x10, "dma-coherent"),
];

/// A busy area and its `vm_struct`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AreaInfo {
    /// First address.
    pub start: Va,
    /// Bytes of address space, the guard page included.
    pub size: u64,
    /// Code address that asked for it; None where the kernel does not say.
    pub caller: Option<Va>,
    /// Pages that belong to it.
    pub pages: u64,
    /// What it maps, for device memory.
    pub physical: Option<u64>,
    /// What it is, in the file's words.
    pub flags: Vec<&'static str>,
}

impl Linux {
    /// All busy areas, ascending by address; bounded.
    ///
    /// # Errors
    /// A kernel without the types it needs, or a damaged list or area, with its address.
    pub fn vmalloc_info(&self, memory: &impl PhysicalMemory) -> anyhow::Result<Vec<AreaInfo>> {
        let lookup = self.lookup()?;
        let vm = |member| lookup.offset("vm_struct", member);
        let (size, caller, pages) = (vm("size")?, vm("caller")?, vm("pages")?);
        let (count, physical) = (vm("nr_pages")?, vm("phys_addr")?);
        let mut areas = Vec::new();
        let mut tables = Vec::new();
        for area in self.busy_vmap_areas(memory)? {
            let Extent { start, end, vm, flags, .. } = self.extent(memory, area)?;
            let Some(vm) = vm else {
                areas.push(AreaInfo::without_structure(start, end));
                tables.push(Va(0));
                continue;
            };
            let flags = FLAGS.iter().filter(|(bit, _)| flags & bit != 0).map(|&(_, word)| word);
            areas.push(AreaInfo {
                start,
                size: self.read_u64(memory, vm + size)?,
                caller: Some(self.read_va(memory, vm + caller)?).filter(|&va| va != Va(0)),
                pages: self.read_u32(memory, vm + count)?.into(),
                physical: Some(self.read_u64(memory, vm + physical)?).filter(|&pa| pa != 0),
                flags: flags.collect(),
            });
            tables.push(self.read_va(memory, vm + pages)?);
        }
        // The table of a large area's pages is an area itself.
        let starts: FxHashSet<Va> = areas.iter().map(|area| area.start).collect();
        for (area, table) in areas.iter_mut().zip(tables) {
            if starts.contains(&table) {
                area.flags.push("vpages");
            }
        }
        areas.sort_by_key(|area| area.start);
        Ok(areas)
    }
}

impl AreaInfo {
    /// An area of `vm_map_ram`, which has no `vm_struct`.
    fn without_structure(start: Va, end: Va) -> Self {
        Self { start, size: end - start, caller: None, pages: 0, physical: None, flags: vec!["vm_map_ram"] }
    }
}
