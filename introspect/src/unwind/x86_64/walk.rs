//! One frame after the other by ORC entries (arch/x86/kernel/unwind_orc.c, unwind_next_frame).

use super::format::{Base, Entry, Frame};
use super::{MODULE_SPACE, OrcTable, Scratch, Start, in_kernel};
use crate::memory::Va;
use crate::unwind::{End, MAX_STACKS, ModuleTables, StackFrame, Unwinder, word};

/// Bytes of a word, and of a return address.
pub(super) const WORD: u64 = 8;

/// Offsets in `struct pt_regs` (arch/x86/include/asm/ptrace.h); entry code pushes them in this order.
pub(super) mod pt_regs {
    pub const R13: u64 = 16;
    pub const BP: u64 = 32;
    pub const R10: u64 = 56;
    pub const DX: u64 = 96;
    pub const DI: u64 = 112;
    /// From here on the processor pushes (Intel SDM volume 3, 6.14.2).
    pub const IP: u64 = 128;
    pub const CS: u64 = 136;
    pub const SP: u64 = 152;
}
/// Privilege level in a code segment selector, and user code's.
const CS_LEVEL: u64 = 3;

/// Where registers other than ip, sp and bp can be had.
#[derive(Clone, Copy)]
enum Source {
    Nowhere,
    Live(Scratch),
    /// A `struct pt_regs` at this address.
    Saved(Va),
}

/// The frame being looked at.
struct Position {
    ip: Va,
    sp: Va,
    bp: Va,
    exact: bool,
    /// A task begins here that never ran.
    new: bool,
    source: Source,
    /// How often the stack pointer went down.
    descents: u32,
}

impl Unwinder<'_> {
    pub(super) fn walk_tables(
        &self,
        orc: &OrcTable,
        modules: &impl ModuleTables,
        start: &Start,
        mut read: impl FnMut(Va) -> Option<u64>,
        mut visit: impl FnMut(StackFrame) -> bool,
    ) -> End {
        let &Start { ip, sp, bp, scratch, exact } = start;
        let source = scratch.map_or(Source::Nowhere, Source::Live);
        let (ip, sp) = in_kernel(modules, ip, sp);
        let new = exact && scratch.is_none();
        let mut at = Position { ip, sp, bp, exact, new, source, descents: 0 };
        while visit(StackFrame { ip: at.ip, sp: at.sp, exact: at.exact }) {
            let called = if at.exact { at.ip } else { at.ip - 1 };
            let entry = match self.entry(orc, modules, called) {
                Some(entry) => entry,
                // The start is emitted whatever it is; anything later has been checked before.
                None => return End::NotCode(at.ip),
            };
            if let Err(end) = at.step(&entry, &mut read) {
                return end;
            }
            (at.ip, at.sp) = in_kernel(modules, at.ip, at.sp);
            if !self.is_code(at.ip, at.exact) {
                return End::NotCode(at.ip);
            }
        }
        End::Full
    }

    #[inline]
    pub(super) fn entry(&self, orc: &OrcTable, modules: &impl ModuleTables, ip: Va) -> Option<Entry> {
        if self.is_kernel_text(ip) {
            orc.find(ip - self.slide).copied()
        } else if let Some(table) = modules.table(ip) {
            table.find(ip).copied()
        } else {
            MODULE_SPACE.contains(&ip.0).then_some(Entry::FRAME_POINTER)
        }
    }
}

impl Position {
    /// Goes to the caller. The order of the kernel's function matters: registers found by this frame give the
    /// caller's bp.
    #[inline]
    fn step(&mut self, entry: &Entry, read: &mut impl FnMut(Va) -> Option<u64>) -> Result<(), End> {
        match entry.frame {
            Frame::Undefined => return Err(End::Undefined(self.ip)),
            // Up to 6.2 code that jumps on to whatever called it asked for is described like the bottom of a stack (the thunks
            // of arch/x86/lib/retpoline.S, UNWIND_HINT_EMPTY). At the bottom somebody called.
            Frame::End if self.exact && !self.new => return Err(End::Undefined(self.ip)),
            Frame::End => return Err(End::Complete),
            Frame::Unknown => return Err(End::BadEntry(self.ip)),
            Frame::Call | Frame::Registers | Frame::Interrupt => {}
        }
        let (ip, sp_before) = (self.ip, self.sp);
        let top = self.top(entry, read)?;
        match entry.frame {
            Frame::Registers => {
                self.enter(top + pt_regs::IP, read)?;
                self.source = Source::Saved(top);
            }
            // Registers saved by the frame before are still what they were.
            Frame::Interrupt => self.enter(top, read)?,
            _ => {
                self.ip = Va(word(read, top - WORD)?);
                self.sp = top;
                self.source = Source::Nowhere;
            }
        }
        self.bp = self.caller_bp(entry, top, ip, read)?;
        (self.exact, self.new) = (entry.signal, false);
        if self.sp <= sp_before {
            self.descents += 1;
            let same_stack = entry.frame == Frame::Call && matches!(entry.sp, Base::Sp | Base::Bp);
            if same_stack || self.descents > MAX_STACKS {
                return Err(End::Backwards(ip));
            }
        }
        Ok(())
    }

    /// The stack pointer before the frame was made.
    #[inline]
    fn top(&self, entry: &Entry, read: &mut impl FnMut(Va) -> Option<u64>) -> Result<Va, End> {
        let offset = i64::from(entry.sp_offset) as u64;
        let mut register = |live: fn(&Scratch) -> u64, saved| match self.source {
            Source::Nowhere => Err(End::MissingRegister(self.ip)),
            Source::Live(scratch) => Ok(live(&scratch)),
            Source::Saved(regs) => word(read, regs + saved),
        };
        Ok(match entry.sp {
            Base::Sp => self.sp + offset,
            Base::Bp => self.bp + offset,
            // The switch to another stack left the old pointer there. One offset is added before, the other
            // after loading.
            Base::SpIndirect => Va(word(read, self.sp)?) + offset,
            Base::BpIndirect => Va(word(read, self.bp + offset)?),
            Base::R10 => Va(register(|s| s.r10, pt_regs::R10)?),
            Base::R13 => Va(register(|s| s.r13, pt_regs::R13)?),
            Base::Di => Va(register(|s| s.di, pt_regs::DI)?),
            Base::Dx => Va(register(|s| s.dx, pt_regs::DX)?),
            Base::Undefined | Base::PreviousSp | Base::Unknown => return Err(End::BadEntry(self.ip)),
        })
    }

    /// Takes ip and sp from what an interrupt pushed at `pushed`.
    fn enter(&mut self, pushed: Va, read: &mut impl FnMut(Va) -> Option<u64>) -> Result<(), End> {
        end_at_user_code(word(read, pushed + (pt_regs::CS - pt_regs::IP))?)?;
        self.ip = Va(word(read, pushed)?);
        self.sp = Va(word(read, pushed + (pt_regs::SP - pt_regs::IP))?);
        Ok(())
    }

    #[inline]
    fn caller_bp(
        &self,
        entry: &Entry,
        top: Va,
        ip: Va,
        read: &mut impl FnMut(Va) -> Option<u64>,
    ) -> Result<Va, End> {
        let offset = i64::from(entry.bp_offset) as u64;
        match (entry.bp, self.source) {
            (Base::Undefined, Source::Saved(regs)) => word(read, regs + pt_regs::BP).map(Va),
            (Base::Undefined, _) => Ok(self.bp),
            (Base::PreviousSp, _) => word(read, top + offset).map(Va),
            (Base::Bp, _) => word(read, self.bp + offset).map(Va),
            _ => Err(End::BadEntry(ip)),
        }
    }
}

/// Ends the trace when `cs`, as saved at an entry to the kernel, is user code's.
pub(super) fn end_at_user_code(cs: u64) -> Result<(), End> {
    if cs & CS_LEVEL == CS_LEVEL { Err(End::User) } else { Ok(()) }
}
