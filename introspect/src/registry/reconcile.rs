//! Closing a gap: what was allocated and freed while nobody looked, from the guest's own metadata.

use super::{AllocEvent, Kind, Object, Paint, Registry};
use crate::memory::Va;
use rustc_hash::FxHashSet;

/// What [`Registry::reconcile`] changed: at least so many events were missed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Gap {
    /// Objects that the guest has and the registry had not.
    pub added: u64,
    /// Objects of the registry that the guest has no more.
    pub removed: u64,
}

impl Registry {
    /// Makes the objects of some `kinds` those that `found` lists, and keeps of others what `may_be` there. New ones have no
    /// backtrace, so they are gray: scanned, never reported. What came and went in between leaves no trace, and needs none.
    /// No event is counted.
    pub fn reconcile<'e>(
        &mut self,
        kinds: &[Kind],
        found: impl IntoIterator<Item = AllocEvent<'e>>,
        may_be: impl Fn(&Object) -> bool,
    ) -> Gap {
        let counters = self.counters;
        let mut gap = Gap::default();
        let mut there: FxHashSet<Va> = FxHashSet::default();
        for event in found {
            there.insert(event.address);
            let same = |known: Object| known.kind == event.kind && known.cache == event.cache;
            if !self.get(event.address).is_some_and(same) {
                self.alloc(&event);
                self.paint(event.address, Paint::Gray);
                gap.added += 1;
            }
        }
        let stays = |o: &Object| if kinds.contains(&o.kind) { there.contains(&o.address) } else { may_be(o) };
        let gone: Vec<Va> = self.objects().filter(|o| !stays(o)).map(|o| o.address).collect();
        for address in gone {
            self.free(address);
            gap.removed += 1;
        }
        self.counters = counters;
        gap
    }
}

#[cfg(test)]
mod tests {
    use super::super::Backtrace;
    use super::*;

    fn event(address: u64, kind: Kind, cache: u64) -> AllocEvent<'static> {
        let stack = &[Va(7)];
        AllocEvent {
            address: Va(address),
            size: 64,
            kind,
            cache: Va(cache),
            comm: [0; 16],
            pid: 1,
            jiffies: 0,
            stack: Backtrace::Frames(stack),
        }
    }

    #[test]
    fn what_the_guest_has_is_what_is_tracked_afterwards() {
        let mut registry = Registry::default();
        let (slab, vmalloc, large) = (Kind::Slab, Kind::Vmalloc, Kind::Large);
        for (address, kind, cache) in [
            (0x1000, slab, 1),
            (0x2000, slab, 1),
            (0x3000, slab, 1),
            (0x4000, vmalloc, 0),
            (0x5000, large, 0),
            (0x7000, large, 0),
        ] {
            registry.alloc(&event(address, kind, cache));
        }
        let before = registry.counters;
        let found = [
            event(0x1000, slab, 1),
            // Freed, and the memory given to another cache.
            event(0x3000, slab, 2),
            event(0x6000, slab, 2),
        ];
        let may_be = |object: &Object| object.address != Va(0x7000);
        let gap = registry.reconcile(&[slab, vmalloc], found, may_be);
        assert_eq!(gap, Gap { added: 2, removed: 3 });
        let mut left: Vec<_> =
            registry.objects().map(|o| (o.address.0, o.kind, o.cache.0, o.paint == Paint::Gray)).collect();
        left.sort_unstable_by_key(|&(address, ..)| address);
        let expected = [
            (0x1000, slab, 1, false),
            (0x3000, slab, 2, true),
            (0x5000, large, 0, false),
            (0x6000, slab, 2, true),
        ];
        assert_eq!(left, expected, "a large kmalloc is in no list");
        assert_eq!(registry.counters, before);
        assert_eq!(registry.reconcile(&[slab, vmalloc], found, may_be), Gap::default());
    }
}
