//! x86-64: functions push what they save.

pub(super) mod code;
pub(super) mod liveness;
pub(super) mod prologue;
#[cfg(test)]
mod tests;

/// A callee-saved register of the System V AMD64 ABI.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the architecture's")]
pub enum Register {
    Rbx,
    Rbp,
    R12,
    R13,
    R14,
    R15,
}

impl Register {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Rbx, Self::Rbp, Self::R12, Self::R13, Self::R14, Self::R15];

    /// As assemblers write it.
    pub fn name(self) -> &'static str {
        ["rbx", "rbp", "r12", "r13", "r14", "r15"][self as usize]
    }

    /// The register that `register` is (a part of).
    fn of(register: iced_x86::Register) -> Option<Self> {
        use iced_x86::Register as R;
        Some(match register.full_register() {
            R::RBX => Self::Rbx,
            R::RBP => Self::Rbp,
            R::R12 => Self::R12,
            R::R13 => Self::R13,
            R::R14 => Self::R14,
            R::R15 => Self::R15,
            _ => return None,
        })
    }
}
