//! What the ring's stubs wrote down of who ran.

use super::Linux;
use super::tasks::Context;
use crate::hooks::record::Record;

impl Linux {
    /// As [`Linux::allocating_comm_and_pid`], for an event that a stub wrote down.
    pub fn recorded_comm_and_pid(&self, record: &Record<'_>) -> ([u8; 16], i32) {
        let (preempt_count, softirqs) = record.counts();
        match self.context_of(preempt_count, softirqs) {
            Context::Task => record.task(),
            interrupt => interrupt.comm_and_pid(),
        }
    }
}
