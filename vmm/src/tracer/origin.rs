//! Who allocates: context, time and backtrace of an event.

use super::{Moment, Recorder};
use introspect::arch::Registers;
use introspect::memory::Va;
use introspect::registry::{AllocEvent, Backtrace, Kind, MAX_FRAMES, StackId};
use introspect::unwind::{Memo, Start};
use std::sync::{MutexGuard, PoisonError};

/// Who allocates, where and when.
pub(super) struct Origin {
    comm: [u8; 16],
    pid: i32,
    jiffies: u64,
    stack: StackId,
}

impl Origin {
    /// What that is of one object.
    pub(super) fn event(&self, address: Va, size: u64, kind: Kind, cache: Va) -> AllocEvent<'static> {
        AllocEvent {
            address,
            size,
            kind,
            cache,
            comm: self.comm,
            pid: self.pid,
            jiffies: self.jiffies,
            stack: Backtrace::Stored(self.stack),
        }
    }
}

impl Recorder {
    /// Who allocates: context, time and backtrace.
    pub(super) fn origin(&self, registers: &Registers, moment: Moment<'_>) -> Origin {
        let (linux, ram) = (&self.linux, &self.ram);
        let ((comm, pid), jiffies) = match moment {
            Moment::Now { cpu } => {
                (linux.allocating_comm_and_pid(ram, cpu).unwrap_or_default(), linux.jiffies(ram).unwrap_or(0))
            }
            Moment::Past(record) => (linux.recorded_comm_and_pid(record), record.jiffies()),
        };
        let start = Start::at_boundary(registers);
        let stack = match moment {
            Moment::Now { .. } => self.backtrace(&start, linux.word_reader(ram)),
            Moment::Past(record) => {
                let known = record.path().and_then(|number| self.memo().known(number));
                known.unwrap_or_else(|| self.backtrace(&start, |va| record.stack(va)))
            }
        };
        Origin { comm, pid, jiffies, stack }
    }

    /// The number of the backtrace from `start` on.
    fn backtrace(&self, start: &Start, mut read: impl FnMut(Va) -> Option<u64>) -> StackId {
        if let Some(stack) = self.memo().find(start, &mut read) {
            return stack;
        }
        let modules = self.modules.read().unwrap_or_else(PoisonError::into_inner);
        let (unwinder, mut frames) = (self.unwinder(), [Va(0); MAX_FRAMES]);
        let trace = unwinder.unwind(&*modules, start, read, &mut frames);
        let frames = &frames[..trace.len];
        let stack = self.state().registry.stacks.intern(frames);
        self.memo().keep(&unwinder, &*modules, start, frames, stack);
        stack
    }

    /// What is kept of modules' code is forgotten while they are locked for the change.
    pub(super) fn memo(&self) -> MutexGuard<'_, Memo<StackId>> {
        self.memo.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
