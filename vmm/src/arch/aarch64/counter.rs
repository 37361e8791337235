//! The frequency of this machine's counter.

use std::arch::asm;

/// In kHz.
pub fn counter_khz() -> u64 {
    let frequency: u64;
    // SAFETY: reading CNTFRQ_EL0 has no effects, and Linux lets user mode do it.
    unsafe { asm!("mrs {}, cntfrq_el0", out(reg) frequency, options(nomem, nostack, preserves_flags)) };
    frequency / 1000
}
