//! Words of a sleeping task's stack that are dead although they lie above the stack pointer: nobody will read them
//! again.
//!
//! - The locals of the scheduler's own frame. Every sleeping task ends in `__schedule` (kernel/sched/core.c); what earlier,
//!   deeper calls left in its frame stays for as long as the task sleeps, which for kernel threads is for ever. Its own
//!   locals are the tasks and the run queue, which are no heap references anybody else lacks.
//! - Registers that a function saved for its caller, who does not read them ([`crate::callee_saved`]).
//!
//! Modules are not asked: what their code saved or may read is alive.

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use crate::callee_saved::Register;
use crate::linux::Linux;
use crate::linux::tasks::Task;
use crate::memory::{PhysicalMemory, Va};
use crate::unwind::{End, SleepingFrame, StackFrame, Text, Unwinder};
use std::ops::Range;

/// Deeper calls do not occur; beyond that nothing is dead.
const MAX_FRAMES: usize = 128;
/// Bytes of a word.
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

    /// The callers of a task that was switched out; None when its stack does not say where it sleeps.
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
