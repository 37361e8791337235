//! Whether code reads a register before it writes it: liveness, of callee-saved registers, from one address on.

use super::Register;
use super::code::{Callee, Source};
use crate::callee_saved::{Fate, Registers};
use crate::memory::Va;
use iced_x86::{FlowControl, Instruction, InstructionInfoFactory, OpAccess};
use rustc_hash::FxHashMap;

/// Instructions looked at; the largest functions have some thousands.
const MAX_STEPS: usize = 50_000;

/// The fate of all registers from `start` on (link address).
pub(in crate::callee_saved) fn fate(code: &impl Source, start: Va) -> Fate {
    let mut walk = Walk {
        code,
        info: InstructionInfoFactory::new(),
        seen: FxHashMap::default(),
        work: vec![(start, Registers::ALL)],
        steps: 0,
        fate: Fate { read: Registers::NONE, returned: Registers::NONE },
    };
    while let Some((at, pending)) = walk.work.pop() {
        if walk.follow(at, pending).is_none() {
            return Fate::UNKNOWN;
        }
    }
    walk.fate
}

struct Walk<'a, C> {
    code: &'a C,
    info: InstructionInfoFactory,
    /// Registers that have been followed from an address.
    seen: FxHashMap<Va, Registers>,
    /// Addresses to follow yet, with the registers not yet written on the way there.
    work: Vec<(Va, Registers)>,
    steps: usize,
    fate: Fate,
}

impl<C: Source> Walk<'_, C> {
    /// Follows one way until it ends or meets another. None when code cannot be followed.
    fn follow(&mut self, mut at: Va, mut pending: Registers) -> Option<()> {
        loop {
            let seen = self.seen.entry(at).or_default();
            pending = pending.without(*seen).without(self.fate.read);
            if pending.is_empty() {
                return Some(());
            }
            *seen = seen.union(pending);
            self.steps += 1;
            let instruction = self.code.instruction(at).filter(|_| self.steps <= MAX_STEPS)?;
            self.work.extend(self.code.hidden(at).map(|to| (to, pending)));
            pending = self.effects(&instruction, pending);
            let next = Va(instruction.next_ip());
            let target = Va(instruction.near_branch_target());
            match instruction.flow_control() {
                FlowControl::Return => {
                    self.fate.returned = self.fate.returned.union(pending);
                    return Some(());
                }
                FlowControl::UnconditionalBranch => match self.code.callee(target) {
                    Callee::Code => at = target,
                    // As the callee returns to our caller.
                    Callee::Function => {
                        self.fate.returned = self.fate.returned.union(pending);
                        return Some(());
                    }
                    Callee::Thunk(_) => return None,
                },
                FlowControl::ConditionalBranch => {
                    match self.code.callee(target) {
                        Callee::Code => self.work.push((target, pending)),
                        Callee::Function => self.fate.returned = self.fate.returned.union(pending),
                        Callee::Thunk(_) => return None,
                    }
                    at = next;
                }
                FlowControl::Call => {
                    if let Callee::Thunk(register) = self.code.callee(target) {
                        pending = self.read(Registers::NONE.with(register?), pending);
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

    /// Notes what the instruction reads; what is left after what it writes.
    fn effects(&mut self, instruction: &Instruction, pending: Registers) -> Registers {
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
        self.read(read, pending).without(written)
    }

    fn read(&mut self, read: Registers, pending: Registers) -> Registers {
        self.fate.read = self.fate.read.union(read.intersection(pending));
        pending.without(read)
    }
}
