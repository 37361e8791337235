//! Whether code reads a register before it writes it: liveness, of callee-saved registers, from one address on.

use super::code::Source;
use super::operands::operands;
use crate::arch::instruction::{Indirect, Instruction};
use crate::callee_saved::{Fate, Registers};
use crate::memory::Va;
use rustc_hash::FxHashMap;

/// Instructions looked at; the largest functions have some thousands.
const MAX_STEPS: usize = 50_000;
/// Bits 31:25 of the instructions that branch to a register's value or return from an exception (Arm ARM, C4.1.87).
const TO_REGISTER: u32 = 0b110_1011;

/// The fate of all registers from `start` on (link address).
pub(in crate::callee_saved) fn fate(code: &impl Source, start: Va) -> Fate {
    let mut walk = Walk {
        code,
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
        let mut may_not_return = false;
        loop {
            let seen = self.seen.entry(at).or_default();
            pending = pending.without(*seen).without(self.fate.read);
            if pending.is_empty() {
                return Some(());
            }
            *seen = seen.union(pending);
            self.steps += 1;
            let word = self.code.word(at).filter(|_| self.steps <= MAX_STEPS)?;
            self.work.extend(self.code.hidden(at).map(|to| (to, pending)));
            let operands = operands(word);
            self.fate.read = self.fate.read.union(operands.read.intersection(pending));
            pending = pending.without(operands.read).without(operands.written);
            let instruction = Instruction::decode(word);
            let target = instruction.target(at);
            may_not_return = match instruction {
                Instruction::Branch { call: false, .. } if self.code.is_function(target?) => {
                    // As the callee returns to our caller.
                    self.returns(pending);
                    return Some(());
                }
                Instruction::Branch { call: false, .. } => {
                    at = target?;
                    continue;
                }
                Instruction::Register { kind: Indirect::Return, .. } => {
                    self.returns(pending);
                    return Some(());
                }
                Instruction::Register { kind: Indirect::Jump, .. } => return None,
                Instruction::Other if word >> 25 == TO_REGISTER => return None,
                Instruction::Branch { .. } | Instruction::Register { .. } | Instruction::Break(_) => true,
                // Between functions.
                Instruction::Nop => may_not_return,
                _ => {
                    match target {
                        Some(target) if self.code.is_function(target) => self.returns(pending),
                        Some(target) => self.work.push((target, pending)),
                        None => {}
                    }
                    false
                }
            };
            at = self.code.next(at);
            if self.code.is_function(at) {
                // Code ends with a call or a BUG() that does not return; what runs on into another function is not compiled.
                return may_not_return.then_some(());
            }
        }
    }

    fn returns(&mut self, pending: Registers) {
        self.fate.returned = self.fate.returned.union(pending);
    }
}
