//! x86-64:
//!
//! - The locals of the scheduler's own frame. Every sleeping task ends in `__schedule` (kernel/sched/core.c). Its frame is
//!   large, and what earlier, deeper calls left there stays for as long as the task sleeps, which for kernel threads is
//!   for ever. Its own locals are the tasks and the run queue, which are no heap references anybody else lacks.
//! - Registers that a function saved for its caller, who does not read them ([`crate::callee_saved`]).

use crate::callee_saved::{Register, Saves};
use crate::linux::Linux;
use crate::linux::tasks::Task;
use crate::memory::{PhysicalMemory, Va};
use crate::unwind::{End, SleepingFrame, StackFrame, Text, Unwinder};
use std::ops::Range;

/// Callee-saved registers of the System V AMD64 ABI that a prologue may push.
const SAVED_BYTES: u64 = 6 * 8;
/// Deeper calls do not occur; beyond that nothing is dead.
const MAX_FRAMES: usize = 128;
/// Bytes of a word, and of a return address.
const WORD: u64 = 8;

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
            unwinder: Unwinder::new(kernel.orc.as_ref(), text, slide),
            text,
            sleeping: SleepingFrame::recover(kernel.types.as_ref()?, &kernel.symbols)?,
            schedule: start..start + kernel.symbols.size("__schedule")?,
        })
    }

    /// Dead addresses of the stack of a task that was switched out, ascending and apart. `modules` is not
    /// asked: what module code saved or may read is alive.
    pub fn of_task(&self, memory: &impl PhysicalMemory, task: &Task) -> Vec<Range<Va>> {
        let mut read = self.linux.word_reader(memory);
        let Some(start) = self.sleeping.start(task, self.linux.placement.slide, &mut read) else {
            return Vec::new();
        };
        let mut frames = Vec::with_capacity(16);
        let end = self.unwinder.visit(&(), &start, &mut read, |frame| {
            frames.push(frame);
            frames.len() < MAX_FRAMES
        });
        let chain = Chain { dead: self, frames, end };
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
    /// What the function of a frame saved for its caller's frame, the next, and the caller's stack pointer. None unless the
    /// function's code and the kernel's stack tables agree on that.
    fn saves(&self, frame: usize) -> Option<(Saves, Va)> {
        let (callee, caller) = (self.frames.get(frame)?, self.frames.get(frame + 1)?);
        let saves = self.dead.linux.kernel.saves(self.dead.link(callee)?, callee.exact)?;
        (caller.sp == callee.sp + saves.depth.unsigned_abs()).then_some((saves, caller.sp))
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
