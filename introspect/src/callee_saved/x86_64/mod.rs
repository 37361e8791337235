//! x86-64: worked out from the image's code.
//!
//! A function that wants rbx for itself pushes its caller's first. Whether the caller still needs that value is
//! not on the stack: it is in the caller's code, behind the call. Often it does not, and for a thread that sleeps for ever
//! the pushed word is a pointer to something freed long ago, and whatever is allocated there next looks referenced.
//! Every kernel thread is an example: the note that told it what to run stays in its first three frames.
//!
//! The answers come from the image's code alone, so they hold for as long as the kernel runs and are kept: each is a walk
//! over one function. The image's code is not what runs, as the kernel patches itself; see [`code`] for why that does not
//! matter. In every doubt a register is read.

mod code;
mod liveness;
mod prologue;
#[cfg(test)]
mod tests;

use crate::kernel::Kernel;
use crate::memory::Va;
use code::{HiddenEdges, ImageCode};
pub use liveness::Fate;
pub use prologue::Saves;
use rustc_hash::FxHashMap;
use std::hash::Hash;
use std::sync::{Mutex, OnceLock, PoisonError};

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

/// A set of [`Register`]s.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Registers(u8);

impl Registers {
    /// None of them.
    pub const NONE: Self = Self(0);
    /// All of them.
    pub const ALL: Self = Self((1 << Register::ALL.len()) - 1);

    /// True when `register` is in it.
    pub fn contains(self, register: Register) -> bool {
        self.0 & (1 << register as u8) != 0
    }

    /// True when nothing is in it.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    fn with(self, register: Register) -> Self {
        Self(self.0 | 1 << register as u8)
    }

    fn without(self, others: Self) -> Self {
        Self(self.0 & !others.0)
    }

    fn union(self, others: Self) -> Self {
        Self(self.0 | others.0)
    }
}

/// The answers found so far for one kernel image.
#[derive(Default)]
pub struct CalleeSaved {
    edges: OnceLock<Option<HiddenEdges>>,
    saves: Mutex<FxHashMap<(Va, bool), Option<Saves>>>,
    fates: Mutex<FxHashMap<Va, Fate>>,
}

impl Kernel {
    /// Where the function at `ip` keeps its caller's registers when it gets there (link address; `exact` as in
    /// [`crate::unwind::Start`]). None when its code cannot be followed.
    pub fn saves(&self, ip: Va, exact: bool) -> Option<Saves> {
        let code = self.code()?;
        remembered(&self.callee_saved.saves, (ip, exact), || prologue::saves(&code, ip, exact))
    }

    /// What becomes of the registers' values when the function at `ip` goes on from there (link address).
    pub fn fate(&self, ip: Va) -> Fate {
        let Some(code) = self.code() else { return Fate::UNKNOWN };
        remembered(&self.callee_saved.fates, ip, || liveness::fate(&code, ip))
    }

    /// None without the tables that complete it.
    fn code(&self) -> Option<ImageCode<'_>> {
        let edges = self.callee_saved.edges.get_or_init(|| HiddenEdges::recover(self)).as_ref()?;
        Some(ImageCode { kernel: self, edges })
    }
}

/// The answer to `question`, worked out the first time.
fn remembered<Q: Eq + Hash, A: Copy>(
    answers: &Mutex<FxHashMap<Q, A>>,
    question: Q,
    work_out: impl FnOnce() -> A,
) -> A {
    let answers = || answers.lock().unwrap_or_else(PoisonError::into_inner);
    let known = answers().get(&question).copied();
    known.unwrap_or_else(|| *answers().entry(question).or_insert_with(work_out))
}
