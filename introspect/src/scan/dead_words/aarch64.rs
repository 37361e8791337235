//! arm64: none are known. Frame records say where frames are, not which words of a frame are whose.

use crate::linux::Linux;
use crate::linux::tasks::Task;
use crate::memory::{PhysicalMemory, Va};
use std::convert::Infallible;
use std::ops::Range;

/// Finds the dead words of stacks.
pub struct DeadWords(Infallible);

impl DeadWords {
    /// None: then nothing is dead.
    pub fn of(_linux: &Linux) -> Option<Self> {
        None
    }

    /// Dead addresses of the stack of a task that was switched out, ascending and apart.
    pub fn of_task(&self, _memory: &impl PhysicalMemory, _task: &Task) -> Vec<Range<Va>> {
        match self.0 {}
    }
}
