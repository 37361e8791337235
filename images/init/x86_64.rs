//! System calls of x86-64 Linux: the `syscall` instruction (System V ABI, AMD64 supplement, A.2.1).

use core::arch::{asm, global_asm};

/// System call numbers (arch/x86/entry/syscalls/syscall_64.tbl).
pub mod number {
    pub const READ: usize = 0;
    pub const WRITE: usize = 1;
    pub const CLOSE: usize = 3;
    pub const IOCTL: usize = 16;
    pub const NANOSLEEP: usize = 35;
    pub const GETPID: usize = 39;
    pub const CLONE: usize = 56;
    pub const EXECVE: usize = 59;
    pub const EXIT: usize = 60;
    pub const WAIT4: usize = 61;
    pub const KILL: usize = 62;
    pub const CHDIR: usize = 80;
    pub const SETSID: usize = 112;
    pub const SYNC: usize = 162;
    pub const MOUNT: usize = 165;
    pub const REBOOT: usize = 169;
    pub const DELETE_MODULE: usize = 176;
    pub const OPENAT: usize = 257;
    pub const MKDIRAT: usize = 258;
    pub const FACCESSAT: usize = 269;
    pub const PPOLL: usize = 271;
    pub const DUP3: usize = 292;
    pub const FINIT_MODULE: usize = 313;
    pub const MEMBARRIER: usize = 324;
}

// The kernel enters here with the stack aligned to 16 bytes (A.2.2 in the ABI); a function expects to be called.
global_asm!(".globl _start", "_start:", "xor ebp, ebp", "call {main}", "ud2", main = sym crate::main);

/// A system call; negative results are errors.
///
/// # Safety
/// The arguments are what the system call expects; pointers among them are valid for what it does with them.
pub unsafe fn syscall(number: usize, arguments: [usize; 5]) -> isize {
    let result;
    // SAFETY: the instruction changes rax, rcx, r11 and, by the caller's promise, nothing else that matters.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") arguments[0],
            in("rsi") arguments[1],
            in("rdx") arguments[2],
            in("r10") arguments[3],
            in("r8") arguments[4],
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    result
}

/// Functions the compiler calls; without a C library they must be somewhere. Written with string instructions,
/// as a loop would be compiled to a call of itself.
mod compiler_calls {
    use core::arch::asm;

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, size: usize) -> *mut u8 {
        // SAFETY: by the caller's promise both areas are valid for `size` bytes.
        unsafe {
            asm!("rep movsb", inout("rcx") size => _, inout("rdi") to => _, inout("rsi") from => _,
                options(nostack, preserves_flags));
        }
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, size: usize) -> *mut u8 {
        if (to as usize).wrapping_sub(from as usize) >= size {
            // SAFETY: as the caller promised; copying upwards, no byte is overwritten before it is read.
            return unsafe { memcpy(to, from, size) };
        }
        // SAFETY: as the caller promised; copied from the last byte down (direction flag).
        unsafe {
            asm!("std", "rep movsb", "cld", inout("rcx") size => _,
                inout("rdi") to.wrapping_add(size).wrapping_sub(1) => _,
                inout("rsi") from.wrapping_add(size).wrapping_sub(1) => _, options(nostack));
        }
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memset(to: *mut u8, byte: i32, size: usize) -> *mut u8 {
        // SAFETY: by the caller's promise the area is valid for `size` bytes.
        unsafe {
            asm!("rep stosb", inout("rcx") size => _, inout("rdi") to => _, in("al") byte as u8,
                options(nostack, preserves_flags));
        }
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcmp(one: *const u8, other: *const u8, size: usize) -> i32 {
        for at in 0..size {
            // SAFETY: by the caller's promise both areas are valid for `size` bytes. Volatile, so that the loop is
            // not recognised as a memcmp.
            let (a, b) = unsafe { (one.add(at).read_volatile(), other.add(at).read_volatile()) };
            if a != b {
                return i32::from(a) - i32::from(b);
            }
        }
        0
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn bcmp(one: *const u8, other: *const u8, size: usize) -> i32 {
        // SAFETY: as the caller promised.
        unsafe { memcmp(one, other, size) }
    }
}
