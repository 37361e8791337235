//! Waiting for a moment when nobody is inside the allocator.
//!
//! A free is recorded before the guest frees and an allocation after it allocated, so in between the registry and
//! the guest rightly disagree on that one object. An audit therefore wants a pause in which no vCPU, and no
//! task that was preempted or went to sleep there, has an allocator function on its stack.

use crate::tracer::Recorder;
use introspect::arch::CpuState;
use introspect::hooks::{Plan, code_of};
use introspect::linux::Linux;
use introspect::linux::tasks::Task;
use introspect::memory::{MemoryError, PhysicalMemory, Va};
use introspect::unwind::{ModuleTables, SleepingFrame, Start};
use rustc_hash::FxHashSet;
use std::iter;
use std::ops::Range;
use std::sync::PoisonError;

/// Functions that do an allocator's work behind a tail call of a hooked one, so that the hooked one is no longer on the
/// stack (mm/slub.c, mm/slab_common.c).
const BEHIND: [&str; 5] = [
    "__kmem_cache_free",
    "__slab_free",
    "free_large_kmalloc",
    "free_to_partial_list",
    "kmem_cache_free_bulk",
];

/// Most bytes of a CPU's own stack (IRQ_STACK_SIZE); behind it is nothing, or what does no harm.
const CPU_STACK: u64 = 0x4000;

/// Most frames of a stack that are looked at. An allocator that waits for memory has fifty or more above it, and what
/// interrupts that comes on top.
const DEPTH: usize = 1024;

/// The code of the allocator, run-time addresses.
pub struct Allocator {
    code: Vec<(String, Range<Va>)>,
    sleeping: Option<SleepingFrame>,
}

/// Addresses at which somebody may go on.
pub struct Standing(FxHashSet<Va>);

impl Standing {
    /// True when one of them is inside these bytes, not at their start: they cannot become something else.
    pub fn is_inside(&self, bytes: &Range<Va>) -> bool {
        self.0.iter().any(|va| bytes.contains(va) && *va != bytes.start)
    }
}

impl Allocator {
    /// The functions of `plan` and those behind them.
    pub fn new(linux: &Linux, plan: &Plan) -> Self {
        let symbols = &linux.kernel.symbols;
        let names = plan.traps.iter().map(|t| t.function.as_str()).chain(BEHIND);
        let slide = linux.placement.slide;
        let code = names
            .flat_map(|name| code_of(&linux.kernel, name).into_iter().map(|code| (name.to_owned(), code)))
            .map(|(name, code)| (name, code.start + slide..code.end + slide))
            .collect();
        let sleeping = linux.kernel.types.as_ref().and_then(|t| SleepingFrame::recover(t, symbols));
        Self { code, sleeping }
    }

    /// True when no stack of the paused machine has allocator code on it.
    pub fn is_quiet(
        &self,
        linux: &Linux,
        memory: &impl PhysicalMemory,
        recorder: &Recorder,
        cpus: &[CpuState],
    ) -> anyhow::Result<bool> {
        Ok(self.busy(linux, memory, recorder, cpus)?.is_empty())
    }

    /// Where in the allocator's code anybody may go on: where the paused machine's vCPUs stand, and what words on stacks
    /// are such addresses, however they are unwound, stale ones among them.
    pub fn standing(
        &self,
        linux: &Linux,
        memory: &impl PhysicalMemory,
        cpus: &[CpuState],
    ) -> anyhow::Result<Standing> {
        let mut read = linux.word_reader(memory);
        let is_code = |at: &Va| self.code.iter().any(|(_, code)| code.contains(at));
        let mut found: FxHashSet<Va> = cpus.iter().map(|cpu| cpu.registers.ip()).filter(is_code).collect();
        let mut look = |start: Va, end: Va| found.extend(words(start..end, &mut read).filter(is_code));
        for cpu in cpus.iter().filter(|cpu| cpu.online && !cpu.user_mode) {
            let sp = cpu.registers.sp();
            look(sp, sp + CPU_STACK);
        }
        for task in linux.tasks(memory)?.iter().filter(|task| task.stack != Va(0)) {
            let Range { start, end } = task.stack_range();
            // Of a running task nobody knows how much is in use.
            look(if task.on_cpu { start } else { task.saved_sp.max(start) }, end);
        }
        Ok(Standing(found))
    }

    /// The functions that are on some stack of the paused machine.
    pub fn busy(
        &self,
        linux: &Linux,
        memory: &impl PhysicalMemory,
        recorder: &Recorder,
        cpus: &[CpuState],
    ) -> anyhow::Result<FxHashSet<&str>> {
        let chains = self.chains(linux, memory, cpus)?;
        let mut read = linux.word_reader(memory);
        let modules = recorder.modules.read().unwrap_or_else(PoisonError::into_inner);
        let unwinder = recorder.unwinder();
        let mut busy = FxHashSet::default();
        let mut note = |ip: Va| {
            let inside = self.code.iter().filter(|(_, code)| code.contains(&ip));
            busy.extend(inside.map(|(name, _)| name.as_str()));
        };
        for Chain { start, parts } in chains {
            let mut left = DEPTH;
            let end = unwinder.visit(&*modules, &start, &mut read, |frame| {
                note(frame.ip);
                left -= 1;
                left > 0
            });
            // Of what the frames do not say any word may be a return address.
            for part in parts.into_iter().filter(|_| !end.is_whole()) {
                words(part, &mut read).for_each(|ip| note(modules.detour(ip).map_or(ip, |detour| detour.to)));
            }
        }
        Ok(busy)
    }

    /// Everybody's callers: those of the vCPUs that run kernel code, and of all tasks that none of them runs.
    fn chains(
        &self,
        linux: &Linux,
        memory: &impl PhysicalMemory,
        cpus: &[CpuState],
    ) -> anyhow::Result<Vec<Chain>> {
        let tasks = linux.tasks(memory)?;
        let mut read = linux.word_reader(memory);
        let running = running(linux, memory, &tasks, cpus)?;
        let in_kernel = running.iter().filter(|(cpu, _)| !cpu.user_mode);
        let mut chains: Vec<Chain> = in_kernel
            .map(|(cpu, task)| {
                let sp = cpu.registers.sp();
                // Below a stack of the CPU's own is the task's that was interrupted.
                let task = tasks.iter().find(|candidate| candidate.va == *task);
                let task = task.map(Task::stack_range).filter(|stack| !stack.contains(&sp));
                let parts = iter::once(sp..sp + CPU_STACK).chain(task).collect();
                Chain { start: Start::running(&cpu.registers), parts }
            })
            .collect();
        if let Some(frame) = &self.sleeping {
            let asleep = tasks.iter().filter(|task| running.iter().all(|(_, running)| *running != task.va));
            let starts = asleep
                .filter(|task| task.stack != Va(0))
                .filter_map(|task| frame.start(task, linux.placement.slide, &mut read));
            chains.extend(starts.map(|start| Chain { parts: vec![start.sp..start.sp + CPU_STACK], start }));
        }
        Ok(chains)
    }
}

/// Where somebody stands, and the stacks on which their callers are.
struct Chain {
    start: Start,
    parts: Vec<Range<Va>>,
}

/// The words of a part of a stack, the one that it begins in included and the one that it ends in not, up to what cannot be read.
fn words(part: Range<Va>, mut read: impl FnMut(Va) -> Option<u64>) -> impl Iterator<Item = Va> {
    (part.start.0 & !7..part.end.0 & !7).step_by(8).map_while(move |at| read(Va(at)).map(Va))
}

/// The vCPUs and the tasks whose registers are theirs. Halfway from one task to another both are `on_cpu`, and the CPU's own
/// word for its task is that of the first, when the stack is the other's already.
fn running<'c>(
    linux: &Linux,
    memory: &impl PhysicalMemory,
    tasks: &[Task],
    cpus: &'c [CpuState],
) -> Result<Vec<(&'c CpuState, Va)>, MemoryError> {
    let online = cpus.iter().filter(|cpu| cpu.online);
    online
        .map(|cpu| {
            let is_on_stack =
                |task: &&Task| !cpu.user_mode && task.stack_range().contains(&cpu.registers.sp());
            let task = match tasks.iter().find(is_on_stack) {
                Some(task) => task.va,
                None => linux.current(memory, cpu.index)?,
            };
            Ok((cpu, task))
        })
        .collect()
}
