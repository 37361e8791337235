//! What is arm64's about a Linux guest: where its parts are, and how what runs on a CPU is found.

use super::Linux;
use super::lookup::Lookup;
use crate::arch::layout::{MIN_VA_BITS, PAGE_STRUCT_SHIFT, page_end, page_offset};
use crate::arch::{AddressSpace, CpuState, Leaf, Translation};
use crate::kernel::Kernel;
use crate::memory::{FrozenMemory, MemoryError, PAGE_SHIFT, Pa, PhysicalMemory, Va};
use crate::symbols;
use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::sync::OnceLock;

/// Where this boot put the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// Run-time address minus link address of kernel text (KASLR).
    pub slide: u64,
    /// Physical address of the image's first byte (`_text`).
    pub phys_base: u64,
    /// How addresses are translated.
    pub translation: Translation,
}

impl Placement {
    /// False for what no processor does, such as in a damaged file.
    pub fn is_valid(&self) -> bool {
        self.translation.is_valid() && self.phys_base.is_multiple_of(1 << PAGE_SHIFT)
    }

    /// From a CPU that has set up its exception vectors, which are in the image: that says where it runs.
    /// `phys_base` is where the image was loaded, as it does not move itself.
    ///
    /// # Errors
    /// The CPU has not come that far, or the image says not where the vectors are.
    pub fn from_registers(kernel: &Kernel, cpu: &CpuState, phys_base: Pa) -> anyhow::Result<Self> {
        let vectors = kernel.symbols.lookup("vectors").context("The kernel image has no symbol vectors")?;
        let translation = Translation::from_tcr(cpu.tcr).context("The kernel has no page tables yet")?;
        let slide = cpu.vbar.wrapping_sub(vectors.0);
        ensure!(
            slide.is_multiple_of(1 << PAGE_SHIFT) && cpu.vbar >= page_end(translation.va_bits.into()).0,
            "VBAR_EL1 is {:#x}, not the kernel's vectors",
            cpu.vbar
        );
        Ok(Self { slide, phys_base: phys_base.0, translation })
    }

    /// What a kernel says of itself in VMCOREINFO (Documentation/admin-guide/kdump/vmcoreinfo.rst): lines `NAME=VALUE`.
    ///
    /// # Errors
    /// A line that is needed is missing or no number.
    pub fn from_vmcoreinfo(vmcoreinfo: &str) -> anyhow::Result<Self> {
        let value = |name: &str| {
            vmcoreinfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('=')).map(str::trim)
        };
        let hex = |name: &str| {
            let text = value(name).with_context(|| format!("It does not say {name}"))?;
            let digits = text.trim_start_matches("0x");
            u64::from_str_radix(digits, 16).with_context(|| format!("{name} is {text:?}"))
        };
        // Kernels that cannot be moved have no such line.
        let slide = if value("KERNELOFFSET").is_some() { hex("KERNELOFFSET")? } else { 0 };
        // `_stext` is 64 KiB behind `_text`, or in older kernels a page.
        let text = hex("SYMBOL(_stext)")? & !0xffff;
        let phys_base = text.wrapping_sub(hex("NUMBER(kimage_voffset)")?);
        let va_bits = match value("NUMBER(TCR_EL1_T1SZ)") {
            Some(_) => 64_u64.saturating_sub(hex("NUMBER(TCR_EL1_T1SZ)")?),
            None => {
                let text = value("NUMBER(VA_BITS)").context("It does not say NUMBER(VA_BITS)")?;
                text.parse().with_context(|| format!("NUMBER(VA_BITS) is {text:?}"))?
            }
        };
        let translation = Translation { va_bits: va_bits as u8, ..Translation::default() };
        ensure!(translation.is_valid(), "It says addresses have {va_bits} bits");
        Ok(Self { slide, phys_base, translation })
    }
}

/// Added to the link address of a per-CPU variable to get its distance from `__per_cpu_offset`: they are linked as part of
/// the image, and move with it.
pub(super) fn percpu_slide(placement: Placement) -> u64 {
    placement.slide
}

/// The kernel image as it is mapped: from `_stext` on. What lies before, the Image's head, is mapped in early boot alone; then its
/// memory is free, and so are its addresses, with which vmalloc space starts where the kernel did not move.
pub(super) fn image(lookup: &Lookup<'_>, placement: Placement) -> anyhow::Result<Leaf> {
    let segment = lookup.image.segments.first().context("The kernel image has no segment")?;
    ensure!(
        u32::from(placement.translation.page_shift) == PAGE_SHIFT,
        "The kernel has pages of {} KiB; only those of 4 KiB are handled",
        (1_u64 << placement.translation.page_shift) >> 10
    );
    let head = lookup.symbol("_stext")? - (segment.va + placement.slide);
    ensure!(head < segment.mem_size, "Its symbol _stext lies outside the kernel image");
    Ok(Leaf {
        va: segment.va + placement.slide + head,
        pa: Pa(placement.phys_base) + head,
        size: segment.mem_size - head,
        special: false,
    })
}

/// The kernel's reference page tables.
pub(super) fn kernel_space(
    lookup: &Lookup<'_>,
    placement: Placement,
    image: &Leaf,
) -> anyhow::Result<AddressSpace> {
    let root = image.translate(lookup.symbol("swapper_pg_dir")?);
    let root = root.context("The kernel's page table swapper_pg_dir lies outside the kernel image")?;
    Ok(AddressSpace { root, translation: placement.translation })
}

/// Where the linear map and the `struct page`s start.
pub(super) struct Bases {
    memstart_addr: Option<Va>,
    va_bits: u32,
    /// `VMEMMAP_START`, once it has been seen.
    vmemmap: OnceLock<Va>,
}

impl Bases {
    pub fn new(lookup: &Lookup<'_>, placement: Placement) -> Self {
        Self {
            memstart_addr: lookup.symbol_if_any("memstart_addr"),
            va_bits: placement.translation.va_bits.into(),
            vmemmap: OnceLock::new(),
        }
    }

    /// Bits of the addresses that the linear map was laid out for, by where that starts (`memstart_addr`): an image for 52 bits
    /// on a processor with 48 starts to count where the larger linear map would start.
    fn linear_bits(&self, memstart: u64) -> u32 {
        if memstart.cast_signed() < -(1_i64 << MIN_VA_BITS) { 52 } else { self.va_bits }
    }

    /// Where `struct page`s may start (`VMEMMAP_START`, arch/arm64/include/asm/memory.h): it moved twice, and no symbol
    /// says where to.
    fn vmemmap_candidates(&self, memstart: u64) -> [Va; 3] {
        let va_bits = self.linear_bits(memstart);
        let linear = page_end(va_bits) - page_offset(va_bits);
        let shift = PAGE_SHIFT - PAGE_STRUCT_SHIFT;
        let below_top = |bytes: u64| Va(bytes.wrapping_neg());
        [
            // 6.9 and later: below the last GiB.
            below_top((1 << 30) + (linear >> shift)),
            // 5.11 to 6.8.
            below_top(1 << (va_bits - shift)),
            // Before: below the last 2 MiB.
            below_top((2 << 20) + (linear >> shift)),
        ]
    }
}

/// Member of `struct task_struct` that has the stack pointer of a task that does not run.
pub(super) const SAVED_SP: &str = "thread.cpu_context.sp";

/// A variable of the kernel's, and from what value of it on the text is final: nobody asks yet.
pub(super) fn final_text(_lookup: &Lookup<'_>) -> Option<(Va, u64)> {
    None
}

/// Size of a kernel stack, bytes; 0 when it is not known.
pub(super) fn stack_size(lookup: &Lookup<'_>) -> u64 {
    symbols::stack_size(lookup.symbols, lookup.image).unwrap_or(0)
}

/// Where a CPU keeps what it runs.
pub(super) struct Running {
    /// Per-CPU offset of the pointer to the task running; nothing before the first switch.
    entry_task: u64,
    /// Offset of `preempt_count` in the task.
    preempt_count: u64,
}

impl Running {
    pub fn new(lookup: &Lookup<'_>) -> anyhow::Result<Self> {
        Ok(Self {
            entry_task: lookup.percpu("__entry_task")?,
            preempt_count: lookup.offset("task_struct", "thread_info.preempt.count")?,
        })
    }
}

impl Linux {
    /// Where the linear map has physical address 0 (`memstart_addr` says; KASLR may move it early in boot).
    ///
    /// # Errors
    /// The variable is not in RAM, or not set yet.
    pub fn direct_map_base(&self, memory: &impl PhysicalMemory) -> Result<Va, MemoryError> {
        let start = self.memstart(memory)?;
        Ok(page_offset(self.addresses.bases.linear_bits(start)) - start)
    }

    /// `memstart_addr`: the physical address at which the linear map starts; negative where that starts with a gap.
    fn memstart(&self, memory: &impl PhysicalMemory) -> Result<u64, MemoryError> {
        let what = "the linear map is not set up yet";
        let unset = MemoryError::Corrupt { va: self.addresses.image.va, what };
        let variable = self.addresses.bases.memstart_addr.ok_or(unset)?;
        match self.read_image_u64(memory, variable)? {
            u64::MAX => Err(unset),
            start => Ok(start),
        }
    }

    /// Start of the `struct page` array, where that of physical address 0 would be.
    ///
    /// # Errors
    /// The linear map is not set up yet, or there are no `struct page`s yet.
    pub fn page_structs_base(&self, memory: &impl PhysicalMemory) -> Result<Va, MemoryError> {
        let bases = &self.addresses.bases;
        // The array starts with the struct of the first page of the linear map.
        let memstart = self.memstart(memory)?;
        let skipped = (memstart.cast_signed() >> PAGE_SHIFT) << PAGE_STRUCT_SHIFT;
        let base = |start: Va| start - skipped as u64;
        if let Some(&start) = bases.vmemmap.get() {
            return Ok(base(start));
        }
        let frames = memory.ranges().iter().map(|range| range.start.0 >> PAGE_SHIFT << PAGE_STRUCT_SHIFT);
        let mapped =
            |start: &Va| frames.clone().any(|offset| self.space.leaf(memory, base(*start) + offset).is_ok());
        let candidates = bases.vmemmap_candidates(memstart);
        let found = candidates.into_iter().find(mapped);
        let what = "no page structures are mapped where this kernel may have them";
        let start = found.ok_or(MemoryError::Corrupt { va: candidates[0], what })?;
        Ok(base(*bases.vmemmap.get_or_init(|| start)))
    }

    /// The task running on `cpu`.
    ///
    /// # Errors
    /// The CPU's per-CPU area is not mapped (yet).
    pub fn current(&self, memory: &impl PhysicalMemory, cpu: usize) -> Result<Va, MemoryError> {
        let task = self.read_va(memory, self.percpu_base(memory, cpu)? + self.tasks.running.entry_task)?;
        Ok(if task == Va(0) { self.tasks.init_task } else { task })
    }

    /// `preempt_count` of `cpu`, which the running task has.
    pub(super) fn preempt_count(&self, memory: &impl PhysicalMemory, cpu: usize) -> Result<u32, MemoryError> {
        self.read_u32(memory, self.current(memory, cpu)? + self.tasks.running.preempt_count)
    }

    /// The top-level page tables of the kernel and of every process.
    pub(super) fn page_table_roots(&self, memory: &impl FrozenMemory) -> Result<Vec<Pa>, MemoryError> {
        let mut roots = vec![self.space.root];
        let Some(layout) = &self.processes else { return Ok(roots) };
        for task in self.tasks(memory)? {
            let mm = self.read_va(memory, task.va + layout.mm)?;
            if mm != Va(0) {
                roots.push(self.translate(memory, self.read_va(memory, mm + layout.pgd)?)?);
            }
        }
        roots.sort_unstable();
        roots.dedup();
        Ok(roots)
    }
}

/// Frames followed from the top of an interrupt stack.
const MAX_INTERRUPT_FRAMES: usize = 1024;

/// The interrupt stack of a CPU as it is mapped, and the stack pointer of what was interrupted: `call_on_irq_stack`
/// (arch/arm64/kernel/entry.S) left a frame record there, to which the chain of records on the interrupt stack leads.
pub fn interrupt_stack(linux: &Linux, memory: &impl FrozenMemory, cpu: &CpuState) -> Option<(Range<Va>, Va)> {
    let pointer = linux.percpu_base(memory, cpu.index).ok()? + linux.percpu_offset("irq_stack_ptr")?;
    let start = Va(linux.read_u64(memory, pointer).ok()?);
    let stack = start..start + linux.tasks.stack_size;
    if start == Va(0) || !start.0.is_multiple_of(1 << PAGE_SHIFT) {
        return None;
    }
    let mut record = cpu.registers.fp();
    for _ in 0..MAX_INTERRUPT_FRAMES {
        if !stack.contains(&record) {
            return Some((stack, record));
        }
        record = Va(linux.read_u64(memory, record).ok()?);
    }
    Some((stack, Va(0)))
}
