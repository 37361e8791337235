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
                let known = known.or_else(|| {
                    let (number, behind) = record.part()?;
                    self.continued(&start, number, &behind, |va| record.stack(va))
                });
                known.unwrap_or_else(|| self.backtrace(&start, |va| record.stack(va)))
            }
        };
        Origin { comm, pid, jiffies, stack }
    }

    /// The number of the backtrace from `start` on.
    fn backtrace(&self, start: &Start, mut read: impl FnMut(Va) -> Option<u64>) -> StackId {
        let found = self.memo().find(start, &mut read);
        found.unwrap_or_else(|| self.unwound(start, (&mut [Va(0); MAX_FRAMES], 0), start, read))
    }

    /// The same of that which a stub followed to the frame that it named by `number`, and which goes on at `behind`.
    fn continued(
        &self,
        start: &Start,
        number: u32,
        behind: &Start,
        mut read: impl FnMut(Va) -> Option<u64>,
    ) -> Option<StackId> {
        let mut frames = [Va(0); MAX_FRAMES];
        let (known, found) = {
            let mut memo = self.memo();
            frames[0] = start.ip;
            let known = 1 + memo.frames(number, &mut frames[1..])?;
            (known, memo.find_behind((number, known), behind, &mut read))
        };
        Some(found.unwrap_or_else(|| self.unwound(start, (&mut frames, known), behind, read)))
    }

    /// The number of the backtrace that begins at `start` with so many `known` frames and goes on at `behind`.
    fn unwound(
        &self,
        start: &Start,
        (frames, known): (&mut [Va], usize),
        behind: &Start,
        read: impl FnMut(Va) -> Option<u64>,
    ) -> StackId {
        let modules = self.modules.read().unwrap_or_else(PoisonError::into_inner);
        let unwinder = self.unwinder();
        let trace = unwinder.unwind_on(&*modules, behind, read, (frames, known));
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
