//! One frame record after the other.

use super::{Link, Start};
use crate::arch::instruction::{BYTES, Indirect, Instruction, Register};
use crate::arch::strip_pac;
use crate::memory::Va;
use crate::unwind::{End, MAX_STACKS, ModuleTables, StackFrame, Unwinder, word};

/// Bytes of a frame record.
const RECORD: u64 = 16;
/// Instructions looked at to tell whether a function has its frame record; large ones have some thousands.
const MAX_STEPS: u64 = 4096;

/// Offsets in `struct pt_regs` (arch/arm64/include/asm/ptrace.h). Entry code makes the last a frame record.
pub(super) mod pt_regs {
    pub const FP: u64 = 29 * 8;
    pub const LINK: u64 = 30 * 8;
    pub const SP: u64 = 248;
    pub const PC: u64 = 256;
    pub const STATE: u64 = 264;
    pub const RECORD: u64 = 304;
}
/// Exception level in PSTATE, 0 in user mode (Arm ARM, C5.2.20).
const LEVEL: u64 = 0b1100;
/// What `struct frame_record_meta` (6.14) has behind its record of two zeros: registers were saved here.
const META_REGISTERS: u64 = 2;

/// What the first of ftrace's two slots is once it is set up (arch/arm64/kernel/ftrace.c): `mov x9, x30`.
const SAVED_LINK: Instruction = Instruction::Move { wide: true, to: Register::X(9), from: Register::LINK };

/// What is at the frame pointer.
enum Record {
    /// The next frame.
    Caller { ip: Va, fp: Va },
    /// Saved registers: the next frame is exact, and may have no record.
    Interrupted(Start),
}

impl Unwinder<'_> {
    #[inline]
    pub(in crate::unwind) fn walk(
        &self,
        _modules: &impl ModuleTables,
        start: &Start,
        mut read: impl FnMut(Va) -> Option<u64>,
        mut visit: impl FnMut(StackFrame) -> bool,
    ) -> End {
        debug_assert!(self.orc.is_none(), "no such tables");
        match self.follow(*start, &mut read, &mut visit) {
            Ok(()) => End::Full,
            Err(end) => end,
        }
    }

    /// Ok when the output is full.
    fn follow(
        &self,
        mut at: Start,
        read: &mut impl FnMut(Va) -> Option<u64>,
        visit: &mut impl FnMut(StackFrame) -> bool,
    ) -> Result<(), End> {
        let mut descents = 0;
        loop {
            if !visit(StackFrame { ip: at.ip, sp: at.sp, exact: at.exact }) {
                return Ok(());
            }
            let link = match std::mem::take(&mut at.link) {
                Link::ReturnAddress(link) => Some(link),
                Link::Register(link) if self.is_code(at.ip, true) && is_frameless(at.ip, read) => Some(link),
                _ => None,
            };
            if let Some(link) = link {
                let ip = strip_pac(link);
                if !self.is_return_address(ip) {
                    return Err(End::NotCode(ip));
                }
                at = Start { ip, link: Link::Lost, exact: false, ..at };
                continue;
            }
            let before = at;
            match self.record(at.fp, read)? {
                Record::Caller { ip, fp } => {
                    at = Start { ip, sp: at.fp + RECORD, fp, link: Link::Lost, exact: false };
                }
                Record::Interrupted(start) => at = start,
            }
            if !at.exact && !self.is_return_address(at.ip) || at.exact && !self.is_code(at.ip, true) {
                return Err(End::NotCode(at.ip));
            }
            if at.fp <= before.fp {
                descents += 1;
                if descents > MAX_STACKS {
                    return Err(End::Backwards(before.ip));
                }
            }
        }
    }

    fn is_return_address(&self, ip: Va) -> bool {
        ip.0.is_multiple_of(BYTES) && self.is_code(ip, false)
    }

    fn record(&self, fp: Va, read: &mut impl FnMut(Va) -> Option<u64>) -> Result<Record, End> {
        if fp == Va(0) {
            return Err(End::Complete);
        }
        if !fp.0.is_multiple_of(8) {
            return Err(End::Unreadable(fp));
        }
        let (next, ip) = (word(read, fp)?, word(read, fp + 8)?);
        let registers = fp - pt_regs::RECORD;
        if (next, ip) == (0, 0) {
            return self.last(fp, registers, read);
        }
        // Entry code saves registers around a record that repeats two of them.
        let repeats =
            read(registers + pt_regs::PC) == Some(ip) && read(registers + pt_regs::FP) == Some(next);
        match interrupted(registers, read) {
            Some(start) if repeats => Ok(Record::Interrupted(start)),
            _ => Ok(Record::Caller { ip: strip_pac(ip), fp: Va(next) }),
        }
    }

    /// The record of two zeros, which ends a stack, or from 6.14 on says that registers were saved there.
    fn last(&self, fp: Va, registers: Va, read: &mut impl FnMut(Va) -> Option<u64>) -> Result<Record, End> {
        let Some(start) = interrupted(registers, read) else { return Err(End::Complete) };
        let kernel = read(registers + pt_regs::STATE).is_some_and(|state| state & LEVEL != 0);
        let meta = read(fp + RECORD) == Some(META_REGISTERS);
        if kernel && meta && self.is_code(start.ip, true) {
            return Ok(Record::Interrupted(start));
        }
        // Of a task that never was in user mode there is nothing.
        let user = !kernel && (start.ip != Va(0) || start.sp != Va(0));
        Err(if user { End::User } else { End::Complete })
    }
}

/// What ran when the registers there were saved.
fn interrupted(registers: Va, read: &mut impl FnMut(Va) -> Option<u64>) -> Option<Start> {
    Some(Start {
        ip: Va(read(registers + pt_regs::PC)?),
        sp: Va(read(registers + pt_regs::SP)?),
        fp: Va(read(registers + pt_regs::FP)?),
        link: Link::Register(read(registers + pt_regs::LINK)?),
        exact: true,
    })
}

/// True when the function at `ip` has not made its frame record yet, has given it up, or never makes one: then x29 is
/// its caller's and x30 its return address. The code before `ip` tells, as compilers write it: `mov x29, sp` behind the
/// store of the two, and their load before what leads to the return. Behind a return (which may be under a trap) other code
/// begins, to which something jumps from where the frame is that `mov` made, if there is one.
fn is_frameless(ip: Va, read: &mut impl FnMut(Va) -> Option<u64>) -> bool {
    let both = [Register::FRAME, Register::LINK];
    let mut another_block = false;
    let mut pair = None;
    let mut nop_behind = false;
    for step in 0..=MAX_STEPS {
        let at = ip - step * BYTES;
        // Instructions have 4 bytes, what can be read has 8.
        let (place, half) = (Va(at.0 & !7), at.0 & 4);
        let words = match pair {
            Some((known, words)) if known == place => words,
            _ => match read(place) {
                Some(words) => words,
                None => return false,
            },
        };
        pair = Some((place, words));
        let instruction = Instruction::decode((words >> (half * 8)) as u32);
        match instruction {
            Instruction::Register { kind: Indirect::Return, .. } if step == 0 => return true,
            _ if step == 0 => continue,
            Instruction::AddConstant { to: Register::FRAME, from: Register::Sp, .. } => return false,
            Instruction::StorePair { from, .. } if from == both => return !another_block,
            Instruction::LoadPair { to, .. } if to == both && !another_block => return true,
            Instruction::Authenticate if !another_block => return true,
            // The beginning of the function, or ftrace's slots of one that does not sign.
            Instruction::Sign | SAVED_LINK => return true,
            Instruction::Nop if nop_behind => return true,
            Instruction::Register { kind: Indirect::Return | Indirect::Jump, .. }
            | Instruction::Branch { call: false, .. }
            | Instruction::Break(_) => another_block = true,
            _ => {}
        }
        nop_behind = instruction == Instruction::Nop;
    }
    false
}
