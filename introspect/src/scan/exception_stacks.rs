//! Stacks that a CPU changes to for exceptions that can come at any time: non-maskable interrupts, double faults, machine
//! checks, debug exceptions (arch/x86/include/asm/cpu_entry_area.h). They lie in the CPU's static per-CPU data, and hold stale
//! words but for the moments in which they are in use.

use crate::linux::Linux;
use crate::memory::{PAGE_SIZE, PhysicalMemory, Va};
use std::ops::Range;

/// Those of a CPU, guard pages included; None when the kernel has none like these.
pub(super) fn exception_stacks(linux: &Linux, memory: &impl PhysicalMemory, cpu: usize) -> Option<Range<Va>> {
    let types = linux.kernel.types.as_ref()?;
    let size = types.size_of("exception_stacks").filter(|size| size.is_multiple_of(PAGE_SIZE))?;
    let symbol = linux.kernel.symbols.lookup("exception_stacks").map(|va| va.0);
    let offset = symbol.or_else(|| types.percpu_offset("exception_stacks"))?;
    let start = linux.percpu_base(memory, cpu).ok()? + offset;
    start.0.is_multiple_of(PAGE_SIZE).then(|| start..start + size)
}
