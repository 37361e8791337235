//! `struct elf_prstatus` of arm64 (include/linux/elfcore.h, arch/arm64/include/asm/elf.h): the registers of a CPU in a core.

use super::{CpuState, Registers};

/// `EM_AARCH64`.
pub const MACHINE: u16 = 183;
/// Size of the structure, and where pid and registers are in it.
const SIZE: usize = 392;
const PID: usize = 32;
const REGISTERS: usize = 112;
/// Registers in the structure (`struct user_pt_regs`): x0 to x30, sp, pc, pstate.
const COUNT: usize = 34;
/// Exception level in PSTATE, 0 in user mode (Arm ARM, C5.2.20).
const LEVEL: u64 = 0b1100;

/// The descriptor of a CPU's note.
pub fn encode(cpu: &CpuState, pid: i32) -> Vec<u8> {
    let r = &cpu.registers;
    let mut out = vec![0; SIZE];
    out[PID..PID + 4].copy_from_slice(&pid.to_le_bytes());
    let words = r.x.into_iter().chain([r.sp, r.pc, r.pstate]);
    for (place, word) in out[REGISTERS..].chunks_exact_mut(8).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    out
}

/// The CPU of a note's descriptor; None when that is too short. Its system registers are not in it.
pub fn decode(descriptor: &[u8], index: usize) -> Option<CpuState> {
    let bytes = descriptor.get(REGISTERS..REGISTERS + COUNT * 8)?;
    let word = |n: usize| u64::from_le_bytes(bytes[n * 8..n * 8 + 8].try_into().expect("8 bytes"));
    let registers = Registers { x: std::array::from_fn(word), sp: word(31), pc: word(32), pstate: word(33) };
    let user_mode = registers.pstate & LEVEL == 0;
    Some(CpuState { index, registers, user_mode, online: true, ..CpuState::default() })
}
