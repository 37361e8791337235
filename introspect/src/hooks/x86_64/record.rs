//! What a stub writes down of one event: the layout of a slot in the ring, and the way back.
//!
//! A ring is a page of shared words and a power of two of slots. A stub takes the next position from [`HEAD`], waits while
//! that is not below [`LIMIT`], fills the slot of that position and writes position + 1 to [`SEQUENCE`] last of all.

use crate::memory::Va;
use crate::unwind::Start;
use std::sync::atomic::{AtomicU64, Ordering};

/// Shared word: positions given out so far.
pub const HEAD: u64 = 0;
/// Shared word: the first position whose slot is not free yet. In a line of its own.
pub const LIMIT: u64 = 0x80;
/// Shared pairs of words: calls under way that fill an array, each by where its return address is, and that array. A call's
/// pair is the one that [`array_of`] says, if it was free.
pub const ARRAYS: u64 = 0x800;
/// Bits of an offset behind [`ARRAYS`].
pub const ARRAYS_MASK: u64 = 0x7f0;
/// Calls of different tasks stand at the same place of their stacks: what tells those apart, from bit 15 on, is that much further
/// down than the index's bits.
pub const STACK_SHIFT: u32 = 11;
/// First slot, behind the shared words.
pub const SLOTS: u64 = 0x1000;
/// Bytes of a slot.
pub const SLOT_LEN: usize = 1024;

/// u64: position + 1 once the slot is filled.
pub const SEQUENCE: usize = 0;
/// u32: number of the hook, and [`IS_ARRAY`].
pub const HOOK: usize = 8;
/// The record has, behind the return address, objects or blocks of pages that a call gives back or has got, in the place of a
/// stack.
pub const IS_ARRAY: u32 = 1 << 31;
/// u32: `preempt_count` of the CPU.
pub const PREEMPT_COUNT: usize = 12;
/// u64: address of the return address on the stack.
pub const RSP: usize = 16;
/// u64: first argument; entries only.
pub const RDI: usize = 24;
/// u64: how many a call that gets them has got before those that this record has.
pub const BEFORE: usize = RDI;
/// Bits of a block of pages in such a record that say its order; all others are its first `struct page`'s address.
pub const ORDERS: u64 = 63;
/// u64: second argument; entries only.
pub const RSI: usize = 32;
/// u64: third argument; entries only.
pub const RDX: usize = 40;
/// Arguments that are written down.
pub const ARGUMENTS: u8 = 3;
/// u64: the result, where an entry has its third argument; returns only, as all that follows but the stack's first word and, in
/// records with [`IS_ARRAY`], the words' number.
pub const RAX: usize = RDX;
/// u64.
pub const RBP: usize = 48;
/// u64: `jiffies_64`.
pub const JIFFIES: usize = 56;
/// u32.
pub const PID: usize = 64;
/// u32: `softirq_disable_cnt` of the task, where it has that.
pub const SOFTIRQS: usize = 68;
/// u32: words of the stack.
pub const WORDS: usize = 72;
/// u32: words of the interrupted task's stack behind those.
pub const INTERRUPTED_WORDS: usize = 76;
/// 16 bytes.
pub const COMM: usize = 80;
/// u64: the slab cache of the result; 0 when that is no slab's.
pub const CACHE: usize = 96;
/// u32: its `object_size`.
pub const OBJECT_SIZE: usize = 104;
/// u32: the end of a backtrace that the stub knows ([`crate::unwind::paths`]), in the place of all words of the stack but the first; or,
/// with [`PART`], the last frame that it knows: the words of the stack begin behind it; or 0.
pub const PATH: usize = 108;
/// See [`PATH`], whose numbers have that bit free.
pub const PART: u32 = 1;
/// u64: where the words of the stack begin behind a frame that the stub knows: at the first return address that it does not.
pub const FROM: usize = RDI;
/// u64: the frame pointer there.
pub const FRAME: usize = RSI;
/// u64: the stack pointer of the interrupted task, when a stack of the CPU's is in use; or where the outermost words are.
pub const INTERRUPTED: usize = 112;
/// Words of the stack, the return address first; with [`PART`], the first one that the stub does not know.
pub const STACK: usize = 120;
/// Most words of both stacks.
pub const MAX_WORDS: usize = (SLOT_LEN - STACK) / 8;
/// Where a task's stack is longer than that, its last words below the registers of user space take the place of the
/// interrupted one's: the outermost frame of a system call, which a random offset may have moved away from all others
/// (`add_random_kstack_offset`), returns there. `struct pt_regs` ends the stack, or 16 bytes below that
/// (`TOP_OF_KERNEL_STACK_PADDING`).
pub const OUTERMOST_WORDS: usize = 4;
/// Bytes from the first of these to the end of the stack.
pub const OUTERMOST: u64 = 168 + 8 * OUTERMOST_WORDS as u64;

/// Where in the shared words the array of a call is kept whose return address is there.
pub fn array_of(return_address: u64) -> u64 {
    ARRAYS + ((return_address ^ return_address >> STACK_SHIFT) & ARRAYS_MASK)
}

/// The words of a slot.
pub type Slot = [AtomicU64; SLOT_LEN / WORD];
/// Bytes of one.
const WORD: usize = size_of::<u64>();

/// A filled slot, which is read word by word: few of them are ever asked for.
#[derive(Debug, Clone, Copy)]
pub struct Record<'a> {
    slot: &'a Slot,
    /// Words of the stack that were written down, and of the interrupted one.
    words: (usize, usize),
    /// Where the record says where the first of them was.
    first: usize,
    known: u32,
}

impl<'a> Record<'a> {
    /// What a slot says, whatever that is. `has_stack` is asked whether records of a hook have more of the stack than one word.
    pub fn new(slot: &'a Slot, has_stack: impl FnOnce(u32) -> bool) -> Self {
        let mut record = Self { slot, words: (1, 0), first: RSP, known: 0 };
        if has_stack(record.hook()) {
            record.known = record.u32(PATH);
            if record.path().is_none() {
                let own = (record.u32(WORDS) as usize).min(MAX_WORDS);
                record.words = (own, (record.u32(INTERRUPTED_WORDS) as usize).min(MAX_WORDS - own));
            }
            if record.known & PART != 0 {
                record.first = FROM;
            }
        }
        record
    }

    fn u32(&self, at: usize) -> u32 {
        (self.word(at & !(WORD - 1)) >> (8 * (at % WORD))) as u32
    }

    /// The word at an offset of this module.
    #[inline]
    pub fn word(&self, at: usize) -> u64 {
        u64::from_le(self.slot[at / WORD].load(Ordering::Relaxed))
    }

    /// Number of the hook.
    pub fn hook(&self) -> u32 {
        self.u32(HOOK) & !IS_ARRAY
    }

    /// Objects or blocks of pages, and how many a call that gets them has got before; None when the record has none.
    pub fn array(&self) -> Option<(u64, impl ExactSizeIterator<Item = u64>)> {
        let words = (self.u32(WORDS) as usize).clamp(1, MAX_WORDS);
        let array = (1..words).map(|k| self.word(STACK + k * WORD));
        (self.u32(HOOK) & IS_ARRAY != 0).then(|| (self.word(BEFORE), array))
    }

    /// `preempt_count` and `softirq_disable_cnt`.
    pub fn counts(&self) -> (u32, u32) {
        (self.u32(PREEMPT_COUNT), self.u32(SOFTIRQS))
    }

    /// `comm` and `pid` of the running task.
    pub fn task(&self) -> ([u8; 16], i32) {
        let comm = u128::from(self.word(COMM + WORD)) << 64 | u128::from(self.word(COMM));
        (comm.to_le_bytes(), self.u32(PID).cast_signed())
    }

    /// `jiffies_64`.
    pub fn jiffies(&self) -> u64 {
        self.word(JIFFIES)
    }

    /// The return address; not of a record with a [`Record::part`].
    pub fn caller(&self) -> Va {
        Va(self.word(STACK))
    }

    /// The slab cache of the result and the size of its objects; None when the result is no slab's.
    pub fn cache(&self) -> Option<(Va, u64)> {
        let cache = self.word(CACHE);
        (cache != 0).then(|| (Va(cache), self.u32(OBJECT_SIZE).into()))
    }

    /// The number of the end of its backtrace, if the stub knew that: then there is no more of the stack than the return address.
    pub fn path(&self) -> Option<u32> {
        (self.known != 0 && self.known & PART == 0).then_some(self.known)
    }

    /// The number of the last frame that the stub knew, if it knew some and not all, and where its caller goes on: the words of
    /// the stack are those from there on.
    pub fn part(&self) -> Option<(u32, Start)> {
        let from = Va(self.word(FROM));
        let ip = self.stack(from).filter(|_| self.known & PART != 0)?;
        Some((self.known & !PART, Start::returning(Va(ip), from + WORD as u64, Va(self.word(FRAME)))))
    }

    /// Words of both stacks that were written down.
    pub fn words(&self) -> usize {
        self.words.0 + self.words.1
    }

    /// The word of a stack at `va`; None when it was not written down.
    #[inline]
    pub fn stack(&self, va: Va) -> Option<u64> {
        let word = |start: usize, words: usize, first: usize| {
            let offset = va.0.wrapping_sub(self.word(start));
            // Below a slot's length, if it is one of the words.
            let is_there = offset.is_multiple_of(8) && offset / 8 < words as u64;
            is_there.then(|| self.word(STACK + 8 * first + offset as usize))
        };
        let (own, interrupted) = self.words;
        word(self.first, own, 0).or_else(|| word(INTERRUPTED, interrupted, own))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(words: &[(usize, u64)]) -> Slot {
        let slot: Slot = std::array::from_fn(|_| AtomicU64::new(0));
        words.iter().for_each(|&(at, word)| slot[at / WORD].store(word, Ordering::Relaxed));
        slot
    }

    #[test]
    fn the_stack_is_read_within_what_was_written_down() {
        let slot = slot(&[
            (RSP, 0xffff_c900_0000_1008),
            (WORDS, 2),
            (STACK, 0x11),
            (STACK + 8, 0x22),
            (STACK + 16, 0x33),
        ]);
        let read = |has_stack: bool, offset: u64| {
            Record::new(&slot, |_| has_stack).stack(Va(0xffff_c900_0000_1000 + offset))
        };
        assert_eq!([8, 16, 24, 0, 12].map(|at| read(true, at)), [Some(0x11), Some(0x22), None, None, None]);
        assert_eq!([8, 16].map(|at| read(false, at)), [Some(0x11), None]);
        assert_eq!(Record::new(&slot, |_| false).caller(), Va(0x11));
    }

    #[test]
    fn the_interrupted_stack_is_read_behind_the_other() {
        let slot = slot(&[
            (RSP, 0x1ff8),
            (WORDS, 2 << 32 | 1),
            (INTERRUPTED, 0x8000),
            (STACK, 0x8000),
            (STACK + 8, 0x22),
            (STACK + 16, 0x33),
        ]);
        let read = |va: u64| Record::new(&slot, |_| true).stack(Va(va));
        assert_eq!([0x1ff8, 0x8000, 0x8008].map(read), [Some(0x8000), Some(0x22), Some(0x33)]);
        assert_eq!([0x2000, 0x8010, 0x7ff8].map(read), [None; 3]);
        assert_eq!(Record::new(&slot, |_| true).words(), 3);
    }

    #[test]
    fn behind_a_part_that_the_stub_knew_the_stack_goes_on_elsewhere() {
        let record = |path: u32, from: u64, words: u64| {
            let head = [(OBJECT_SIZE, u64::from(path) << 32), (RSP, 0x1000), (FROM, from), (FRAME, 7)];
            slot(&[&head[..], &[(WORDS, words), (STACK, 0x11), (STACK + 8, 0x22)]].concat())
        };
        let number = 0x7f00_0040;
        let there = record(number | PART, 0x1400, 2);
        let there = Record::new(&there, |_| true);
        let behind = Start::returning(Va(0x11), Va(0x1408), Va(7));
        assert_eq!((there.path(), there.part()), (None, Some((number, behind))));
        assert_eq!(
            [0x1400, 0x1408, 0x1410, 0x1000].map(|at| there.stack(Va(at))),
            [Some(0x11), Some(0x22), None, None]
        );
        // Whatever the guest writes there.
        let whole = record(number, 0x1400, 2);
        let whole = Record::new(&whole, |_| true);
        assert_eq!((whole.path(), whole.part(), whole.stack(Va(0x1000))), (Some(number), None, Some(0x11)));
        for (path, from, words) in [(0, 0x1400, 2), (number | PART, 0x1400, 0)] {
            assert_eq!(Record::new(&record(path, from, words), |_| true).part(), None);
        }
        let wild = record(number | PART, u64::MAX, 2);
        assert_eq!(Record::new(&wild, |_| true).part().map(|(_, behind)| behind.sp), Some(Va(7)));
    }

    #[test]
    fn halves_of_words_and_names_are_read() {
        let slot = slot(&[
            (HOOK, 3 << 32 | 7),
            (PID, 5 << 32 | 0xffff_ffff),
            (COMM, u64::from_le_bytes(*b"kworker/")),
            (COMM + 8, u64::from_le_bytes(*b"0:1\0\0\0\0\0")),
        ]);
        let record = Record::new(&slot, |_| false);
        assert_eq!((record.hook(), record.counts()), (7, (3, 5)));
        assert_eq!(record.task(), (*b"kworker/0:1\0\0\0\0\0", -1));
    }

    #[test]
    fn words_of_an_array_are_read_behind_the_return_address() {
        let array = |hook: u32, words: u64| {
            let slot =
                slot(&[(HOOK, hook.into()), (BEFORE, 2), (WORDS, words), (STACK + 8, 5), (STACK + 16, 6)]);
            let record = Record::new(&slot, |_| false);
            assert_eq!(record.hook(), 9);
            record.array().map(|(before, words)| (before, words.collect::<Vec<_>>()))
        };
        assert_eq!(array(9, 3), None);
        assert_eq!(array(9 | IS_ARRAY, 3), Some((2, vec![5, 6])));
        assert_eq!(array(9 | IS_ARRAY, 0), Some((2, vec![])));
        assert_eq!(array(9 | IS_ARRAY, u64::MAX).map(|(_, words)| words.len()), Some(MAX_WORDS - 1));
    }

    #[test]
    fn a_damaged_number_of_words_ends_with_the_slot() {
        let slot = slot(&[(WORDS, u64::MAX)]);
        let record = Record::new(&slot, |_| true);
        assert_eq!(record.stack(Va(8 * (MAX_WORDS as u64 - 1))), Some(0));
        assert_eq!(record.stack(Va(8 * MAX_WORDS as u64)), None);
        assert_eq!(record.stack(Va(u64::MAX)), None);
    }
}
