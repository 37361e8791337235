//! What a stub writes down of one event. arm64 has no stubs yet, and so no records.

use crate::memory::Va;

/// A filled slot: there is none.
#[derive(Debug, Clone, Copy)]
pub enum Record {}

impl Record {
    /// `preempt_count` and `softirq_disable_cnt`.
    pub fn counts(&self) -> (u32, u32) {
        match *self {}
    }

    /// `comm` and `pid` of the running task.
    pub fn task(&self) -> ([u8; 16], i32) {
        match *self {}
    }

    /// `jiffies_64`.
    pub fn jiffies(&self) -> u64 {
        match *self {}
    }

    /// The slab cache of the result and the size of its objects.
    pub fn cache(&self) -> Option<(Va, u64)> {
        match *self {}
    }

    /// The return address.
    pub fn caller(&self) -> Va {
        match *self {}
    }

    /// The word of the stack at `va`; None when it was not written down.
    pub fn stack(&self, _va: Va) -> Option<u64> {
        match *self {}
    }
}
