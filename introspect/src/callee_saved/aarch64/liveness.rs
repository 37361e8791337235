//! Whether code reads a register before it writes it: liveness, of callee-saved registers, from one address on.

use super::code::Source;
use super::operands::operands;
use crate::arch::instruction::{Indirect, Instruction};
use crate::callee_saved::ways::Ways;
use crate::callee_saved::{Fate, Registers};
use crate::memory::Va;

/// Bits 31:25 of the instructions that branch to a register's value or return from an exception (Arm ARM, C4.1.87).
const TO_REGISTER: u32 = 0b110_1011;

/// The fate of all registers from `start` on (link address).
pub(in crate::callee_saved) fn fate(code: &impl Source, start: Va) -> Fate {
    Ways::fate(start, |ways, at, pending| follow(code, ways, at, pending))
}

/// As [`Ways::fate`] wants it.
fn follow(code: &impl Source, ways: &mut Ways, mut at: Va, mut pending: Registers) -> Option<()> {
    let mut may_not_return = false;
    loop {
        let (left, may_go_on) = ways.step(at, pending);
        if left.is_empty() {
            return Some(());
        }
        let word = code.word(at).filter(|_| may_go_on)?;
        code.hidden(at).for_each(|to| ways.branch(to, left));
        let operands = operands(word);
        pending = ways.read(operands.read, left).without(operands.written);
        let instruction = Instruction::decode(word);
        let target = instruction.target(at);
        may_not_return = match instruction {
            Instruction::Branch { call: false, .. } if code.is_function(target?) => {
                // As the callee returns to our caller.
                ways.returned(pending);
                return Some(());
            }
            Instruction::Branch { call: false, .. } => {
                at = target?;
                continue;
            }
            Instruction::Register { kind: Indirect::Return, .. } => {
                ways.returned(pending);
                return Some(());
            }
            Instruction::Register { kind: Indirect::Jump, .. } => return None,
            Instruction::Other if word >> 25 == TO_REGISTER => return None,
            Instruction::Branch { .. } | Instruction::Register { .. } | Instruction::Break(_) => true,
            // Between functions.
            Instruction::Nop => may_not_return,
            _ => {
                match target {
                    Some(target) if code.is_function(target) => ways.returned(pending),
                    Some(target) => ways.branch(target, pending),
                    None => {}
                }
                false
            }
        };
        at = code.next(at);
        if code.is_function(at) {
            // Code ends with a call or a BUG() that does not return; what runs on into another function is not compiled.
            return may_not_return.then_some(());
        }
    }
}
