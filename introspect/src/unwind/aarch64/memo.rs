//! Backtraces that were seen before: nothing is shorter than to follow frame records, so none is kept.

use super::Start;
use crate::memory::Va;
use crate::unwind::{ModuleTables, Unwinder};
use std::marker::PhantomData;

/// Keeps nothing.
pub struct Memo<T>(PhantomData<T>);

impl<T> Memo<T> {
    /// An empty one, as it stays.
    pub fn new(_depth: usize) -> Self {
        Self(PhantomData)
    }

    /// Has nothing to forget.
    pub fn clear(&mut self) {}

    /// Nothing.
    pub fn find(&mut self, _: &Start, _: impl FnMut(Va) -> Option<u64>) -> Option<T> {
        None
    }

    /// Nothing.
    pub fn known(&self, _: u32) -> Option<T> {
        None
    }

    /// Nothing.
    pub fn frames(&self, _: u32, _: &mut [Va]) -> Option<usize> {
        None
    }

    /// Nothing.
    pub fn find_behind(&mut self, _: (u32, usize), _: &Start, _: impl FnMut(Va) -> Option<u64>) -> Option<T> {
        None
    }

    /// Does nothing.
    pub fn keep(&mut self, _: &Unwinder<'_>, _: &impl ModuleTables, _: &Start, _: &[Va], _: T) {}
}
