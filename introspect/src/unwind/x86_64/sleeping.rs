//! Where a task that does not run was switched out (arch/x86/include/asm/switch_to.h).

use super::Start;
use crate::callee_saved::Register;
use crate::linux::tasks::Task;
use crate::memory::Va;
use crate::symbols::SymbolTable;
use crate::types::Btf;

/// `struct inactive_task_frame`, which `__switch_to_asm` leaves at `thread.sp`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SleepingFrame {
    pub(super) bytes: u64,
    /// The callee-saved registers in it, and their offsets.
    pub saved: [(Register, u64); 6],
    pub(super) bp_at: u64,
    pub(super) ip_at: u64,
    /// What a new task is made to return to, link address.
    pub(super) fork_return: Option<Va>,
}

impl SleepingFrame {
    /// Looks its layout up; None without it.
    pub fn recover(types: &Btf, symbols: &SymbolTable) -> Option<Self> {
        let offset = |member| types.offset("inactive_task_frame", member);
        Some(Self {
            saved: [
                (Register::Rbx, offset("bx")?),
                (Register::Rbp, offset("bp")?),
                (Register::R12, offset("r12")?),
                (Register::R13, offset("r13")?),
                (Register::R14, offset("r14")?),
                (Register::R15, offset("r15")?),
            ],
            bytes: types.size_of("inactive_task_frame")?,
            bp_at: offset("bp")?,
            ip_at: offset("ret_addr")?,
            // Since commit 3aec4ecb3d1f (in v6.5) ret_from_fork is a C function, which the new task calls.
            fork_return: symbols.lookup("ret_from_fork_asm").or_else(|| symbols.lookup("ret_from_fork")),
        })
    }

    /// Where to start unwinding a task that does not run; None when its stack cannot be read. `slide` is run-time
    /// minus link address.
    pub fn start(
        &self,
        task: &Task,
        slide: u64,
        mut read_word: impl FnMut(Va) -> Option<u64>,
    ) -> Option<Start> {
        let saved_sp = task.saved_sp;
        let ip = Va(read_word(saved_sp + self.ip_at)?);
        Some(Start {
            ip,
            sp: saved_sp + self.bytes,
            bp: Va(read_word(saved_sp + self.bp_at)?),
            scratch: None,
            // A task that never ran has called nothing yet.
            exact: self.fork_return.is_some_and(|va| va + slide == ip),
        })
    }
}
