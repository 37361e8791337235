//! Which of the registers that functions save on the stack anybody will read again: worked out from the image's code.
//!
//! A function that wants a callee-saved register for itself saves its caller's value first. Whether the caller still needs that
//! is not on the stack: it is in the caller's code, behind the call. Often it does not, and for a thread that sleeps for ever
//! the saved word is a pointer to something freed long ago, and whatever is allocated there next looks referenced.
//! Every kernel thread is an example: the note that told it what to run stays in its first three frames.
//!
//! The answers come from the image's code alone, so they hold for as long as the kernel runs and are kept: each is a walk
//! over one function. The image's code is not what runs, as the kernel patches itself; see [`platform::code`] for why that does
//! not matter. In every doubt a register is read.

#[cfg(target_arch = "aarch64")]
mod aarch64;
mod ways;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use crate::kernel::Kernel;
use crate::memory::Va;
#[cfg(target_arch = "aarch64")]
use aarch64 as platform;
use platform::code::{HiddenEdges, ImageCode};
pub use platform::{Register, prologue::Saves};
use platform::{liveness, prologue};
use rustc_hash::FxHashMap;
use std::hash::Hash;
use std::sync::{Mutex, OnceLock, PoisonError};
#[cfg(target_arch = "x86_64")]
use x86_64 as platform;

/// A set of [`Register`]s.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Registers(u16);

impl Registers {
    /// None of them.
    pub const NONE: Self = Self(0);
    /// All of them.
    pub const ALL: Self = Self((1 << Register::ALL.len()) - 1);

    /// True when `register` is in it.
    pub fn contains(self, register: Register) -> bool {
        self.0 & (1 << register as u16) != 0
    }

    /// True when nothing is in it.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    fn with(self, register: Register) -> Self {
        Self(self.0 | 1 << register as u16)
    }

    fn without(self, others: Self) -> Self {
        Self(self.0 & !others.0)
    }

    fn union(self, others: Self) -> Self {
        Self(self.0 | others.0)
    }

    fn intersection(self, others: Self) -> Self {
        Self(self.0 & others.0)
    }
}

/// What becomes of the values that registers have at an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fate {
    /// Read on some way, or that cannot be excluded.
    pub read: Registers,
    /// Still there when the function returns, on some way: then it is the caller who may read them.
    pub returned: Registers,
}

impl Fate {
    /// Nothing can be excluded.
    const UNKNOWN: Self = Self { read: Registers::ALL, returned: Registers::ALL };
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
