//! Slots that stubs fill and that are read in the order of their positions.
//!
//! A free takes its position before the guest gives the memory back, an allocation after it was made: the order of
//! positions is that of events on any one piece of memory. A position whose slot is not filled yet is passed over: what
//! it will say has not happened yet, so nothing behind it can depend on it. What does depend on it takes its position after
//! the slot was filled, and a pass ends at the positions that were taken when it began.

use crate::machine::PrivatePages;
use anyhow::Result;
use introspect::hooks::record::{self, HEAD, LIMIT, Record, SLOT_LEN, SLOTS};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Slots are given back to the guest by so many.
const BATCH: u64 = 256;
/// Who waits for a free slot goes on when one of so many is free: an exit each time costs more than the wait.
const ROOM: u64 = 4;

/// How far they were read.
struct Reading {
    /// All before were.
    tail: u64,
    /// And these: a bit for each slot.
    beyond: Vec<u64>,
}

impl Reading {
    fn new(slots: u64) -> Self {
        Self { tail: 0, beyond: vec![0; slots.div_ceil(64) as usize] }
    }

    /// Where a slot's bit is.
    fn bit(slot: u64) -> (usize, u64) {
        ((slot / 64) as usize, 1 << (slot % 64))
    }

    fn was_read(&self, slot: u64) -> bool {
        let (word, bit) = Self::bit(slot);
        self.beyond[word] & bit != 0
    }

    fn change(&mut self, slot: u64) {
        let (word, bit) = Self::bit(slot);
        self.beyond[word] ^= bit;
    }
}

/// Who reads and who waits.
#[derive(Default)]
struct Turns {
    /// That read, or are about to.
    readers: usize,
    /// The least limit that somebody waits for.
    awaited: Option<u64>,
}

/// One that reads.
struct Turn<'a>(&'a Slots);

impl<'a> Turn<'a> {
    fn begin(slots: &'a Slots) -> Self {
        lock(&slots.turns).readers += 1;
        Self(slots)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut turns = lock(&self.0.turns);
        turns.readers -= 1;
        if turns.awaited.take().is_some() {
            self.0.given_back.notify_all();
        }
    }
}

/// See the module.
pub(super) struct Slots {
    pages: Arc<PrivatePages>,
    count: u64,
    reading: Mutex<Reading>,
    taken: AtomicU64,
    /// [`Reading::tail`], as far as slots were given back.
    tail: AtomicU64,
    turns: Mutex<Turns>,
    given_back: Condvar,
}

impl Slots {
    /// `count` empty slots, a power of two.
    pub fn new(count: u64) -> Result<Self> {
        let pages = Arc::new(PrivatePages::new(SLOTS as usize + count as usize * SLOT_LEN)?);
        let [taken, tail] = [0, 0].map(AtomicU64::new);
        let reading = Mutex::new(Reading::new(count));
        let (turns, given_back) = Default::default();
        let slots = Self { pages, count, reading, taken, tail, turns, given_back };
        slots.give_back(0);
        Ok(slots)
    }

    /// Where they are.
    pub fn pages(&self) -> &Arc<PrivatePages> {
        &self.pages
    }

    /// Positions given out.
    pub fn head(&self) -> u64 {
        self.pages.word(HEAD as usize).load(Ordering::Acquire)
    }

    /// The first position without a free slot.
    pub fn limit(&self) -> u64 {
        self.pages.word(LIMIT as usize).load(Ordering::Relaxed)
    }

    /// All positions before were read.
    pub fn tail(&self) -> u64 {
        self.tail.load(Ordering::Relaxed)
    }

    /// Records read.
    pub fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }

    /// The array that a stub kept for the call whose return address is there; it is kept no longer.
    pub fn take_array(&self, return_address: u64) -> Option<u64> {
        let pair = record::array_of(return_address) as usize;
        // Only the call itself, which stands still, and stubs of others that find it taken, are at it.
        (self.pages.word(pair).load(Ordering::Acquire) == return_address).then(|| {
            let array = self.pages.word(pair + 8).load(Ordering::Relaxed);
            self.pages.word(pair).store(0, Ordering::Release);
            array
        })
    }

    /// Hands every record that was complete when it was called to `take`, once; `has_stack` says of a hook whether its records
    /// have more of the stack than one word.
    pub fn drain(&self, has_stack: impl Fn(u32) -> bool, mut take: impl FnMut(&Record<'_>)) {
        let _turn = Turn::begin(self);
        let mut reading = lock(&self.reading);
        let reading = &mut *reading;
        // Behind are those that wait for a free slot.
        let head = self.head().min(reading.tail.saturating_add(self.count));
        for position in reading.tail..head {
            let slot = self.slot(position);
            if position < reading.tail || reading.was_read(slot) {
                continue;
            }
            let Some(record) = self.filled(position, &has_stack) else { continue };
            take(&record);
            // Nobody else counts.
            self.taken.store(self.taken() + 1, Ordering::Relaxed);
            reading.change(slot);
            while reading.was_read(self.slot(reading.tail)) {
                reading.change(self.slot(reading.tail));
                reading.tail += 1;
                if reading.tail.is_multiple_of(BATCH) {
                    self.give_back(reading.tail);
                }
            }
        }
        self.give_back(reading.tail);
    }

    fn give_back(&self, tail: u64) {
        self.tail.store(tail, Ordering::Relaxed);
        let limit = tail.saturating_add(self.count);
        self.pages.word(LIMIT as usize).store(limit, Ordering::Release);
        if lock(&self.turns).awaited.take_if(|awaited| *awaited <= limit).is_some() {
            self.given_back.notify_all();
        }
    }

    /// Waits for whoever reads to free the slot of `position`, and many more, or calls `read` when nobody does. True when the
    /// slot is free.
    pub fn make_room(&self, position: u64, read: impl FnOnce()) -> bool {
        let enough = position.saturating_add(self.count / ROOM);
        let waits = |turns: &mut Turns| {
            let waits = turns.readers > 0 && self.limit() < enough;
            if waits {
                turns.awaited = Some(turns.awaited.map_or(enough, |awaited| awaited.min(enough)));
            }
            waits
        };
        let waited = self.given_back.wait_while(lock(&self.turns), waits);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
        let is_free = || position < self.limit();
        if !is_free() {
            read();
        }
        is_free()
    }

    fn slot(&self, position: u64) -> u64 {
        position & (self.count - 1)
    }

    /// The record of a position, when it is complete.
    fn filled(&self, position: u64, has_stack: impl Fn(u32) -> bool) -> Option<Record<'_>> {
        let at = SLOTS as usize + self.slot(position) as usize * SLOT_LEN;
        let slot = self.pages.words(at);
        let sequence = slot[record::SEQUENCE / 8].load(Ordering::Acquire);
        (sequence == position + 1).then(|| Record::new(slot, has_stack))
    }
}

/// The data behind these locks has no invariant that a panicking holder could have broken.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const COUNT: u64 = 8;

    /// A guest that fills slots, each with its position as the first argument.
    struct Filling(Slots);

    impl Filling {
        fn new() -> Self {
            Self(Slots::new(COUNT).unwrap())
        }

        fn reserve(&self, upto: u64) {
            self.0.pages.word(HEAD as usize).store(upto, Ordering::Release);
        }

        fn fill(&self, position: u64) {
            let at = SLOTS as usize + (position % COUNT) as usize * SLOT_LEN;
            self.0.pages.word(at + record::RDI).store(position, Ordering::Relaxed);
            self.0.pages.word(at + record::SEQUENCE).store(position + 1, Ordering::Release);
        }

        fn drain(&self) -> Vec<u64> {
            let mut taken = Vec::new();
            self.0.drain(|_| false, |record| taken.push(record.word(record::RDI)));
            taken
        }
    }

    #[test]
    fn records_come_once_and_in_order_round_after_round() {
        let guest = Filling::new();
        for first in (0..40).step_by(5) {
            guest.reserve(first + 5);
            (first..first + 5).rev().for_each(|position| guest.fill(position));
            assert_eq!(guest.drain(), (first..first + 5).collect::<Vec<_>>());
            assert!(guest.drain().is_empty());
            assert_eq!(guest.0.limit(), first + 5 + COUNT);
        }
        assert_eq!(guest.0.taken(), 40);
    }

    #[test]
    fn a_slot_that_is_not_filled_is_passed_over_and_keeps_its_place() {
        let guest = Filling::new();
        guest.reserve(4);
        [1, 3].into_iter().for_each(|position| guest.fill(position));
        assert_eq!((guest.drain(), guest.0.limit()), (vec![1, 3], COUNT));
        guest.fill(2);
        assert_eq!((guest.drain(), guest.0.limit()), (vec![2], COUNT), "the first still holds all back");
        guest.fill(0);
        assert_eq!((guest.drain(), guest.0.limit()), (vec![0], 4 + COUNT));
    }

    #[test]
    fn what_lies_behind_a_late_slot_is_not_read_again() {
        let guest = Filling::new();
        guest.reserve(6);
        [1, 2, 4].into_iter().for_each(|position| guest.fill(position));
        assert_eq!(guest.drain(), [1, 2, 4]);
        [0, 3].into_iter().for_each(|position| guest.fill(position));
        assert_eq!(guest.drain(), [0, 3]);
        guest.fill(5);
        assert_eq!(guest.drain(), [5]);
        assert_eq!(guest.0.taken(), 6);
    }

    #[test]
    fn what_waits_for_a_free_slot_is_not_read_before_it_is_there() {
        let guest = Filling::new();
        guest.reserve(COUNT + 3);
        (1..COUNT).for_each(|position| guest.fill(position));
        assert_eq!(guest.drain().len() as u64, COUNT - 1);
        guest.fill(0);
        assert_eq!(guest.drain(), [0]);
        guest.fill(COUNT);
        assert_eq!(guest.drain(), [COUNT]);
    }

    #[test]
    fn a_damaged_head_costs_one_round() {
        let guest = Filling::new();
        guest.reserve(u64::MAX);
        guest.fill(0);
        assert_eq!(guest.drain(), [0]);
        assert!(guest.drain().is_empty());
    }

    #[test]
    fn an_array_is_there_once_and_for_its_call_only() {
        let slots = Slots::new(COUNT).unwrap();
        let (mine, other) = (0xffff_c900_0001_3d08, 0xffff_c900_0001_3d18);
        slots.pages.word(record::array_of(mine) as usize).store(mine, Ordering::Relaxed);
        slots.pages.word(record::array_of(mine) as usize + 8).store(7, Ordering::Relaxed);
        assert_eq!([other, mine, mine].map(|call| slots.take_array(call)), [None, Some(7), None]);
    }

    proptest::proptest! {
        /// Positions are taken, filled in any order, and read, again and again.
        #[test]
        fn every_record_is_read_once_and_as_soon_as_it_is_there(steps in proptest::collection::vec(0_u8..24, 0..400)) {
            let guest = Filling::new();
            let (mut head, mut open, mut filled, mut taken) = (0, Vec::new(), Vec::new(), 0);
            for step in steps {
                match step {
                    0..8 => {
                        open.push(head);
                        head += 1;
                        guest.reserve(head);
                    }
                    8..16 if !open.is_empty() => {
                        let position = open[usize::from(step - 8) % open.len()];
                        if position < guest.0.limit() {
                            guest.fill(position);
                            open.retain(|other| *other != position);
                            filled.push(position);
                        }
                    }
                    _ => {
                        filled.sort_unstable();
                        taken += filled.len() as u64;
                        proptest::prop_assert_eq!(guest.drain(), std::mem::take(&mut filled));
                        proptest::prop_assert_eq!(guest.0.taken(), taken);
                        let first = open.first().copied().unwrap_or(head);
                        proptest::prop_assert_eq!(guest.0.limit(), first + COUNT);
                    }
                }
            }
        }
    }

    /// Several fill, and read themselves or wait for one another when there is no room; somebody else reads, too.
    #[test]
    fn records_are_read_while_they_are_written() {
        const ALL: u64 = 4000;
        let guest = Filling::new();
        let seen = Mutex::new(Vec::new());
        let drain = || guest.0.drain(|_| false, |record| lock(&seen).push(record.word(record::RDI)));
        let head = guest.0.pages.word(HEAD as usize);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    loop {
                        let position = head.fetch_add(1, Ordering::AcqRel);
                        if position >= ALL {
                            break;
                        }
                        while position >= guest.0.limit() {
                            guest.0.make_room(position, drain);
                        }
                        guest.fill(position);
                    }
                });
            }
            while guest.0.taken() < ALL {
                drain();
                std::thread::yield_now();
            }
        });
        let mut seen = seen.into_inner().unwrap();
        seen.sort_unstable();
        assert_eq!(seen, (0..ALL).collect::<Vec<_>>());
    }

    #[test]
    fn who_waits_for_room_goes_on_when_a_quarter_is_free_or_the_pass_ends() {
        let guest = Filling::new();
        std::thread::scope(|scope| {
            let slots = &guest.0;
            let turn = Turn::begin(slots);
            let waiting = [COUNT, COUNT + 3].map(|position| {
                scope.spawn(move || slots.make_room(position, || panic!("somebody reads already")))
            });
            while lock(&slots.turns).awaited != Some(COUNT + 2) {
                std::thread::yield_now();
            }
            slots.give_back(2);
            let [first, second] = waiting;
            assert!(first.join().unwrap());
            guest.reserve(4);
            (0..4).for_each(|position| guest.fill(position));
            guest.drain();
            drop(turn);
            assert!(second.join().unwrap());
        });
        let mut read = false;
        assert!(!guest.0.make_room(COUNT + 9, || read = true));
        assert!(read);
    }
}
