//! x86-64: ORC tables (arch/x86/include/asm/orc_types.h, arch/x86/kernel/unwind_orc.c), or frame pointers.

mod format;
mod frame_pointer;
mod memo;
#[cfg(test)]
mod memo_tests;
mod orc;
pub mod paths;
mod sleeping;
#[cfg(test)]
mod tests;
mod walk;

use super::{End, ModuleTables, StackFrame, Unwinder};
use crate::arch::Registers;
use crate::memory::Va;
pub use memo::Memo;
pub use orc::OrcTable;
pub use sleeping::SleepingFrame;
use std::ops::Range;

/// Where modules and generated code (BPF) live, and nothing else does: Documentation/arch/x86/x86_64/mm.rst,
/// "module mapping space". Kernel text, which KASLR may slide into its lower part, is looked for first.
pub(super) const MODULE_SPACE: Range<u64> = 0xffff_ffff_a000_0000..0xffff_ffff_ff00_0000;
/// Kernels have stack tables, unless they are built with frame pointers.
pub const HAS_TABLES: bool = true;

/// Registers that are only known while they are live: realigned stacks and entry code find their frame by them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(missing_docs, reason = "the names are the architecture's")]
pub struct Scratch {
    pub r10: u64,
    pub r13: u64,
    pub di: u64,
    pub dx: u64,
}

/// Where an unwind starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Start {
    /// First address of the trace.
    pub ip: Va,
    /// Stack pointer.
    pub sp: Va,
    /// Frame pointer register, whatever it holds.
    pub bp: Va,
    /// The other registers, when the code at `ip` is being executed.
    pub scratch: Option<Scratch>,
    /// `ip` is the next instruction to execute; false when it is a return address, whose call is looked up.
    pub exact: bool,
}

impl Start {
    /// A CPU about to execute the instruction at its instruction pointer.
    pub fn running(registers: &Registers) -> Self {
        Self {
            ip: registers.ip(),
            sp: registers.sp(),
            bp: Va(registers.rbp),
            scratch: Some(Scratch {
                r10: registers.r10,
                r13: registers.r13,
                di: registers.rdi,
                dx: registers.rdx,
            }),
            exact: true,
        }
    }

    /// Behind a call, at its return address, with the stack pointer and the frame pointer that are there then.
    pub fn returning(ip: Va, sp: Va, bp: Va) -> Self {
        Self { ip, sp, bp, scratch: None, exact: false }
    }

    /// A CPU at the first instructions of a function or at its return: tables tell.
    pub fn at_boundary(registers: &Registers) -> Self {
        Self::running(registers)
    }
}

/// Where the kernel would be, and its stack pointer, if it had not been led elsewhere.
#[inline]
fn in_kernel(modules: &impl ModuleTables, ip: Va, sp: Va) -> (Va, Va) {
    modules.detour(ip).map_or((ip, sp), |detour| (detour.to, sp + detour.pushed))
}

impl Unwinder<'_> {
    #[inline]
    pub(super) fn walk(
        &self,
        modules: &impl ModuleTables,
        start: &Start,
        read_word: impl FnMut(Va) -> Option<u64>,
        visit: impl FnMut(StackFrame) -> bool,
    ) -> End {
        match self.orc {
            Some(orc) => self.walk_tables(orc, modules, start, read_word, visit),
            None => self.walk_frame_pointers(modules, start, read_word, visit),
        }
    }
}
