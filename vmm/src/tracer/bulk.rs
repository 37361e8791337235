//! Calls that pass many objects or pages by an array or a list.

use super::{Moment, Recorder};
use guest_profiles::hooks::Role;
use introspect::arch::Registers;
use introspect::hooks::KEPT_ARRAY;
use introspect::memory::{MemoryError, Va};
use introspect::registry::Kind;
use rustc_hash::FxHashMap;

/// Most objects one bulk call can pass; the kernel's own users pass up to 512.
const MAX_BULK: u64 = 16 * 1024;

/// Most calls whose objects are known and that have not returned: from the first record of those to that of the return no
/// interrupt comes, so it is one for each vCPU.
const MAX_ARRIVED: usize = 64;

impl Recorder {
    /// What a stub wrote down of a bulk call at these registers: objects, or pages with their orders. A call that gives them
    /// back has `caller`. One that gets them returns next; it got `before` of them before these.
    pub fn bulk(
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
            Role::BulkFree => blocks.for_each(|(object, _)| self.free(object.0, || caller)),
            Role::PageListFree | Role::PageBatchFree => self.free_pages(|_| Ok(blocks.collect())),
            Role::BulkAlloc | Role::PageBulkAlloc => {
                if !self.state().arrived.add(registers.sp(), before, blocks.map(|(object, _)| object)) {
                    self.lost();
                }
            }
            // The guest wrote where only stubs should.
            _ => self.lost(),
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
        let arrived = self.state().arrived.take(registers.sp());
        let objects: Vec<_> = match moment {
            Moment::Past(_) => arrived.into_iter().flatten().map(Ok).collect(),
            Moment::Now { .. } => {
                let (array, count) = (self.state().pending.remove(&sp), registers.result() & 0xffff_ffff);
                let Some(array) = array else { return self.lost_unless(count == 0) };
                self.objects(Va(array), count).collect()
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
        let arrived = self.state().arrived.take(registers.sp());
        let pages = match moment {
            // Empty places of an array are none.
            Moment::Past(_) => Ok(arrived.into_iter().flatten().filter(|page| *page != Va(0)).collect()),
            Moment::Now { .. } => {
                let destination = self.state().pending.remove(&sp);
                let Some(destination) = destination else { return self.lost_unless(registers.result() == 0) };
                Destination(destination).pages(self, registers.result())
            }
        };
        match pages {
            Ok(pages) => self.pages(&pages, 0, true, registers, moment),
            Err(_) => self.lost(),
        }
    }

    /// A call of which the beginning was not seen.
    fn lost_unless(&self, nothing: bool) {
        if !nothing {
            self.lost();
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

/// What calls got that have not returned yet, by their stack pointer at entry.
#[derive(Default)]
pub(super) struct Arrived(FxHashMap<u64, Vec<Va>>);

impl Arrived {
    /// What a call got besides `before` others. False when it is too much, or others are missing: it is not kept then.
    fn add(&mut self, call: Va, before: u64, objects: impl ExactSizeIterator<Item = Va>) -> bool {
        let all = before.saturating_add(objects.len() as u64);
        let is_known = self.0.contains_key(&call.0);
        if all > MAX_BULK || !is_known && (before > 0 || self.0.len() >= MAX_ARRIVED) {
            return false;
        }
        let there = self.0.entry(call.0).or_default();
        // What one left there that did not return.
        there.truncate(before as usize);
        let is_next = there.len() as u64 == before;
        if is_next {
            there.extend(objects);
        }
        is_next
    }

    fn take(&mut self, call: Va) -> Option<Vec<Va>> {
        self.0.remove(&call.0)
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}

/// Where a bulk call of the page allocator puts its pages: a list or, odd, an array.
pub(super) struct Destination(pub u64);

impl Destination {
    /// From the fifth and the sixth argument: `struct list_head *page_list`, on kernels that have it, and `struct page
    /// **page_array`, one of which is NULL.
    pub fn at(fifth: u64, sixth: u64, has_list: bool) -> Self {
        match (has_list, sixth) {
            (true, 0) => Self(fifth),
            (true, array) => Self(array | KEPT_ARRAY),
            (false, _) => Self(fifth | KEPT_ARRAY),
        }
    }

    /// The `struct page`s that are there when `count` were asked for in vain or not: the newest on the list are the
    /// first; of an array's some may have been there before.
    fn pages(&self, recorder: &Recorder, count: u64) -> Result<Vec<Va>, MemoryError> {
        let (linux, ram) = (&recorder.linux, &recorder.ram);
        match self.0 {
            0 => Ok(Vec::new()),
            array if array & KEPT_ARRAY != 0 => linux.pages_in_array(ram, Va(array & !KEPT_ARRAY), count),
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
    fn what_arrives_in_pieces_is_taken_whole() {
        let mut arrived = Arrived::default();
        let objects = |first: u64, count: u64| (first..first + count).map(Va).collect::<Vec<_>>().into_iter();
        let call = Va(0xffff_c900_0001_3d08);
        assert!(arrived.add(call, 0, objects(8, 3)) && arrived.add(call, 3, objects(11, 2)));
        assert_eq!(arrived.take(call), Some(objects(8, 5).collect()));
        assert_eq!(arrived.take(call), None);
        // One that did not return left some there.
        assert!(arrived.add(call, 0, objects(1, 4)) && arrived.add(call, 0, objects(8, 1)));
        assert_eq!(arrived.take(call), Some(vec![Va(8)]));
    }

    #[test]
    fn what_a_guest_invents_is_bounded() {
        let mut arrived = Arrived::default();
        let some = |count: u64| (0..count).map(Va).collect::<Vec<_>>().into_iter();
        assert!(!arrived.add(Va(8), 1, some(1)), "the first piece is missing");
        assert!(arrived.add(Va(8), 0, some(1)) && !arrived.add(Va(8), 2, some(1)), "the second is missing");
        for before in [MAX_BULK, u64::MAX] {
            assert!(!arrived.add(Va(8), before, some(1)));
        }
        assert!((0..1000).filter(|&call| arrived.add(Va(0x1000 + call), 0, some(1))).count() < MAX_ARRIVED);
        assert_eq!(arrived.0.len(), MAX_ARRIVED);
    }

    #[test]
    fn bulk_calls_fill_an_array_or_a_list() {
        assert_eq!(Destination::at(0, 0xffff_c900_0000_1000, true).0, 0xffff_c900_0000_1001);
        assert_eq!(Destination::at(0xffff_c900_0000_2000, 0, true).0, 0xffff_c900_0000_2000);
        assert_eq!(Destination::at(0xffff_c900_0000_3000, 7, false).0, 0xffff_c900_0000_3001);
    }
}
