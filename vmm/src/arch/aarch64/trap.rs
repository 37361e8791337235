//! Instructions that leave the guest.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// Which trap instruction the breakpoint tracer plants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TrapChoice {
    /// `brk`.
    Auto,
    /// A breakpoint, a debug exit.
    Brk,
}

impl TrapChoice {
    /// The one that is wanted; None leaves it to the probe.
    pub fn wanted(self) -> Option<TrapInstruction> {
        match self {
            Self::Auto => None,
            Self::Brk => Some(TrapInstruction::Brk),
        }
    }
}

/// Which instruction a trap site holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrapInstruction {
    /// `brk #0`, KVM_EXIT_DEBUG through KVM_GUESTDBG_USE_SW_BP.
    Brk,
}

impl TrapInstruction {
    /// All there are, the best first.
    pub const ALL: &[Self] = &[Self::Brk];

    /// The instruction's bytes (Arm ARM, C6.2 "BRK").
    pub fn bytes(self) -> &'static [u8] {
        &[0x00, 0x00, 0x20, 0xd4]
    }

    /// Length in bytes.
    #[allow(clippy::len_without_is_empty, reason = "no instruction is empty")]
    pub fn len(self) -> usize {
        self.bytes().len()
    }

    /// Its name, in options and reports.
    pub const fn name(self) -> &'static str {
        "brk"
    }

    /// For people.
    pub const fn words(self) -> &'static str {
        "brk"
    }
}
