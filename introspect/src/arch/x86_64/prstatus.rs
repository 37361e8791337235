//! `struct elf_prstatus` of x86-64 (include/linux/elfcore.h, arch/x86/include/asm/elf.h): the registers of a CPU in a core.

use super::{CpuState, Registers};

/// `EM_X86_64`.
pub const MACHINE: u16 = 62;
/// Size of the structure, and where pid and registers are in it.
const SIZE: usize = 336;
const PID: usize = 32;
const REGISTERS: usize = 112;
/// Registers in the structure (`struct user_regs_struct`).
const COUNT: usize = 27;
/// Selectors as Linux has them (arch/x86/include/asm/segment.h): code and stack of the kernel, of user space.
const KERNEL_SELECTORS: [u64; 2] = [0x10, 0x18];
const USER_SELECTORS: [u64; 2] = [0x33, 0x2b];
/// Privilege level in a selector.
const RPL: u64 = 3;

/// The descriptor of a CPU's note.
pub fn encode(cpu: &CpuState, pid: i32) -> Vec<u8> {
    let r = &cpu.registers;
    let [cs, ss] = if cpu.user_mode { USER_SELECTORS } else { KERNEL_SELECTORS };
    // No system call is under way that could be restarted: -1.
    let orig_rax = u64::MAX;
    let words: [u64; COUNT] = [
        r.r15,
        r.r14,
        r.r13,
        r.r12,
        r.rbp,
        r.rbx,
        r.r11,
        r.r10,
        r.r9,
        r.r8,
        r.rax,
        r.rcx,
        r.rdx,
        r.rsi,
        r.rdi,
        orig_rax,
        r.rip,
        cs,
        r.rflags,
        r.rsp,
        ss,
        0,
        cpu.gs_base,
        0,
        0,
        0,
        0,
    ];
    let mut out = vec![0; SIZE];
    out[PID..PID + 4].copy_from_slice(&pid.to_le_bytes());
    for (place, word) in out[REGISTERS..].chunks_exact_mut(8).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    out
}

/// The CPU of a note's descriptor; None when that is too short. Its page tables are not in it.
pub fn decode(descriptor: &[u8], index: usize) -> Option<CpuState> {
    let bytes = descriptor.get(REGISTERS..REGISTERS + COUNT * 8)?;
    let word = |n: usize| u64::from_le_bytes(bytes[n * 8..n * 8 + 8].try_into().expect("8 bytes"));
    let registers = Registers {
        r15: word(0),
        r14: word(1),
        r13: word(2),
        r12: word(3),
        rbp: word(4),
        rbx: word(5),
        r11: word(6),
        r10: word(7),
        r9: word(8),
        r8: word(9),
        rax: word(10),
        rcx: word(11),
        rdx: word(12),
        rsi: word(13),
        rdi: word(14),
        rip: word(16),
        rflags: word(18),
        rsp: word(19),
    };
    let user_mode = word(17) & RPL == RPL;
    Some(CpuState { index, registers, gs_base: word(22), user_mode, online: true, ..CpuState::default() })
}
