//! Stack unwinding with the kernel's own ORC tables, or along frame pointers for a kernel without them, as all arm64 ones are.
//!
//! A pure unwinder: the caller says where to start ([`Start`]), how to read a word of the stack, and which modules
//! there are ([`ModuleTables`]); it gets return addresses as the kernel's stack_trace_save would. It runs at every
//! traced event, so nothing is allocated and every step emits one frame: the length of the output bounds the work
//! whatever the tables and the stack hold.
//!
//! Code of the tracer's that stands for some of the kernel's leaves no trace of its own ([`Detour`]).
//!
//! What it does not know: code copied by ftrace and kprobes (trampolines) and the real return addresses behind
//! `return_to_handler` (function graph tracer, kretprobes), which are in no table. Generated code is assumed to
//! keep a frame pointer, as the kernel's unwinder assumes.

#[cfg(target_arch = "aarch64")]
mod aarch64;
mod detours;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use crate::image::KernelImage;
use crate::linux::ModuleMap;
use crate::memory::Va;
use crate::symbols::SymbolTable;
#[cfg(target_arch = "aarch64")]
use aarch64 as platform;
pub use detours::{Detour, Detours};
use platform::MODULE_SPACE;
pub use platform::{HAS_TABLES, Memo, OrcTable, SleepingFrame, Start};
#[cfg(target_arch = "x86_64")]
use x86_64 as platform;
#[cfg(target_arch = "x86_64")]
pub use x86_64::paths;

/// Stacks that can be nested in one another on a CPU: task, entry, interrupt, overflow, and one per exception type with its
/// own (arch/x86/include/asm/page_64_types.h, arch/arm64/include/asm/stacktrace.h). Going down in memory more often is no
/// stack.
const MAX_STACKS: u32 = 8;

/// Why a trace ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Nobody called the last frame: the bottom of a kernel thread's or an idle task's stack.
    Complete,
    /// User code entered the kernel there.
    User,
    /// The output is full.
    Full,
    /// The tables do not describe the code at this address.
    Undefined(Va),
    /// No code can be at this address, which the stack holds as a return address.
    NotCode(Va),
    /// The stack cannot be read at this address.
    Unreadable(Va),
    /// The frame of the code at this address hangs on a register whose value is lost.
    MissingRegister(Va),
    /// The tables' entry for the code at this address makes no sense.
    BadEntry(Va),
    /// The caller of the code at this address would lie below it on the stack.
    Backwards(Va),
}

impl End {
    /// True when no frame is missing.
    pub fn is_whole(self) -> bool {
        matches!(self, Self::Complete | Self::User)
    }
}

/// One function's part of a stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StackFrame {
    /// Where the function goes on: the start, or a return address.
    pub ip: Va,
    /// Stack pointer when it does.
    pub sp: Va,
    /// As [`Start::exact`].
    pub exact: bool,
}

/// What an unwind came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trace {
    /// Frames written.
    pub len: usize,
    /// Why there are no more.
    pub end: End,
}

/// Stack tables of modules by run-time address, and what is in no table.
pub trait ModuleTables {
    /// The tables (run-time addresses) of the module whose code is at `ip`.
    fn table(&self, ip: Va) -> Option<&OrcTable>;

    /// What the code at `ip` stands for, if it does for some of the kernel's.
    fn detour(&self, _ip: Va) -> Option<&Detour> {
        None
    }
}

/// No modules.
impl ModuleTables for () {
    fn table(&self, _ip: Va) -> Option<&OrcTable> {
        None
    }
}

impl ModuleTables for ModuleMap {
    fn table(&self, ip: Va) -> Option<&OrcTable> {
        self.orc(ip)
    }

    fn detour(&self, ip: Va) -> Option<&Detour> {
        self.detours.find(ip)
    }
}

/// Where the kernel image's code lies, link addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Text {
    /// Start and end of code and of code used at boot only.
    ranges: [(u64, u64); 2],
}

impl Text {
    /// From the symbols around it, else from the sections.
    ///
    /// # Errors
    /// When there is neither.
    pub fn recover(image: &KernelImage, symbols: &SymbolTable) -> anyhow::Result<Self> {
        let range = |start: &str, end: &str, section: &str| {
            let by_symbols = symbols.lookup(start).zip(symbols.lookup(end));
            by_symbols.map(|(start, end)| (start.0, end.0)).or_else(|| {
                let section = image.section(section)?;
                Some((section.va.0, section.va.0.checked_add(section.size)?))
            })
        };
        let Some(text) = range("_stext", "_etext", ".text") else {
            anyhow::bail!("The kernel image says nowhere where its code is: no _stext, no section .text");
        };
        let init = range("_sinittext", "_einittext", ".init.text").unwrap_or_default();
        Ok(Self { ranges: [text, init] })
    }

    /// True for a link address of code.
    #[inline]
    pub fn contains(&self, link: Va) -> bool {
        self.ranges.iter().any(|&(start, end)| start <= link.0 && link.0 < end)
    }
}

/// Unwinds kernel stacks of one booted guest. Cheap to make and to copy.
#[derive(Clone, Copy)]
pub struct Unwinder<'a> {
    orc: Option<&'a OrcTable>,
    text: Text,
    slide: u64,
}

impl<'a> Unwinder<'a> {
    /// With the image's stack tables, or along frame pointers when it has none. `slide` is run-time minus link
    /// address.
    pub fn new(orc: Option<&'a OrcTable>, text: Text, slide: u64) -> Self {
        Self { orc, text, slide }
    }

    /// Writes the start address and then return addresses, innermost first, to `out`.
    ///
    /// `read_word` reads the guest's memory; None from it ends the trace.
    pub fn unwind(
        &self,
        modules: &impl ModuleTables,
        start: &Start,
        read_word: impl FnMut(Va) -> Option<u64>,
        out: &mut [Va],
    ) -> Trace {
        let mut len = 0;
        let end = self.visit(modules, start, read_word, |frame| {
            if let Some(slot) = out.get_mut(len) {
                *slot = frame.ip;
                len += 1;
            }
            len < out.len()
        });
        Trace { len, end }
    }

    /// The same of a backtrace whose first `known` frames are in `out` already, and which goes on at `start` if that can be.
    pub fn unwind_on(
        &self,
        modules: &impl ModuleTables,
        start: &Start,
        read_word: impl FnMut(Va) -> Option<u64>,
        (out, known): (&mut [Va], usize),
    ) -> Trace {
        if known > 0 && !self.is_code(start.ip, start.exact) {
            return Trace { len: known, end: End::NotCode(start.ip) };
        }
        let trace = self.unwind(modules, start, read_word, &mut out[known..]);
        Trace { len: known + trace.len, ..trace }
    }

    /// Calls `visit` for the start and then for each caller, innermost first, for as long as it returns true; that
    /// alone bounds the walk.
    #[inline]
    pub fn visit(
        &self,
        modules: &impl ModuleTables,
        start: &Start,
        read_word: impl FnMut(Va) -> Option<u64>,
        visit: impl FnMut(StackFrame) -> bool,
    ) -> End {
        self.walk(modules, start, read_word, visit)
    }

    /// As the kernel's __kernel_text_address, which ends its traces; modules cannot be told from other uses of
    /// their space.
    #[inline]
    fn is_code(&self, ip: Va, exact: bool) -> bool {
        let called = if exact { ip } else { ip - 1 };
        self.is_kernel_text(called) || MODULE_SPACE.contains(&called.0)
    }

    #[inline]
    fn is_kernel_text(&self, ip: Va) -> bool {
        self.text.contains(ip - self.slide)
    }
}

/// Reads a word of the stack or ends the trace.
#[inline]
fn word(read: &mut impl FnMut(Va) -> Option<u64>, va: Va) -> Result<u64, End> {
    read(va).ok_or(End::Unreadable(va))
}
