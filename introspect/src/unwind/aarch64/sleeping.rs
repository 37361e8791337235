//! Where a task that does not run was switched out (arch/arm64/kernel/entry.S, cpu_switch_to).

use super::{Link, Start};
use crate::callee_saved::Register;
use crate::linux::tasks::Task;
use crate::memory::Va;
use crate::symbols::SymbolTable;
use crate::types::Btf;

/// `thread.cpu_context` in `struct task_struct`, where `cpu_switch_to` leaves x19 to x29, sp and pc.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SleepingFrame {
    /// The callee-saved registers in it, and their offsets in the task.
    pub saved: [(Register, u64); Register::ALL.len()],
    pub(super) fp: u64,
    pub(super) sp: u64,
    pub(super) pc: u64,
    /// What a new task is made to return to, link address.
    pub(super) fork_return: Option<Va>,
}

impl SleepingFrame {
    /// Looks its layout up; None without it.
    pub fn recover(types: &Btf, symbols: &SymbolTable) -> Option<Self> {
        let offset = |member: &str| types.offset("task_struct", &format!("thread.cpu_context.{member}"));
        let mut saved = Register::ALL.map(|register| (register, 0));
        for (register, at) in &mut saved {
            *at = offset(register.name())?;
        }
        Some(Self {
            saved,
            fp: offset("fp")?,
            sp: offset("sp")?,
            pc: offset("pc")?,
            fork_return: symbols.lookup("ret_from_fork"),
        })
    }

    /// Where to start unwinding a task that does not run; None when its structure cannot be read. `slide` is run-time
    /// minus link address.
    pub fn start(
        &self,
        task: &Task,
        slide: u64,
        mut read_word: impl FnMut(Va) -> Option<u64>,
    ) -> Option<Start> {
        let mut word = |offset| read_word(task.va + offset).map(Va);
        let ip = word(self.pc)?;
        Some(Start {
            ip,
            sp: word(self.sp)?,
            fp: word(self.fp)?,
            link: Link::Lost,
            // A task that never ran has called nothing yet.
            exact: self.fork_return.is_some_and(|va| va + slide == ip),
        })
    }
}
