//! Carrying out the instruction a trap displaced.
//!
//! Prologues and returns need few: stores of register pairs, arithmetic on the stack pointer, moves, branches. What is not
//! here is never displaced ([`Displaced::from_instruction`] refuses it), so there is no slow path. Signing and
//! authenticating return addresses needs the guest's keys, which nobody outside has: traps lie behind the one and the other.

use crate::arch::instruction::{Index, Indirect, Instruction, Place, Register};
use crate::arch::{Registers, strip_pac};
use crate::hooks::Step;
use crate::memory::Va;

/// One instruction in the form the emulator carries out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Displaced(Instruction);

/// Condition flags in PSTATE: N, Z, C, V (Arm ARM, C5.2.10).
const FLAGS_SHIFT: u32 = 28;

impl Displaced {
    /// The emulator's form of an instruction; None when it has none.
    pub(crate) fn from_instruction(instruction: Instruction) -> Option<Self> {
        let carried_out = match instruction {
            Instruction::Move { .. }
            | Instruction::Constant { .. }
            | Instruction::Insert { .. }
            | Instruction::AddConstant { .. }
            | Instruction::AddRegister { .. }
            | Instruction::Adr { .. }
            | Instruction::Adrp { .. }
            | Instruction::Load { bytes: 8, .. }
            | Instruction::Store { bytes: 8, .. }
            | Instruction::LoadPair { .. }
            | Instruction::StorePair { .. }
            | Instruction::Conditional { .. }
            | Instruction::CompareZero { .. }
            | Instruction::TestBit { .. }
            | Instruction::Register { kind: Indirect::Return, .. } => true,
            // A jump label is a `nop` or a `b`, and so may be what an alternative replaces; a call is to be unwound.
            _ => false,
        };
        carried_out.then_some(Self(instruction))
    }

    /// Carries it out on `registers`, whose program counter is where the instruction belongs; that stays as it is. `load`
    /// reads a guest word; None from it (nothing mapped there) makes the whole instruction None, as the guest would fault,
    /// and leaves `registers` as they were.
    pub fn execute(self, registers: &mut Registers, mut load: impl FnMut(Va) -> Option<u64>) -> Option<Step> {
        let here = registers.ip();
        match self.0 {
            Instruction::Move { wide, to, from } => {
                let value = read(registers, from);
                write(registers, to, narrow(wide, value));
            }
            Instruction::Constant { to, value } => write(registers, to, value),
            Instruction::Insert { wide, to, bits, shift } => {
                let kept = read(registers, to) & !(0xffff << shift);
                write(registers, to, narrow(wide, kept | u64::from(bits) << shift));
            }
            Instruction::AddConstant { wide, to, from, value } => {
                let sum = read(registers, from).wrapping_add(value as u64);
                write(registers, to, narrow(wide, sum));
            }
            Instruction::AddRegister { wide, to, a, b, subtract } => {
                let (a, b) = (read(registers, a), read(registers, b));
                let result = if subtract { a.wrapping_sub(b) } else { a.wrapping_add(b) };
                write(registers, to, narrow(wide, result));
            }
            Instruction::Adr { to, offset } => write(registers, to, (here + offset as u64).0),
            Instruction::Adrp { to, offset } => {
                write(registers, to, (Va(here.0 & !0xfff) + offset as u64).0);
            }
            Instruction::Load { to, place, .. } => {
                let value = load(address(registers, place))?;
                step_base(registers, place);
                write(registers, to, value);
            }
            Instruction::LoadPair { to, place } => {
                let at = address(registers, place);
                let values = [load(at)?, load(at + 8)?];
                step_base(registers, place);
                write(registers, to[0], values[0]);
                write(registers, to[1], values[1]);
            }
            Instruction::Store { from, place, .. } => {
                let (at, value) = (address(registers, place), read(registers, from));
                step_base(registers, place);
                return Some(Step::Store(at, value));
            }
            Instruction::StorePair { from, place } => {
                let (at, values) = (address(registers, place), from.map(|r| read(registers, r)));
                step_base(registers, place);
                return Some(Step::StorePair(at, values));
            }
            Instruction::Conditional { condition, offset } => {
                return Some(branch(holds(condition, registers.pstate), here, offset));
            }
            Instruction::CompareZero { wide, register, nonzero, offset } => {
                let zero = narrow(wide, read(registers, register)) == 0;
                return Some(branch(zero != nonzero, here, offset));
            }
            Instruction::TestBit { register, bit, nonzero, offset } => {
                let set = read(registers, register) >> bit & 1 != 0;
                return Some(branch(set == nonzero, here, offset));
            }
            Instruction::Register { register, authenticated, .. } => {
                let target = read(registers, register);
                return Some(Step::Go(if authenticated { strip_pac(target) } else { Va(target) }));
            }
            _ => return None,
        }
        Some(Step::Done)
    }
}

fn branch(taken: bool, here: Va, offset: i64) -> Step {
    if taken { Step::Go(here + offset as u64) } else { Step::Done }
}

/// Arm ARM, C1.2.4: conditions come in pairs, the odd one of which is the even one's opposite, except the last.
fn holds(condition: u8, pstate: u64) -> bool {
    let flags = pstate >> FLAGS_SHIFT;
    let [v, c, z, n] = [0, 1, 2, 3].map(|bit| flags >> bit & 1 != 0);
    let even = match condition >> 1 {
        0 => z,
        1 => c,
        2 => n,
        3 => v,
        4 => c && !z,
        5 => n == v,
        6 => n == v && !z,
        _ => return true,
    };
    even != (condition & 1 != 0)
}

/// Where the access is.
fn address(registers: &Registers, place: Place) -> Va {
    let base = Va(read(registers, place.base));
    if place.index == Index::Post { base } else { base + place.offset as u64 }
}

/// Changes the base register as the instruction does.
fn step_base(registers: &mut Registers, place: Place) {
    if place.index != Index::Offset {
        let base = read(registers, place.base);
        write(registers, place.base, base.wrapping_add(place.offset as u64));
    }
}

/// What a 32-bit operation leaves of a result.
fn narrow(wide: bool, value: u64) -> u64 {
    if wide { value } else { value & u64::from(u32::MAX) }
}

fn read(registers: &Registers, register: Register) -> u64 {
    match register {
        Register::X(n) => registers.x[usize::from(n)],
        Register::Sp => registers.sp,
        Register::Zero => 0,
    }
}

fn write(registers: &mut Registers, register: Register, value: u64) {
    match register {
        Register::X(n) => registers.x[usize::from(n)] = value,
        Register::Sp => registers.sp = value,
        Register::Zero => {}
    }
}

#[cfg(test)]
mod tests;
