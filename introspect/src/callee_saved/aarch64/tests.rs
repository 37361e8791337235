use super::code::Source;
use super::tables::{Alternative, Bytes};
use super::*;
use crate::callee_saved::Registers;
use crate::memory::Va;

const START: Va = Va(0xffff_8000_0801_0000);
/// The start of another function.
const OTHER: Va = Va(0xffff_8000_0801_0100);

/// One function's code.
struct Fake {
    words: Vec<u32>,
    hidden: Vec<(u64, u64)>,
    /// The last instruction of a replacement, and what is behind what it replaces.
    behind: Option<(u64, u64)>,
}

fn code(words: &[u32]) -> Fake {
    Fake { words: words.to_vec(), hidden: Vec::new(), behind: None }
}

impl Source for Fake {
    fn word(&self, at: Va) -> Option<u32> {
        self.words.get((at - START) as usize / 4).copied()
    }

    fn function(&self, at: Va) -> Option<(Va, &str)> {
        [(OTHER, "other"), (START, "f")].into_iter().find(|(start, _)| at >= *start)
    }

    fn hidden(&self, from: Va) -> impl Iterator<Item = Va> {
        self.hidden.iter().filter(move |edge| START + 4 * edge.0 == from).map(|edge| START + 4 * edge.1)
    }

    fn next(&self, at: Va) -> Va {
        let behind = self.behind.filter(|behind| START + 4 * behind.0 == at);
        behind.map_or(at + 4, |behind| START + 4 * behind.1)
    }
}

/// `b` and `bl` from an instruction's place.
fn branch(opcode: u32, from: u64, to: Va) -> u32 {
    let distance = to.0.wrapping_sub((START + 4 * from).0) / 4;
    opcode | distance as u32 & 0x03ff_ffff
}

const B: u32 = 0x1400_0000;
const BL: u32 = 0x9400_0000;
const MOV_X0_X19: u32 = 0xaa13_03e0;
const MOV_X19_X0: u32 = 0xaa00_03f3;
const MOV_W19_WZR: u32 = 0x2a1f_03f3;
const MOVK_X19_1: u32 = 0xf280_0033;
const LDP_X19_X20_SP_16: u32 = 0xa941_53f3;
const STP_X19_X20_SP_16: u32 = 0xa901_53f3;
const STP_X19_X20_SP_32: u32 = 0xa902_53f3;
const STR_X0_SP_16: u32 = 0xf900_0be0;
const STR_X21_SP_32: u32 = 0xf900_13f5;
/// stp x29, x30, [sp, #-48]!
const PUSH_RECORD: u32 = 0xa9bd_7bfd;
const MOV_X29_SP: u32 = 0x9100_03fd;
const POP_RECORD: u32 = 0xa8c3_7bfd;
const SUB_SP_64: u32 = 0xd101_03ff;
const ADD_SP_64: u32 = 0x9101_03ff;
const STP_RECORD_SP_16: u32 = 0xa901_7bfd;
const ADD_X29_SP_16: u32 = 0x9100_43fd;
/// and sp, x0, #-16
const ALIGN_SP: u32 = 0x927c_ec1f;
const NOP: u32 = 0xd503_201f;
const BUG: u32 = 0xd421_0000;
const RET: u32 = 0xd65f_03c0;
/// To the second instruction behind it.
const BNE_8: u32 = 0x5400_0041;
const BLR_X21: u32 = 0xd63f_02a0;
const BR_X0: u32 = 0xd61f_0000;
const ERET: u32 = 0xd69f_03e0;

fn names(registers: Registers) -> Vec<&'static str> {
    Register::ALL.into_iter().filter(|&r| registers.contains(r)).map(Register::name).collect()
}

/// What is read and how many are returned from the first instruction on.
fn fate(code: &Fake) -> (Vec<&'static str>, usize) {
    let fate = liveness::fate(code, START);
    (names(fate.read), names(fate.returned).len())
}

#[test]
fn a_register_is_read_restored_or_returned() {
    assert_eq!(fate(&code(&[MOV_X0_X19, RET])), (vec!["x19"], 9));
    assert_eq!(fate(&code(&[LDP_X19_X20_SP_16, MOV_X0_X19, RET])), (vec![], 8));
    assert_eq!(fate(&code(&[MOV_W19_WZR, MOV_X0_X19, RET])), (vec![], 9));
    // 16 bits are no whole.
    assert_eq!(fate(&code(&[MOVK_X19_1, RET])).0, ["x19"]);
}

#[test]
fn every_way_is_taken() {
    let both = code(&[BNE_8, MOV_X0_X19, LDP_X19_X20_SP_16, RET]);
    assert_eq!(fate(&both).0, ["x19"]);
    // A jump label or a fault leads to it.
    let mut hidden = code(&[NOP, MOV_X19_X0, RET, MOV_X0_X19, RET]);
    assert_eq!(fate(&hidden).0, [""; 0]);
    hidden.hidden = vec![(0, 3)];
    assert_eq!(fate(&hidden).0, ["x19"]);
    // A replacement goes on where what it replaces ends.
    let mut replaced = code(&[NOP, MOV_X19_X0, RET, NOP, MOV_X0_X19, RET]);
    replaced.hidden = vec![(0, 3)];
    replaced.behind = Some((3, 1));
    assert_eq!(fate(&replaced).0, [""; 0]);
    // For ever round and round.
    assert_eq!(fate(&code(&[NOP, NOP, branch(B, 2, START + 4)])), (vec![], 0));
}

#[test]
fn other_functions_are_the_callers_affair() {
    let tail = code(&[MOV_X19_X0, branch(B, 1, OTHER)]);
    assert_eq!(fate(&tail), (vec![], 9));
    let call = code(&[branch(BL, 0, OTHER), LDP_X19_X20_SP_16, RET]);
    assert_eq!(fate(&call), (vec![], 8));
    assert_eq!(fate(&code(&[BLR_X21, RET])).0, ["x21"]);
    // A call that does not return ends a function.
    let mut words = vec![NOP; 64];
    words[0] = BNE_8;
    words[1] = RET;
    words[62] = branch(BL, 62, OTHER);
    words.push(MOV_X0_X19);
    assert_eq!(fate(&code(&words)), (vec![], 10));
    words[62] = NOP;
    assert_eq!(fate(&code(&words)).0.len(), 10);
}

#[test]
fn in_doubt_everything_is_read() {
    for words in [&[BR_X0][..], &[ERET], &[], &[branch(B, 0, START + 0x80)]] {
        assert_eq!(fate(&code(words)).0.len(), 10, "{words:x?}");
    }
}

#[test]
fn operands_are_what_an_assembler_says() {
    let table: [(u32, &[&str], &[&str]); 15] = [
        // casp x20, x21, x22, x23, [x1]
        (0x4834_7c36, &["x20", "x21", "x22", "x23"], &[]),
        // ldr w21, [x0, x22]; ldr x19, [sp, #16]; ldr x19, literal
        (0xb876_6815, &["x22"], &["x21"]),
        (0xf940_0bf3, &[], &["x19"]),
        (0x5800_0053, &[], &["x19"]),
        // str q19, [x20]; prfm pldl1keep, [x20]
        (0x3d80_0293, &["x20"], &[]),
        (0xf980_0280, &["x20"], &[]),
        // ubfx w23, w0, #1, #1; bfi x23, x0, #1, #1
        (0x5301_0417, &[], &["x23"]),
        (0xb37f_0017, &["x23"], &["x23"]),
        // ccmp x19, #20, #0, eq; cbz x22
        (0xfa54_0a60, &["x19"], &[]),
        (0xb400_0056, &["x22"], &[]),
        // mrs x19, sp_el0; msr sp_el0, x20
        (0xd538_4113, &[], &["x19"]),
        (0xd518_4114, &["x20"], &[]),
        // madd x19, x20, x21, x22
        (0x9b15_5a93, &["x20", "x21", "x22"], &["x19"]),
        // stxr w19, x20, [x21]; ldadd x19, x20, [x21]: more than is read, and nothing that is surely written.
        (0xc813_7eb4, &["x19", "x20", "x21"], &[]),
        (0xf833_02b4, &["x19", "x20", "x21"], &[]),
    ];
    for (word, read, written) in table {
        let found = operands::operands(word);
        assert_eq!((&names(found.read)[..], &names(found.written)[..]), (read, written), "{word:#x}");
    }
}

/// Bytes below the record, above it, and the saved registers.
type Frame = (i64, i64, Vec<(&'static str, i64)>);

/// The frame at an instruction.
fn saves(code: &Fake, at: u64) -> Option<Frame> {
    let saves = prologue::saves(code, START + 4 * at, true)?;
    let registers = saves.iter().map(|(register, offset)| (register.name(), offset)).collect();
    Some((saves.below, saves.above, registers))
}

#[test]
fn stores_are_saves_until_the_frame_is_gone() {
    let words =
        [PUSH_RECORD, MOV_X29_SP, STP_X19_X20_SP_16, STR_X21_SP_32, NOP, LDP_X19_X20_SP_16, POP_RECORD, RET];
    let code = code(&words);
    assert_eq!(saves(&code, 0), None);
    assert_eq!(saves(&code, 1), None, "the frame pointer is the caller's yet");
    assert_eq!(saves(&code, 2), Some((0, 48, vec![])));
    assert_eq!(saves(&code, 4), Some((0, 48, vec![("x19", 16), ("x20", 24), ("x21", 32)])));
    assert_eq!(saves(&code, 7), None);
}

#[test]
fn the_record_may_lie_above_the_stack_pointer() {
    let words = [SUB_SP_64, STP_RECORD_SP_16, ADD_X29_SP_16, STP_X19_X20_SP_32, NOP, ADD_SP_64, RET];
    assert_eq!(saves(&code(&words), 4), Some((16, 48, vec![("x19", 16), ("x20", 24)])));
}

#[test]
fn what_is_changed_first_or_overwritten_is_not_the_callers() {
    let changed = [PUSH_RECORD, MOV_X29_SP, MOV_X19_X0, STP_X19_X20_SP_16, NOP];
    assert_eq!(saves(&code(&changed), 4), Some((0, 48, vec![("x20", 24)])));
    let overwritten = [PUSH_RECORD, MOV_X29_SP, STP_X19_X20_SP_16, STR_X0_SP_16, NOP];
    assert_eq!(saves(&code(&overwritten), 4), Some((0, 48, vec![("x20", 24)])));
}

#[test]
fn all_ways_agree_or_it_is_not_known() {
    // Saved on one way only.
    let one_way = [PUSH_RECORD, MOV_X29_SP, BNE_8, STR_X21_SP_32, STP_X19_X20_SP_16, NOP, RET];
    assert_eq!(saves(&code(&one_way), 5), Some((0, 48, vec![("x19", 16), ("x20", 24)])));
    // Another frame, and a stack pointer that is lost.
    let another = [PUSH_RECORD, MOV_X29_SP, BNE_8, SUB_SP_64, NOP, RET];
    assert_eq!(saves(&code(&another), 4), None);
    let aligned = [PUSH_RECORD, MOV_X29_SP, ALIGN_SP, NOP, RET];
    assert_eq!(saves(&code(&aligned), 3), None);
    // What is behind a BUG() is not reached from there.
    let bug = [PUSH_RECORD, MOV_X29_SP, STP_X19_X20_SP_16, BNE_8, BUG, NOP, RET];
    assert_eq!(saves(&code(&bug), 5), Some((0, 48, vec![("x19", 16), ("x20", 24)])));
}

/// Code with three tables behind it.
#[test]
fn tables_are_found_by_their_entries() {
    const ENTRIES: u64 = 80;
    const TEXT: u64 = 4 * ENTRIES;
    // Each instruction is a load in the table of faults, and a nop elsewhere.
    const LDR: u32 = 0xf940_0bf3;
    let mut bytes: Vec<u8> = Vec::new();
    for n in 0..2 * ENTRIES {
        bytes.extend((if n < ENTRIES { NOP } else { LDR }).to_le_bytes());
    }
    let distance = |to: u64, field: usize| (to as i64 - field as i64) as i32;
    let push = |bytes: &mut Vec<u8>, to: u64| bytes.extend(distance(to, bytes.len()).to_le_bytes());
    for n in 0..ENTRIES {
        push(&mut bytes, 4 * n);
        push(&mut bytes, TEXT - 4 * (n % 7) - 4);
        bytes.extend((16 * n).to_le_bytes());
    }
    bytes.extend([0xff; 32]);
    for n in 0..ENTRIES {
        push(&mut bytes, TEXT + 4 * n);
        push(&mut bytes, 4 * n);
        bytes.extend([3, 0, 0, 0]);
    }
    bytes.extend([0xff; 32]);
    for n in 0..ENTRIES {
        push(&mut bytes, 4 * n);
        push(&mut bytes, TEXT);
        // A capability, bytes of what is replaced and of what replaces it: a function's in every second entry.
        bytes.extend([7, 0, 4, if n % 2 == 0 { 4 } else { 0 }]);
    }
    let tables = Bytes { bytes: &bytes, start: START, size: bytes.len() as u64 };
    let labels = tables.jump_labels().unwrap();
    assert_eq!((labels.len() as u64, labels[3]), (ENTRIES, (START + 12, START + TEXT - 16)));
    let faults = tables.faults().unwrap();
    assert_eq!((faults.len() as u64, faults[3]), (ENTRIES, (START + TEXT + 12, START + 12)));
    let alternatives = tables.alternatives().unwrap();
    assert_eq!(alternatives.len() as u64, ENTRIES);
    let replaced = Alternative { original: START, replacement: Some(START + TEXT), len: 4 };
    let made = Alternative { original: START + 4, replacement: None, len: 4 };
    assert_eq!(alternatives[..2], [replaced, made]);
    let none = Bytes { bytes: &[0; 1 << 12], start: START, size: 1 << 12 };
    assert!(none.jump_labels().is_none() && none.faults().is_none() && none.alternatives().is_none());
}
