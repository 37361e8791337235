//! Which registers an instruction reads and writes, of those that functions save.
//!
//! Only what decides is looked at: what is not known to write a register does not write it, and what is not known not to read
//! one reads it. A register field that holds something else, as those of vector registers do, is taken for a register that
//! is read.

use super::Register;
use crate::callee_saved::Registers;

/// Those of one instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Operands {
    /// At least those that it reads.
    pub read: Registers,
    /// At most those that it writes whole; writes of 32 bits clear the others.
    pub written: Registers,
}

/// Places of register fields (Arm ARM, C4.1).
const D: u32 = 0;
const N: u32 = 5;
const A: u32 = 10;
const M: u32 = 16;

/// Those of the instruction encoded as `word`.
pub(super) fn operands(word: u32) -> Operands {
    match word >> 25 & 0xf {
        0b1000 | 0b1001 => immediate(word),
        0b1010 | 0b1011 => branch(word),
        0b0101 | 0b1101 => registers(word),
        0b0100 | 0b0110 | 0b1100 | 0b1110 => memory(word),
        // Vectors, and what does not exist.
        _ => reads(word, &[D, N, A, M]),
    }
}

fn field(word: u32, at: u32) -> Registers {
    let register = Register::numbered(word >> at & 0x1f);
    register.map_or(Registers::NONE, |register| Registers::NONE.with(register))
}

fn reads(word: u32, fields: &[u32]) -> Operands {
    let read = fields.iter().fold(Registers::NONE, |all, &at| all.union(field(word, at)));
    Operands { read, written: Registers::NONE }
}

fn makes(word: u32, fields: &[u32]) -> Operands {
    Operands { written: field(word, D), ..reads(word, fields) }
}

/// C4.1.86: data processing with an immediate.
fn immediate(word: u32) -> Operands {
    let opcode = word >> 29 & 3;
    match word >> 23 & 7 {
        // adr, adrp
        0b000 | 0b001 => makes(word, &[]),
        // add, sub, logic
        0b010 | 0b100 => makes(word, &[N]),
        // movn, movz; movk keeps the other bits.
        0b101 if opcode != 0b11 => makes(word, &[]),
        0b101 => makes(word, &[D]),
        // sbfm, ubfm; bfm keeps the other bits.
        0b110 if opcode != 0b01 => makes(word, &[N]),
        0b110 => makes(word, &[D, N]),
        // extr
        0b111 => makes(word, &[N, M]),
        _ => reads(word, &[D, N, A, M]),
    }
}

/// C4.1.87: branches, exceptions, system instructions.
fn branch(word: u32) -> Operands {
    match word >> 24 {
        // b, bl, b.cond, exceptions: no register that is saved.
        0x14..=0x17 | 0x94..=0x97 | 0x54 | 0xd4 => Operands::default(),
        // cbz, cbnz, tbz, tbnz
        0x34..=0x37 | 0xb4..=0xb7 => reads(word, &[D]),
        // mrs, sysl
        0xd5 if word >> 21 & 1 != 0 => makes(word, &[]),
        // msr, sys, hints
        0xd5 => reads(word, &[D]),
        // To a register's value; authenticating forms have a second register.
        _ => reads(word, &[D, N]),
    }
}

/// C4.1.95: data processing with registers only.
fn registers(word: u32) -> Operands {
    let (bit_28, opcode) = (word >> 28 & 1, word >> 21 & 0xf);
    match (bit_28, opcode) {
        // Logic, add and sub.
        (0, _) => makes(word, &[N, M]),
        // adc, sbc; and flags made of a register.
        (1, 0b0000) if word >> 10 & 0x3f == 0 => makes(word, &[N, M]),
        (1, 0b0000) => reads(word, &[D, N]),
        // ccmn, ccmp with a register, with an immediate.
        (1, 0b0010) if word >> 11 & 1 == 0 => reads(word, &[N, M]),
        (1, 0b0010) => reads(word, &[N]),
        // csel and the like.
        (1, 0b0100) => makes(word, &[N, M]),
        // One source, two sources.
        (1, 0b0110) if word >> 30 & 1 != 0 => {
            makes(word, if word >> 16 & 0x1f == 0 { &[N] } else { &[D, N] })
        }
        (1, 0b0110) => makes(word, &[N, M]),
        // madd and the like: three sources.
        (1, 0b1000..) => makes(word, &[N, M, A]),
        _ => reads(word, &[D, N, A, M]),
    }
}

/// C4.1.88: loads and stores. Base registers that change are read before.
fn memory(word: u32) -> Operands {
    let vector = word >> 26 & 1 != 0;
    let all = reads(word, &[D, N, A, M]);
    match (word >> 28 & 3, vector) {
        // Literals.
        (0b01, false) if word >> 24 & 1 == 0 && word >> 30 != 0b11 => makes(word, &[]),
        // Pairs: with an immediate where the third register would be.
        (0b10, true) => reads(word, &[N]),
        (0b10, false) if word >> 22 & 1 == 0 => reads(word, &[D, N, A]),
        (0b10, false) => {
            let written = field(word, D).union(field(word, A));
            Operands { written, ..reads(word, &[N]) }
        }
        (0b11, _) => single(word, vector),
        // casp has pairs of registers of which the fields name the first.
        (0b00, false) if word & 0xbfa0_7c00 == 0x0820_7c00 => {
            let second = |at| Register::numbered((word >> at & 0x1f) + 1);
            let seconds = [D, M].into_iter().filter_map(second);
            Operands { read: seconds.fold(all.read, Registers::with), ..all }
        }
        _ => all,
    }
}

/// Loads and stores of one register.
fn single(word: u32, vector: bool) -> Operands {
    let unsigned_offset = word >> 24 & 1 != 0;
    // Atomics and authenticating loads have bit 21 as register offsets do, and other bits 11:10.
    let register_offset = word >> 21 & 1 != 0 && !unsigned_offset;
    if register_offset && word >> 10 & 3 != 0b10 {
        return reads(word, &[D, N, A, M]);
    }
    let address: &[u32] = if register_offset { &[N, M] } else { &[N] };
    let address = reads(word, address);
    let is_store = word >> 22 & 3 == 0;
    // prfm names what to do where the register would be.
    let is_prefetch = word >> 30 == 3 && word >> 22 & 3 == 2;
    if vector || is_prefetch {
        return address;
    }
    if is_store {
        Operands { read: address.read.union(field(word, D)), ..address }
    } else {
        Operands { written: field(word, D), ..address }
    }
}
