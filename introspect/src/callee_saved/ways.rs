//! The ways through a function's code that liveness follows, and what they came to.

use super::{Fate, Registers};
use crate::memory::Va;
use rustc_hash::FxHashMap;

/// Instructions looked at; the largest functions have some thousands.
const MAX_STEPS: usize = 50_000;

/// See the module. Addresses are link addresses.
pub(super) struct Ways {
    /// Registers that have been followed from an address.
    seen: FxHashMap<Va, Registers>,
    /// Addresses to follow yet, with the registers not yet written on the way there.
    work: Vec<(Va, Registers)>,
    steps: usize,
    fate: Fate,
}

impl Ways {
    /// The fate of all registers from `start` on. `follow` follows one way until it ends or meets another; None when code
    /// cannot be followed.
    pub fn fate(start: Va, mut follow: impl FnMut(&mut Self, Va, Registers) -> Option<()>) -> Fate {
        let mut ways = Self {
            seen: FxHashMap::default(),
            work: vec![(start, Registers::ALL)],
            steps: 0,
            fate: Fate { read: Registers::NONE, returned: Registers::NONE },
        };
        while let Some((at, pending)) = ways.work.pop() {
            if follow(&mut ways, at, pending).is_none() {
                return Fate::UNKNOWN;
            }
        }
        ways.fate
    }

    /// One more instruction; which of the `pending` registers are still to be followed from it, and that the walk may go on.
    /// Where none is left the way has met another.
    pub fn step(&mut self, at: Va, pending: Registers) -> (Registers, bool) {
        let seen = self.seen.entry(at).or_default();
        let pending = pending.without(*seen).without(self.fate.read);
        *seen = seen.union(pending);
        self.steps += usize::from(!pending.is_empty());
        (pending, self.steps <= MAX_STEPS)
    }

    /// There is a way from `to` on as well.
    pub fn branch(&mut self, to: Va, pending: Registers) {
        self.work.push((to, pending));
    }

    /// Notes that an instruction reads registers; those that are left.
    pub fn read(&mut self, read: Registers, pending: Registers) -> Registers {
        self.fate.read = self.fate.read.union(read.intersection(pending));
        pending.without(read)
    }

    /// Notes that the function returns with these.
    pub fn returned(&mut self, pending: Registers) {
        self.fate.returned = self.fate.returned.union(pending);
    }
}
