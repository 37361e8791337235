//! The part of a sleeping task's stack that is dead although it lies above the stack pointer: the locals of the
//! scheduler's own frame.
//!
//! Every sleeping task ends in `__schedule` (kernel/sched/core.c). Its frame is large, and what earlier, deeper calls left
//! there stays for as long as the task sleeps, which for kernel threads is for ever: the most common place for stale
//! pointers that make a lost object look referenced. Its own locals are the tasks and the run queue, which are no
//! heap references anybody else lacks. Only what it saved for its callers matters: the registers just below
//! its return address, and those that the switch itself saved.

use crate::linux::Linux;
use crate::memory::{PhysicalMemory, Va};
use crate::unwind::{SleepingFrame, Text, Unwinder};
use std::ops::Range;

/// Callee-saved registers of the System V AMD64 ABI that a prologue may push.
const SAVED_BYTES: u64 = 6 * 8;
/// A frame is not larger; beyond it the return address is not looked for.
const MAX_FRAME: u64 = 1024;

/// Finds the dead part of scheduler frames.
pub struct SwitchFrame<'a> {
    unwinder: Unwinder<'a>,
    sleeping: SleepingFrame,
    schedule: Range<Va>,
    slide: u64,
}

impl<'a> SwitchFrame<'a> {
    /// None on a kernel without the types or the symbol it needs: then nothing is dead.
    pub fn of(linux: &'a Linux) -> Option<Self> {
        let kernel = &linux.kernel;
        let slide = linux.placement.slide;
        let text = Text::recover(&kernel.image, &kernel.symbols).ok()?;
        let start = kernel.symbols.lookup("__schedule")? + slide;
        Some(Self {
            unwinder: Unwinder::new(kernel.orc.as_ref(), text, slide),
            sleeping: SleepingFrame::recover(kernel.types.as_ref()?, &kernel.symbols)?,
            schedule: start..start + kernel.symbols.size("__schedule")?,
            slide,
        })
    }

    /// Dead addresses of a task that was switched out at `saved_sp`.
    pub fn dead(&self, linux: &Linux, memory: &impl PhysicalMemory, saved_sp: Va) -> Option<Range<Va>> {
        let mut read = linux.word_reader(memory);
        let start = self.sleeping.start(saved_sp, self.slide, &mut read)?;
        let mut frames = [Va(0); 2];
        let trace = self.unwinder.unwind(&(), &start, &mut read, &mut frames);
        if trace.len < 2 || !self.schedule.contains(&frames[0]) {
            return None;
        }
        let slots = (start.sp.0..start.sp.0 + MAX_FRAME).step_by(8).map(Va);
        let return_address = slots.into_iter().find(|&slot| read(slot) == Some(frames[1].0))?;
        let end = return_address - SAVED_BYTES;
        (start.sp < end).then_some(start.sp..end)
    }
}
