//! arm64: functions store what they save beside their frame record.
//!
//! The registers of a task that was switched out are not on its stack but in its `task_struct`, which is an object like any
//! other: what types.toml says of it keeps them from being read there, as they are stale while a task runs.

use super::{Chain, DeadWords, WORD};
use crate::callee_saved::Saves;
use crate::linux::tasks::Task;
use crate::memory::{PhysicalMemory, Va};
use std::ops::Range;

/// Bytes of a frame record.
const RECORD: u64 = 16;

impl DeadWords<'_> {
    /// Dead addresses of the stack of a task that was switched out, ascending and apart.
    pub fn of_task(&self, memory: &impl PhysicalMemory, task: &Task) -> Vec<Range<Va>> {
        let Some(chain) = self.chain(memory, task) else { return Vec::new() };
        let mut dead: Vec<Range<Va>> = Vec::new();
        for callee in 0..chain.frames.len() {
            let Some((saves, record)) = chain.saves(callee) else { continue };
            let slots = saves.iter().filter(|&(register, _)| chain.is_dead(register, callee + 1));
            dead.extend(slots.map(|(_, offset)| record + offset as u64).map(|at| at..at + WORD));
            if self.schedule.contains(&chain.frames[callee].ip) {
                dead.extend(locals(&saves, record));
            }
        }
        dead.sort_unstable_by_key(|range| range.start);
        dead
    }

    /// The registers of a task that was switched out, where somebody may read them again.
    pub fn registers(&self, memory: &impl PhysicalMemory, task: &Task) -> Vec<Range<Va>> {
        let chain = self.chain(memory, task);
        let alive = |register| chain.as_ref().is_none_or(|chain| !chain.is_dead(register, 0));
        let saved = self.sleeping.saved.iter().filter(|&&(register, _)| alive(register));
        saved.map(|&(_, offset)| task.va + offset).map(|at| at..at + WORD).collect()
    }
}

impl Chain<'_, '_> {
    /// What the function of a frame saved for its caller's frame, the next, and where its frame record is. None unless its
    /// code, that of the function before and the stack agree on that.
    pub(super) fn saves(&self, frame: usize) -> Option<(Saves, Va)> {
        let (saves, record) = self.by_code(frame)?;
        let callee = self.frames[frame];
        let sp = if frame == 0 || callee.exact {
            callee.sp
        } else {
            let (before, record) = self.by_code(frame - 1)?;
            record + before.above.unsigned_abs()
        };
        (sp + saves.below.unsigned_abs() == record).then_some((saves, record))
    }

    /// The same, as the function's code alone says it.
    fn by_code(&self, frame: usize) -> Option<(Saves, Va)> {
        let (callee, caller) = (self.frames.get(frame)?, self.frames.get(frame + 1)?);
        // The caller comes from the record, unless it was interrupted, or is in the link register.
        let by_record = !caller.exact && callee.sp < caller.sp;
        let saves = self.dead.linux.kernel.saves(self.dead.link(callee)?, callee.exact)?;
        by_record.then_some((saves, caller.sp - RECORD))
    }
}

/// What a frame has beside its record and what it saved: from the stack pointer, which may lie below the record, up to where the
/// caller's begins.
fn locals(saves: &Saves, record: Va) -> Vec<Range<Va>> {
    let (mut start, end) = (record - saves.below.unsigned_abs(), record + saves.above.unsigned_abs());
    let slots = saves.iter().map(|(_, offset)| (record + offset as u64, WORD));
    let mut kept: Vec<(Va, u64)> = slots.chain([(record, RECORD), (end, 0)]).collect();
    kept.sort_unstable();
    let mut locals = Vec::new();
    for (at, len) in kept {
        if start < at {
            locals.push(start..at);
        }
        start = start.max(at + len);
    }
    locals
}
