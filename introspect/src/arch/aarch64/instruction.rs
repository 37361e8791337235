//! A64 instructions (Arm ARM, C4): those that function prologues, epilogues and references to data are made of. All have 4
//! bytes, so a decoder for them is small; every other instruction is [`Instruction::Other`].

use crate::memory::Va;

/// Bytes of an instruction.
pub const BYTES: u64 = 4;

/// A register operand. Number 31 is the stack pointer or zero, by instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Register {
    /// x0 to x30.
    X(u8),
    Sp,
    Zero,
}

impl Register {
    /// The frame pointer and the link register.
    pub const FRAME: Self = Self::X(29);
    pub const LINK: Self = Self::X(30);

    fn or_zero(number: u32) -> Self {
        if number == 31 { Self::Zero } else { Self::X(number as u8) }
    }

    fn or_sp(number: u32) -> Self {
        if number == 31 { Self::Sp } else { Self::X(number as u8) }
    }
}

/// When the base register of a load or store changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Index {
    /// Never.
    Offset,
    /// Before the access, which is there.
    Pre,
    /// After the access, which is at the old place.
    Post,
}

/// The memory operand of a load or store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub base: Register,
    pub offset: i64,
    pub index: Index,
}

/// How a branch to a register's value goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Indirect {
    Jump,
    Call,
    Return,
}

/// One instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Instruction {
    Nop,
    /// `bti`
    LandingPad,
    /// `paciasp`, `pacibsp`
    Sign,
    /// `autiasp`, `autibsp`
    Authenticate,
    /// `mov` between registers; not `wide`: 32 bits
    Move {
        wide: bool,
        to: Register,
        from: Register,
    },
    /// `movz`, `movn`
    Constant {
        to: Register,
        value: u64,
    },
    /// `movk`: these 16 bits at `shift`
    Insert {
        wide: bool,
        to: Register,
        bits: u16,
        shift: u8,
    },
    /// `add`, `sub` of an immediate (subtractions have it negated), without flags
    AddConstant {
        wide: bool,
        to: Register,
        from: Register,
        value: i64,
    },
    /// `add`, `sub` of a register, neither shifted nor extended, without flags
    AddRegister {
        wide: bool,
        to: Register,
        a: Register,
        b: Register,
        subtract: bool,
    },
    /// `adr`
    Adr {
        to: Register,
        offset: i64,
    },
    /// `adrp`: relative to the page of the instruction
    Adrp {
        to: Register,
        offset: i64,
    },
    /// `ldr` of 1, 2, 4 or 8 bytes into a general register; sign-extended ones, too
    Load {
        bytes: u8,
        to: Register,
        place: Place,
    },
    /// `str` of 1, 2, 4 or 8 bytes
    Store {
        bytes: u8,
        from: Register,
        place: Place,
    },
    /// `ldp` of 64-bit registers
    LoadPair {
        to: [Register; 2],
        place: Place,
    },
    /// `stp` of 64-bit registers
    StorePair {
        from: [Register; 2],
        place: Place,
    },
    /// `b`, `bl`
    Branch {
        call: bool,
        offset: i64,
    },
    /// `b.cond`
    Conditional {
        condition: u8,
        offset: i64,
    },
    /// `cbz`, `cbnz`
    CompareZero {
        wide: bool,
        register: Register,
        nonzero: bool,
        offset: i64,
    },
    /// `tbz`, `tbnz`
    TestBit {
        register: Register,
        bit: u8,
        nonzero: bool,
        offset: i64,
    },
    /// `br`, `blr`, `ret` and their authenticating forms
    Register {
        kind: Indirect,
        register: Register,
        authenticated: bool,
    },
    /// `brk`
    Break(u16),
    /// `mrs to, sp_el0`
    ReadTask {
        to: Register,
    },
    Other,
}

impl Instruction {
    /// The instruction encoded as `word`.
    pub fn decode(word: u32) -> Self {
        // Arm ARM, C4.1: bits 28:25.
        match bits(word, 25, 4) {
            0b1000 | 0b1001 => Self::immediate(word),
            0b1010 | 0b1011 => Self::branch(word),
            0b0100 | 0b0110 | 0b1100 | 0b1110 => Self::memory(word),
            0b0101 | 0b1101 => Self::registers(word),
            _ => Self::Other,
        }
    }

    /// Where it branches, for one at `at`; None for other instructions and branches to a register's value.
    pub fn target(self, at: Va) -> Option<Va> {
        let (Self::Branch { offset, .. }
        | Self::Conditional { offset, .. }
        | Self::CompareZero { offset, .. }
        | Self::TestBit { offset, .. }) = self
        else {
            return None;
        };
        Some(at + offset as u64)
    }

    /// C4.1.86: data processing with an immediate.
    fn immediate(word: u32) -> Self {
        let (to, from) = (bits(word, 0, 5), bits(word, 5, 5));
        let wide = bit(word, 31);
        match bits(word, 23, 3) {
            0b000 | 0b001 => {
                let offset = signed(bits(word, 5, 19) << 2 | bits(word, 29, 2), 21);
                let to = Register::or_zero(to);
                if wide { Self::Adrp { to, offset: offset << 12 } } else { Self::Adr { to, offset } }
            }
            // With flags it is a comparison: not here.
            0b010 if !bit(word, 29) => {
                let value = i64::from(bits(word, 10, 12)) << if bit(word, 22) { 12 } else { 0 };
                let value = if bit(word, 30) { -value } else { value };
                Self::AddConstant { wide, to: Register::or_sp(to), from: Register::or_sp(from), value }
            }
            0b101 => Self::move_wide(word, wide, Register::or_zero(to)),
            _ => Self::Other,
        }
    }

    fn move_wide(word: u32, wide: bool, to: Register) -> Self {
        let (half, shift) = (bits(word, 5, 16), 16 * bits(word, 21, 2));
        if !wide && shift > 16 {
            return Self::Other;
        }
        let mask = if wide { u64::MAX } else { u64::from(u32::MAX) };
        let value = u64::from(half) << shift;
        match bits(word, 29, 2) {
            0b00 => Self::Constant { to, value: !value & mask },
            0b10 => Self::Constant { to, value },
            0b11 => Self::Insert { wide, to, bits: half as u16, shift: shift as u8 },
            _ => Self::Other,
        }
    }

    /// C4.1.87: branches, exceptions, system instructions.
    fn branch(word: u32) -> Self {
        if bits(word, 26, 5) == 0b00101 {
            return Self::Branch { call: bit(word, 31), offset: signed(bits(word, 0, 26), 26) << 2 };
        }
        let offset = signed(bits(word, 5, 19), 19) << 2;
        match bits(word, 24, 8) {
            0x54 if !bit(word, 4) => Self::Conditional { condition: bits(word, 0, 4) as u8, offset },
            0x34 | 0x35 | 0xb4 | 0xb5 => Self::CompareZero {
                wide: bit(word, 31),
                register: Register::or_zero(bits(word, 0, 5)),
                nonzero: bit(word, 24),
                offset,
            },
            0x36 | 0x37 | 0xb6 | 0xb7 => Self::TestBit {
                register: Register::or_zero(bits(word, 0, 5)),
                bit: (bits(word, 31, 1) << 5 | bits(word, 19, 5)) as u8,
                nonzero: bit(word, 24),
                offset: signed(bits(word, 5, 14), 14) << 2,
            },
            0xd4 if bits(word, 21, 3) == 1 && bits(word, 0, 5) == 0 => Self::Break(bits(word, 5, 16) as u16),
            0xd5 => Self::system(word),
            0xd6 | 0xd7 => Self::to_register(word),
            _ => Self::Other,
        }
    }

    fn system(word: u32) -> Self {
        // C6.2.226: mrs of S3_0_C4_C1_0, which is SP_EL0.
        if word & !0x1f == 0xd538_4100 {
            return Self::ReadTask { to: Register::or_zero(bits(word, 0, 5)) };
        }
        // C4.1.87.3: hints have Rt 31, CRn 2, op0 0, op1 3.
        if word & 0xffff_f01f != 0xd503_201f {
            return Self::Other;
        }
        match bits(word, 5, 7) {
            0 => Self::Nop,
            0b001_1001 | 0b001_1011 => Self::Sign,
            0b001_1101 | 0b001_1111 => Self::Authenticate,
            0b010_0000 | 0b010_0010 | 0b010_0100 | 0b010_0110 => Self::LandingPad,
            _ => Self::Other,
        }
    }

    /// C4.1.87.12: unconditional branch to a register's value.
    fn to_register(word: u32) -> Self {
        let kind = match bits(word, 21, 4) {
            0b0000 | 0b1000 => Indirect::Jump,
            0b0001 | 0b1001 => Indirect::Call,
            0b0010 => Indirect::Return,
            _ => return Self::Other,
        };
        let authenticated = match bits(word, 10, 6) {
            0 => false,
            0b10 | 0b11 => true,
            _ => return Self::Other,
        };
        if bits(word, 16, 5) != 31 || (!authenticated && bits(word, 0, 5) != 0) {
            return Self::Other;
        }
        let number = bits(word, 5, 5);
        let register = match kind {
            // retaa and retab name the link register by 31.
            Indirect::Return if authenticated => Register::LINK,
            _ => Register::or_zero(number),
        };
        Self::Register { kind, register, authenticated }
    }

    /// C4.1.88: loads and stores.
    fn memory(word: u32) -> Self {
        if bit(word, 26) {
            // Vector registers.
            return Self::Other;
        }
        let base = Register::or_sp(bits(word, 5, 5));
        let register = Register::or_zero(bits(word, 0, 5));
        match bits(word, 27, 3) {
            0b101 => Self::pair(word, base, register),
            0b111 => Self::single(word, base, register),
            _ => Self::Other,
        }
    }

    fn pair(word: u32, base: Register, first: Register) -> Self {
        let index = match bits(word, 23, 3) {
            0b001 => Index::Post,
            0b010 => Index::Offset,
            0b011 => Index::Pre,
            _ => return Self::Other,
        };
        if bits(word, 30, 2) != 0b10 {
            return Self::Other;
        }
        let place = Place { base, offset: signed(bits(word, 15, 7), 7) << 3, index };
        let both = [first, Register::or_zero(bits(word, 10, 5))];
        let is_load = bit(word, 22);
        // Where base and target are one register the result is not defined.
        let clash = index != Index::Offset && both.contains(&base) || is_load && both[0] == both[1];
        match (clash, is_load) {
            (true, _) => Self::Other,
            (_, true) => Self::LoadPair { to: both, place },
            _ => Self::StorePair { from: both, place },
        }
    }

    fn single(word: u32, base: Register, register: Register) -> Self {
        let scale = bits(word, 30, 2);
        let unscaled = || signed(bits(word, 12, 9), 9);
        let (offset, index) = if bit(word, 24) {
            (i64::from(bits(word, 10, 12) << scale), Index::Offset)
        } else if bit(word, 21) {
            return Self::Other;
        } else {
            match bits(word, 10, 2) {
                0b00 => (unscaled(), Index::Offset),
                0b01 => (unscaled(), Index::Post),
                0b11 => (unscaled(), Index::Pre),
                _ => return Self::Other,
            }
        };
        if index != Index::Offset && register == base {
            return Self::Other;
        }
        let place = Place { base, offset, index };
        let bytes = 1 << scale;
        match bits(word, 22, 2) {
            0b00 => Self::Store { bytes, from: register, place },
            0b01 => Self::Load { bytes, to: register, place },
            // Prefetches and what does not exist.
            _ if scale == 3 || (scale == 2 && bit(word, 22)) => Self::Other,
            _ => Self::Load { bytes, to: register, place },
        }
    }

    /// C4.1.95: data processing with registers only.
    fn registers(word: u32) -> Self {
        let wide = bit(word, 31);
        let (to, a, b) = (bits(word, 0, 5), bits(word, 5, 5), bits(word, 16, 5));
        let unshifted = bits(word, 10, 6) == 0 && bits(word, 22, 2) == 0;
        let register = Register::or_zero;
        match bits(word, 21, 8) & 0b1111_1001 {
            // orr to, zr, b
            0b0101_0000 if bits(word, 29, 2) == 0b01 && unshifted && a == 31 => {
                Self::Move { wide, to: register(to), from: register(b) }
            }
            0b0101_1000 if !bit(word, 29) && unshifted => Self::AddRegister {
                wide,
                to: register(to),
                a: register(a),
                b: register(b),
                subtract: bit(word, 30),
            },
            _ => Self::Other,
        }
    }
}

fn bits(word: u32, from: u32, count: u32) -> u32 {
    word >> from & ((1 << count) - 1)
}

fn bit(word: u32, at: u32) -> bool {
    word >> at & 1 != 0
}

/// Sign-extends the low `count` bits.
fn signed(value: u32, count: u32) -> i64 {
    let unused = 64 - count;
    (i64::from(value) << unused) >> unused
}

#[cfg(test)]
mod tests {
    use super::*;

    const X0: Register = Register::X(0);

    #[test]
    fn decodes_what_an_assembler_made() {
        let at = |base, offset, index| Place { base, offset, index };
        let frame = [Register::FRAME, Register::LINK];
        let table = [
            (0xd503_201f, Instruction::Nop),
            (0xd503_245f, Instruction::LandingPad),
            (0xd503_233f, Instruction::Sign),
            (0xd503_23bf, Instruction::Authenticate),
            // mov x9, x30; mov w0, w1; mov x29, sp
            (0xaa1e_03e9, Instruction::Move { wide: true, to: Register::X(9), from: Register::LINK }),
            (0x2a01_03e0, Instruction::Move { wide: false, to: X0, from: Register::X(1) }),
            (
                0x9100_03fd,
                Instruction::AddConstant { wide: true, to: Register::FRAME, from: Register::Sp, value: 0 },
            ),
            // sub sp, sp, #0x70; add x0, x1, #0x5, lsl #12
            (
                0xd101_c3ff,
                Instruction::AddConstant { wide: true, to: Register::Sp, from: Register::Sp, value: -0x70 },
            ),
            (
                0x9140_1420,
                Instruction::AddConstant { wide: true, to: X0, from: Register::X(1), value: 0x5000 },
            ),
            // add x0, x1, x2; sub w0, w1, w2
            (
                0x8b02_0020,
                Instruction::AddRegister {
                    wide: true,
                    to: X0,
                    a: Register::X(1),
                    b: Register::X(2),
                    subtract: false,
                },
            ),
            (
                0x4b02_0020,
                Instruction::AddRegister {
                    wide: false,
                    to: X0,
                    a: Register::X(1),
                    b: Register::X(2),
                    subtract: true,
                },
            ),
            // stp x29, x30, [sp, #-0x30]!; ldp x29, x30, [sp], #0x30; stp x19, x20, [sp, #0x10]
            (0xa9bd_7bfd, Instruction::StorePair { from: frame, place: at(Register::Sp, -0x30, Index::Pre) }),
            (0xa8c3_7bfd, Instruction::LoadPair { to: frame, place: at(Register::Sp, 0x30, Index::Post) }),
            (
                0xa901_53f3,
                Instruction::StorePair {
                    from: [Register::X(19), Register::X(20)],
                    place: at(Register::Sp, 0x10, Index::Offset),
                },
            ),
            // ldr x0, [x1, #8]; ldrb w0, [x1]; ldrsw x0, [x1, #4]; str x0, [sp, #-16]!
            (
                0xf940_0420,
                Instruction::Load { bytes: 8, to: X0, place: at(Register::X(1), 8, Index::Offset) },
            ),
            (
                0x3940_0020,
                Instruction::Load { bytes: 1, to: X0, place: at(Register::X(1), 0, Index::Offset) },
            ),
            (
                0xb980_0420,
                Instruction::Load { bytes: 4, to: X0, place: at(Register::X(1), 4, Index::Offset) },
            ),
            (
                0xf81f_0fe0,
                Instruction::Store { bytes: 8, from: X0, place: at(Register::Sp, -16, Index::Pre) },
            ),
            // mov x0, #-5; mov w0, #0x10000; movk x0, #0xabcd, lsl #32
            (0x9280_0080, Instruction::Constant { to: X0, value: -5_i64 as u64 }),
            (0x52a0_0020, Instruction::Constant { to: X0, value: 0x1_0000 }),
            (0xf2d5_79a0, Instruction::Insert { wide: true, to: X0, bits: 0xabcd, shift: 32 }),
            // adr x0, .+4; adrp x0, .-0x1000
            (0x1000_0020, Instruction::Adr { to: X0, offset: 4 }),
            (0xf0ff_ffe0, Instruction::Adrp { to: X0, offset: -0x1000 }),
            // b .-4; bl .+8; b.ne .+16; cbz x1, .+8; cbnz w1, .-8; tbz x3, #33, .+8
            (0x17ff_ffff, Instruction::Branch { call: false, offset: -4 }),
            (0x9400_0002, Instruction::Branch { call: true, offset: 8 }),
            (0x5400_0081, Instruction::Conditional { condition: 1, offset: 16 }),
            (
                0xb400_0041,
                Instruction::CompareZero { wide: true, register: Register::X(1), nonzero: false, offset: 8 },
            ),
            (
                0x35ff_ffc1,
                Instruction::CompareZero { wide: false, register: Register::X(1), nonzero: true, offset: -8 },
            ),
            (
                0xb608_0043,
                Instruction::TestBit { register: Register::X(3), bit: 33, nonzero: false, offset: 8 },
            ),
            // ret; retaa; br x16; blr x1; brk #0x800; mrs x1, sp_el0
            (0xd65f_03c0, returns(false)),
            (0xd65f_0bff, returns(true)),
            (
                0xd61f_0200,
                Instruction::Register {
                    kind: Indirect::Jump,
                    register: Register::X(16),
                    authenticated: false,
                },
            ),
            (
                0xd63f_0020,
                Instruction::Register {
                    kind: Indirect::Call,
                    register: Register::X(1),
                    authenticated: false,
                },
            ),
            (0xd421_0000, Instruction::Break(0x800)),
            (0xd538_4101, Instruction::ReadTask { to: Register::X(1) }),
            // subs xzr (cmp), ldp of 32 bits, ldr q0, prfm, ldxr, svc, orr shifted
            (0xf100_003f, Instruction::Other),
            (0x2940_0420, Instruction::Other),
            (0x3dc0_0020, Instruction::Other),
            (0xf980_0020, Instruction::Other),
            (0xc85f_7c20, Instruction::Other),
            (0xd400_0001, Instruction::Other),
            (0xaa02_0fe0, Instruction::Other),
        ];
        for (word, instruction) in table {
            assert_eq!(Instruction::decode(word), instruction, "{word:#x}");
        }
    }

    fn returns(authenticated: bool) -> Instruction {
        Instruction::Register { kind: Indirect::Return, register: Register::LINK, authenticated }
    }
}
