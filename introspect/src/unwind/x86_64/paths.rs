//! Backtraces that stubs in the guest know: the part of [`super::Memo`]'s tree that stubs follow.
//!
//! A stub at a return goes from frame to frame as [`super::Memo::find`] does, and where it comes to an end that it knows it
//! writes down the number of that in the place of its stack, which costs a tenth of the copy, and the host nothing but to look the
//! number up. Where it comes to a frame that it does not know it writes down the number of the one before, and copies the stack from
//! there.
//!
//! The table lies in memory that the guest cannot write: buckets of [`BUCKET`] entries of [`ENTRY_LEN`] bytes, each for one return
//! address behind one other. [`KEY`] is written last, and an entry is never changed while a stub can be at it: what is
//! forgotten loses its keys, and its place is used again when all events are read that had begun before. So what a record
//! names is what the stub found.

use crate::memory::Va;
use std::sync::atomic::{AtomicU64, Ordering, fence};

/// Bytes of an entry.
pub const ENTRY_LEN: usize = 16;
/// Entries of a bucket: a line of memory.
pub const BUCKET: usize = 4;
/// Bytes of it.
pub const BUCKET_LEN: usize = ENTRY_LEN * BUCKET;
/// u64: the low half of the return address and, above it, the number of the entry before, or the low half of where the event is;
/// 0 in an entry that is free.
pub const KEY: usize = 0;
/// i16: bytes from the word with this return address to the one with the next ([`CALL`]); the same from the frame pointer
/// ([`FRAMED_CALL`]); to the saved code segment ([`USER`]).
pub const UP: usize = 8;
/// i16: bytes from the word with the next return address to where the frame pointer is saved; 0 where it is not.
pub const SAVED: usize = 10;
/// u8: one of the following.
pub const KIND: usize = 12;
/// Goes on, from the stack pointer.
pub const CALL: u8 = 0;
/// Goes on, from the frame pointer.
pub const FRAMED_CALL: u8 = 1;
/// The backtrace ends.
pub const END: u8 = 2;
/// It ends if user code was interrupted.
pub const USER: u8 = 3;
/// A bucket is found by five times the number of the entry before and the return address, all of 32 bits: their product with this
/// (the golden ratio's) has the offset in its highest bits, [`SHIFT`] further up. The number must count as a whole: most backtraces end with
/// the same few frames behind different ones.
pub const MULTIPLIER: i32 = 0x9e37_79b9_u32.cast_signed();
/// See [`MULTIPLIER`]. A table has no more than 2 to the power of 32, less this, bytes.
pub const SHIFT: u32 = 11;

/// What stubs read, and how far the host is with what they write.
pub trait Shared: Send + Sync {
    /// The aligned word at an offset of the table.
    fn word(&self, offset: usize) -> &AtomicU64;
    /// Events that have begun.
    fn begun(&self) -> u64;
    /// All before this one were read.
    fn read(&self) -> u64;
}

/// How a stub goes on from an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the constants of these names say it")]
pub enum Onward {
    Call { up: i16, saved: i16 },
    FramedCall { up: i16, saved: i16 },
    End,
    User { up: i16 },
}

/// Where stubs find the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Its first byte.
    pub start: Va,
    /// Bytes: a power of two, a bucket's at least and no more than 2 MiB.
    pub len: usize,
}

impl Place {
    /// Bits of an offset that are its bucket's.
    pub fn mask(self) -> u32 {
        (self.len - BUCKET_LEN) as u32
    }

    /// Offset of the bucket of a return address behind an entry.
    fn bucket(self, before: u32, ip: u32) -> usize {
        let sum = before.wrapping_mul(5).wrapping_add(ip);
        (sum.wrapping_mul(MULTIPLIER.cast_unsigned()) >> SHIFT & self.mask()) as usize
    }

    /// The number of the entry at an offset: the low half of its address.
    fn number(self, offset: usize) -> u32 {
        (self.start.0 + offset as u64) as u32
    }

    /// The place of an entry among all, if it is one's number.
    fn entry(self, number: u32) -> Option<usize> {
        let offset = number.wrapping_sub(self.start.0 as u32) as usize;
        (offset < self.len && offset.is_multiple_of(ENTRY_LEN)).then_some(offset / ENTRY_LEN)
    }
}

/// See the module.
pub struct Paths {
    shared: Box<dyn Shared>,
    place: Place,
    /// Offsets of entries in use.
    used: Vec<u32>,
    /// Nothing is added before all events up to there were read.
    not_before: Option<u64>,
}

impl Paths {
    /// None yet, in a table of zeros.
    pub fn new(shared: Box<dyn Shared>, place: Place) -> Self {
        Self { shared, place, used: Vec::new(), not_before: None }
    }

    /// Entries that there is room for.
    pub fn capacity(&self) -> usize {
        self.place.len / ENTRY_LEN
    }

    /// The place among all of the entry with this number; None when there is no such.
    pub fn entry(&self, number: u32) -> Option<usize> {
        self.place.entry(number)
    }

    /// True when entries can be added.
    pub fn is_open(&mut self) -> bool {
        self.not_before = self.not_before.filter(|&until| self.shared.read() < until);
        self.not_before.is_none()
    }

    /// An entry for `ip` behind `before`, which there is none for yet: its number. None when there is no room.
    pub fn add(&mut self, before: u32, ip: Va, onward: Onward) -> Option<u32> {
        if !self.is_open() {
            return None;
        }
        let key = u64::from(before) << 32 | ip.0 & 0xffff_ffff;
        let first = self.place.bucket(before, ip.0 as u32);
        let free = |&offset: &usize| self.shared.word(offset + KEY).load(Ordering::Relaxed) == 0;
        let offset = (first..first + BUCKET_LEN).step_by(ENTRY_LEN).find(free)?;
        let (up, saved, kind) = match onward {
            Onward::Call { up, saved } => (up, saved, CALL),
            Onward::FramedCall { up, saved } => (up, saved, FRAMED_CALL),
            Onward::End => (0, 0, END),
            Onward::User { up } => (up, 0, USER),
        };
        let half = |number: i16| u64::from(number.cast_unsigned());
        let rest = half(up) | half(saved) << (8 * (SAVED - UP)) | u64::from(kind) << (8 * (KIND - UP));
        self.shared.word(offset + UP).store(rest, Ordering::Relaxed);
        self.shared.word(offset + KEY).store(key, Ordering::Release);
        self.used.push(offset as u32);
        Some(self.place.number(offset))
    }

    /// Forgets all. What stubs have found so far they may still write down.
    pub fn forget(&mut self) {
        if self.used.is_empty() {
            return;
        }
        for offset in self.used.drain(..) {
            self.shared.word(offset as usize + KEY).store(0, Ordering::Relaxed);
        }
        // Who takes a position after this look has no key to find.
        fence(Ordering::SeqCst);
        self.not_before = Some(self.shared.begun());
    }
}
