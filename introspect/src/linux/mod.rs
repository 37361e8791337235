//! A Linux guest seen through its own data structures.
//!
//! [`Linux`] joins the static [`Kernel`] with where this boot put it, and holds every structure offset
//! it needs, looked up once by member name. All lists are bounded; damage is a
//! [`MemoryError`] with the address in it.

#[cfg(test)]
mod accounting_tests;
pub mod counters;
#[cfg(test)]
mod counters_tests;
#[cfg(test)]
mod damage_tests;
mod lookup;
mod module_map;
pub mod modules;
mod page_lists;
mod page_structs;
#[cfg(test)]
mod page_structs_tests;
mod page_tables;
pub mod pages;
pub mod percpu;
pub mod processes;
mod rcu_free;
pub(crate) mod read;
mod roots;
pub mod slab;
mod slab_map;
#[cfg(test)]
mod synthetic;
pub mod tasks;
#[cfg(test)]
mod tests;
pub mod totals;
pub mod vmalloc;
pub mod vmalloc_info;
mod vmcoreinfo;
pub mod zones;

pub use module_map::ModuleMap;
pub use page_structs::{PageChunk, PagePlaces, PageStructs};
pub use read::Walk;
pub use roots::StaticRoot;

use crate::arch::layout::{DIRECT_MAP_4, DIRECT_MAP_5, KERNEL_MAP, PAGE_STRUCTS_4, PAGE_STRUCTS_5};
use crate::arch::{AddressSpace, Leaf};
use crate::kernel::Kernel;
use crate::memory::{MemoryError, Pa, PhysicalMemory, RamRange, Va};
use anyhow::Context;
use lookup::Lookup;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Most CPUs of any configuration (`NR_CPUS` with MAXSMP).
const MAX_CPUS: u64 = 8192;

/// Where this boot put the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// Run-time address minus link address of kernel text (KASLR).
    pub slide: u64,
    /// Run-time physical address minus (link address - 0xffffffff80000000) of the image:
    /// the kernel's own `phys_base` plus `slide`; 0 when loaded where linked.
    pub phys_base: u64,
    /// 4 or 5 page-table levels.
    pub levels: u8,
}

/// A view of one booted guest.
pub struct Linux {
    /// The image it runs.
    pub kernel: Arc<Kernel>,
    /// Where it runs.
    pub placement: Placement,
    /// The kernel's reference page tables (`init_top_pgt`), which map all kernel addresses.
    pub space: AddressSpace,
    hz: u64,
    addresses: Addresses,
    tasks: tasks::Layout,
    slab: slab::Layout,
    pages: page_structs::Layout,
    page_lists: page_lists::Layout,
    zones: pages::Layout,
    percpu: percpu::Layout,
    vmalloc: vmalloc::Layout,
    modules: modules::Layout,
    processes: Option<processes::Layout>,
    rcu_free: Option<rcu_free::Layout>,
}

/// Variables that everything else starts from; run-time addresses.
struct Addresses {
    /// The kernel image, which is contiguous in physical memory.
    image: Leaf,
    /// None on kernels without run-time placement of the direct map: see `default_direct_map`.
    page_offset_base: Option<Va>,
    vmemmap_base: Option<Va>,
    default_direct_map: Va,
    default_page_structs: Va,
    jiffies_64: Va,
    per_cpu_offset: Va,
    /// None on kernels built for one CPU.
    nr_cpu_ids: Option<Va>,
}

impl Linux {
    /// Looks up all offsets.
    ///
    /// # Errors
    /// Names the symbol or member that is missing.
    pub fn new(kernel: Arc<Kernel>, placement: Placement) -> anyhow::Result<Self> {
        let lookup = Lookup::new(&kernel, placement.slide)?;
        let addresses = Addresses::new(&lookup, placement)?;
        let root = addresses.image.translate(lookup.symbol("init_top_pgt")?);
        let root = root.context("The kernel's page table init_top_pgt lies outside the kernel image")?;
        Ok(Self {
            space: AddressSpace { root, levels: placement.levels },
            hz: recover_hz(&lookup)?,
            addresses,
            tasks: tasks::Layout::new(&lookup)?,
            slab: slab::Layout::new(&lookup)?,
            pages: page_structs::Layout::new(&lookup)?,
            page_lists: page_lists::Layout::new(&lookup),
            zones: pages::Layout::new(&lookup)?,
            percpu: percpu::Layout::new(&lookup)?,
            vmalloc: vmalloc::Layout::new(&lookup)?,
            modules: modules::Layout::new(&lookup)?,
            processes: processes::Layout::new(&lookup),
            rcu_free: rcu_free::Layout::new(&lookup),
            placement,
            kernel,
        })
    }

    /// For what only some commands ask for: looked up when they do, so that a kernel without it has the others.
    fn lookup(&self) -> anyhow::Result<Lookup<'_>> {
        Lookup::new(&self.kernel, self.placement.slide)
    }

    /// Run-time address of a text or data symbol.
    pub fn symbol(&self, name: &str) -> Option<Va> {
        self.kernel.symbols.lookup(name).map(|va| va + self.placement.slide)
    }

    /// Where the kernel maps its image, and where that is: both contiguous.
    pub fn image_mapping(&self) -> (Va, RamRange) {
        let Leaf { va, pa, size, .. } = self.addresses.image;
        (va, RamRange { start: pa, len: size })
    }

    /// `jiffies_64` (low word of what kmemleak prints; kmemleak prints `jiffies`).
    ///
    /// # Errors
    /// The variable is not in RAM.
    pub fn jiffies(&self, memory: &impl PhysicalMemory) -> Result<u64, MemoryError> {
        self.read_u64(memory, self.addresses.jiffies_64)
    }

    /// Ticks per second of `jiffies` (from `CONFIG_HZ`; recovered, not guessed).
    pub fn hz(&self) -> u64 {
        self.hz
    }

    /// Number of possible CPUs (`nr_cpu_ids`).
    ///
    /// # Errors
    /// The variable is not in RAM, or is out of range.
    pub fn cpu_count(&self, memory: &impl PhysicalMemory) -> Result<usize, MemoryError> {
        let Some(va) = self.addresses.nr_cpu_ids else { return Ok(1) };
        let count = self.read_u32(memory, va)?;
        if count == 0 || u64::from(count) > MAX_CPUS {
            return Err(MemoryError::Corrupt { va, what: "the number of CPUs is out of range" });
        }
        Ok(count as usize)
    }

    /// `__per_cpu_offset[cpu]`; valid from the first instruction on (the image holds the boot value).
    ///
    /// # Errors
    /// The table is not in RAM.
    pub fn percpu_base(&self, memory: &impl PhysicalMemory, cpu: usize) -> Result<Va, MemoryError> {
        let table = self.addresses.per_cpu_offset;
        if cpu as u64 >= MAX_CPUS {
            return Err(MemoryError::Corrupt { va: table, what: "no such CPU" });
        }
        self.read_va(memory, table + 8 * cpu as u64)
    }
}

impl Addresses {
    fn new(lookup: &Lookup<'_>, placement: Placement) -> anyhow::Result<Self> {
        // Per-CPU data has a segment of its own at link address 0 on some kernels: no part of the mapped image.
        let mapped = || lookup.image.segments.iter().filter(|s| s.va >= KERNEL_MAP);
        let start =
            mapped().map(|s| s.va).min().context("The kernel image has no segment at kernel addresses")?;
        let end = mapped().map(|s| s.va + s.mem_size).max().unwrap_or(start);
        let five = placement.levels == 5;
        Ok(Self {
            image: Leaf {
                va: start + placement.slide,
                pa: Pa(start - KERNEL_MAP) + placement.phys_base,
                size: end - start,
                special: false,
            },
            page_offset_base: lookup.symbol_if_any("page_offset_base"),
            vmemmap_base: lookup.symbol_if_any("vmemmap_base"),
            default_direct_map: if five { DIRECT_MAP_5 } else { DIRECT_MAP_4 },
            default_page_structs: if five { PAGE_STRUCTS_5 } else { PAGE_STRUCTS_4 },
            jiffies_64: lookup.symbol("jiffies_64")?,
            per_cpu_offset: lookup.symbol("__per_cpu_offset")?,
            nr_cpu_ids: lookup.symbol_if_any("nr_cpu_ids"),
        })
    }
}

/// `CONFIG_HZ` from the image: `jiffies_64` starts five minutes before its low word wraps
/// (include/linux/jiffies.h, `INITIAL_JIFFIES`), so its initial value holds the number of ticks in 300 s.
fn recover_hz(lookup: &Lookup<'_>) -> anyhow::Result<u64> {
    const SECONDS: u32 = 300;
    let (va, _) = lookup.link("jiffies_64").context("The kernel image has no symbol jiffies_64")?;
    let initial = lookup.image.bytes_at(va, 4).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes);
    let ticks = initial.context("The initial value of jiffies_64 is not in the kernel image")?.wrapping_neg();
    anyhow::ensure!(
        ticks != 0 && ticks.is_multiple_of(SECONDS) && ticks / SECONDS <= 10_000,
        "The initial value of jiffies_64 gives no tick rate: {ticks} ticks in {SECONDS} s"
    );
    Ok(u64::from(ticks / SECONDS))
}
