//! arm64:
//!
//! - The locals of the scheduler's own frame. Every sleeping task ends in `__schedule` (kernel/sched/core.c); what earlier,
//!   deeper calls left in its frame stays for as long as the task sleeps. Its own locals are the tasks and the run queue,
//!   which are no heap references anybody else lacks.
//! - Registers that a function saved for its caller, who does not read them ([`crate::callee_saved`]).
//!
//! The registers of a task that was switched out are not on its stack but in its `task_struct`, which is an object like any
//! other: what types.toml says of it keeps them from being read there, as they are stale while a task runs.

use crate::callee_saved::{Register, Saves};
use crate::linux::Linux;
use crate::linux::tasks::Task;
use crate::memory::{PhysicalMemory, Va};
use crate::unwind::{End, SleepingFrame, StackFrame, Text, Unwinder};
use std::ops::Range;

/// Deeper calls do not occur; beyond that nothing is dead.
const MAX_FRAMES: usize = 128;
/// Bytes of a word, and of a frame record.
const WORD: u64 = 8;
const RECORD: u64 = 16;

/// Finds the dead words of stacks.
pub struct DeadWords<'a> {
    linux: &'a Linux,
    unwinder: Unwinder<'a>,
    text: Text,
    sleeping: SleepingFrame,
    schedule: Range<Va>,
}

impl<'a> DeadWords<'a> {
    /// None on a kernel without the types or the symbols it needs: then nothing is dead.
    pub fn of(linux: &'a Linux) -> Option<Self> {
        let kernel = &linux.kernel;
        let slide = linux.placement.slide;
        let text = Text::recover(&kernel.image, &kernel.symbols).ok()?;
        let start = kernel.symbols.lookup("__schedule")? + slide;
        Some(Self {
            linux,
            unwinder: Unwinder::new(None, text, slide),
            text,
            sleeping: SleepingFrame::recover(kernel.types.as_ref()?, &kernel.symbols)?,
            schedule: start..start + kernel.symbols.size("__schedule")?,
        })
    }

    /// Dead addresses of the stack of a task that was switched out, ascending and apart. Modules are not asked: what their
    /// code saved or may read is alive.
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

    fn chain(&self, memory: &impl PhysicalMemory, task: &Task) -> Option<Chain<'_, 'a>> {
        let mut read = self.linux.word_reader(memory);
        let start = self.sleeping.start(task, self.linux.placement.slide, &mut read)?;
        let mut frames = Vec::with_capacity(16);
        let end = self.unwinder.visit(&(), &start, &mut read, |frame| {
            frames.push(frame);
            frames.len() < MAX_FRAMES
        });
        Some(Chain { dead: self, frames, end })
    }

    /// Link address of kernel text; None elsewhere.
    fn link(&self, frame: &StackFrame) -> Option<Va> {
        let link = frame.ip - self.linux.placement.slide;
        let inside = if frame.exact { link } else { link - 1 };
        self.text.contains(inside).then_some(link)
    }
}

/// The callers of one task's stack.
struct Chain<'d, 'a> {
    dead: &'d DeadWords<'a>,
    frames: Vec<StackFrame>,
    end: End,
}

impl Chain<'_, '_> {
    /// What the function of a frame saved for its caller's frame, the next, and where its frame record is. None unless its
    /// code, that of the function before and the stack agree on that.
    fn saves(&self, frame: usize) -> Option<(Saves, Va)> {
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

    /// True when nobody reads the value that `register` has when frame number `frame` goes on.
    fn is_dead(&self, register: Register, mut frame: usize) -> bool {
        loop {
            let Some(link) = self.frames.get(frame).and_then(|frame| self.dead.link(frame)) else {
                return false;
            };
            let fate = self.dead.linux.kernel.fate(link);
            if fate.read.contains(register) {
                return false;
            }
            if !fate.returned.contains(register) {
                return true;
            }
            frame += 1;
            if frame == self.frames.len() {
                // The bottom of a kernel thread's stack has nobody to return to.
                return self.end == End::Complete;
            }
            if self.saves(frame - 1).is_none() {
                return false;
            }
        }
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
