//! Tasks: `current` of a CPU, the task list, kernel stacks.

use super::Linux;
use super::lookup::Lookup;
use super::platform::{Running, SAVED_SP, final_text, stack_size};
use super::read::{Walk, le32, le64};
use crate::arch::layout::STACK_SIZES;
use crate::memory::{MemoryError, PhysicalMemory, Va};
use anyhow::Context as _;
use rustc_hash::FxHashSet;
use std::ops::Range;

/// Most tasks of any Linux machine (`PID_MAX_LIMIT`, include/linux/threads.h).
const MAX_TASKS: usize = 4 << 20;
/// `TASK_COMM_LEN`.
const COMM_LEN: usize = 16;

/// Bits of `preempt_count` (include/linux/preempt.h).
const SOFTIRQ_SERVING: u32 = 1 << 8;
const HARDIRQ_MASK: u32 = 0xf << 16;

/// A task.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Task {
    /// `struct task_struct`.
    pub va: Va,
    /// `comm`, as in /proc (NUL-terminated inside 16 bytes).
    pub comm: [u8; 16],
    /// Thread id in the initial namespace (`task->pid`).
    pub pid: i32,
    /// Lowest address of the kernel stack; 0 when it is already gone.
    pub stack: Va,
    /// Stack size, bytes.
    pub stack_size: u64,
    /// Saved stack pointer (`thread.sp`, `thread.cpu_context.sp`); meaningless while `on_cpu`.
    pub saved_sp: Va,
    /// True while the task runs on a CPU.
    pub on_cpu: bool,
    /// State as the letter of /proc/PID/stat; `?` on a kernel whose tasks have none.
    pub state: char,
}

impl Task {
    /// All of its kernel stack.
    pub fn stack_range(&self) -> Range<Va> {
        self.stack..self.stack + self.stack_size
    }

    /// `comm` as text; what is not UTF-8 is replaced, and so are control characters: a task may call itself anything.
    pub fn name(&self) -> String {
        let end = self.comm.iter().position(|&b| b == 0).unwrap_or(self.comm.len());
        let text = String::from_utf8_lossy(&self.comm[..end]);
        text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
    }
}

/// Letters by the highest bit of the state that is reported (`task_state_array`, fs/proc/array.c).
const STATES: [char; 8] = ['R', 'S', 'D', 'T', 't', 'X', 'Z', 'P'];
/// The bits reported, and those of a task that sleeps for long without counting as load (include/linux/sched.h).
const TASK_REPORT: u32 = 0x7f;
const TASK_IDLE: u32 = 0x402;
/// Waits for a sleeping lock of PREEMPT_RT, or for a thaw: shown as uninterruptible.
const TASK_RTLOCK_WAIT: u32 = 0x1000;
const TASK_FROZEN: u32 = 0x8000;

/// The letter for `task->__state | task->exit_state` (`task_state_index`, include/linux/sched.h).
fn state_letter(state: u32) -> char {
    if state & TASK_IDLE == TASK_IDLE {
        return 'I';
    }
    if state & (TASK_RTLOCK_WAIT | TASK_FROZEN) != 0 {
        return 'D';
    }
    STATES[(u32::BITS - (state & TASK_REPORT).leading_zeros()) as usize % STATES.len()]
}

/// What a CPU is doing, in kmemleak's terms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Context {
    /// A task's own work (also inside sections with softirqs disabled).
    Task,
    /// A softirq handler.
    Softirq,
    /// A hardware interrupt handler.
    Hardirq,
}

impl Context {
    /// What kmemleak records of an interrupt.
    pub(super) fn comm_and_pid(self) -> ([u8; 16], i32) {
        let name: &[u8] = if self == Self::Hardirq { b"hardirq" } else { b"softirq" };
        let mut comm = [0; COMM_LEN];
        comm[..name.len()].copy_from_slice(name);
        (comm, 0)
    }
}

/// Offsets and addresses this room needs.
pub(super) struct Layout {
    pub running: Running,
    /// PREEMPT_RT counts softirqs in the task.
    pub softirq_disable_cnt: Option<u64>,
    /// Per-CPU offset of the pointer to the idle task.
    idle_threads: Option<u64>,
    pub init_task: Va,
    pub stack_size: u64,
    pub comm: u64,
    pub pid: u64,
    pub stack: u64,
    saved_sp: u64,
    on_cpu: Option<u64>,
    /// `state` until 5.13. None: not known.
    state: Option<u64>,
    exit_state: Option<u64>,
    tasks: u64,
    signal: u64,
    thread_node: u64,
    thread_head: u64,
    final_text: Option<(Va, u64)>,
}

impl Layout {
    pub fn new(lookup: &Lookup<'_>) -> anyhow::Result<Self> {
        let task = |member| lookup.offset("task_struct", member);
        let stack_size = stack_size(lookup);
        anyhow::ensure!(STACK_SIZES.contains(&stack_size), "No kernel stack has {stack_size} bytes");
        Ok(Self {
            running: Running::new(lookup)?,
            softirq_disable_cnt: lookup.types.offset("task_struct", "softirq_disable_cnt"),
            idle_threads: lookup.percpu_if_any("idle_threads"),
            init_task: lookup.symbol("init_task")?,
            stack_size,
            comm: task("comm")?,
            pid: task("pid")?,
            stack: task("stack")?,
            saved_sp: task(SAVED_SP)?,
            on_cpu: lookup.types.offset("task_struct", "on_cpu"),
            state: ["__state", "state"].iter().find_map(|m| lookup.types.offset("task_struct", m)),
            exit_state: lookup.types.offset("task_struct", "exit_state"),
            tasks: task("tasks")?,
            signal: task("signal")?,
            thread_node: task("thread_node")?,
            thread_head: lookup.offset("signal_struct", "thread_head")?,
            final_text: final_text(lookup),
        })
    }
}

impl Linux {
    /// What `cpu` is doing. Softirqs count only while they are served, as kmemleak has it
    /// (`in_serving_softirq`).
    ///
    /// # Errors
    /// The CPU's per-CPU area is not mapped (yet).
    pub fn context(&self, memory: &impl PhysicalMemory, cpu: usize) -> Result<Context, MemoryError> {
        let count = self.preempt_count(memory, cpu)?;
        let softirqs = match self.tasks.softirq_disable_cnt {
            Some(offset) => self.read_u32(memory, self.current(memory, cpu)? + offset)?,
            None => 0,
        };
        Ok(self.context_of(count, softirqs))
    }

    /// What a CPU was doing whose counters and task's counter are these.
    pub(super) fn context_of(&self, preempt_count: u32, softirqs: u32) -> Context {
        let softirqs = if self.tasks.softirq_disable_cnt.is_some() { softirqs } else { preempt_count };
        match (preempt_count & HARDIRQ_MASK, softirqs & SOFTIRQ_SERVING) {
            (0, 0) => Context::Task,
            (0, _) => Context::Softirq,
            _ => Context::Hardirq,
        }
    }

    /// `comm` and `pid` that kmemleak records for an allocation made on `cpu` now: those of the task, or
    /// "hardirq" and "softirq" with pid 0 (mm/kmemleak.c).
    ///
    /// # Errors
    /// The CPU's per-CPU area or its task is not mapped (yet).
    pub fn allocating_comm_and_pid(
        &self,
        memory: &impl PhysicalMemory,
        cpu: usize,
    ) -> Result<([u8; 16], i32), MemoryError> {
        match self.context(memory, cpu)? {
            Context::Task => self.comm_and_pid(memory, self.current(memory, cpu)?),
            interrupt => Ok(interrupt.comm_and_pid()),
        }
    }

    /// True once the kernel's text is final but for what it patches on the run: fentry slots, jump labels, static calls.
    ///
    /// # Errors
    /// See [`Linux::says_when_final`].
    pub fn is_final(&self, memory: &impl PhysicalMemory) -> anyhow::Result<bool> {
        let (variable, least) =
            self.tasks.final_text.context("The kernel does not say when its text is final")?;
        Ok(u64::from(self.read_u32(memory, variable)?) >= least)
    }

    /// Whether the kernel says when its text is final.
    pub fn says_when_final(&self) -> bool {
        self.tasks.final_text.is_some()
    }

    /// `comm` and `pid` of a task: the two things a traced event wants. Two reads, no allocation.
    ///
    /// # Errors
    /// `task` is not mapped.
    pub fn comm_and_pid(
        &self,
        memory: &impl PhysicalMemory,
        task: Va,
    ) -> Result<([u8; 16], i32), MemoryError> {
        let mut walk = Walk::default();
        let (mut comm, mut pid) = ([0; COMM_LEN], [0; 4]);
        self.read_with(memory, &mut walk, task + self.tasks.comm, &mut comm)?;
        self.read_with(memory, &mut walk, task + self.tasks.pid, &mut pid)?;
        Ok((comm, i32::from_le_bytes(pid)))
    }

    /// All tasks and threads, the idle tasks of every CPU included; bounded at 4 M entries.
    ///
    /// # Errors
    /// A damaged list, with its address.
    pub fn tasks(&self, memory: &impl PhysicalMemory) -> Result<Vec<Task>, MemoryError> {
        let layout = &self.tasks;
        let mut found = Found::default();
        let leaders = self.list(memory, layout.init_task + layout.tasks, MAX_TASKS)?;
        let leaders = leaders.into_iter().map(|node| node - layout.tasks);
        // Of all lists together, also where damaged leaders share one.
        let mut left = MAX_TASKS;
        for leader in std::iter::once(layout.init_task).chain(leaders) {
            found.add(leader);
            let signal = self.read_va(memory, leader + layout.signal)?;
            if signal != Va(0) {
                let threads = self.list(memory, signal + layout.thread_head, left)?;
                left -= threads.len();
                threads.into_iter().for_each(|node| found.add(node - layout.thread_node));
            }
        }
        for cpu in 0..self.cpu_count(memory)? {
            if let Some(offset) = layout.idle_threads {
                let idle = self.read_va(memory, self.percpu_base(memory, cpu)? + offset)?;
                // CPUs that never came up have none.
                if idle != Va(0) {
                    found.add(idle);
                }
            }
        }
        found.order.iter().map(|&va| self.task(memory, va)).collect()
    }

    /// The task at `va`.
    ///
    /// # Errors
    /// `va` is not mapped.
    pub fn task(&self, memory: &impl PhysicalMemory, va: Va) -> Result<Task, MemoryError> {
        let layout = &self.tasks;
        let mut walk = Walk::default();
        let mut word = |offset| {
            let mut b = [0; 8];
            self.read_with(memory, &mut walk, va + offset, &mut b).map(|()| b)
        };
        let stack = Va(le64(&word(layout.stack)?, 0));
        let saved_sp = Va(le64(&word(layout.saved_sp)?, 0));
        let on_cpu = match layout.on_cpu {
            Some(offset) => le32(&word(offset)?, 0) != 0,
            None => true,
        };
        let mut half = |offset: Option<u64>| Ok(offset.map(&mut word).transpose()?.map(|b| le32(&b, 0)));
        let exit = half(layout.exit_state)?.unwrap_or(0);
        let state = half(layout.state)?.map_or('?', |state| state_letter(state | exit));
        let (comm, pid) = self.comm_and_pid(memory, va)?;
        Ok(Task { va, comm, pid, stack, stack_size: layout.stack_size, saved_sp, on_cpu, state })
    }
}

/// Tasks in the order found, each once.
#[derive(Default)]
struct Found {
    order: Vec<Va>,
    seen: FxHashSet<Va>,
}

impl Found {
    fn add(&mut self, task: Va) {
        if self.seen.insert(task) {
            self.order.push(task);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::state_letter;

    #[test]
    fn states_have_the_letters_of_proc() {
        let table = [
            (0, 'R'),
            (1, 'S'),
            (2, 'D'),
            (0x402, 'I'),
            (4, 'T'),
            (8, 't'),
            (0x20, 'Z'),
            (0x10, 'X'),
            (0x40, 'P'),
            (0x8000, 'D'),
            (0x1000, 'D'),
            // A zombie that died in its sleep, and a bit that is not reported.
            (0x21, 'Z'),
            (0x81, 'S'),
        ];
        for (state, letter) in table {
            assert_eq!(state_letter(state), letter, "{state:#x}");
        }
    }
}
