//! The registry as it goes into a file, and back. What comes back is untrusted: an object that no registry could hold is
//! left out and counted as a dropped event.

use super::record::{New, Record};
use super::{Counters, Kind, MAX_FRAMES, Object, Registry, ScanAreas, StackId};
use crate::memory::Va;
use serde::{Deserialize, Serialize};

/// More than the device memory of any machine, bytes.
pub const MAX_DEVICE: u64 = 1 << 46;
/// Of an address; all zeros or all ones even with five-level paging.
const TOP_BYTE: u32 = 56;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedRegistry {
    /// Backtraces, by [`StackId`] from 1 on.
    stacks: Vec<Vec<Va>>,
    /// Task names, by [`Object::comm`].
    comms: Vec<[u8; 16]>,
    /// Objects, and then blocks of pages.
    objects: Vec<Object>,
    areas: ScanAreas,
    counters: Counters,
    sequence: u64,
}

impl Registry {
    /// A copy for a file.
    pub fn save(&self) -> SavedRegistry {
        let stacks = (1..self.stacks.len()).map(|id| self.stacks.get(StackId(id as u32)).to_vec());
        SavedRegistry {
            stacks: stacks.collect(),
            comms: self.comms.values().to_vec(),
            objects: self.objects().chain(self.blocks()).collect(),
            areas: self.areas.clone(),
            counters: self.counters,
            sequence: self.sequence,
        }
    }

    /// The registry that was saved. `largest` is the size in bytes that no object but device memory exceeds.
    pub fn restore(saved: &SavedRegistry, largest: u64) -> Self {
        let mut this = Self { counters: saved.counters, sequence: saved.sequence, ..Self::default() };
        for stack in &saved.stacks {
            this.stacks.intern(&stack[..stack.len().min(MAX_FRAMES)]);
        }
        let comms: Vec<u32> = saved.comms.iter().map(|&comm| this.comms.intern(comm)).collect();
        for object in &saved.objects {
            let comm = comms.get(object.comm as usize).copied().unwrap_or(0);
            if !this.put_back(&Object { comm, ..*object }, largest) {
                this.counters.dropped = this.counters.dropped.saturating_add(1);
            }
        }
        this.areas = saved.areas.checked(|address| this.get(address).map(|object| object.size));
        this
    }

    /// False for an object that cannot be.
    fn put_back(&mut self, object: &Object, largest: u64) -> bool {
        let fits = object.size <= if object.kind == Kind::Ioremap { MAX_DEVICE } else { largest };
        if !fits || object.address.0.checked_add(object.size).is_none() {
            return false;
        }
        let mut record = Record::new(&New {
            address: object.address,
            kind: object.kind,
            stack: object.stack,
            sequence: object.sequence,
            pid: object.pid,
            jiffies: object.jiffies,
            cache: self.caches.intern(object.cache),
            comm: object.comm,
        });
        record.set_paint(object.paint);
        if object.no_scan {
            record.set_no_scan();
        }
        if object.reported {
            record.set_reported();
        }
        let canonical = matches!(object.address.0 >> TOP_BYTE, 0 | 0xff);
        if !canonical || record.object(object.address, object.size, object.cache) != *object {
            return false;
        }
        match object.kind {
            Kind::Page => {
                object.size <= u64::from(u32::MAX) && !self.blocks.insert(object.address, object.size, record)
            }
            kind => !self.insert(object.address, object.size, kind, record),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::KINDS;
    use super::super::{AllocEvent, Backtrace, Paint};
    use super::*;
    use proptest::prelude::*;

    const LARGEST: u64 = 1 << 40;

    fn event(address: u64, size: u64, kind: Kind, stack: &[Va]) -> AllocEvent<'_> {
        let address = Va(address);
        AllocEvent {
            address,
            size,
            kind,
            cache: Va(size),
            comm: [size as u8; 16],
            pid: 7,
            jiffies: 99,
            stack: Backtrace::Frames(stack),
        }
    }

    fn all(registry: &Registry) -> Vec<(Object, Vec<Va>, [u8; 16])> {
        let with = |o: Object| (o, registry.stacks.get(o.stack).to_vec(), registry.comm(o.comm));
        let mut all: Vec<_> = registry.objects().chain(registry.blocks()).map(with).collect();
        all.sort_by_key(|(object, ..)| (object.address, object.kind));
        all
    }

    proptest! {
        #[test]
        fn what_was_saved_comes_back(objects in prop::collection::vec((1..400_u64, 1..1_u64 << 34, 0..KINDS.len(), 0..3_usize), 0..60)) {
            let mut registry = Registry::default();
            for (page, size, kind, paint) in objects {
                let address = 0xffff_8880_0000_0000 + page * 4096;
                let size = if KINDS[kind] == Kind::Page { 4096 } else { size };
                registry.alloc(&event(address, size, KINDS[kind], &[Va(size), Va(page)]));
                registry.paint(Va(address), [Paint::Normal, Paint::Gray, Paint::Black][paint]);
                if paint == 2 {
                    registry.set_no_scan(Va(address));
                    registry.set_reported(Va(address));
                }
            }
            registry.free(Va(0xffff_8880_0000_0000 + 4096));
            let back = Registry::restore(&registry.save(), LARGEST);
            prop_assert_eq!(all(&back), all(&registry));
            prop_assert_eq!(back.counters, registry.counters);
            prop_assert_eq!(back.sequence(), registry.sequence());
        }
    }

    #[test]
    fn what_no_registry_holds_is_left_out_and_counted() {
        let mut registry = Registry::default();
        registry.alloc(&event(0xffff_8880_0000_1000, 64, Kind::Slab, &[Va(1)]));
        let mut saved = registry.save();
        let good = saved.objects[0];
        saved.objects.extend([
            good,
            Object { address: Va(0x10ab_0000_0000_0000), ..good },
            Object { address: Va(0xffff_8880_0000_2000), size: LARGEST + 1, ..good },
            Object { address: Va(u64::MAX - 8), ..good },
            Object { address: Va(0xffff_8880_0000_3000), size: 1 << 33, kind: Kind::Page, ..good },
            Object { address: Va(0xffff_8880_0000_4000), pid: -1, sequence: u64::MAX, ..good },
            Object { address: Va(0xffff_8880_0000_5000), stack: StackId(77), comm: 55, ..good },
        ]);
        let back = Registry::restore(&saved, LARGEST);
        assert_eq!((back.len(), back.counters.dropped), (2, 6));
        let strange = back.get(Va(0xffff_8880_0000_5000)).unwrap();
        assert!(back.stacks.get(strange.stack).is_empty() && back.comm(strange.comm) == [0; 16]);
    }
}
