//! arm64: functions store what they save in pairs, beside their frame record.

pub(super) mod code;
pub(super) mod liveness;
mod operands;
pub(super) mod prologue;
mod tables;
#[cfg(test)]
mod tests;

/// A callee-saved register of the AAPCS64 (6.1.1) that may hold any value; x29 is the frame pointer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the architecture's")]
pub enum Register {
    X19,
    X20,
    X21,
    X22,
    X23,
    X24,
    X25,
    X26,
    X27,
    X28,
}

impl Register {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::X19,
        Self::X20,
        Self::X21,
        Self::X22,
        Self::X23,
        Self::X24,
        Self::X25,
        Self::X26,
        Self::X27,
        Self::X28,
    ];

    /// As assemblers write it.
    pub fn name(self) -> &'static str {
        ["x19", "x20", "x21", "x22", "x23", "x24", "x25", "x26", "x27", "x28"][self as usize]
    }

    /// The register with a number.
    fn numbered(number: u32) -> Option<Self> {
        Self::ALL.get(number.checked_sub(19)? as usize).copied()
    }

    /// The register that is an operand.
    fn of(operand: crate::arch::instruction::Register) -> Option<Self> {
        match operand {
            crate::arch::instruction::Register::X(number) => Self::numbered(number.into()),
            _ => None,
        }
    }
}
