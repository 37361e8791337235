//! Calls that pass many objects or pages by an array or a list.

use super::recorder::MAX_PENDING;
use super::{Moment, Recorder};
use guest_profiles::hooks::Role;
use introspect::arch::Registers;
use introspect::memory::{MemoryError, Va};
use introspect::registry::Kind;

/// Most objects one bulk call can pass; mm/slub.c's own users stay below 512.
const MAX_BULK: u64 = 16 * 1024;

impl Recorder {
    /// What a stub wrote down of a bulk call, objects, or pages with their orders: given back by `caller`, or got by the call with
    /// these registers, which returns soon, and `before` of them are not among these.
    pub(super) fn bulk(
        &self,
        role: Role,
        registers: &Registers,
        before: u64,
        blocks: impl ExactSizeIterator<Item = (Va, u64)>,
        caller: Va,
    ) {
        if !self.enabled() {
            return;
        }
        match role {
            Role::BulkFree => return blocks.for_each(|(object, _)| self.free(object.0, || caller)),
            Role::PageListFree | Role::PageBatchFree => return self.free_pages(|_| Ok(blocks.collect())),
            _ => {}
        }
        let mut state = self.state();
        let calls = state.filled.len();
        let objects = state.filled.entry(registers.sp().0).or_default();
        // What a call left there that did not return, or while events were not recorded.
        objects.truncate(usize::try_from(before).unwrap_or(usize::MAX));
        let is_next = objects.len() as u64 == before;
        if is_next && before + blocks.len() as u64 <= MAX_BULK && calls < MAX_PENDING {
            objects.extend(blocks.map(|(object, _)| object));
        } else {
            state.registry.counters.dropped += blocks.len() as u64;
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

    /// At the return of a call that has got pages.
    pub(super) fn bulk_pages(&self, registers: &Registers, moment: Moment<'_>) {
        let sp = registers.sp().0;
        let filled = self.state().filled.remove(&sp);
        let pages = match moment {
            // Empty places of an array are none.
            Moment::Past(_) => Ok(filled.into_iter().flatten().filter(|page| *page != Va(0)).collect()),
            Moment::Now { .. } => {
                let Some(filled) = self.state().pending.remove(&sp) else { return };
                Filled(filled).pages(self, registers.result())
            }
        };
        match pages {
            Ok(pages) => self.pages(&pages, 0, true, registers, moment),
            Err(_) => self.lost(),
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

/// Where a bulk call of the page allocator puts its pages: a list or, odd, an array.
pub(super) struct Filled(pub u64);

impl Filled {
    /// From the fifth and the sixth argument: `struct list_head *page_list`, on kernels that have it, and `struct page
    /// **page_array`, one of which is NULL.
    pub fn at(fifth: u64, sixth: u64, has_list: bool) -> Self {
        match (has_list, sixth) {
            (true, 0) => Self(fifth),
            (true, array) => Self(array | 1),
            (false, _) => Self(fifth | 1),
        }
    }

    /// The `struct page`s that are there when `count` were asked for in vain or not: the newest on the list are the
    /// first; of an array's some may have been there before.
    fn pages(&self, recorder: &Recorder, count: u64) -> Result<Vec<Va>, MemoryError> {
        let (linux, ram) = (&recorder.linux, &recorder.ram);
        match self.0 {
            0 => Ok(Vec::new()),
            array if array & 1 == 1 => linux.pages_in_array(ram, Va(array & !1), count),
            list => {
                let mut pages = linux.pages_on_list(ram, Va(list))?;
                pages.truncate(usize::try_from(count).unwrap_or(usize::MAX));
                Ok(pages)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bulk_calls_fill_an_array_or_a_list() {
        assert_eq!(Filled::at(0, 0xffff_c900_0000_1000, true).0, 0xffff_c900_0000_1001);
        assert_eq!(Filled::at(0xffff_c900_0000_2000, 0, true).0, 0xffff_c900_0000_2000);
        assert_eq!(Filled::at(0xffff_c900_0000_3000, 7, false).0, 0xffff_c900_0000_3001);
    }
}
