//! What a stub writes down of one event. arm64 has no stubs yet, and so no records.

use crate::memory::Va;
use crate::unwind::Start;
use std::convert::Infallible;
use std::marker::PhantomData;

/// A filled slot: there is none.
#[derive(Debug, Clone, Copy)]
pub struct Record<'a> {
    never: Infallible,
    slot: PhantomData<&'a ()>,
}

impl Record<'_> {
    /// `preempt_count` and `softirq_disable_cnt`.
    pub fn counts(&self) -> (u32, u32) {
        match self.never {}
    }

    /// `comm` and `pid` of the running task.
    pub fn task(&self) -> ([u8; 16], i32) {
        match self.never {}
    }

    /// `jiffies_64`.
    pub fn jiffies(&self) -> u64 {
        match self.never {}
    }

    /// The slab cache of the result and the size of its objects.
    pub fn cache(&self) -> Option<(Va, u64)> {
        match self.never {}
    }

    /// The number of its backtrace.
    pub fn path(&self) -> Option<u32> {
        match self.never {}
    }

    /// The number of a frame of it, and what comes behind.
    pub fn part(&self) -> Option<(u32, Start)> {
        match self.never {}
    }

    /// The return address.
    pub fn caller(&self) -> Va {
        match self.never {}
    }

    /// The word of the stack at `va`; None when it was not written down.
    pub fn stack(&self, _va: Va) -> Option<u64> {
        match self.never {}
    }
}
