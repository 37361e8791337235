//! `ps` and `bt`: tasks, and what each is doing in the kernel.

use super::{Cell, Column, Role, Table};
use crate::arch::CpuState;
use crate::linux::Linux;
use crate::linux::tasks::Task;
use crate::memory::{MemoryError, PhysicalMemory, Va};
use crate::unwind::{End, ModuleTables, SleepingFrame, Start, Unwinder};
use anyhow::{Context, ensure};

/// Most frames of a backtrace that is shown.
const MAX_FRAMES: usize = 64;

/// One row per task: pid, state as /proc has it, CPU of a running one, bytes of its kernel stack in use and name. No
/// stack has depth 0: the task runs user code, or its stack is gone.
///
/// # Errors
/// A CPU's pointer to its task cannot be read.
pub fn table(
    linux: &Linux,
    memory: &impl PhysicalMemory,
    tasks: &[Task],
    cpus: &[CpuState],
) -> Result<Table, MemoryError> {
    let columns = vec![
        Column::new("pid", Role::Key),
        Column::new("state", Role::Fact),
        Column::new("cpu", Role::Fact),
        Column::new("stack_bytes", Role::Amount),
        Column::new("comm", Role::Fact),
    ];
    let mut table = Table::new(columns, 3);
    for task in tasks {
        let cpu = running_on(linux, memory, task, cpus)?;
        let sp = match cpu {
            Some(cpu) if cpu.user_mode => None,
            Some(cpu) => Some(cpu.registers.sp()),
            None => Some(task.saved_sp),
        };
        let end = task.stack + task.stack_size;
        let depth = sp.filter(|&sp| task.stack != Va(0) && sp - task.stack < task.stack_size);
        let depth = depth.map_or(0, |sp| end - sp);
        table.rows.push(vec![
            Cell::Number(task.pid.into()),
            Cell::Text(task.state.to_string()),
            cpu.map_or(Cell::Absent, |cpu| Cell::from(cpu.index as u64)),
            depth.into(),
            Cell::Text(task.name()),
        ]);
    }
    Ok(table)
}

/// What a task is doing in the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Doing {
    /// The CPU it runs on; None while it sleeps or waits for one.
    pub cpu: Option<usize>,
    /// Return addresses, innermost first; none while it runs user code.
    pub frames: Vec<Va>,
    /// Why there are no more.
    pub end: End,
}

/// The backtrace of a task.
///
/// # Errors
/// A kernel without the types it needs, or a stack that cannot be read.
pub fn backtrace(
    linux: &Linux,
    memory: &impl PhysicalMemory,
    unwinder: &Unwinder<'_>,
    modules: &impl ModuleTables,
    task: &Task,
    cpus: &[CpuState],
) -> anyhow::Result<Doing> {
    let mut read = linux.word_reader(memory);
    let cpu = running_on(linux, memory, task, cpus)?;
    let start = match cpu {
        Some(cpu) if cpu.user_mode => {
            return Ok(Doing { cpu: Some(cpu.index), frames: Vec::new(), end: End::User });
        }
        Some(cpu) => Start::running(&cpu.registers),
        None => {
            ensure!(
                task.stack != Va(0),
                "The task with pid {} has ended and has no kernel stack any more",
                task.pid
            );
            ensure!(
                task.saved_sp - task.stack < task.stack_size,
                "The stack pointer {} of the task with pid {} is not on its stack",
                task.saved_sp,
                task.pid
            );
            let kernel = &linux.kernel;
            let types = kernel.types.as_ref().context("The kernel has no BTF")?;
            let sleeping = SleepingFrame::recover(types, &kernel.symbols)
                .context("The kernel's BTF does not describe how tasks are switched")?;
            sleeping
                .start(task, linux.placement.slide, &mut read)
                .ok_or(MemoryError::NotMapped { va: task.saved_sp })
                .with_context(|| format!("Cannot read the stack of the task with pid {}", task.pid))?
        }
    };
    let mut frames = vec![Va(0); MAX_FRAMES];
    let trace = unwinder.unwind(modules, &start, &mut read, &mut frames);
    frames.truncate(trace.len);
    Ok(Doing { cpu: cpu.map(|cpu| cpu.index), frames, end: trace.end })
}

/// The CPU that runs a task. `on_cpu` alone does not say: it is still set while the CPU switches to the next task.
fn running_on<'c>(
    linux: &Linux,
    memory: &impl PhysicalMemory,
    task: &Task,
    cpus: &'c [CpuState],
) -> Result<Option<&'c CpuState>, MemoryError> {
    for cpu in cpus.iter().filter(|cpu| cpu.online) {
        if linux.current(memory, cpu.index)? == task.va {
            return Ok(Some(cpu));
        }
    }
    Ok(None)
}
