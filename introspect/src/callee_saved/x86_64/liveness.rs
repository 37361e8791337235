//! Whether code reads a register before it writes it: liveness, of callee-saved registers, from one address on.

use super::Register;
use super::code::{Callee, Source};
use crate::callee_saved::ways::Ways;
use crate::callee_saved::{Fate, Registers};
use crate::memory::Va;
use iced_x86::{FlowControl, Instruction, InstructionInfoFactory, OpAccess};

/// The fate of all registers from `start` on (link address).
pub(in crate::callee_saved) fn fate(code: &impl Source, start: Va) -> Fate {
    let mut walk = Walk { code, info: InstructionInfoFactory::new() };
    Ways::fate(start, |ways, at, pending| walk.follow(ways, at, pending))
}

struct Walk<'a, C> {
    code: &'a C,
    info: InstructionInfoFactory,
}

impl<C: Source> Walk<'_, C> {
    /// As [`Ways::fate`] wants it.
    fn follow(&mut self, ways: &mut Ways, mut at: Va, mut pending: Registers) -> Option<()> {
        loop {
            let (left, may_go_on) = ways.step(at, pending);
            if left.is_empty() {
                return Some(());
            }
            let instruction = self.code.instruction(at).filter(|_| may_go_on)?;
            self.code.hidden(at).for_each(|to| ways.branch(to, left));
            let (read, written) = self.effects(&instruction);
            pending = ways.read(read, left).without(written);
            let next = Va(instruction.next_ip());
            let target = Va(instruction.near_branch_target());
            match instruction.flow_control() {
                FlowControl::Return => {
                    ways.returned(pending);
                    return Some(());
                }
                FlowControl::UnconditionalBranch => match self.code.callee(target) {
                    Callee::Code => at = target,
                    // As the callee returns to our caller.
                    Callee::Function => {
                        ways.returned(pending);
                        return Some(());
                    }
                    Callee::Thunk(_) => return None,
                },
                FlowControl::ConditionalBranch => {
                    match self.code.callee(target) {
                        Callee::Code => ways.branch(target, pending),
                        Callee::Function => ways.returned(pending),
                        Callee::Thunk(_) => return None,
                    }
                    at = next;
                }
                FlowControl::Call => {
                    if let Callee::Thunk(register) = self.code.callee(target) {
                        pending = ways.read(Registers::NONE.with(register?), pending);
                    }
                    at = next;
                }
                FlowControl::IndirectBranch => return None,
                // A breakpoint or BUG() that does not return goes on into code that is read for nothing: no harm.
                FlowControl::Next
                | FlowControl::IndirectCall
                | FlowControl::Interrupt
                | FlowControl::Exception
                | FlowControl::XbeginXabortXend => at = next,
            }
        }
    }

    /// What the instruction reads, and what it writes.
    fn effects(&mut self, instruction: &Instruction) -> (Registers, Registers) {
        let (mut read, mut written) = (Registers::NONE, Registers::NONE);
        for used in self.info.info(instruction).used_registers() {
            let Some(register) = Register::of(used.register()) else { continue };
            match used.access() {
                // A write of 32 bits clears the others; one of 8 or 16 keeps them.
                OpAccess::Write if used.register().size() >= 4 => written = written.with(register),
                OpAccess::None | OpAccess::NoMemAccess | OpAccess::CondWrite => {}
                _ => read = read.with(register),
            }
        }
        (read, written)
    }
}
