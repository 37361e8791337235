//! The registers of one vCPU.

use crate::memory::{Pa, Va};
use serde::{Deserialize, Serialize};

/// General registers of x86-64, as KVM and `struct pt_regs` name them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names are the architecture's")]
pub struct Registers {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
}

impl Registers {
    /// Instruction pointer.
    pub fn ip(&self) -> Va {
        Va(self.rip)
    }

    /// Goes on at `ip`.
    pub fn set_ip(&mut self, ip: Va) {
        self.rip = ip.0;
    }

    /// Integer argument `position` (0 to 5) of a function just entered (System V AMD64 ABI, 3.2.3).
    pub fn argument(&self, position: u8) -> u64 {
        match position {
            0 => self.rdi,
            1 => self.rsi,
            2 => self.rdx,
            3 => self.rcx,
            4 => self.r8,
            _ => self.r9,
        }
    }

    /// What a function just left has returned.
    pub fn result(&self) -> u64 {
        self.rax
    }

    /// Where a function just entered returns to, with the stack pointer still on it.
    pub fn return_address(&self, read_word: impl FnOnce(Va) -> Option<u64>) -> Option<Va> {
        read_word(Va(self.rsp)).map(Va)
    }

    /// Stack pointer.
    pub fn sp(&self) -> Va {
        Va(self.rsp)
    }

    #[cfg(test)]
    pub(crate) fn with_sp(sp: u64) -> Self {
        Self { rsp: sp, ..Self::default() }
    }

    /// Every general register, for conservative root scanning.
    pub fn words(&self) -> [u64; 16] {
        [
            self.rax, self.rbx, self.rcx, self.rdx, self.rsi, self.rdi, self.rbp, self.rsp, self.r8, self.r9,
            self.r10, self.r11, self.r12, self.r13, self.r14, self.r15,
        ]
    }

    /// All of them by name, in the order in which they are shown.
    pub fn named(&self) -> [(&'static str, u64); 18] {
        [
            ("rax", self.rax),
            ("rbx", self.rbx),
            ("rcx", self.rcx),
            ("rdx", self.rdx),
            ("rsi", self.rsi),
            ("rdi", self.rdi),
            ("rbp", self.rbp),
            ("rsp", self.rsp),
            ("r8", self.r8),
            ("r9", self.r9),
            ("r10", self.r10),
            ("r11", self.r11),
            ("r12", self.r12),
            ("r13", self.r13),
            ("r14", self.r14),
            ("r15", self.r15),
            ("rip", self.rip),
            ("rflags", self.rflags),
        ]
    }
}

/// Everything a scan wants to know of one paused vCPU.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuState {
    /// vCPU index; Linux numbers its CPUs in the same order (MADT order, boot CPU first).
    pub index: usize,
    /// General registers.
    pub registers: Registers,
    /// Page-table root in use (CR3 without PCID and flags).
    pub root: Pa,
    /// GS base, and the value `swapgs` would bring.
    pub gs_base: u64,
    /// See `gs_base`.
    pub kernel_gs_base: u64,
    /// True while the vCPU runs user code (CPL 3).
    pub user_mode: bool,
    /// False for a vCPU that waits for its INIT/SIPI: its registers mean nothing.
    pub online: bool,
}

impl CpuState {
    /// The registers beside the general ones by name, in the order in which they are shown.
    pub fn named(&self) -> [(&'static str, u64); 2] {
        [("cr3", self.root.0), ("gs_base", self.gs_base)]
    }
}
