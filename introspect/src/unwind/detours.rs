//! Code that stands for some of the kernel's, and is in no table: where in the kernel whoever runs it is.

use crate::memory::Va;
use serde::{Deserialize, Serialize};

/// Instructions that stand for one of the kernel's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Detour {
    /// The first of them; they reach to the next detour.
    pub from: Va,
    /// The kernel's instruction that is next.
    pub to: Va,
    /// Bytes that there are more on the stack than there would be.
    pub pushed: u64,
}

/// All of a guest's.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Detours {
    /// Ascending.
    all: Vec<Detour>,
    end: Va,
}

impl Detours {
    /// Adds those of code that ends at `end` and lies behind all that is there.
    pub fn add(&mut self, detours: &[Detour], end: Va) {
        self.all.extend(detours);
        self.end = end;
    }

    /// Makes those that come from a file whole again.
    pub fn restore(&mut self) {
        self.all.sort_by_key(|detour| detour.from);
    }

    /// The one that has an instruction at `ip`.
    #[inline]
    pub fn find(&self, ip: Va) -> Option<&Detour> {
        if ip >= self.end {
            return None;
        }
        let after = self.all.partition_point(|detour| detour.from <= ip);
        self.all.get(after.checked_sub(1)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_belongs_to_the_detour_that_begins_before_it() {
        let detour = |from, to| Detour { from: Va(from), to: Va(to), pushed: from };
        let mut detours = Detours::default();
        assert_eq!(detours.find(Va(0)), None);
        detours.add(&[detour(0x100, 1), detour(0x108, 2)], Va(0x110));
        detours.add(&[detour(0x140, 3)], Va(0x150));
        let to = |ip| detours.find(Va(ip)).map(|detour| detour.to.0);
        assert_eq!([0xff, 0x100, 0x107, 0x108].map(to), [None, Some(1), Some(1), Some(2)]);
        assert_eq!([0x140, 0x14f, 0x150, u64::MAX].map(to), [Some(3), Some(3), None, None]);
    }
}
