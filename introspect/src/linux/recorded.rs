//! What the ring's stubs need to know of a kernel, and what they wrote down of who ran.

use super::Linux;
use super::tasks::Context;
use crate::hooks::Surroundings;
use crate::hooks::record::Record;

impl Linux {
    /// As [`Linux::allocating_comm_and_pid`], for an event that a stub wrote down.
    pub fn recorded_comm_and_pid(&self, record: &Record) -> ([u8; 16], i32) {
        let (preempt_count, softirqs) = record.counts();
        match self.context_of(preempt_count, softirqs) {
            Context::Task => record.task(),
            interrupt => interrupt.comm_and_pid(),
        }
    }

    /// What stubs read of where an event happens.
    pub fn surroundings(&self) -> Surroundings {
        let layout = &self.tasks;
        Surroundings {
            current: layout.running.current,
            preempt_count: layout.running.preempt_count,
            softirq_disable_cnt: layout.softirq_disable_cnt,
            comm: layout.comm,
            pid: layout.pid,
            stack: layout.stack,
            stack_size: layout.stack_size,
            jiffies: self.addresses.jiffies_64,
        }
    }
}
