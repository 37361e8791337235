//! Carrying out the instructions a trap displaced.
//!
//! Function prologues and epilogues need few: push, pop, register moves, address arithmetic. What is
//! not here is never displaced ([`Displaced::from_instruction`] refuses it), so there is no slow path.

use crate::arch::Registers;
use crate::hooks::Step;
use crate::memory::Va;
use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};
use std::ops::Range;

/// One instruction in the form the emulator carries out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Displaced {
    /// `push r64`
    Push(Register),
    /// `pop r64`
    Pop(Register),
    /// `mov r, r` (32 or 64 bits; 32-bit moves clear the upper half)
    Move(Register, Register),
    /// `mov r, imm`, already extended as the instruction does
    Load(Register, u64),
    /// `mov r64, [base + displacement]`
    Fetch(Register, Register, u64),
    /// `lea r64, [base + displacement]`
    Address(Register, Register, u64),
    /// `add r64, imm` and `sub r64, imm` (as an addition), with flags
    Add(Register, u64),
    /// See [`Displaced::Add`].
    Sub(Register, u64),
    /// `xor r32, r32` of a register with itself
    Zero(Register),
    /// `test r, r` of a register with itself; true for 64 bits
    Test(Register, bool),
}

const CF: u64 = 1;
const PF: u64 = 1 << 2;
const AF: u64 = 1 << 4;
const ZF: u64 = 1 << 6;
const SF: u64 = 1 << 7;
const OF: u64 = 1 << 11;
const STATUS: u64 = CF | PF | AF | ZF | SF | OF;

/// Where kernels are linked to, and moved from (`__START_KERNEL_map` and `KERNEL_IMAGE_SIZE`, arch/x86/include/asm/page_64*.h).
const IMAGE: Range<u64> = 0xffff_ffff_8000_0000..0xffff_ffff_c000_0000;

impl Displaced {
    /// Whether an operand is an address in the kernel image: where the kernel is moved, so is that, and the instruction in
    /// memory is not the image's.
    pub fn names_the_image(&self) -> bool {
        match self {
            Self::Load(_, value)
            | Self::Fetch(_, _, value)
            | Self::Address(_, _, value)
            | Self::Add(_, value)
            | Self::Sub(_, value) => IMAGE.contains(value),
            _ => false,
        }
    }

    /// The emulator's form of an instruction; None when it has none.
    pub fn from_instruction(i: &Instruction) -> Option<Self> {
        let general = |r: Register| (r.is_gpr64() || r.is_gpr32()).then_some(r);
        let two_registers =
            i.op_count() == 2 && i.op0_kind() == OpKind::Register && i.op1_kind() == OpKind::Register;
        let immediate = |op: u32| {
            matches!(
                i.op_kind(op),
                OpKind::Immediate8
                    | OpKind::Immediate32
                    | OpKind::Immediate64
                    | OpKind::Immediate8to32
                    | OpKind::Immediate8to64
                    | OpKind::Immediate32to64
            )
            .then(|| i.immediate(op))
        };
        match i.mnemonic() {
            Mnemonic::Push if i.code() == Code::Push_r64 => Some(Self::Push(i.op0_register())),
            Mnemonic::Pop if i.code() == Code::Pop_r64 => Some(Self::Pop(i.op0_register())),
            Mnemonic::Mov if two_registers => {
                Some(Self::Move(general(i.op0_register())?, general(i.op1_register())?))
            }
            Mnemonic::Mov if i.code() == Code::Mov_r64_rm64 && is_plain_address(i) => {
                Some(Self::Fetch(i.op0_register(), i.memory_base(), i.memory_displacement64()))
            }
            Mnemonic::Mov if i.op0_kind() == OpKind::Register => {
                let to = general(i.op0_register())?;
                let value = immediate(1)?;
                Some(Self::Load(to, if to.is_gpr32() { value & 0xffff_ffff } else { value }))
            }
            Mnemonic::Lea if i.op0_register().is_gpr64() && is_plain_address(i) => {
                Some(Self::Address(i.op0_register(), i.memory_base(), i.memory_displacement64()))
            }
            Mnemonic::Add if i.op0_kind() == OpKind::Register && i.op0_register().is_gpr64() => {
                Some(Self::Add(i.op0_register(), immediate(1)?))
            }
            Mnemonic::Sub if i.op0_kind() == OpKind::Register && i.op0_register().is_gpr64() => {
                Some(Self::Sub(i.op0_register(), immediate(1)?))
            }
            Mnemonic::Xor if two_registers && i.op0_register() == i.op1_register() => {
                i.op0_register().is_gpr32().then(|| Self::Zero(i.op0_register()))
            }
            Mnemonic::Test if two_registers && i.op0_register() == i.op1_register() => {
                let r = general(i.op0_register())?;
                Some(Self::Test(r, r.is_gpr64()))
            }
            _ => None,
        }
    }

    /// Carries it out on `registers` (not the instruction pointer). `load` reads a guest word; None from it
    /// (nothing mapped there) makes the whole instruction None, as the guest would fault.
    pub fn execute(self, registers: &mut Registers, mut load: impl FnMut(Va) -> Option<u64>) -> Option<Step> {
        match self {
            Self::Push(r) => {
                let value = read(registers, r);
                registers.rsp = registers.rsp.wrapping_sub(8);
                return Some(Step::Store(Va(registers.rsp), value));
            }
            Self::Pop(r) => {
                let value = load(Va(registers.rsp))?;
                registers.rsp = registers.rsp.wrapping_add(8);
                write(registers, r, value);
            }
            Self::Move(to, from) => {
                let value = read(registers, from);
                write(registers, to, value);
            }
            Self::Load(to, value) => write(registers, to, value),
            Self::Fetch(to, base, displacement) => {
                let value = load(Va(read(registers, base).wrapping_add(displacement)))?;
                write(registers, to, value);
            }
            Self::Address(to, base, displacement) => {
                let value = read(registers, base).wrapping_add(displacement);
                write(registers, to, value);
            }
            Self::Add(r, value) => {
                let a = read(registers, r);
                let (sum, carry) = a.overflowing_add(value);
                let overflow = ((a ^ sum) & (value ^ sum)) >> 63 != 0;
                set_flags(registers, sum, carry, (a ^ value ^ sum) & 0x10 != 0, overflow);
                write(registers, r, sum);
            }
            Self::Sub(r, value) => {
                let a = read(registers, r);
                let (difference, borrow) = a.overflowing_sub(value);
                let overflow = (a ^ value) & (a ^ difference);
                set_flags(
                    registers,
                    difference,
                    borrow,
                    (a ^ value ^ difference) & 0x10 != 0,
                    overflow >> 63 != 0,
                );
                write(registers, r, difference);
            }
            Self::Zero(r) => {
                write(registers, r, 0);
                set_flags(registers, 0, false, false, false);
            }
            Self::Test(r, wide) => {
                let value = read(registers, r);
                // The sign is that of the operand's width.
                let signed = if wide { value } else { value as u32 as i32 as i64 as u64 };
                set_flags(registers, signed, false, false, false);
            }
        }
        Some(Step::Done)
    }
}

/// True for a memory operand of a base register and a displacement alone.
fn is_plain_address(i: &Instruction) -> bool {
    i.memory_index() == Register::None
        && i.memory_base().is_gpr64()
        && !matches!(i.memory_segment(), Register::FS | Register::GS)
}

fn set_flags(registers: &mut Registers, result: u64, carry: bool, auxiliary: bool, overflow: bool) {
    let mut flags = registers.rflags & !STATUS;
    for (bit, set) in [
        (CF, carry),
        (PF, (result as u8).count_ones().is_multiple_of(2)),
        (AF, auxiliary),
        (ZF, result == 0),
        (SF, result >> 63 != 0),
        (OF, overflow),
    ] {
        flags |= if set { bit } else { 0 };
    }
    registers.rflags = flags;
}

fn slot(registers: &mut Registers, register: Register) -> &mut u64 {
    match register.full_register() {
        Register::RAX => &mut registers.rax,
        Register::RBX => &mut registers.rbx,
        Register::RCX => &mut registers.rcx,
        Register::RDX => &mut registers.rdx,
        Register::RSI => &mut registers.rsi,
        Register::RDI => &mut registers.rdi,
        Register::RSP => &mut registers.rsp,
        Register::RBP => &mut registers.rbp,
        Register::R8 => &mut registers.r8,
        Register::R9 => &mut registers.r9,
        Register::R10 => &mut registers.r10,
        Register::R11 => &mut registers.r11,
        Register::R12 => &mut registers.r12,
        Register::R13 => &mut registers.r13,
        Register::R14 => &mut registers.r14,
        _ => &mut registers.r15,
    }
}

fn read(registers: &mut Registers, register: Register) -> u64 {
    let value = *slot(registers, register);
    if register.is_gpr32() { value & 0xffff_ffff } else { value }
}

fn write(registers: &mut Registers, register: Register, value: u64) {
    *slot(registers, register) = if register.is_gpr32() { value & 0xffff_ffff } else { value };
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};
    use proptest::prelude::*;

    fn decode(bytes: &[u8]) -> Option<Displaced> {
        let i = Decoder::with_ip(64, bytes, 0xffff_ffff_8100_0000, DecoderOptions::NONE).decode();
        assert_eq!(i.len(), bytes.len());
        Displaced::from_instruction(&i)
    }

    #[test]
    fn push_stores_below_and_pop_takes_it_back() {
        let push = decode(&[0x41, 0x57]).unwrap();
        let mut r = Registers { rsp: 0x1000, r15: 7, ..Default::default() };
        assert_eq!(push.execute(&mut r, |_| None), Some(Step::Store(Va(0xff8), 7)));
        let pop = decode(&[0x41, 0x5f]).unwrap();
        r.r15 = 0;
        assert_eq!(pop.execute(&mut r, |va| (va == Va(0xff8)).then_some(7)), Some(Step::Done));
        assert_eq!((r.rsp, r.r15), (0x1000, 7));
    }

    #[test]
    fn push_rsp_stores_the_old_value() {
        let mut r = Registers { rsp: 0x1000, ..Default::default() };
        assert_eq!(decode(&[0x54]).unwrap().execute(&mut r, |_| None), Some(Step::Store(Va(0xff8), 0x1000)));
    }

    #[test]
    fn pop_from_nowhere_changes_nothing() {
        let mut r = Registers { rsp: 0x1000, ..Default::default() };
        let before = r;
        assert_eq!(decode(&[0x5b]).unwrap().execute(&mut r, |_| None), None);
        assert_eq!(r, before);
    }

    #[test]
    fn a_load_takes_a_word_from_memory() {
        // mov rcx, [rdi - 8]
        let fetch = decode(&[0x48, 0x8b, 0x4f, 0xf8]).unwrap();
        let mut r = Registers { rdi: 0x1008, ..Default::default() };
        assert_eq!(fetch.execute(&mut r, |va| (va == Va(0x1000)).then_some(7)), Some(Step::Done));
        assert_eq!(r.rcx, 7);
        assert_eq!(fetch.execute(&mut r, |_| None), None);
    }

    #[test]
    fn patchable_and_complex_instructions_are_refused() {
        for bytes in [
            &[0x0f, 0x1f, 0x44, 0, 0][..],   // nop: a jump label or an ftrace slot
            &[0xe8, 0, 0, 0, 0],             // call
            &[0x8b, 0x07],                   // load of half a word
            &[0x48, 0x8b, 0x04, 0xf7],       // load from an element
            &[0x65, 0x48, 0x8b, 0x07],       // load from per-CPU memory
            &[0x48, 0x8b, 0x05, 0, 0, 0, 0], // load relative to the instruction
            &[0xf0, 0x48, 0xff, 0x07],       // lock inc
            &[0x65, 0x8b, 0x05, 0, 0, 0, 0], // gs-relative
            &[0x8b, 0xc8][..1],              // truncated
        ] {
            if bytes.len() > 1 {
                assert_eq!(decode(bytes), None, "{bytes:02x?}");
            }
        }
    }

    /// Runs an instruction natively: flags and one register, by inline assembly.
    macro_rules! native {
        ($asm:literal, $a:expr, $b:expr) => {{
            let mut a: u64 = $a;
            let flags: u64;
            // SAFETY: arithmetic on registers only; the flags are popped into a register from the red-zone-free stack.
            unsafe {
                std::arch::asm!($asm, "pushfq", "pop {f}", a = inout(reg) a, b = in(reg) $b, f = out(reg) flags);
            }
            let _ = $b;
            (a, flags & STATUS)
        }};
    }

    proptest! {
        #[test]
        fn add_and_sub_flags_are_the_processors(a: u64, b: i32) {
            let b = b as i64 as u64;
            for (op, (value, flags)) in [
                (Displaced::Add(Register::RBX, b), native!("add {a}, {b}", a, b)),
                (Displaced::Sub(Register::RBX, b), native!("sub {a}, {b}", a, b)),
            ] {
                let mut r = Registers { rbx: a, ..Default::default() };
                op.execute(&mut r, |_| None).unwrap();
                prop_assert_eq!((r.rbx, r.rflags & STATUS), (value, flags));
            }
        }

        #[test]
        fn test_flags_are_the_processors(a: u64) {
            // AF is undefined after test: not compared.
            let (_, flags) = native!("test {a}, {b}", a, a);
            let mut r = Registers { rdi: a, ..Default::default() };
            Displaced::Test(Register::RDI, true).execute(&mut r, |_| None).unwrap();
            prop_assert_eq!(r.rflags & STATUS & !AF, flags & !AF);
        }
    }
}
