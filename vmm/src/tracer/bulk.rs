//! Calls that pass many objects of the slab allocator by an array.

use super::recorder::MAX_PENDING;
use super::{Moment, Recorder};
use guest_profiles::hooks::Role;
use introspect::arch::Registers;
use introspect::memory::{MemoryError, Va};
use introspect::registry::Kind;

/// Most objects one bulk call can pass; mm/slub.c's own users stay below 512.
const MAX_BULK: u64 = 16 * 1024;

impl Recorder {
    /// What is in an array of a bulk call that a stub wrote down, `before` words of it not among these: given back by `caller`,
    /// or got by the call with these registers, which returns soon.
    pub(super) fn array(
        &self,
        role: Role,
        registers: &Registers,
        before: u64,
        words: impl ExactSizeIterator<Item = u64>,
        caller: Va,
    ) {
        if !self.enabled() {
            return;
        }
        if role == Role::BulkFree {
            words.for_each(|object| self.free(object, || caller));
            return;
        }
        let mut state = self.state();
        let calls = state.filled.len();
        let objects = state.filled.entry(registers.sp().0).or_default();
        // What a call left there that did not return, or while events were not recorded.
        objects.truncate(usize::try_from(before).unwrap_or(usize::MAX));
        let is_next = objects.len() as u64 == before;
        if is_next && before + words.len() as u64 <= MAX_BULK && calls < MAX_PENDING {
            objects.extend(words.map(Va));
        } else {
            state.registry.counters.dropped += words.len() as u64;
        }
    }

    /// Objects that the guest reads from an array to give them back.
    pub(super) fn bulk_free(&self, count: u64, array: Va, caller: Va) {
        for object in self.objects(array, count) {
            match object {
                Ok(object) => self.free(object.0, || caller),
                Err(_) => self.lost(),
            }
        }
    }

    /// At the return of a call that has filled an array.
    pub(super) fn bulk_alloc(&self, registers: &Registers, moment: Moment<'_>) {
        let sp = registers.sp().0;
        let filled = self.state().filled.remove(&sp);
        let objects: Vec<_> = match moment {
            Moment::Past(_) => filled.into_iter().flatten().map(Ok).collect(),
            Moment::Now { .. } => {
                let Some(array) = self.state().pending.remove(&sp) else { return };
                self.objects(Va(array), registers.result() & 0xffff_ffff).collect()
            }
        };
        let origin = self.origin(registers, moment);
        for object in objects {
            match object.and_then(|object| Ok((object, self.cache(object, moment)?))) {
                Ok((object, Some((cache, size)))) => {
                    self.alloc(&origin.event(object, size, Kind::Slab, cache), |_| true);
                }
                Ok((_, None)) | Err(_) => self.lost(),
            }
        }
    }

    /// The words of an array, not more than there can be.
    fn objects(&self, array: Va, count: u64) -> impl Iterator<Item = Result<Va, MemoryError>> {
        if count > MAX_BULK {
            self.lost();
        }
        (0..count.min(MAX_BULK)).map(move |k| self.linux.read_u64(&self.ram, array + k * 8).map(Va))
    }
}
