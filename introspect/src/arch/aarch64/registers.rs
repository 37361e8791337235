//! The registers of one vCPU.

use crate::memory::{Pa, Va};
use serde::{Deserialize, Serialize};

/// Number of the frame pointer and of the link register (AAPCS64, 6.1.1).
const FRAME: usize = 29;
const LINK: usize = 30;
/// Bit 55 tells kernel from user addresses (Arm ARM, D8.2.1).
const HALF: u32 = 55;

/// A return address without its pointer authentication code: bits 63:48 are what bit 55 is. That holds for the text of
/// 52-bit kernels, too, which is where that of 48-bit kernels is.
pub fn strip_pac(signed: u64) -> Va {
    const UPPER: u64 = 0xffff << 48;
    Va(if signed >> HALF & 1 != 0 { signed | UPPER } else { signed & !UPPER })
}

/// General registers of arm64, as KVM and `struct pt_regs` name them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    /// x0 to x30.
    pub x: [u64; 31],
    /// Stack pointer in use: SP_EL1, or SP_EL0 in user mode.
    pub sp: u64,
    /// Program counter.
    pub pc: u64,
    /// PSTATE, as SPSR has it.
    pub pstate: u64,
}

impl Registers {
    /// Instruction pointer.
    pub fn ip(&self) -> Va {
        Va(self.pc)
    }

    /// Goes on at `ip`.
    pub fn set_ip(&mut self, ip: Va) {
        self.pc = ip.0;
    }

    /// Stack pointer.
    pub fn sp(&self) -> Va {
        Va(self.sp)
    }

    /// Frame pointer: where the frame record of the running function is, or of its caller.
    pub fn fp(&self) -> Va {
        Va(self.x[FRAME])
    }

    /// Link register, as it is: its address may be signed.
    pub fn link(&self) -> u64 {
        self.x[LINK]
    }

    /// Integer argument `position` (0 to 5) of a function just entered (AAPCS64, 6.8.2).
    pub fn argument(&self, position: u8) -> u64 {
        self.x[usize::from(position.min(7))]
    }

    /// What a function just left has returned.
    pub fn result(&self) -> u64 {
        self.x[0]
    }

    /// Where a function just entered returns to; it may have signed that already.
    pub fn return_address(&self, _read_word: impl FnOnce(Va) -> Option<u64>) -> Option<Va> {
        Some(strip_pac(self.link()))
    }

    #[cfg(test)]
    pub(crate) fn with_sp(sp: u64) -> Self {
        Self { sp, ..Self::default() }
    }

    /// Every general register, for conservative root scanning.
    pub fn words(&self) -> [u64; 32] {
        let mut words = [self.sp; 32];
        words[..31].copy_from_slice(&self.x);
        words
    }

    /// All of them by name, in the order in which they are shown.
    pub fn named(&self) -> Vec<(&'static str, u64)> {
        let names = [
            "x0", "x1", "x2", "x3", "x4", "x5", "x6", "x7", "x8", "x9", "x10", "x11", "x12", "x13", "x14",
            "x15", "x16", "x17", "x18", "x19", "x20", "x21", "x22", "x23", "x24", "x25", "x26", "x27", "x28",
            "x29", "x30",
        ];
        let general = names.into_iter().zip(self.x);
        general.chain([("sp", self.sp), ("pc", self.pc), ("pstate", self.pstate)]).collect()
    }
}

/// Everything a scan wants to know of one paused vCPU.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuState {
    /// vCPU index; Linux numbers its CPUs in the same order (device tree order, boot CPU first).
    pub index: usize,
    /// General registers.
    pub registers: Registers,
    /// Root of the kernel's page tables in use: TTBR1_EL1 without ASID and flags.
    pub root: Pa,
    /// TCR_EL1: how addresses are translated; see [`super::Translation`].
    pub tcr: u64,
    /// VBAR_EL1: the kernel's exception vectors, so where the kernel is; 0 before it has set them.
    pub vbar: u64,
    /// SP_EL0: in kernel mode the task that runs.
    pub sp_el0: u64,
    /// TPIDR_EL1: the CPU's `__per_cpu_offset`.
    pub tpidr: u64,
    /// True while the vCPU runs user code (EL0).
    pub user_mode: bool,
    /// False for a vCPU that is off (PSCI): its registers mean nothing.
    pub online: bool,
}

impl CpuState {
    /// The registers beside the general ones by name, in the order in which they are shown.
    pub fn named(&self) -> [(&'static str, u64); 5] {
        [
            ("ttbr1", self.root.0),
            ("tcr", self.tcr),
            ("vbar", self.vbar),
            ("sp_el0", self.sp_el0),
            ("tpidr", self.tpidr),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signed_addresses_lose_their_codes() {
        for (signed, address) in [
            (0x1234_8000_0812_3456, 0x0000_8000_0812_3456),
            (0x12b4_8000_0812_3456, 0xffff_8000_0812_3456),
            (0xffff_8000_0812_3456, 0xffff_8000_0812_3456),
            (0x0000_aaaa_0000_1000, 0x0000_aaaa_0000_1000),
        ] {
            assert_eq!(strip_pac(signed), Va(address), "{signed:#x}");
        }
    }
}
