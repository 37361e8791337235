//! What is x86-64's about a Linux guest: where its parts are, and how what runs on a CPU is found.

use super::Linux;
use super::lookup::Lookup;
use super::page_structs::Kind;
use super::read::physical_end;
use crate::arch::layout::{DIRECT_MAP_4, DIRECT_MAP_5, KERNEL_MAP, PAGE_STRUCTS_4, PAGE_STRUCTS_5};
use crate::arch::{AddressSpace, CpuState, Leaf};
use crate::hooks::{Base, IsSlab, Slabs, StubPages, Surroundings};
use crate::memory::{FrozenMemory, MemoryError, PAGE_SHIFT, PAGE_SIZE, Pa, PhysicalMemory, Va};
use anyhow::Context;
use serde::{Deserialize, Serialize};
use std::ops::Range;

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

impl Placement {
    /// False for what no processor does, such as in a damaged file.
    pub fn is_valid(&self) -> bool {
        matches!(self.levels, 4 | 5)
    }

    /// What a kernel says of itself in VMCOREINFO (Documentation/admin-guide/kdump/vmcoreinfo.rst): lines `NAME=VALUE`.
    ///
    /// # Errors
    /// A line that is needed is missing or no number.
    pub fn from_vmcoreinfo(vmcoreinfo: &str) -> anyhow::Result<Self> {
        let value = |name: &str| {
            vmcoreinfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('=')).map(str::trim)
        };
        // Kernels that cannot be moved have no such line.
        let slide = match value("KERNELOFFSET") {
            Some(text) => {
                u64::from_str_radix(text, 16).with_context(|| format!("KERNELOFFSET is {text:?}"))?
            }
            None => 0,
        };
        let base = value("NUMBER(phys_base)").context("It does not say phys_base")?;
        let base: i64 = base.parse().with_context(|| format!("phys_base is {base:?}"))?;
        let levels = if value("NUMBER(pgtable_l5_enabled)") == Some("1") { 5 } else { 4 };
        Ok(Self { slide, phys_base: slide.wrapping_add(base as u64), levels })
    }
}

/// Added to the link address of a per-CPU variable to get its distance from `__per_cpu_offset`: they are linked at 0.
pub(super) fn percpu_slide(_placement: Placement) -> u64 {
    0
}

/// The kernel image as it is mapped.
pub(super) fn image(lookup: &Lookup<'_>, placement: Placement) -> anyhow::Result<Leaf> {
    // Per-CPU data has a segment of its own at link address 0 on some kernels: no part of the mapped image.
    let mapped = || lookup.image.segments.iter().filter(|s| s.va >= KERNEL_MAP);
    let start =
        mapped().map(|s| s.va).min().context("The kernel image has no segment at kernel addresses")?;
    let end = mapped().map(|s| s.va + s.mem_size).max().unwrap_or(start);
    Ok(Leaf {
        va: start + placement.slide,
        pa: Pa(start - KERNEL_MAP) + placement.phys_base,
        size: end - start,
        special: false,
    })
}

/// The kernel's reference page tables.
pub(super) fn kernel_space(
    lookup: &Lookup<'_>,
    placement: Placement,
    image: &Leaf,
) -> anyhow::Result<AddressSpace> {
    let root = image.translate(lookup.symbol("init_top_pgt")?);
    let root = root.context("The kernel's page table init_top_pgt lies outside the kernel image")?;
    Ok(AddressSpace { root, levels: placement.levels })
}

/// Where the direct map and the `struct page`s start.
pub(super) struct Bases {
    /// None on kernels without run-time placement of the direct map: see `default_direct_map`.
    page_offset_base: Option<Va>,
    vmemmap_base: Option<Va>,
    default_direct_map: Va,
    default_page_structs: Va,
}

impl Bases {
    pub fn new(lookup: &Lookup<'_>, placement: Placement) -> Self {
        let five = placement.levels == 5;
        Self {
            page_offset_base: lookup.symbol_if_any("page_offset_base"),
            vmemmap_base: lookup.symbol_if_any("vmemmap_base"),
            default_direct_map: if five { DIRECT_MAP_5 } else { DIRECT_MAP_4 },
            default_page_structs: if five { PAGE_STRUCTS_5 } else { PAGE_STRUCTS_4 },
        }
    }
}

/// Member of `struct task_struct` that has the stack pointer of a task that does not run.
pub(super) const SAVED_SP: &str = "thread.sp";

/// A variable of the kernel's, and from what value of it on the text is final but for what is patched on the run.
pub(super) fn final_text(lookup: &Lookup<'_>) -> Option<(Va, u64)> {
    // Set behind all other patching of the image, before there are tasks (arch/x86/kernel/alternative.c).
    let patched = lookup.symbol_if_any("alternatives_patched").map(|va| (va, 1));
    patched.or_else(|| lookup.symbol_if_any("system_state").zip(lookup.enumerator("SYSTEM_RUNNING").ok()))
}

/// Size of a kernel stack, bytes; 0 when it is not known.
pub(super) fn stack_size(lookup: &Lookup<'_>) -> u64 {
    // A label near the top of the initial stack (6.10) may split the symbol's range.
    lookup.link("init_stack").map_or(0, |(_, size)| size.next_power_of_two())
}

/// Where a CPU keeps what it runs.
pub(super) struct Running {
    /// Per-CPU offset of the pointer to the running task.
    pub current: u64,
    /// Per-CPU offset of `preempt_count`.
    pub preempt_count: u64,
}

impl Running {
    pub fn new(lookup: &Lookup<'_>) -> anyhow::Result<Self> {
        // 6.2 gathered the hot per-CPU variables in `pcpu_hot`; 6.15 took it apart again.
        let hot =
            |member, alone| match (lookup.percpu_if_any("pcpu_hot"), lookup.types.offset("pcpu_hot", member))
            {
                (Some(base), Some(offset)) => Ok(base + offset),
                _ => lookup.percpu(alone),
            };
        Ok(Self {
            current: hot("current_task", "current_task")?,
            preempt_count: hot("preempt_count", "__preempt_count")?,
        })
    }
}

/// Where `X86_FEATURE_PTI` is in the array of features, bytes, and its bit (arch/x86/include/asm/cpufeatures.h).
const PTI: (u64, u32) = (7 * 4, 1 << 11);

impl Linux {
    /// What stubs read of where an event happens, in a guest with this RAM.
    ///
    /// # Errors
    /// Pages of slabs are marked in a way that stubs do not know.
    pub fn surroundings(&self, memory: &impl PhysicalMemory) -> anyhow::Result<Surroundings> {
        let layout = &self.tasks;
        Ok(Surroundings {
            current: layout.running.current,
            preempt_count: layout.running.preempt_count,
            softirq_disable_cnt: layout.softirq_disable_cnt,
            comm: layout.comm,
            pid: layout.pid,
            stack: layout.stack,
            stack_size: layout.stack_size,
            jiffies: self.addresses.jiffies_64,
            slabs: self.slabs_for_stubs(memory)?,
            pages: self.pages_for_stubs(),
        })
    }

    fn pages_for_stubs(&self) -> StubPages {
        StubPages {
            list: self.pages.list,
            flags: self.pages.flags,
            head: self.pages.head,
            order: self.page_lists.order,
            batch: self.page_lists.batch.as_ref().map(|batch| (batch.count, batch.folios)),
            bulk_has_list: self.bulk_has_list(),
        }
    }

    fn slabs_for_stubs(&self, memory: &impl PhysicalMemory) -> anyhow::Result<Slabs> {
        let base = |variable: Option<Va>, constant| variable.map_or(Base::Constant(constant), Base::Variable);
        let (bases, pages) = (&self.addresses.bases, &self.pages);
        Ok(Slabs {
            direct_map: base(bases.page_offset_base, bases.default_direct_map),
            direct_map_len: physical_end(memory),
            page_structs: base(bases.vmemmap_base, bases.default_page_structs),
            page_struct: pages.size,
            compound_head: pages.compound_head,
            is_slab: match pages.slab {
                Kind::Flag(bits) => IsSlab::Flag(pages.flags, bits),
                // The top byte of a word.
                Kind::TypeByte(value) => IsSlab::Byte(pages.page_type + 3, value as u8),
                kind => anyhow::bail!("Pages of slabs are marked in a way of their own: {kind:?}"),
            },
            slab_cache: self.slab.slab_cache,
            object_size: self.slab.object_size,
        })
    }

    /// Start of the direct map of RAM (`page_offset_base`, which KASLR moves early in boot).
    ///
    /// # Errors
    /// The variable is not in RAM.
    pub fn direct_map_base(&self, memory: &impl PhysicalMemory) -> Result<Va, MemoryError> {
        match self.addresses.bases.page_offset_base {
            Some(variable) => self.read_image_u64(memory, variable).map(Va),
            None => Ok(self.addresses.bases.default_direct_map),
        }
    }

    /// Start of the `struct page` array (`vmemmap_base`, which KASLR moves early in boot).
    ///
    /// # Errors
    /// The variable is not in RAM.
    pub fn page_structs_base(&self, memory: &impl PhysicalMemory) -> Result<Va, MemoryError> {
        match self.addresses.bases.vmemmap_base {
            Some(variable) => self.read_image_u64(memory, variable).map(Va),
            None => Ok(self.addresses.bases.default_page_structs),
        }
    }

    /// The task running on `cpu`.
    ///
    /// # Errors
    /// The CPU's per-CPU area is not mapped (yet).
    pub fn current(&self, memory: &impl PhysicalMemory, cpu: usize) -> Result<Va, MemoryError> {
        self.read_va(memory, self.percpu_base(memory, cpu)? + self.tasks.running.current)
    }

    /// `preempt_count` of `cpu`.
    pub(super) fn preempt_count(&self, memory: &impl PhysicalMemory, cpu: usize) -> Result<u32, MemoryError> {
        self.read_u32(memory, self.percpu_base(memory, cpu)? + self.tasks.running.preempt_count)
    }

    /// The top-level page tables of the kernel and of every process.
    pub(super) fn page_table_roots(&self, memory: &impl FrozenMemory) -> Result<Vec<Pa>, MemoryError> {
        // More tables than frames there are not.
        let frames = (physical_end(memory) >> PAGE_SHIFT) as usize;
        let mut roots = vec![self.space.root];
        // arch/x86/mm/fault.c: linked through the struct pages.
        if let Some(head) = self.symbol("pgd_list") {
            let places = self.page_places(memory)?;
            for link in self.list(memory, head, frames)? {
                let page = link - self.pages.list;
                let what = "a page table's link is in no struct page";
                roots.push(places.pa(page).ok_or(MemoryError::Corrupt { va: page, what })?);
            }
        }
        if self.isolates_page_tables(memory)? {
            let user = roots.iter().filter(|root| root.0 & PAGE_SIZE == 0).map(|&root| root + PAGE_SIZE);
            roots.extend(user.collect::<Vec<_>>());
        }
        Ok(roots)
    }

    /// True when the page behind each top-level table is that for user mode (arch/x86/mm/pti.c).
    fn isolates_page_tables(&self, memory: &impl FrozenMemory) -> Result<bool, MemoryError> {
        let types = self.kernel.types.as_ref();
        let features = types.and_then(|types| types.offset("cpuinfo_x86", "x86_capability"));
        match self.symbol("boot_cpu_data").zip(features) {
            Some((data, features)) => Ok(self.read_u32(memory, data + features + PTI.0)? & PTI.1 != 0),
            None => Ok(false),
        }
    }
}

/// The interrupt stack of a CPU as it is mapped, and the stack pointer of what was interrupted: the word at its top.
pub fn interrupt_stack(linux: &Linux, memory: &impl FrozenMemory, cpu: &CpuState) -> Option<(Range<Va>, Va)> {
    let types = linux.kernel.types.as_ref()?;
    let size = types.size_of("irq_stack")?;
    // 6.2 gathered the hot per-CPU variables in `pcpu_hot`.
    let offset = match (linux.percpu_offset("pcpu_hot"), types.offset("pcpu_hot", "hardirq_stack_ptr")) {
        (Some(base), Some(member)) => base + member,
        _ => linux.percpu_offset("hardirq_stack_ptr")?,
    };
    let top_word = Va(linux.read_u64(memory, linux.percpu_base(memory, cpu.index).ok()? + offset).ok()?);
    let end = top_word + 8;
    let interrupted = Va(linux.read_u64(memory, top_word).ok()?);
    (top_word.0 >= size && end.0.is_multiple_of(PAGE_SIZE)).then_some((end - size..end, interrupted))
}
