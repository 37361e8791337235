//! The processor that runs the tests carries every instruction out, too: both must come to the same.

use super::*;
use proptest::prelude::*;
use std::arch::{asm, global_asm};

/// Registers as [`run_instruction`] loads and stores them: x0 to x30, sp, and the flags.
const WORDS: usize = 33;
const SP: usize = 31;
const FLAGS: usize = 32;
/// Registers that the harness needs while the instruction runs.
const TAKEN: [u8; 2] = [17, 18];
/// Bytes of memory that loads and stores go to, and where in them base registers point.
const MEMORY: usize = 2048;
const MIDDLE: usize = 1024;
/// Branches go this far: to the second way out.
const BRANCH: i64 = 16;

global_asm!(
    ".global run_instruction, run_instruction_fell_through, run_instruction_branched",
    // x0: code, x1: registers. Returns 1 when the instruction branched.
    "run_instruction:",
    "stp x29, x30, [sp, #-96]!",
    "stp x19, x20, [sp, #16]",
    "stp x21, x22, [sp, #32]",
    "stp x23, x24, [sp, #48]",
    "stp x25, x26, [sp, #64]",
    "stp x27, x28, [sp, #80]",
    "mov x18, x1",
    "mov x17, x0",
    "mov x2, sp",
    "str x2, [x18, #264]",
    "ldr x2, [x18, #256]",
    "msr nzcv, x2",
    "ldr x2, [x18, #248]",
    "mov sp, x2",
    "ldp x0, x1, [x18]",
    "ldp x2, x3, [x18, #16]",
    "ldp x4, x5, [x18, #32]",
    "ldp x6, x7, [x18, #48]",
    "ldp x8, x9, [x18, #64]",
    "ldp x10, x11, [x18, #80]",
    "ldp x12, x13, [x18, #96]",
    "ldp x14, x15, [x18, #112]",
    "ldr x16, [x18, #128]",
    "ldp x19, x20, [x18, #152]",
    "ldp x21, x22, [x18, #168]",
    "ldp x23, x24, [x18, #184]",
    "ldp x25, x26, [x18, #200]",
    "ldp x27, x28, [x18, #216]",
    "ldp x29, x30, [x18, #232]",
    "br x17",
    "run_instruction_fell_through:",
    "mov x17, #0",
    "b 1f",
    "run_instruction_branched:",
    "mov x17, #1",
    "1:",
    "stp x0, x1, [x18]",
    "stp x2, x3, [x18, #16]",
    "stp x4, x5, [x18, #32]",
    "stp x6, x7, [x18, #48]",
    "stp x8, x9, [x18, #64]",
    "stp x10, x11, [x18, #80]",
    "stp x12, x13, [x18, #96]",
    "stp x14, x15, [x18, #112]",
    "str x16, [x18, #128]",
    "stp x19, x20, [x18, #152]",
    "stp x21, x22, [x18, #168]",
    "stp x23, x24, [x18, #184]",
    "stp x25, x26, [x18, #200]",
    "stp x27, x28, [x18, #216]",
    "stp x29, x30, [x18, #232]",
    "mov x0, sp",
    "str x0, [x18, #248]",
    "mrs x0, nzcv",
    "str x0, [x18, #256]",
    "ldr x0, [x18, #264]",
    "mov sp, x0",
    "mov x0, x17",
    "ldp x19, x20, [sp, #16]",
    "ldp x21, x22, [sp, #32]",
    "ldp x23, x24, [sp, #48]",
    "ldp x25, x26, [sp, #64]",
    "ldp x27, x28, [sp, #80]",
    "ldp x29, x30, [sp], #96",
    "ret",
);

unsafe extern "C" {
    fn run_instruction(code: *const u32, registers: *mut u64) -> u64;
    fn run_instruction_fell_through();
    fn run_instruction_branched();
}

/// A page of code with room for one instruction, and the ways out behind it.
struct Code(*mut u32);

impl Code {
    fn new() -> Self {
        const READ_WRITE_EXECUTE: u64 = 7;
        const PRIVATE_ANONYMOUS: u64 = 0x22;
        let page: usize;
        // SAFETY: mmap of a new page touches no memory of this program's.
        unsafe {
            asm!(
                "svc #0",
                in("x8") 222, inout("x0") 0_usize => page, in("x1") 4096, in("x2") READ_WRITE_EXECUTE,
                in("x3") PRIVATE_ANONYMOUS, in("x4") -1, in("x5") 0,
            );
        }
        assert!(page.is_multiple_of(4096) && page != 0, "no page for code");
        Self(page as *mut u32)
    }

    /// The instruction; `ldr x17, literal; br x17` on both ways; the two literals.
    fn put(&self, instruction: u32) {
        let load = |words: u32| 0x5800_0011 | words << 5;
        const JUMP: u32 = 0xd61f_0220;
        let words = [instruction, load(5), JUMP, 0xd503_201f, load(4), JUMP];
        // SAFETY: the page is ours, writable, and nobody executes it now.
        unsafe {
            for (n, word) in words.into_iter().enumerate() {
                self.0.add(n).write(word);
            }
            let literals = self.0.add(6).cast::<u64>();
            literals.write(run_instruction_fell_through as *const () as u64);
            literals.add(1).write(run_instruction_branched as *const () as u64);
            asm!("dc cvau, {0}", "dsb ish", "ic ivau, {0}", "dsb ish", "isb", in(reg) self.0);
        }
    }

    fn address(&self) -> u64 {
        self.0 as u64
    }
}

impl Drop for Code {
    fn drop(&mut self) {
        // SAFETY: the page was mapped by `new`, and nothing refers to it any more.
        unsafe {
            asm!("svc #0", in("x8") 215, inlateout("x0") self.0 as usize => _, in("x1") 4096);
        }
    }
}

fn bits(register: Register) -> u32 {
    match register {
        Register::X(n) => u32::from(n),
        Register::Sp | Register::Zero => 31,
    }
}

/// Registers that an instruction of the test may name; base registers of memory operands are others than what is loaded.
fn register() -> impl Strategy<Value = Register> {
    let numbers: Vec<u8> = (0..31).filter(|n| !TAKEN.contains(n)).collect();
    prop::sample::select(numbers).prop_map(Register::X)
}

fn place(pair: bool) -> impl Strategy<Value = Place> {
    let index = prop::sample::select(vec![Index::Offset, Index::Pre, Index::Post]);
    let base = prop_oneof![register(), Just(Register::Sp)];
    (base, -16_i64..16, index).prop_map(move |(base, words, index)| Place {
        base,
        // The stack pointer stays aligned.
        offset: if base == Register::Sp { 16 * words } else { 8 * words },
        index: if pair || words != 0 { index } else { Index::Offset },
    })
}

fn instruction() -> impl Strategy<Value = Instruction> {
    let branch = Just(BRANCH);
    prop_oneof![
        (any::<bool>(), register(), register()).prop_map(|(wide, to, from)| Instruction::Move {
            wide,
            to,
            from
        }),
        (register(), any::<u16>(), 0..4_u32)
            .prop_map(|(to, bits, half)| Instruction::Constant { to, value: u64::from(bits) << (16 * half) }),
        (register(), any::<u16>(), 0..4_u8).prop_map(|(to, bits, half)| Instruction::Insert {
            wide: true,
            to,
            bits,
            shift: 16 * half
        }),
        (any::<bool>(), register(), register(), -4095_i64..4096)
            .prop_map(|(wide, to, from, value)| Instruction::AddConstant { wide, to, from, value }),
        (-255_i64..256).prop_map(|n| Instruction::AddConstant {
            wide: true,
            to: Register::Sp,
            from: Register::Sp,
            value: 16 * n
        }),
        (register(), -255_i64..256).prop_map(|(to, value)| Instruction::AddConstant {
            wide: true,
            to,
            from: Register::Sp,
            value
        }),
        (any::<bool>(), register(), register(), register(), any::<bool>())
            .prop_map(|(wide, to, a, b, subtract)| Instruction::AddRegister { wide, to, a, b, subtract }),
        (register(), -(1_i64 << 20)..1 << 20).prop_map(|(to, offset)| Instruction::Adr { to, offset }),
        (register(), -(1_i64 << 20)..1 << 20)
            .prop_map(|(to, pages)| Instruction::Adrp { to, offset: pages << 12 }),
        (register(), place(false)).prop_map(|(to, place)| Instruction::Load { bytes: 8, to, place }),
        (register(), place(false)).prop_map(|(from, place)| Instruction::Store { bytes: 8, from, place }),
        (register(), register(), place(true))
            .prop_map(|(a, b, place)| Instruction::LoadPair { to: [a, b], place }),
        (register(), register(), place(true))
            .prop_map(|(a, b, place)| Instruction::StorePair { from: [a, b], place }),
        (0..16_u8, branch).prop_map(|(condition, offset)| Instruction::Conditional { condition, offset }),
        (any::<bool>(), register(), any::<bool>(), branch).prop_map(|(wide, register, nonzero, offset)| {
            Instruction::CompareZero { wide, register, nonzero, offset }
        }),
        (register(), 0..64_u8, any::<bool>(), branch).prop_map(|(register, bit, nonzero, offset)| {
            Instruction::TestBit { register, bit, nonzero, offset }
        }),
    ]
}

/// Assembles what [`instruction`] makes, from the manual's diagrams.
fn assemble(instruction: Instruction) -> u32 {
    let wide_bit = |wide: bool| u32::from(wide) << 31;
    let field = |value: i64, bits: u32| value as u32 & ((1 << bits) - 1);
    match instruction {
        Instruction::Move { wide, to, from } => 0x2a00_03e0 | wide_bit(wide) | bits(from) << 16 | bits(to),
        Instruction::Constant { to, value } => {
            let half = value.trailing_zeros().min(63) / 16;
            0xd280_0000 | half << 21 | ((value >> (16 * half)) as u32 & 0xffff) << 5 | bits(to)
        }
        Instruction::Insert { to, bits: value, shift, .. } => {
            0xf280_0000 | u32::from(shift / 16) << 21 | u32::from(value) << 5 | bits(to)
        }
        Instruction::AddConstant { wide, to, from, value } => {
            let subtract = u32::from(value < 0) << 30;
            0x1100_0000
                | wide_bit(wide)
                | subtract
                | field(value.abs(), 12) << 10
                | bits(from) << 5
                | bits(to)
        }
        Instruction::AddRegister { wide, to, a, b, subtract } => {
            0x0b00_0000 | wide_bit(wide) | u32::from(subtract) << 30 | bits(b) << 16 | bits(a) << 5 | bits(to)
        }
        Instruction::Adr { to, offset } => {
            0x1000_0000 | field(offset, 2) << 29 | field(offset >> 2, 19) << 5 | bits(to)
        }
        Instruction::Adrp { to, offset } => {
            0x9000_0000 | field(offset >> 12, 2) << 29 | field(offset >> 14, 19) << 5 | bits(to)
        }
        Instruction::Load { to, place, .. } => single(place, bits(to), 1),
        Instruction::Store { from, place, .. } => single(place, bits(from), 0),
        Instruction::LoadPair { to, place } => pair(place, to, 1),
        Instruction::StorePair { from, place } => pair(place, from, 0),
        Instruction::Conditional { condition, offset } => {
            0x5400_0000 | field(offset >> 2, 19) << 5 | u32::from(condition)
        }
        Instruction::CompareZero { wide, register, nonzero, offset } => {
            0x3400_0000
                | wide_bit(wide)
                | u32::from(nonzero) << 24
                | field(offset >> 2, 19) << 5
                | bits(register)
        }
        Instruction::TestBit { register, bit, nonzero, offset } => {
            0x3600_0000
                | u32::from(bit >> 5) << 31
                | u32::from(nonzero) << 24
                | u32::from(bit & 31) << 19
                | field(offset >> 2, 14) << 5
                | bits(register)
        }
        other => panic!("{other:?}"),
    }
}

fn single(place: Place, register: u32, load: u32) -> u32 {
    let mode = match place.index {
        Index::Offset => 0,
        Index::Post => 1 << 10,
        Index::Pre => 3 << 10,
    };
    0xf800_0000 | load << 22 | (place.offset as u32 & 0x1ff) << 12 | mode | bits(place.base) << 5 | register
}

fn pair(place: Place, both: [Register; 2], load: u32) -> u32 {
    let mode = match place.index {
        Index::Post => 1,
        Index::Offset => 2,
        Index::Pre => 3,
    };
    let offset = ((place.offset / 8) as u32 & 0x7f) << 15;
    0xa800_0000
        | mode << 23
        | load << 22
        | offset
        | bits(both[1]) << 10
        | bits(place.base) << 5
        | bits(both[0])
}

/// The base register of a memory operand, which must point to memory.
fn base(instruction: Instruction) -> Option<Register> {
    match instruction {
        Instruction::Load { place, .. }
        | Instruction::Store { place, .. }
        | Instruction::LoadPair { place, .. }
        | Instruction::StorePair { place, .. } => Some(place.base),
        _ => None,
    }
}

/// Memory aligned as the stack pointer must be.
#[repr(align(16))]
struct Memory([u64; MEMORY / 8]);

/// Carries out `word` natively and by emulation, and compares registers, flags, memory and the way taken.
fn compare(word: u32, mut words: [u64; WORDS], seed: u64) -> Result<(), TestCaseError> {
    let decoded = Instruction::decode(word);
    let Some(displaced) = Displaced::from_instruction(decoded) else {
        // Two targets that are one, or a base that changes and is loaded: not defined.
        prop_assert_eq!(decoded, Instruction::Other, "{:#x}", word);
        return Ok(());
    };
    let mut memory = Memory(std::array::from_fn(|n| seed.wrapping_mul(2 * n as u64 + 1)));
    let start = (&raw mut memory).cast::<u64>() as u64;
    words[SP] = start + MIDDLE as u64;
    if let Some(Register::X(n)) = base(decoded) {
        words[usize::from(n)] = start + MIDDLE as u64;
    }
    let code = Code::new();
    code.put(word);
    let mut registers = Registers {
        x: std::array::from_fn(|n| words[n]),
        sp: words[SP],
        pc: code.address(),
        pstate: words[FLAGS],
    };
    let mut emulated = memory.0;
    let load = |va: Va| emulated.get((va.0 - start) as usize / 8).copied();
    let step = displaced.execute(&mut registers, load);
    let mut native = [0; WORDS + 1];
    native[..WORDS].copy_from_slice(&words);
    // SAFETY: the code runs one instruction, whose memory operand lies in `memory`, and comes back by the ways out.
    let branched = unsafe { run_instruction(code.0, native.as_mut_ptr()) } != 0;
    match step.expect("all that is loaded is there") {
        Step::Done => prop_assert!(!branched),
        Step::Go(va) => prop_assert!(branched && va.0 == code.address() + BRANCH as u64),
        Step::Store(va, value) => emulated[(va.0 - start) as usize / 8] = value,
        Step::StorePair(va, values) => {
            emulated[(va.0 - start) as usize / 8..][..2].copy_from_slice(&values);
        }
    }
    for n in (0..31).filter(|n| !TAKEN.contains(&(*n as u8))) {
        prop_assert_eq!(registers.x[n], native[n], "x{} after {:?}", n, decoded);
    }
    prop_assert_eq!(registers.sp, native[SP], "sp after {:?}", decoded);
    prop_assert_eq!(registers.pstate, native[FLAGS], "flags after {:?}", decoded);
    prop_assert_eq!(emulated, memory.0, "memory after {:?}", decoded);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn instructions_do_what_the_processor_does(
        instruction in instruction(),
        values in any::<[u64; 31]>(),
        small in any::<u8>(),
        flags in 0..16_u64,
        seed in any::<u64>(),
    ) {
        let mut words = [0; WORDS];
        words[..31].copy_from_slice(&values);
        // Zeros and small numbers are rare otherwise.
        for (n, word) in words.iter_mut().enumerate().filter(|(n, _)| n % 3 == usize::from(small) % 3) {
            *word >>= 40 + n % 24;
        }
        words[FLAGS] = flags << FLAGS_SHIFT;
        compare(assemble(instruction), words, seed)?;
    }
}

#[test]
fn a_return_goes_where_the_link_register_says() {
    let ret = Displaced::from_instruction(Instruction::decode(0xd65f_03c0)).unwrap();
    let mut registers = Registers { pc: 0x1000, ..Registers::default() };
    registers.x[30] = 0xffff_8000_0812_3456;
    assert_eq!(ret.execute(&mut registers, |_| None), Some(Step::Go(Va(0xffff_8000_0812_3456))));
    assert_eq!(registers.pc, 0x1000);
}

#[test]
fn a_load_from_nowhere_changes_nothing() {
    // ldp x29, x30, [sp], #0x30
    let pop = Displaced::from_instruction(Instruction::decode(0xa8c3_7bfd)).unwrap();
    let before = Registers { sp: 0x1000, ..Registers::default() };
    let mut after = before;
    assert_eq!(pop.execute(&mut after, |va| (va.0 == 0x1000).then_some(7)), None);
    assert_eq!(after, before);
}

#[test]
fn what_cannot_be_carried_out_is_refused() {
    // nop, bti c, paciasp, autiasp, b, bl, blr, br, brk, mrs, ldrb, ldxr, svc, cmp
    for word in [
        0xd503_201f,
        0xd503_245f,
        0xd503_233f,
        0xd503_23bf,
        0x1400_0001,
        0x9400_0001,
        0xd63f_0020,
        0xd61f_0200,
        0xd421_0000,
        0xd538_4101,
        0x3940_0020,
        0xc85f_7c20,
        0xd400_0001,
        0xf100_003f,
    ] {
        assert_eq!(Displaced::from_instruction(Instruction::decode(word)), None, "{word:#x}");
    }
}
