//! The memo against the unwinder, and what stubs know of it.

use super::paths::{
    BUCKET_LEN, END, ENTRY_LEN, FRAMED_CALL, KEY, KIND, Paths, Place, SAVED, Shared, UP, USER,
};
use super::tests::{
    CALL, KERNEL_CS, REGISTERS, SIGNAL, SLIDE, STACK, USER_CS, code, row, rows, start, table, text,
};
use super::walk::pt_regs;
use super::*;
use proptest::prelude::*;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Functions of 0x100 bytes as compilers make them: with a frame pointer that the first pushes and by which the second finds
/// its frame, a system call's entry, a thread's first.
fn usual() -> OrcTable {
    table(&[
        row(0, (5, 0x18), (1, -16), CALL),
        row(0x100, (4, 16), (1, -16), CALL),
        row(0x200, (5, 0), (0, 0), REGISTERS),
        row(0x300, (0, 0), (0, 0), 1),
        row(0x400, (5, 8), (0, 0), CALL | SIGNAL),
        row(RETURN, (5, 8), (0, 0), CALL),
    ])
}

/// A function's return.
const RETURN: u64 = 0x500;
/// Where stubs would find what they know: sixteen buckets.
const PLACE: Place = Place { start: Va(0xffff_ffff_7f00_0000), len: 16 * BUCKET_LEN };

/// A table, how many events have begun, and how many were read.
struct Table {
    words: Vec<AtomicU64>,
    begun: AtomicU64,
    read: AtomicU64,
}

impl Shared for Arc<Table> {
    fn word(&self, offset: usize) -> &AtomicU64 {
        &self.words[offset / 8]
    }

    fn begun(&self) -> u64 {
        self.begun.load(Ordering::Relaxed)
    }

    fn read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }
}

fn shared() -> Arc<Table> {
    let words = (0..PLACE.len / 8).map(|_| AtomicU64::new(0)).collect();
    Arc::new(Table { words, begun: AtomicU64::new(0), read: AtomicU64::new(0) })
}

/// What a stub finds.
#[derive(Debug, PartialEq)]
enum Found {
    Nothing,
    /// The number that it writes down.
    Path(u32),
    /// That of a part, and where it goes on.
    Part(u32, Start),
}

/// As stubs do it.
fn follow(table: &Table, start: &Start, read: impl Fn(Va) -> Option<u64>) -> Found {
    let word = |offset: usize| table.words[offset / 8].load(Ordering::Relaxed);
    let (mut slot, mut bp, mut before) = (start.sp, start.bp, start.ip.0 as u32);
    for _ in 0..100 {
        let Some(ip) = read(slot) else { return Found::Nothing };
        let key = u64::from(before) << 32 | ip & 0xffff_ffff;
        let mut entries = (0..PLACE.len).step_by(ENTRY_LEN);
        let Some(entry) = entries.find(|entry| word(entry + KEY) == key) else {
            let is_part = before != start.ip.0 as u32;
            let behind = Start::returning(Va(ip), slot + 8, bp);
            return if is_part { Found::Part(before, behind) } else { Found::Nothing };
        };
        let rest = word(entry + UP);
        let half = |at: usize| i64::from((rest >> (8 * (at - UP))) as i16);
        let (up, saved, kind) = (half(UP) as u64, half(SAVED) as u64, (rest >> (8 * (KIND - UP))) as u8);
        before = (PLACE.start.0 + entry as u64) as u32;
        slot = match kind {
            END => return Found::Path(before),
            USER if read(slot + up).is_some_and(|cs| cs & 3 == 3) => return Found::Path(before),
            USER => return Found::Nothing,
            FRAMED_CALL if bp < slot => return Found::Nothing,
            FRAMED_CALL => bp + up,
            _ => slot + up,
        };
        if saved != 0 {
            let Some(saved) = read(slot + saved) else { return Found::Nothing };
            bp = Va(saved);
        }
    }
    panic!("it does not end");
}

/// What is kept when backtraces come by copies of the stack, as long as stubs do not know them.
struct Seen<'a> {
    unwinder: Unwinder<'a>,
    memo: Memo<usize>,
    table: Arc<Table>,
    kept: Vec<Vec<Va>>,
}

impl<'a> Seen<'a> {
    fn new(orc: &'a OrcTable, depth: usize) -> Self {
        let (table, mut memo) = (shared(), Memo::new(depth));
        memo.share(Paths::new(Box::new(Arc::clone(&table)), PLACE));
        Self { unwinder: Unwinder::new(Some(orc), text(), SLIDE), memo, table, kept: Vec::new() }
    }

    /// An event, of whose stack stubs copy `copied` bytes. True when a stub knows its backtrace, which is the right one then; by
    /// copies it may be cut off.
    fn event_of(
        &mut self,
        start: &Start,
        depth: usize,
        copied: u64,
        read: impl Fn(Va) -> Option<u64> + Copy,
    ) -> bool {
        let (mut out, mut frames) = ([Va(0); 16], [Va(0); 16]);
        let len = self.unwinder.unwind(&(), start, read, &mut out[..depth]).len;
        let is_cut = |frames: &[Va]| copied < u64::MAX && out[..len].starts_with(frames);
        let check = |frames: &[Va]| assert!(frames == &out[..len] || is_cut(frames), "{frames:?} of {out:?}");
        let part = match follow(&self.table, start, read) {
            Found::Path(number) => {
                let known = self.memo.known(number).expect("an end that is kept");
                assert_eq!(self.kept[known], &out[..len]);
                return true;
            }
            Found::Part(number, behind) => Some((number, behind)),
            Found::Nothing => None,
        };
        let from = part.map_or(start.sp, |(_, behind)| behind.sp - 8);
        let copy = |va: Va| read(va).filter(|_| va - from < copied);
        let (found, known, behind) = match part {
            None => (self.memo.find(start, copy), 0, *start),
            Some((number, behind)) => {
                frames[0] = start.ip;
                let known = 1 + self.memo.frames(number, &mut frames[1..depth]).expect("frames");
                (self.memo.find_behind((number, known), &behind, copy), known, behind)
            }
        };
        match found {
            Some(found) => check(&self.kept[found]),
            None => {
                let trace = self.unwinder.unwind_on(&(), &behind, copy, (&mut frames[..depth], known));
                let frames = &frames[..trace.len];
                check(frames);
                self.memo.keep(&self.unwinder, &(), start, frames, self.kept.len());
                self.kept.push(frames.to_vec());
            }
        }
        false
    }

    /// One of whose stack all is copied.
    fn event(&mut self, start: &Start, depth: usize, read: impl Fn(Va) -> Option<u64> + Copy) -> bool {
        self.event_of(start, depth, u64::MAX, read)
    }
}

/// Each copy goes on where stubs knew no further.
#[test]
fn what_is_longer_than_a_copy_becomes_known_bit_by_bit() {
    let orc = usual();
    let mut seen = Seen::new(&orc, 16);
    let frames = (0..9).map(|k| (STACK + 8 * k, code(0x510 + k)));
    let memory: HashMap<u64, u64> = frames.chain([(STACK + 72, code(0x310))]).collect();
    let read = |va: Va| memory.get(&va.0).copied();
    let mut events = (0..9).map(|_| seen.event_of(&start(RETURN), 16, 32, read));
    assert_eq!(events.position(|is_known| is_known), Some(3));
    drop(events);
    let lens: Vec<usize> = seen.kept.iter().map(Vec::len).collect();
    assert_eq!(lens, [5, 9, 11]);
}

#[test]
fn stubs_know_what_was_seen() {
    let orc = usual();
    let mut seen = Seen::new(&orc, 16);
    let mut event = |stack: &[(u64, u64)]| {
        let memory: HashMap<u64, u64> = stack.iter().map(|&(at, word)| (STACK + at, word)).collect();
        [(); 2].map(|()| seen.event(&start(RETURN), 16, |va| memory.get(&va.0).copied()))
    };
    let inner = [(0, code(0x20)), (0x10, STACK + 0x60), (0x18, code(0x120)), (0x60, 7)];
    let with = |outer: &[(u64, u64)]| [&inner[..], outer].concat();
    let user = [(0x68, code(0x210)), (0x70 + pt_regs::CS, USER_CS)];
    assert_eq!(event(&with(&user)), [false, true]);
    assert_eq!(event(&with(&user)), [true, true]);
    // The end of a thread; the kernel itself interrupted, and by a frame pointer below: these are unwound each time.
    assert_eq!(event(&with(&[(0x68, code(0x310))])), [false, true]);
    let ip = (0x70 + pt_regs::IP, code(0x310));
    let (sp, bp) = ((0x70 + pt_regs::SP, STACK + 0x400), (0x70 + pt_regs::BP, 0));
    assert_eq!(event(&with(&[(0x68, code(0x210)), (0x70 + pt_regs::CS, KERNEL_CS), ip, sp, bp])), [false; 2]);
    assert_eq!(event(&[(0, code(0x20)), (0x10, STACK), (0x18, code(0x120))]), [false; 2]);
    // A stack that ends too early.
    assert_eq!(event(&inner), [false; 2]);
}

#[test]
fn what_fills_the_depth_ends_there() {
    let orc = usual();
    let mut seen = Seen::new(&orc, 4);
    let memory: HashMap<u64, u64> = (0..8).map(|k| (STACK + k * 8, code(0x520))).collect();
    let mut event = || seen.event(&start(RETURN), 4, |va| memory.get(&va.0).copied());
    assert_eq!([event(), event()], [false, true]);
    assert_eq!(seen.kept[0].len(), 4);
}

/// What stubs found before everything was forgotten is theirs until it is read.
#[test]
fn a_forgotten_place_is_used_again_when_nobody_can_mean_it() {
    let orc = usual();
    let mut seen = Seen::new(&orc, 16);
    let memory = HashMap::from([(STACK, code(0x510)), (STACK + 8, code(0x310))]);
    let read = |va: Va| memory.get(&va.0).copied();
    seen.event(&start(RETURN), 16, read);
    let Found::Path(number) = follow(&seen.table, &start(RETURN), read) else { panic!("not known") };
    seen.table.begun.store(7, Ordering::Relaxed);
    seen.memo.clear();
    for (events, is_known) in [(6, [false, false]), (7, [false, true])] {
        seen.table.read.store(events, Ordering::Relaxed);
        assert_eq!(seen.memo.known(number), Some(0), "{events}");
        assert_eq!([(); 2].map(|()| seen.event(&start(RETURN), 16, read)), is_known, "{events}");
    }
    assert_eq!(seen.memo.known(number), Some(1), "there again");
    let none = [0, number - 1, number + 1, u32::MAX];
    assert_eq!(none.map(|number| seen.memo.known(number)), [None; 4]);
    // The guest can write what it likes where stubs write numbers.
    let mut out = [Va(0); 16];
    assert_eq!(seen.memo.frames(number, &mut out), Some(2));
    assert_eq!(out[..2], [code(0x510), code(0x310)].map(Va));
    assert_eq!(seen.memo.frames(number, &mut out[..1]), None, "no room");
    assert_eq!(none.map(|number| seen.memo.frames(number, &mut out)), [None; 4]);
    assert_eq!(none.map(|number| seen.memo.find_behind((number, 3), &start(RETURN), read)), [None; 4]);
    let all = seen.unwinder.unwind_on(&(), &start(RETURN), read, (&mut out, 16));
    assert_eq!((all.len, all.end), (16, End::Full));
}

#[test]
fn a_full_bucket_is_no_harm() {
    let orc = usual();
    let mut seen = Seen::new(&orc, 16);
    let known = (0..0x100).filter(|k| {
        let memory = HashMap::from([(STACK, code(0x500 + k)), (STACK + 8, code(0x310))]);
        let read = |va: Va| memory.get(&va.0).copied();
        seen.event(&start(RETURN), 16, read);
        seen.event(&start(RETURN), 16, read)
    });
    // Two entries each.
    let known = known.count();
    assert!((8..=32).contains(&known), "{known}");
}

#[test]
fn a_backtrace_seen_before_is_found_without_the_tables() {
    let orc = usual();
    let unwinder = Unwinder::new(Some(&orc), text(), SLIDE);
    let mut memo = Memo::new(16);
    let mut seen = |stack: &[(u64, u64)]| {
        let memory: HashMap<u64, u64> = stack.iter().map(|&(at, word)| (STACK + at, word)).collect();
        let read = |va: Va| memory.get(&va.0).copied();
        let mut out = [Va(0); 16];
        let len = unwinder.unwind(&(), &start(0x10), read, &mut out).len;
        let found = memo.find(&start(0x10), read);
        memo.keep(&unwinder, &(), &start(0x10), &out[..len], len);
        (found, len)
    };
    let (pushed, returns, outer) = ((8, STACK + 0x60), (0x10, code(0x120)), (0x68, code(0x210)));
    let registers = |cs| (0x70 + pt_regs::CS, cs);
    let from_user = [pushed, returns, (0x60, 7), outer, registers(USER_CS)];
    assert_eq!(seen(&from_user), (None, 3));
    assert_eq!(seen(&from_user), (Some(3), 3));
    // The same addresses behind a frame of another size.
    let farther =
        [(8, STACK + 0x200), returns, (0x200, 7), (0x208, code(0x210)), (0x210 + pt_regs::CS, USER_CS)];
    assert_eq!(seen(&farther), (Some(3), 3));
    // Another caller; the kernel itself interrupted; a stack that ends too early; a frame pointer below.
    assert_eq!(seen(&[pushed, returns, (0x60, 7), (0x68, code(0x310))]), (None, 3));
    assert_eq!(seen(&[pushed, returns, (0x60, 7), (0x68, code(0x310))]), (Some(3), 3));
    let ip = (0x70 + pt_regs::IP, code(0x310));
    let (sp, bp) = ((0x70 + pt_regs::SP, STACK + 0x400), (0x70 + pt_regs::BP, 0));
    let in_kernel = [pushed, returns, (0x60, 7), outer, registers(KERNEL_CS), ip, sp, bp];
    assert_eq!(seen(&in_kernel), (None, 4));
    assert_eq!(seen(&in_kernel), (None, 4));
    assert_eq!(seen(&[pushed, returns]), (None, 2));
    assert_eq!(seen(&[pushed, returns]), (Some(2), 2));
    assert_eq!(seen(&[(8, STACK), returns, (0, 7)]).0, None);
}

proptest! {
    /// Whatever the tables and the stacks are.
    #[test]
    fn what_is_found_is_what_unwinding_finds(
        rows in rows(),
        usual_ones in any::<bool>(),
        stacks in prop::collection::vec(prop::collection::vec(any::<u16>(), 48), 1..12),
        order in prop::collection::vec((any::<prop::sample::Index>(), 0u64..6), 1..60),
        copied in prop_oneof![Just(u64::MAX), 0u64..200],
    ) {
        let orc = if usual_ones { usual() } else { table(&rows) };
        let mut seen = Seen::new(&orc, 6);
        for (stack, first) in &order {
            let words = stack.get(&stacks);
            // Few addresses of code, so that they come together again; stack addresses, code segments, and nothing.
            let read = |va: Va| {
                let word = words.get((va.0.wrapping_sub(STACK) / 8) as usize).copied().map(u64::from)?;
                match word & 15 {
                    0..8 => Some(code((word >> 4) % 24 * 0x40)),
                    8..12 => Some(STACK + (word >> 4) % 64 * 8),
                    12 => Some(KERNEL_CS),
                    13 => Some(USER_CS),
                    14 => Some(word),
                    _ => None,
                }
            };
            match first {
                4 => seen.event_of(&start(RETURN), 6, copied, read),
                5 => {
                    seen.memo.clear();
                    false
                }
                _ => seen.event_of(&start(first * 0x90), 6, copied, read),
            };
        }
    }
}
