//! Waiting for a moment when nobody is inside the allocator.
//!
//! A free is recorded before the guest frees and an allocation after it allocated, so in between the registry and
//! the guest rightly disagree on that one object. An audit therefore wants a pause in which no vCPU, and no
//! task that was preempted or went to sleep there, has an allocator function on its stack.

use crate::tracer::Recorder;
use introspect::arch::CpuState;
use introspect::hooks::Plan;
use introspect::linux::Linux;
use introspect::memory::{PhysicalMemory, Va};
use introspect::unwind::{SleepingFrame, Start};
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

/// Frames looked at per stack.
const DEPTH: usize = 64;

/// The code of the allocator, run-time addresses.
pub struct Allocator {
    code: Vec<Range<Va>>,
    sleeping: Option<SleepingFrame>,
}

impl Allocator {
    /// The functions of `plan` and those behind them.
    pub fn new(linux: &Linux, plan: &Plan) -> Self {
        let symbols = &linux.kernel.symbols;
        let names = plan.traps.iter().map(|t| t.function.as_str()).chain(BEHIND);
        let code = names
            .filter_map(|name| {
                let start = symbols.lookup(name)? + linux.placement.slide;
                Some(start..start + symbols.size(name)?)
            })
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
        let mut read = linux.word_reader(memory);
        let mut starts: Vec<Start> =
            cpus.iter().filter(|c| c.online && !c.user_mode).map(|c| Start::running(&c.registers)).collect();
        if let Some(frame) = &self.sleeping {
            let tasks = linux.tasks(memory)?;
            let asleep = tasks.iter().filter(|t| !t.on_cpu && t.stack != Va(0));
            starts.extend(asleep.filter_map(|t| frame.start(t, linux.placement.slide, &mut read)));
        }
        let modules = recorder.modules.read().unwrap_or_else(PoisonError::into_inner);
        let unwinder = recorder.unwinder();
        Ok(!starts.iter().any(|start| {
            let mut stack = [Va(0); DEPTH];
            let trace = unwinder.unwind(&*modules, start, &mut read, &mut stack);
            stack[..trace.len].iter().any(|ip| self.code.iter().any(|code| code.contains(ip)))
        }))
    }
}
