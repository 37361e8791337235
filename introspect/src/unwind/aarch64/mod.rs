//! arm64: frame pointers (arch/arm64/kernel/stacktrace.c). Each function keeps a frame record, `[caller's x29][return address]`,
//! where x29 points; return addresses may be signed.

mod memo;
mod sleeping;
#[cfg(test)]
mod tests;
mod walk;

use crate::arch::Registers;
use crate::image::KernelImage;
use crate::memory::Va;
use crate::symbols::SymbolTable;
use crate::types::Btf;
pub use memo::Memo;
pub use sleeping::SleepingFrame;
use std::ops::Range;

/// Where the image, modules and generated code (BPF) live (Documentation/arch/arm64/memory.rst): above the linear map, whatever
/// the size of addresses up to 48 bits. Kernel text is looked for first.
pub(super) const MODULE_SPACE: Range<u64> = 0xffff_8000_0000_0000..0xffff_fc00_0000_0000;

/// Kernels have stack tables.
pub const HAS_TABLES: bool = false;

/// Stack tables: arm64 kernels have none.
pub enum OrcTable {}

impl OrcTable {
    /// Always an error: stacks are unwound along frame pointers.
    ///
    /// # Errors
    /// Always.
    pub fn recover(_: &KernelImage, _: &SymbolTable, _: Option<&Btf>) -> anyhow::Result<Self> {
        anyhow::bail!("arm64 kernels have frame pointers instead")
    }

    /// Tables of a module.
    pub fn from_module(&self, _ip_va: Va, _ips: &[u8], _entries: &[u8]) -> Option<Self> {
        match *self {}
    }

    /// Which encoding they have.
    pub fn encoding(&self) -> &'static str {
        match *self {}
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        match *self {}
    }

    /// True when there is no entry.
    pub fn is_empty(&self) -> bool {
        match *self {}
    }
}

/// The link register at the start of an unwind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Link {
    /// Nothing: the code at the start is not being executed.
    #[default]
    Lost,
    /// Its value. Whether that still is the return address has to be seen.
    Register(u64),
    /// Its value, which is the return address: the function has no frame record at the start.
    ReturnAddress(u64),
}

/// Where an unwind starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Start {
    /// First address of the trace.
    pub ip: Va,
    /// Stack pointer.
    pub sp: Va,
    /// Frame pointer: the frame record of the function at `ip`, or of its caller where it has none yet or no more.
    pub fp: Va,
    /// What is known of the link register.
    pub link: Link,
    /// `ip` is the next instruction to execute; false when it is a return address, whose call is looked up.
    pub exact: bool,
}

impl Start {
    /// A CPU about to execute the instruction at its instruction pointer.
    pub fn running(registers: &Registers) -> Self {
        Self {
            ip: registers.ip(),
            sp: registers.sp(),
            fp: registers.fp(),
            link: Link::Register(registers.link()),
            exact: true,
        }
    }

    /// The same of a CPU at the first instructions of a function, before it has made its frame record, or at its return.
    pub fn at_boundary(registers: &Registers) -> Self {
        Self { link: Link::ReturnAddress(registers.link()), ..Self::running(registers) }
    }
}
