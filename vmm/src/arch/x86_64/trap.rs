//! Instructions that leave the guest.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// Which trap instruction the breakpoint tracer plants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TrapChoice {
    /// `int3` where the probe says it works, else `pio`.
    Auto,
    /// One byte, a debug exit.
    Int3,
    /// Two bytes, a port-write exit.
    Pio,
}

impl TrapChoice {
    /// The one that is wanted; None leaves it to the probe.
    pub fn wanted(self) -> Option<TrapInstruction> {
        match self {
            Self::Auto => None,
            Self::Int3 => Some(TrapInstruction::Int3),
            Self::Pio => Some(TrapInstruction::Pio),
        }
    }
}

/// Which instruction a trap site holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrapInstruction {
    /// `int3` (one byte), KVM_EXIT_DEBUG through KVM_GUESTDBG_USE_SW_BP.
    Int3,
    /// `out imm8, al` (two bytes), KVM_EXIT_IO on [`TRAP_PORT`].
    Pio,
}

/// Port of the `out imm8, al` trap: no device of ours or of KVM's in-kernel chips answers there, and KVM has no
/// quirk for it (0x7e has one).
pub const TRAP_PORT: u8 = 0xe4;

impl TrapInstruction {
    /// All there are, the best first.
    pub const ALL: &[Self] = &[Self::Int3, Self::Pio];

    /// The instruction's bytes.
    pub fn bytes(self) -> &'static [u8] {
        match self {
            Self::Int3 => &[0xcc],
            Self::Pio => &[0xe6, TRAP_PORT],
        }
    }

    /// Length in bytes.
    #[allow(clippy::len_without_is_empty, reason = "no instruction is empty")]
    pub fn len(self) -> usize {
        self.bytes().len()
    }

    /// Its name, in options and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Int3 => "int3",
            Self::Pio => "pio",
        }
    }

    /// For people.
    pub const fn words(self) -> &'static str {
        match self {
            Self::Int3 => "int3",
            Self::Pio => "port write",
        }
    }
}
