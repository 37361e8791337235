//! Instruction caches, which do not see what is written through the host's mapping of guest memory.

use crate::machine::GuestRam;
use introspect::memory::Pa;
use std::arch::asm;

/// Makes what was written to guest memory at `at` what every CPU executes from there on. KVM does the same for a page that it
/// maps for the first time.
pub fn synchronise_code(ram: &GuestRam, at: Pa, len: usize) {
    let end = at.0.saturating_add(len as u64);
    for (range, host) in ram.mappings() {
        let (from, to) = (at.0.max(range.start.0), end.min(range.start.0 + range.len));
        if from < to {
            let start = (host + (from - range.start.0)) as usize;
            // SAFETY: the range is within the mapping.
            unsafe { synchronise(start, start + (to - from) as usize) };
        }
    }
}

/// Cleans data to where instructions come from, and drops instructions (Arm ARM, B2.4.4 "Concurrent modification and execution
/// of instructions").
///
/// # Safety
/// The addresses from `start` to `end` are mapped.
unsafe fn synchronise(start: usize, end: usize) {
    let types: usize;
    // SAFETY: reading CTR_EL0 has no effects, and Linux lets user mode do it.
    unsafe { asm!("mrs {}, ctr_el0", out(reg) types, options(nomem, nostack, preserves_flags)) };
    // Sizes of the smallest lines, in words: DminLine and IminLine (Arm ARM, CTR_EL0).
    let (data, code) = (4 << (types >> 16 & 0xf), 4 << (types & 0xf));
    for line in (start & !(data - 1)..end).step_by(data) {
        // SAFETY: mapped by the caller's promise, at least the first byte in the range.
        unsafe { asm!("dc cvau, {}", in(reg) line, options(nostack, preserves_flags)) };
    }
    // SAFETY: a barrier.
    unsafe { asm!("dsb ish", options(nostack, preserves_flags)) };
    for line in (start & !(code - 1)..end).step_by(code) {
        // SAFETY: as above.
        unsafe { asm!("ic ivau, {}", in(reg) line, options(nostack, preserves_flags)) };
    }
    // SAFETY: barriers.
    unsafe { asm!("dsb ish", "isb", options(nostack, preserves_flags)) };
}
