//! x86-64: functions push what they save, at the top of their frames.

use super::{Chain, DeadWords, WORD};
use crate::callee_saved::Saves;
use crate::linux::tasks::Task;
use crate::memory::{PhysicalMemory, Va};
use std::ops::Range;

/// Callee-saved registers of the System V AMD64 ABI that a prologue may push.
const SAVED_BYTES: u64 = 6 * 8;

impl DeadWords<'_> {
    /// Dead addresses of the stack of a task that was switched out, ascending and apart.
    pub fn of_task(&self, memory: &impl PhysicalMemory, task: &Task) -> Vec<Range<Va>> {
        let Some(chain) = self.chain(memory, task) else { return Vec::new() };
        let mut dead: Vec<Range<Va>> = Vec::new();
        let switched =
            self.sleeping.saved.iter().map(|&(register, offset)| (register, task.saved_sp + offset));
        dead.extend(switched.filter(|&(r, _)| chain.is_dead(r, 0)).map(|(_, at)| at..at + WORD));
        dead.extend(chain.scheduler_locals());
        for callee in 0..chain.frames.len() {
            let Some((saves, top)) = chain.saves(callee) else { continue };
            let slots = saves.iter().filter(|&(r, _)| chain.is_dead(r, callee + 1));
            dead.extend(slots.map(|(_, offset)| top - offset).map(|at| at..at + WORD));
        }
        dead.sort_unstable_by_key(|range| range.start);
        dead
    }

    /// Saved registers of a task that was switched out that are not on its stack: none.
    pub fn registers(&self, _memory: &impl PhysicalMemory, _task: &Task) -> Vec<Range<Va>> {
        Vec::new()
    }
}

impl Chain<'_, '_> {
    /// What the function of a frame saved for its caller's frame, the next, and the caller's stack pointer. None unless the
    /// function's code and the kernel's stack tables agree on that.
    pub(super) fn saves(&self, frame: usize) -> Option<(Saves, Va)> {
        let (callee, caller) = (self.frames.get(frame)?, self.frames.get(frame + 1)?);
        let saves = self.dead.linux.kernel.saves(self.dead.link(callee)?, callee.exact)?;
        (caller.sp == callee.sp + saves.depth.unsigned_abs()).then_some((saves, caller.sp))
    }

    /// The frame of `__schedule` without what it saved.
    fn scheduler_locals(&self) -> Option<Range<Va>> {
        let [first, second, ..] = &self.frames[..] else { return None };
        if !self.dead.schedule.contains(&first.ip) {
            return None;
        }
        let end = second.sp - WORD - SAVED_BYTES;
        (first.sp < end).then_some(first.sp..end)
    }
}
