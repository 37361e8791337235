//! System calls of arm64 Linux: the `svc` instruction (syscall(2), "Architecture calling conventions").

use core::arch::{asm, global_asm};

/// System call numbers (include/uapi/asm-generic/unistd.h).
pub mod number {
    pub const DUP3: usize = 24;
    pub const IOCTL: usize = 29;
    pub const MKDIRAT: usize = 34;
    pub const MOUNT: usize = 40;
    pub const FACCESSAT: usize = 48;
    pub const CHDIR: usize = 49;
    pub const OPENAT: usize = 56;
    pub const CLOSE: usize = 57;
    pub const READ: usize = 63;
    pub const WRITE: usize = 64;
    pub const PPOLL: usize = 73;
    pub const SYNC: usize = 81;
    pub const EXIT: usize = 93;
    pub const NANOSLEEP: usize = 101;
    pub const DELETE_MODULE: usize = 106;
    pub const KILL: usize = 129;
    pub const REBOOT: usize = 142;
    pub const SETSID: usize = 157;
    pub const GETPID: usize = 172;
    pub const CLONE: usize = 220;
    pub const EXECVE: usize = 221;
    pub const WAIT4: usize = 260;
    pub const FINIT_MODULE: usize = 273;
    pub const MEMBARRIER: usize = 283;
}

// The kernel enters here with the stack aligned to 16 bytes; the frame pointer ends the chain of frames (AAPCS64, 6.4.6).
global_asm!(".globl _start", "_start:", "mov x29, #0", "mov x30, #0", "bl {main}", "udf #0", main = sym crate::main);

/// A system call; negative results are errors.
///
/// # Safety
/// The arguments are what the system call expects; pointers among them are valid for what it does with them.
pub unsafe fn syscall(number: usize, arguments: [usize; 5]) -> isize {
    let result;
    // SAFETY: the instruction changes x0 and, by the caller's promise, nothing else that matters.
    unsafe {
        asm!(
            "svc #0",
            in("x8") number,
            inlateout("x0") arguments[0] => result,
            in("x1") arguments[1],
            in("x2") arguments[2],
            in("x3") arguments[3],
            in("x4") arguments[4],
            options(nostack),
        );
    }
    result
}

/// Functions the compiler calls; without a C library they must be somewhere. Every access is volatile, as a loop would
/// be compiled to a call of itself.
mod compiler_calls {
    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, size: usize) -> *mut u8 {
        for at in 0..size {
            // SAFETY: by the caller's promise both areas are valid for `size` bytes.
            unsafe { to.add(at).write_volatile(from.add(at).read_volatile()) };
        }
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, size: usize) -> *mut u8 {
        if (to as usize).wrapping_sub(from as usize) >= size {
            // SAFETY: as the caller promised; copying upwards, no byte is overwritten before it is read.
            return unsafe { memcpy(to, from, size) };
        }
        for at in (0..size).rev() {
            // SAFETY: as the caller promised; copying downwards, no byte is overwritten before it is read.
            unsafe { to.add(at).write_volatile(from.add(at).read_volatile()) };
        }
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memset(to: *mut u8, byte: i32, size: usize) -> *mut u8 {
        for at in 0..size {
            // SAFETY: by the caller's promise the area is valid for `size` bytes.
            unsafe { to.add(at).write_volatile(byte as u8) };
        }
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcmp(one: *const u8, other: *const u8, size: usize) -> i32 {
        for at in 0..size {
            // SAFETY: by the caller's promise both areas are valid for `size` bytes.
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
