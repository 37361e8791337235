//! As much of an x86-64 processor as stubs and the instructions that they displace need. What is not here, and memory that
//! nobody gave it, is an error.

use anyhow::{Context, Result, bail, ensure};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use std::collections::BTreeMap;

const CF: u64 = 1;
const ZF: u64 = 1 << 6;
const SF: u64 = 1 << 7;
const IF: u64 = 1 << 9;
const OF: u64 = 1 << 11;

/// What came of one instruction.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// On to the next.
    On,
    /// On at this address.
    To(u64),
    /// The instruction is none that a processor decides on: a trap.
    Trap,
}

/// Registers, flags and memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Processor {
    /// In the order of [`Register::RAX`] and its successors.
    pub registers: [u64; 16],
    pub flags: u64,
    pub gs: u64,
    /// Words by address, aligned.
    pub memory: BTreeMap<u64, u64>,
    /// Addresses of words that were written.
    pub written: Vec<u64>,
    /// True if something was written while interrupts were on, other than by a push.
    pub open: bool,
}

impl Processor {
    pub fn get(&self, register: Register) -> Result<u64> {
        let index = register.full_register() as usize - Register::RAX as usize;
        let value = *self.registers.get(index).with_context(|| format!("{register:?}"))?;
        match register.size() {
            8 => Ok(value),
            4 => Ok(value & 0xffff_ffff),
            1 if register.is_gpr8() && !is_high(register) => Ok(value & 0xff),
            size => bail!("{size} bytes of {register:?}"),
        }
    }

    pub fn set(&mut self, register: Register, value: u64) -> Result<()> {
        let index = register.full_register() as usize - Register::RAX as usize;
        let slot = self.registers.get_mut(index).with_context(|| format!("{register:?}"))?;
        *slot = match register.size() {
            8 => value,
            4 => value & 0xffff_ffff,
            1 if !is_high(register) => *slot & !0xff | value & 0xff,
            size => bail!("{size} bytes of {register:?}"),
        };
        Ok(())
    }

    pub fn load(&self, address: u64, size: usize) -> Result<u64> {
        let word = *self.memory.get(&(address & !7)).with_context(|| format!("load at {address:#x}"))?;
        let shift = address % 8;
        ensure!(shift as usize + size <= 8, "{size} bytes at {address:#x}");
        Ok((word >> (shift * 8)) & mask(size))
    }

    pub fn store(&mut self, address: u64, size: usize, value: u64) -> Result<()> {
        let word = self.memory.get_mut(&(address & !7)).with_context(|| format!("store at {address:#x}"))?;
        let shift = address % 8 * 8;
        *word = *word & !(mask(size) << shift) | (value & mask(size)) << shift;
        self.written.push(address & !7);
        Ok(())
    }

    fn address(&self, i: &Instruction) -> Result<u64> {
        let mut address = i.memory_displacement64();
        if i.is_ip_rel_memory_operand() {
            return Ok(address);
        }
        if i.memory_base() != Register::None {
            address = address.wrapping_add(self.get(i.memory_base())?);
        }
        if i.memory_index() != Register::None {
            let index = self.get(i.memory_index())?;
            address = address.wrapping_add(index.wrapping_mul(u64::from(i.memory_index_scale())));
        }
        match i.segment_prefix() {
            Register::None => Ok(address),
            Register::GS => Ok(address.wrapping_add(self.gs)),
            other => bail!("segment {other:?}"),
        }
    }

    fn size(i: &Instruction) -> usize {
        match i.op0_kind() {
            OpKind::Register => i.op0_register().size(),
            _ => i.memory_size().size(),
        }
    }

    fn operand(&self, i: &Instruction, n: u32) -> Result<u64> {
        match i.op_kind(n) {
            OpKind::Register => self.get(i.op_register(n)),
            OpKind::Memory => self.load(self.address(i)?, i.memory_size().size()),
            _ => i.try_immediate(n).ok().with_context(|| format!("operand {n} of {i:?}")),
        }
    }

    fn write(&mut self, i: &Instruction, n: u32, value: u64) -> Result<()> {
        if i.op_kind(n) == OpKind::Register {
            return self.set(i.op_register(n), value);
        }
        self.open |= self.flags & IF != 0;
        self.store(self.address(i)?, i.memory_size().size(), value)
    }

    fn push(&mut self, value: u64) -> Result<()> {
        let rsp = self.get(Register::RSP)?.wrapping_sub(8);
        self.set(Register::RSP, rsp)?;
        self.store(rsp, 8, value)
    }

    fn pop(&mut self) -> Result<u64> {
        let rsp = self.get(Register::RSP)?;
        let value = self.load(rsp, 8)?;
        self.set(Register::RSP, rsp + 8)?;
        Ok(value)
    }

    fn set_flags(&mut self, result: u64, size: usize, carry: bool, overflow: bool) {
        self.flags &= !(CF | ZF | SF | OF);
        let top = 1 << (size * 8 - 1);
        for (bit, set) in
            [(CF, carry), (ZF, result & mask(size) == 0), (SF, result & top != 0), (OF, overflow)]
        {
            self.flags |= if set { bit } else { 0 };
        }
    }

    fn arithmetic(&mut self, i: &Instruction) -> Result<()> {
        let size = Self::size(i);
        let (a, b) = (self.operand(i, 0)?, self.operand(i, 1)? & mask(size));
        let top = 1_u64 << (size * 8 - 1);
        let (result, carry, overflow) = match i.mnemonic() {
            Mnemonic::Add => {
                let sum = a.wrapping_add(b) & mask(size);
                (sum, sum < a, (a ^ sum) & (b ^ sum) & top != 0)
            }
            Mnemonic::Sub | Mnemonic::Cmp => {
                let difference = a.wrapping_sub(b) & mask(size);
                (difference, a < b, (a ^ b) & (a ^ difference) & top != 0)
            }
            Mnemonic::And | Mnemonic::Test => (a & b, false, false),
            Mnemonic::Or => (a | b, false, false),
            Mnemonic::Xor => (a ^ b, false, false),
            // Their carry and overflow are not looked at.
            Mnemonic::Shl => (a << b & mask(size), false, false),
            _ => (a >> b, false, false),
        };
        self.set_flags(result, size, carry, overflow);
        if !matches!(i.mnemonic(), Mnemonic::Cmp | Mnemonic::Test) {
            self.write(i, 0, result)?;
        }
        Ok(())
    }

    /// Carries out one instruction.
    pub fn step(&mut self, i: &Instruction) -> Result<Next> {
        let carry = self.flags & CF != 0;
        let zero = self.flags & ZF != 0;
        match i.mnemonic() {
            Mnemonic::Mov => {
                let value = self.operand(i, 1)?;
                self.write(i, 0, value)?;
            }
            Mnemonic::Movsxd => {
                let value = self.operand(i, 1)? as u32;
                self.write(i, 0, i64::from(value.cast_signed()).cast_unsigned())?;
            }
            Mnemonic::Movsx => {
                let (size, value) = (i.memory_size().size(), self.operand(i, 1)?);
                ensure!(i.op1_kind() == OpKind::Memory && size == 2, "movsx of {size} bytes");
                self.write(i, 0, i64::from(value as i16).cast_unsigned())?;
            }
            Mnemonic::Movzx => {
                let value = self.operand(i, 1)?;
                self.write(i, 0, value)?;
            }
            Mnemonic::Lea => {
                let value = self.address(i)? & mask(Self::size(i));
                self.write(i, 0, value)?;
            }
            Mnemonic::Push => {
                let value = self.operand(i, 0)?;
                self.push(value)?;
            }
            Mnemonic::Pop => {
                let value = self.pop()?;
                self.write(i, 0, value)?;
            }
            Mnemonic::Pushfq => self.push(self.flags)?,
            Mnemonic::Popfq => self.flags = self.pop()?,
            Mnemonic::Cli => self.flags &= !IF,
            Mnemonic::Imul => {
                ensure!(i.op_count() == 3, "another product than that of an operand by a number");
                let size = Self::size(i);
                let product = self.operand(i, 1)?.wrapping_mul(self.operand(i, 2)?) & mask(size);
                // Its carry and overflow are not looked at; the rest is undefined.
                self.set_flags(product, size, false, false);
                self.write(i, 0, product)?;
            }
            Mnemonic::Inc => {
                let size = Self::size(i);
                let value = self.operand(i, 0)?.wrapping_add(1) & mask(size);
                self.set_flags(value, size, carry, false);
                self.write(i, 0, value)?;
            }
            Mnemonic::Xadd => {
                ensure!(i.has_lock_prefix(), "a position is taken without a lock");
                let (old, add) = (self.operand(i, 0)?, self.operand(i, 1)?);
                self.write(i, 1, old)?;
                self.write(i, 0, old.wrapping_add(add))?;
                self.set_flags(old.wrapping_add(add), 8, false, false);
            }
            Mnemonic::Cmpxchg => {
                ensure!(i.has_lock_prefix(), "a word is compared and exchanged without a lock");
                let (old, expected) = (self.operand(i, 0)?, self.get(Register::RAX)?);
                let new = if old == expected { self.operand(i, 1)? } else { old };
                self.write(i, 0, new)?;
                self.set(Register::RAX, old)?;
                self.set_flags(expected.wrapping_sub(old), 8, expected < old, false);
            }
            Mnemonic::Xchg => {
                let (a, b) = (self.operand(i, 0)?, self.operand(i, 1)?);
                self.write(i, 0, b)?;
                self.write(i, 1, a)?;
            }
            Mnemonic::Movsq => {
                ensure!(i.has_rep_prefix(), "one word");
                while self.get(Register::RCX)? != 0 {
                    let (from, to) = (self.get(Register::RSI)?, self.get(Register::RDI)?);
                    let value = self.load(from, 8)?;
                    self.open |= self.flags & IF != 0;
                    self.store(to, 8, value)?;
                    self.set(Register::RSI, from + 8)?;
                    self.set(Register::RDI, to + 8)?;
                    self.set(Register::RCX, self.get(Register::RCX)? - 1)?;
                }
            }
            Mnemonic::Jmp => return Ok(Next::To(i.near_branch_target())),
            Mnemonic::Jae if !carry => return Ok(Next::To(i.near_branch_target())),
            Mnemonic::Ja if !carry && !zero => return Ok(Next::To(i.near_branch_target())),
            Mnemonic::Jb if carry => return Ok(Next::To(i.near_branch_target())),
            Mnemonic::Jbe if carry || zero => return Ok(Next::To(i.near_branch_target())),
            Mnemonic::Je if zero => return Ok(Next::To(i.near_branch_target())),
            Mnemonic::Jne if !zero => return Ok(Next::To(i.near_branch_target())),
            Mnemonic::Ja | Mnemonic::Jae | Mnemonic::Jb | Mnemonic::Jbe | Mnemonic::Je | Mnemonic::Jne => {}
            Mnemonic::Ret => return Ok(Next::To(self.pop()?)),
            Mnemonic::Out | Mnemonic::Int3 => return Ok(Next::Trap),
            Mnemonic::Add
            | Mnemonic::Sub
            | Mnemonic::Cmp
            | Mnemonic::And
            | Mnemonic::Test
            | Mnemonic::Or
            | Mnemonic::Xor
            | Mnemonic::Shl
            | Mnemonic::Shr => self.arithmetic(i)?,
            other => bail!("{other:?} is not carried out here"),
        }
        Ok(Next::On)
    }
}

fn is_high(register: Register) -> bool {
    matches!(register, Register::AH | Register::BH | Register::CH | Register::DH)
}

fn mask(size: usize) -> u64 {
    if size >= 8 { u64::MAX } else { (1 << (size * 8)) - 1 }
}
