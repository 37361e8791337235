use super::code::Source;
use super::*;
use crate::callee_saved::Registers;
use crate::memory::Va;

const START: Va = Va(0xffff_ffff_8100_0000);
/// The start of another function.
const OTHER: Va = Va(0xffff_ffff_8100_0100);
/// A thunk that jumps to the address in r12.
const THUNK_R12: Va = Va(0xffff_ffff_8100_0120);

/// One function's code.
struct Fake {
    bytes: Vec<u8>,
    hidden: Vec<(usize, usize)>,
}

fn code(bytes: &[&[u8]]) -> Fake {
    Fake { bytes: bytes.concat(), hidden: Vec::new() }
}

impl Source for Fake {
    fn bytes(&self, at: Va) -> &[u8] {
        self.bytes.get((at - START) as usize..).unwrap_or_default()
    }

    fn function(&self, at: Va) -> Option<(Va, &str)> {
        let functions = [(THUNK_R12, "__x86_indirect_thunk_r12"), (OTHER, "other"), (START, "f")];
        functions.into_iter().find(|(start, _)| at >= *start)
    }

    fn hidden(&self, from: Va) -> impl Iterator<Item = Va> {
        self.hidden.iter().filter(move |edge| START + edge.0 as u64 == from).map(|edge| START + edge.1 as u64)
    }
}

/// E8 or E9 at offset `from` to `to`.
fn branch(opcode: u8, from: usize, to: Va) -> [u8; 5] {
    let distance = ((to - (START + from as u64 + 5)) as u32).to_le_bytes();
    [opcode, distance[0], distance[1], distance[2], distance[3]]
}

const CALL: u8 = 0xe8;
const JUMP: u8 = 0xe9;
const PUSH_RBX: &[u8] = &[0x53];
const POP_RBX: &[u8] = &[0x5b];
const PUSH_R12: &[u8] = &[0x41, 0x54];
const POP_R12: &[u8] = &[0x41, 0x5c];
const PUSH_RBP: &[u8] = &[0x55];
const MOV_RBP_RSP: &[u8] = &[0x48, 0x89, 0xe5];
const SUB_RSP_32: &[u8] = &[0x48, 0x83, 0xec, 0x20];
const ADD_RSP_32: &[u8] = &[0x48, 0x83, 0xc4, 0x20];
const MOV_RBX_RDI: &[u8] = &[0x48, 0x89, 0xfb];
const MOV_RDI_RBX: &[u8] = &[0x48, 0x89, 0xdf];
const XOR_EBX_EBX: &[u8] = &[0x31, 0xdb];
const MOV_BL_1: &[u8] = &[0xb3, 0x01];
const NOP: &[u8] = &[0x90];
const RET: &[u8] = &[0xc3];
/// To the instruction three bytes behind the next.
const JNE_3: &[u8] = &[0x75, 0x03];

fn names(registers: Registers) -> Vec<&'static str> {
    Register::ALL.into_iter().filter(|&r| registers.contains(r)).map(Register::name).collect()
}

/// What is read and what is returned from the first byte on.
fn fate(code: &Fake) -> (Vec<&'static str>, Vec<&'static str>) {
    let fate = liveness::fate(code, START);
    (names(fate.read), names(fate.returned))
}

#[test]
fn a_register_is_read_restored_or_returned() {
    let (read, returned) = fate(&code(&[MOV_RDI_RBX, POP_R12, RET]));
    assert_eq!(read, ["rbx"]);
    assert_eq!(returned, ["rbp", "r13", "r14", "r15"]);
}

#[test]
fn the_first_access_counts_and_a_part_is_no_whole() {
    assert_eq!(fate(&code(&[XOR_EBX_EBX, MOV_RDI_RBX, RET])).0, [""; 0]);
    assert_eq!(fate(&code(&[MOV_BL_1, MOV_RDI_RBX, RET])).0, ["rbx"]);
}

#[test]
fn every_way_is_taken() {
    // One way reads rbx, the other restores it.
    let both = code(&[JNE_3, MOV_RDI_RBX, POP_RBX, RET]);
    assert_eq!(fate(&both).0, ["rbx"]);
    // A jump label or a fault leads to it.
    let mut hidden = code(&[NOP, POP_RBX, RET, MOV_RDI_RBX, RET]);
    assert_eq!(fate(&hidden).0, [""; 0]);
    hidden.hidden = vec![(0, 3)];
    assert_eq!(fate(&hidden).0, ["rbx"]);
    // For ever round and round.
    assert_eq!(fate(&code(&[NOP, NOP, &[0xeb, 0xfd]])), (vec![], vec![]));
}

#[test]
fn other_functions_are_the_callers_affair_and_thunks_read() {
    let tail = code(&[POP_RBX, &branch(JUMP, 1, OTHER)]);
    assert_eq!(fate(&tail), (vec![], vec!["rbp", "r12", "r13", "r14", "r15"]));
    let call = code(&[&branch(CALL, 0, OTHER), POP_R12, POP_RBX, RET]);
    assert_eq!(fate(&call).0, [""; 0]);
    let thunk = code(&[&branch(CALL, 0, THUNK_R12), POP_R12, POP_RBX, RET]);
    assert_eq!(fate(&thunk).0, ["r12"]);
}

#[test]
fn in_doubt_everything_is_read() {
    // jmp *%rax; no code; bytes that are no instruction; a jump out of the image.
    let all = Register::ALL.map(Register::name).to_vec();
    for bytes in [&[0xff, 0xe0][..], &[], &[0x06], &branch(JUMP, 0, START + 0x80)] {
        assert_eq!(fate(&code(&[bytes])).0, all, "{bytes:x?}");
    }
}

/// Depth and saved registers with their offsets at a byte of the code.
fn saves(code: &Fake, at: usize) -> Option<(i64, Vec<(&'static str, u64)>)> {
    let saves = prologue::saves(code, START + at as u64, true)?;
    Some((saves.depth, saves.iter().map(|(register, offset)| (register.name(), offset)).collect()))
}

#[test]
fn pushes_are_saves_until_they_are_popped() {
    let bytes = [PUSH_R12, PUSH_RBX, SUB_RSP_32, MOV_RBX_RDI, PUSH_RBX, POP_RBX, ADD_RSP_32, POP_RBX, RET];
    let code = code(&bytes);
    assert_eq!(saves(&code, 0), Some((8, vec![])));
    assert_eq!(saves(&code, 3), Some((24, vec![("rbx", 24), ("r12", 16)])));
    // The second rbx is the function's own.
    assert_eq!(saves(&code, 11), Some((64, vec![("rbx", 24), ("r12", 16)])));
    assert_eq!(saves(&code, 17), Some((16, vec![("r12", 16)])));
}

#[test]
fn a_frame_pointer_is_followed() {
    // push rbp; mov rbp,rsp; push r12; sub rsp,32; leave; ret
    let code = code(&[PUSH_RBP, MOV_RBP_RSP, PUSH_R12, SUB_RSP_32, &[0xc9], RET]);
    assert_eq!(saves(&code, 10), Some((56, vec![("rbp", 16), ("r12", 24)])));
    assert_eq!(saves(&code, 11), Some((8, vec![])));
}

#[test]
fn what_is_changed_first_or_overwritten_is_not_the_callers() {
    let changed = code(&[MOV_RBX_RDI, PUSH_RBX, RET]);
    assert_eq!(saves(&changed, 4), Some((16, vec![])));
    // mov %rdi,(%rsp): over the pushed rbx.
    let overwritten = code(&[PUSH_R12, PUSH_RBX, &[0x48, 0x89, 0x3c, 0x24], RET]);
    assert_eq!(saves(&overwritten, 7), Some((24, vec![("r12", 16)])));
}

#[test]
fn a_branch_around_is_followed_and_a_lost_stack_is_not() {
    // jne over a return; and rsp,-16.
    let around = code(&[PUSH_RBX, JNE_3, POP_RBX, RET, NOP, MOV_RDI_RBX, RET]);
    assert_eq!(saves(&around, 6), Some((16, vec![("rbx", 16)])));
    let aligned = code(&[PUSH_RBX, &[0x48, 0x83, 0xe4, 0xf0], NOP, RET]);
    assert_eq!(saves(&aligned, 6), None);
    assert_eq!(saves(&aligned, 0x40), None);
}
