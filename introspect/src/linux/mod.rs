//! A Linux guest seen through its own data structures.
//!
//! [`Linux`] joins the static [`Kernel`] with where this boot put it, and holds every structure offset
//! it needs, looked up once by member name. All lists are bounded; damage is a
//! [`MemoryError`] with the address in it.

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(all(test, target_arch = "x86_64"))]
mod accounting_tests;
pub mod counters;
#[cfg(all(test, target_arch = "x86_64"))]
mod counters_tests;
#[cfg(all(test, target_arch = "x86_64"))]
mod damage_tests;
mod lookup;
mod module_map;
pub mod modules;
mod page_lists;
mod page_structs;
#[cfg(all(test, target_arch = "x86_64"))]
mod page_structs_tests;
mod page_tables;
pub mod pages;
pub mod percpu;
pub mod processes;
mod rcu_free;
pub(crate) mod read;
mod recorded;
mod roots;
pub mod slab;
mod slab_map;
#[cfg(all(test, target_arch = "x86_64"))]
mod synthetic;
pub mod tasks;
#[cfg(all(test, target_arch = "x86_64"))]
mod tests;
pub mod totals;
pub mod vmalloc;
pub mod vmalloc_info;
mod vmcoreinfo;
#[cfg(target_arch = "x86_64")]
mod x86_64;
pub mod zones;

#[cfg(target_arch = "aarch64")]
use aarch64 as platform;
pub use module_map::ModuleMap;
pub use page_structs::{PageChunk, PagePlaces, PageStructs};
pub use platform::{Placement, interrupt_stack};
pub use read::Walk;
pub use roots::StaticRoot;
#[cfg(target_arch = "x86_64")]
use x86_64 as platform;

use crate::arch::{AddressSpace, Leaf};
use crate::kernel::Kernel;
use crate::memory::{MemoryError, PhysicalMemory, RamRange, Va};
use anyhow::Context;
use lookup::Lookup;
use std::sync::Arc;

/// Most CPUs of any configuration (`NR_CPUS` with MAXSMP).
const MAX_CPUS: u64 = 8192;

/// A view of one booted guest.
pub struct Linux {
    /// The image it runs.
    pub kernel: Arc<Kernel>,
    /// Where it runs.
    pub placement: Placement,
    /// The kernel's reference page tables (`init_top_pgt`, `swapper_pg_dir`), which map all kernel addresses.
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
    bases: platform::Bases,
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
        let lookup = Lookup::new(&kernel, placement)?;
        let addresses = Addresses::new(&lookup, placement)?;
        Ok(Self {
            space: platform::kernel_space(&lookup, placement, &addresses.image)?,
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
        Lookup::new(&self.kernel, self.placement)
    }

    /// Run-time address of a text or data symbol.
    pub fn symbol(&self, name: &str) -> Option<Va> {
        self.kernel.symbols.lookup(name).map(|va| va + self.placement.slide)
    }

    /// What is added to a per-CPU variable's link address to get [`Linux::percpu_offset`].
    pub fn percpu_slide(&self) -> u64 {
        platform::percpu_slide(self.placement)
    }

    /// Distance of a per-CPU variable from each CPU's [`Linux::percpu_base`].
    pub fn percpu_offset(&self, name: &str) -> Option<u64> {
        self.lookup().ok()?.percpu_if_any(name)
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

    /// Seconds since the guest's clock began to tick, by which `jiffies` have not wrapped yet.
    ///
    /// # Errors
    /// The variable is not in RAM.
    pub fn uptime_s(&self, memory: &impl PhysicalMemory) -> Result<u64, MemoryError> {
        let first = (1 << 32) - TICKS_FROM_S * self.hz;
        Ok(self.jiffies(memory)?.saturating_sub(first) / self.hz)
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
        Ok(Self {
            image: platform::image(lookup, placement)?,
            bases: platform::Bases::new(lookup, placement),
            jiffies_64: lookup.symbol("jiffies_64")?,
            per_cpu_offset: lookup.symbol("__per_cpu_offset")?,
            nr_cpu_ids: lookup.symbol_if_any("nr_cpu_ids"),
        })
    }
}

/// `jiffies_64` starts so many seconds before its low word wraps (include/linux/jiffies.h, `INITIAL_JIFFIES`).
const TICKS_FROM_S: u64 = 300;

/// `CONFIG_HZ` from the image: the initial value of `jiffies_64` holds the number of ticks in [`TICKS_FROM_S`].
fn recover_hz(lookup: &Lookup<'_>) -> anyhow::Result<u64> {
    const SECONDS: u32 = TICKS_FROM_S as u32;
    let (va, _) = lookup.link("jiffies_64").context("The kernel image has no symbol jiffies_64")?;
    let initial = lookup.image.bytes_at(va, 4).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes);
    let ticks = initial.context("The initial value of jiffies_64 is not in the kernel image")?.wrapping_neg();
    anyhow::ensure!(
        ticks != 0 && ticks.is_multiple_of(SECONDS) && ticks / SECONDS <= 10_000,
        "The initial value of jiffies_64 gives no tick rate: {ticks} ticks in {SECONDS} s"
    );
    Ok(u64::from(ticks / SECONDS))
}
