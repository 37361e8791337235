//! Where a function keeps its caller's registers.

use super::Register;
use super::code::{Callee, Source, is_cold};
use crate::callee_saved::Registers;
use crate::memory::Va;
use iced_x86::{
    Code, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register as R,
};
use rustc_hash::FxHashSet;

/// Instructions looked at; the largest functions have some thousands.
const MAX_STEPS: usize = 50_000;
/// Bytes of a word, and of a return address.
const WORD: i64 = 8;

/// What a function's frame looks like at one of its instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Saves {
    /// Bytes from the stack pointer to the caller's: behind the return address.
    pub depth: i64,
    /// For each of [`Register::ALL`]: bytes from the word with the caller's value to the caller's stack pointer; 0 when it
    /// is not on the stack.
    offsets: [i64; Register::ALL.len()],
}

impl Saves {
    /// The saved registers, and the bytes from each to the caller's stack pointer.
    pub fn iter(&self) -> impl Iterator<Item = (Register, u64)> {
        let all = Register::ALL.into_iter().zip(self.offsets);
        all.filter(|(_, offset)| *offset != 0).map(|(register, offset)| (register, offset.unsigned_abs()))
    }
}

/// The frame at `ip`.
///
/// Any way from the function's start to there gives it: code that is not written by hand has the same frame at an address
/// whichever way it got there, as debuggers' and unwinders' tables want it. The stack pointer is compared with those tables
/// before anything is made of it.
pub(in crate::callee_saved) fn saves(code: &impl Source, ip: Va, exact: bool) -> Option<Saves> {
    let inside = if exact { ip } else { ip - 1 };
    let (start, name) = code.function(inside)?;
    // A cold part is entered with a frame that its function made.
    if is_cold(name) {
        return None;
    }
    let state = State { depth: WORD, bp: None, kept: Registers::ALL, offsets: [0; Register::ALL.len()] };
    let mut walk = Walk { info: InstructionInfoFactory::new(), seen: FxHashSet::default(), work: Vec::new() };
    walk.work.push((start, state));
    while let Some((mut at, mut state)) = walk.work.pop() {
        while at != ip && walk.seen.insert(at) && walk.seen.len() <= MAX_STEPS {
            let Some(instruction) = code.instruction(at) else { break };
            // This way is of no use; another may be.
            if state.apply(&instruction, &mut walk.info).is_none() {
                break;
            }
            let target = Va(instruction.near_branch_target());
            let stays = || matches!(code.callee(target), Callee::Code);
            match instruction.flow_control() {
                FlowControl::Return | FlowControl::IndirectBranch => break,
                FlowControl::UnconditionalBranch if stays() => at = target,
                FlowControl::UnconditionalBranch => break,
                flow => {
                    if flow == FlowControl::ConditionalBranch && stays() {
                        walk.work.push((target, state));
                    }
                    at = Va(instruction.next_ip());
                }
            }
        }
        if at == ip {
            return Some(Saves { depth: state.depth, offsets: state.offsets });
        }
    }
    None
}

struct Walk {
    info: InstructionInfoFactory,
    seen: FxHashSet<Va>,
    work: Vec<(Va, State)>,
}

/// All offsets count down from the caller's stack pointer.
#[derive(Clone, Copy)]
struct State {
    /// The stack pointer.
    depth: i64,
    /// The frame pointer, where there is one.
    bp: Option<i64>,
    /// Registers that still have the caller's values.
    kept: Registers,
    /// As [`Saves::offsets`].
    offsets: [i64; Register::ALL.len()],
}

impl State {
    /// Carries one instruction out; None when the stack pointer is lost.
    fn apply(&mut self, i: &Instruction, info: &mut InstructionInfoFactory) -> Option<()> {
        self.overwrite(i, info);
        match (i.mnemonic(), i.op0_kind()) {
            (Mnemonic::Push, kind) => {
                self.depth += WORD;
                let pushed = (kind == OpKind::Register).then(|| Register::of(i.op0_register())).flatten();
                if let Some(register) = pushed.filter(|&r| self.kept.contains(r)) {
                    self.offsets[register as usize] = self.depth;
                }
            }
            (Mnemonic::Pop, OpKind::Register) if i.op0_register() != R::RSP => {
                let register = Register::of(i.op0_register());
                let restored = register.filter(|&r| self.offsets[r as usize] == self.depth);
                self.write(register);
                if let Some(register) = restored {
                    self.kept = self.kept.with(register);
                }
                self.set_depth(self.depth - WORD)?;
            }
            (Mnemonic::Leave, _) => {
                let bp = self.bp?;
                self.write(Some(Register::Rbp));
                self.set_depth(bp - WORD)?;
            }
            (Mnemonic::Sub | Mnemonic::Add, OpKind::Register) if i.op0_register() == R::RSP => {
                let immediate = i64::from(i.try_immediate(1).ok().map(|v| v as i32)?);
                let down = if i.mnemonic() == Mnemonic::Sub { immediate } else { immediate.checked_neg()? };
                self.set_depth(self.depth + down)?;
            }
            (Mnemonic::Lea, _) if i.op0_register() == R::RSP => {
                let base = self.base(i)?;
                self.set_depth(base)?;
            }
            (Mnemonic::Mov, _) if i.code() == Code::Mov_r64_rm64 || i.code() == Code::Mov_rm64_r64 => {
                match (i.op0_register(), i.op1_register()) {
                    (R::RBP, R::RSP) => {
                        self.write(Some(Register::Rbp));
                        self.bp = Some(self.depth);
                    }
                    (R::RSP, R::RBP) => {
                        let bp = self.bp?;
                        self.set_depth(bp)?;
                    }
                    (R::RSP, _) => return None,
                    _ => self.writes(i, info)?,
                }
            }
            _ if matches!(i.flow_control(), FlowControl::Call | FlowControl::IndirectCall) => {}
            _ => self.writes(i, info)?,
        }
        Some(())
    }

    /// Moves the stack pointer; what lies below it is gone.
    fn set_depth(&mut self, depth: i64) -> Option<()> {
        self.depth = depth;
        for offset in &mut self.offsets {
            if *offset > depth {
                *offset = 0;
            }
        }
        (depth >= WORD).then_some(())
    }

    fn write(&mut self, register: Option<Register>) {
        if let Some(register) = register {
            self.kept = self.kept.without(Registers::NONE.with(register));
            if register == Register::Rbp {
                self.bp = None;
            }
        }
    }

    /// Registers that the instruction writes.
    fn writes(&mut self, i: &Instruction, info: &mut InstructionInfoFactory) -> Option<()> {
        for used in info.info(i).used_registers() {
            if matches!(used.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess) {
                continue;
            }
            if used.register().full_register() == R::RSP {
                return None;
            }
            self.write(Register::of(used.register()));
        }
        Some(())
    }

    /// The operand's address, counted down from the caller's stack pointer.
    fn base(&self, i: &Instruction) -> Option<i64> {
        if i.memory_index() != R::None {
            return None;
        }
        let base = match i.memory_base() {
            R::RSP => self.depth,
            R::RBP => self.bp?,
            _ => return None,
        };
        base.checked_sub(i.memory_displacement64() as i64)
    }

    /// A saved register that is overwritten is none any more.
    fn overwrite(&mut self, i: &Instruction, info: &mut InstructionInfoFactory) {
        let Some(top) = self.base(i) else { return };
        let memory = info.info(i).used_memory();
        let written = memory.iter().filter(|m| !matches!(m.access(), OpAccess::Read | OpAccess::NoMemAccess));
        for used in written {
            let bottom = top - used.memory_size().size() as i64;
            for offset in &mut self.offsets {
                if *offset > bottom && *offset - WORD < top {
                    *offset = 0;
                }
            }
        }
    }
}
