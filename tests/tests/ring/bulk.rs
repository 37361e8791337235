//! Stubs of calls that pass an array or a list, carried out beside the code whose place they take.

use crate::paths::know;
use crate::processor::Processor;
use crate::stubs::{
    CACHE, CALLER, CASES, COUNT, Case, HOOK, OBJECT, PAGES, STACK, STACK_LEN, by_stub, check_result, is_ring,
    processor, slot_of,
};
use anyhow::{Context, Result, ensure};
use iced_x86::{Instruction, Register};
use introspect::arch::layout::TRACER_RING;
use introspect::hooks::record::{self, Record, SLOT_LEN, SLOTS};
use introspect::hooks::{Stub, StubFilled, StubPages, StubPoint, StubSource, Surroundings};
use introspect::memory::Va;
use introspect::unwind::paths::Onward;

/// Somebody's array, or list; and a `struct folio_batch`.
const ARRAY: u64 = 0xffff_c900_0200_0010;
const LIST: u64 = 0xffff_c900_0300_0008;
const BATCH: u64 = 0xffff_c900_0400_0000;
/// Words that one record has.
const PIECE: u64 = record::MAX_WORDS as u64 - 1;
/// Most that the kernel passes.
const MOST: u64 = 512;
/// Of as many as have no record, of one, of those that fill a record, and one more, and of the most.
const COUNTS: [u64; 6] = [0, 1, PIECE, PIECE + 1, 2 * PIECE, MOST];
/// More than a stub writes down.
const TOO_MANY: [u64; 2] = [4097, u64::MAX];
/// Position of the first record.
const FIRST: u64 = 3;
/// Whose what a stub finds may be.
const OTHERS: u64 = STACK + 0x8000;
/// More pages than a stub follows a list for.
const LONG: u64 = 4097;

/// In two forms of kernels.
pub fn pages(is_old: bool) -> StubPages {
    StubPages {
        list: 8,
        flags: 0,
        head: 1 << if is_old { 16 } else { 6 },
        order: (!is_old).then_some(0x40),
        batch: Some((if is_old { 0 } else { 5 }, 0x10)),
        bulk_has_list: is_old,
    }
}

/// Each stub of such a call in each state that it may meet.
pub fn check(stub: &Stub, point: StubPoint, displaced: &[Instruction], around: &Surroundings) -> Result<()> {
    ensure!(stub.fallback.is_some(), "no way out");
    // In a task's stack, deep and near its top, and on stacks of CPUs'.
    for case in CASES {
        let check = Check { stub, displaced, around, case };
        match point {
            StubPoint::Free(StubSource::Array, _) => check.free_array(),
            StubPoint::Free(StubSource::List, _) => check.free_list(),
            StubPoint::Free(StubSource::Batch, _) => check.free_batch(),
            StubPoint::Fill(filled, _) => check.fill(filled),
            StubPoint::Filled(StubFilled::Objects) => check.filled_with_objects(),
            _ => check.filled_with_pages(),
        }
        .with_context(|| format!("{case:x?}"))?;
    }
    Ok(())
}

fn object(k: u64) -> u64 {
    OBJECT + 96 * k
}

/// The first `struct page`s of blocks of four.
fn page(k: u64) -> u64 {
    PAGES + 0x10_0000 + 0x100 * k
}

/// Words of the ring that were written.
fn ring(processor: &Processor) -> Vec<u64> {
    processor.written.iter().copied().filter(|at| is_ring(*at)).collect()
}

struct Check<'a> {
    stub: &'a Stub,
    displaced: &'a [Instruction],
    around: &'a Surroundings,
    case: Case,
}

impl Check<'_> {
    /// The place of the return address, by which calls are told apart.
    fn own(&self) -> u64 {
        self.case.0
    }

    /// Where the call keeps something.
    fn pair(&self) -> u64 {
        TRACER_RING.0 + record::array_of(self.own())
    }

    /// A vCPU at such a call, with these registers, and this word kept by `whose` call.
    fn call(&self, registers: &[(Register, u64)], (whose, word): (u64, u64)) -> Result<Processor> {
        let mut processor = processor(self.case, FIRST, self.around);
        for at in (record::ARRAYS..=record::ARRAYS + record::ARRAYS_MASK + 8).step_by(8) {
            processor.memory.insert(TRACER_RING.0 + at, 0);
        }
        processor.memory.extend([(self.pair(), whose), (self.pair() + 8, word)]);
        for &(register, value) in registers {
            processor.set(register, value)?;
        }
        Ok(processor)
    }

    fn without_trap(&self, before: &Processor) -> Result<Processor> {
        by_stub(before, self.stub, self.displaced, |_, at| panic!("a trap at {at}"))
    }

    /// The stub traps, with all as it was at the event, and goes on without a record.
    fn falls_back(&self, before: &Processor) -> Result<()> {
        let mut traps = 0;
        let after = by_stub(before, self.stub, self.displaced, |processor, at| {
            traps += 1;
            assert_eq!(Some(at), self.stub.fallback);
            assert_eq!((processor.registers, processor.flags), (before.registers, before.flags));
        })?;
        ensure!(traps == 1, "{traps} traps");
        // Comparing a word writes what was there.
        let same = ring(&after).iter().all(|at| after.memory[at] == before.memory[at]);
        ensure!(same, "written to the ring: {:x?}", ring(&after));
        Ok(())
    }

    /// The records of these words from position [`FIRST`] on, and nothing but those and `more`.
    fn wrote(&self, after: &Processor, words: &[u64], more: u64) -> Result<()> {
        let mut found = Vec::new();
        let pieces = (words.len() as u64).div_ceil(PIECE);
        for position in FIRST..FIRST + pieces {
            let slot = slot_of(after, position);
            let record = Record::new(&slot, |_| false);
            ensure!(record.word(record::SEQUENCE) == position + 1 && record.hook() == HOOK, "head");
            ensure!(record.word(record::RSP) == self.own() && record.caller().0 == CALLER, "whose");
            let (before, words) = record.array().context("no record of an array")?;
            // Of what is given back nobody asks.
            ensure!(more == 0 || before == found.len() as u64, "{before} words before {}", found.len());
            found.extend(words);
        }
        ensure!(found == words, "{} words: {found:x?}", words.len());
        self.published(after, pieces + more)?;
        ensure!(after.memory[&TRACER_RING.0] == FIRST + pieces + more, "positions");
        Ok(())
    }

    /// Each of so many slots was written before its sequence, once, and nothing else of the ring but positions and what is kept.
    fn published(&self, after: &Processor, slots: u64) -> Result<()> {
        let mut left = ring(after);
        for position in FIRST..FIRST + slots {
            let slot = TRACER_RING.0 + SLOTS + position % COUNT * SLOT_LEN as u64;
            let inside = |at: &u64| (slot..slot + SLOT_LEN as u64).contains(at);
            let own: Vec<u64> = left.iter().copied().filter(inside).collect();
            let is_last = own.iter().position(|at| *at == slot) == own.len().checked_sub(1);
            ensure!(is_last, "order: {own:x?}");
            left.retain(|at| !inside(at));
        }
        let known = [TRACER_RING.0, self.pair(), self.pair() + 8];
        ensure!(left.iter().all(|at| known.contains(at)), "written elsewhere: {left:x?}");
        Ok(())
    }

    /// A call that comes to the last slot asks for the next, and all is written, [`PIECE`] + 1 words in two records.
    fn waits(&self, mut before: Processor, words: &[u64], more: u64) -> Result<()> {
        before.memory.insert(TRACER_RING.0 + record::LIMIT, FIRST + 1);
        let mut asked = 0;
        let after = by_stub(&before, self.stub, self.displaced, |processor, at| {
            asked += 1;
            assert_eq!(Some(at), self.stub.request);
            let position = processor.get(Register::RAX).unwrap();
            processor.memory.insert(TRACER_RING.0 + record::LIMIT, position + 1);
        })?;
        ensure!(asked == 1 + more && FIRST + 2 + more < COUNT, "asked {asked} times for a slot");
        self.wrote(&after, words, more)
    }

    fn free_array(&self) -> Result<()> {
        let call = |count| {
            let mut call = self.call(&[(Register::RSI, count), (Register::RDX, ARRAY)], (0, 0))?;
            call.memory.extend((0..MOST).map(|k| (ARRAY + 8 * k, object(k))));
            Ok::<_, anyhow::Error>(call)
        };
        let objects: Vec<u64> = (0..MOST).map(object).collect();
        for count in COUNTS {
            self.wrote(&self.without_trap(&call(count)?)?, &objects[..count as usize], 0)?;
        }
        for count in TOO_MANY {
            self.falls_back(&call(count)?)?;
        }
        self.waits(call(PIECE + 1)?, &objects[..PIECE as usize + 1], 0)
    }

    /// So many pages on the list.
    fn list(&self, count: u64) -> impl Iterator<Item = (u64, u64)> {
        let link = move |k| if k == count { LIST } else { page(k) + 8 };
        (0..count).map(move |k| (link(k), link(k + 1))).chain([(LIST, link(0))])
    }

    fn free_list(&self) -> Result<()> {
        let call = |count| {
            let mut call = self.call(&[(Register::RDI, LIST)], (0, 0))?;
            call.memory.extend(self.list(count));
            Ok::<_, anyhow::Error>(call)
        };
        let pages: Vec<u64> = (0..MOST).map(page).collect();
        for count in COUNTS {
            self.wrote(&self.without_trap(&call(count)?)?, &pages[..count as usize], 0)?;
        }
        self.waits(call(PIECE + 1)?, &pages[..PIECE as usize + 1], 0)?;
        // In the end the host looks at it.
        let mut fallbacks = 0;
        by_stub(&call(LONG)?, self.stub, self.displaced, |processor, at| {
            if Some(at) == self.stub.fallback {
                fallbacks += 1;
            } else {
                let position = processor.get(Register::RAX).unwrap();
                processor.memory.insert(TRACER_RING.0 + record::LIMIT, position + 1);
            }
        })?;
        ensure!(fallbacks == 1, "{fallbacks} traps for an endless list");
        Ok(())
    }

    /// Every other folio has an order, on kernels that write that down.
    fn free_batch(&self) -> Result<()> {
        let pages = &self.around.pages;
        let (at, folios) = pages.batch.context("no batch")?;
        let call = |count: u64| {
            let mut call = self.call(&[(Register::RDI, BATCH)], (0, 0))?;
            call.memory.insert(BATCH, count << (8 * at) | 0x77 << (8 * (at + 1)));
            for k in 0..count {
                let flags = 0x17_ffff_0000_0000 | if k % 2 == 1 { pages.head } else { 0 };
                call.memory.insert(BATCH + folios + 8 * k, page(k));
                call.memory.extend([(page(k), flags), (page(k) + 0x40, 0xdd00 | (k % 11))]);
            }
            Ok::<_, anyhow::Error>(call)
        };
        let order = |k: u64| if k % 2 == 1 && pages.order.is_some() { k % 11 } else { 0 };
        for count in [0, 1, 2, 31, 64] {
            let words: Vec<u64> = (0..count).map(|k| page(k) | order(k)).collect();
            self.wrote(&self.without_trap(&call(count)?)?, &words, 0)?;
        }
        self.falls_back(&call(65)?)
    }

    fn fill(&self, filled: StubFilled) -> Result<()> {
        ensure!(self.stub.request.is_none(), "it needs no slot");
        // Where the call says that it wants them, and what is kept of that.
        let cases = match filled {
            StubFilled::Objects => vec![([(Register::RCX, ARRAY), (Register::R9, 0)], ARRAY)],
            StubFilled::Pages if self.around.pages.bulk_has_list => vec![
                ([(Register::R8, LIST), (Register::R9, 0)], LIST),
                ([(Register::R8, 0), (Register::R9, ARRAY)], ARRAY | 1),
                ([(Register::R8, 0), (Register::R9, 0)], 0),
            ],
            StubFilled::Pages => vec![([(Register::R8, ARRAY), (Register::R9, 0x77)], ARRAY | 1)],
        };
        for (registers, word) in &cases {
            // The pair is free; or one like it never came back.
            for whose in [0, self.own()] {
                let after = self.without_trap(&self.call(registers, (whose, 0x77))?)?;
                let kept = [self.pair(), self.pair() + 8].map(|at| after.memory[&at]);
                ensure!(kept == [self.own(), *word], "{kept:x?}");
                let elsewhere = |at: &u64| *at != self.pair() && *at != self.pair() + 8;
                ensure!(!ring(&after).iter().any(elsewhere), "written elsewhere");
            }
        }
        self.falls_back(&self.call(&cases[0].0, (OTHERS, 0x77))?)
    }

    /// Whatever they got: nothing is kept any longer, and the last record is that of the return.
    fn filled(&self, before: &Processor, words: &[u64], result: (u64, Option<(Va, u64)>)) -> Result<()> {
        let after = self.without_trap(before)?;
        ensure!(after.memory[&self.pair()] == 0, "something is kept on");
        self.wrote(&after, words, u64::from(!words.is_empty()))?;
        if words.is_empty() {
            return Ok(());
        }
        let last = FIRST + (words.len() as u64).div_ceil(PIECE);
        let slot = slot_of(&after, last);
        let record = Record::new(&slot, |_| true);
        ensure!(record.array().is_none() && record.word(record::RAX) == result.0, "the result");
        check_result(&record, last, before, (self.own(), result.0, result.1))
    }

    /// Where the backtrace is known, or a part of it.
    fn known(&self, call: &Processor) -> Result<()> {
        let at = self.displaced.first().context("nothing is displaced")?.ip();
        for (onward, whole) in [(Onward::End, true), (Onward::Call { up: 0x20, saved: 0 }, false)] {
            let mut call = call.clone();
            let number = know(&mut call, at, [(CALLER, onward)])?;
            let slot = slot_of(&self.without_trap(&call)?, FIRST + 1);
            let record = Record::new(&slot, |_| true);
            let part = record.part().map(|(number, behind)| (number, behind.sp));
            let wanted = match whole {
                // On a stack of the CPU's nothing is looked up.
                _ if !(STACK..STACK + STACK_LEN).contains(&self.own()) => (None, None),
                true => (Some(number), None),
                false => (None, Some((number, Va(self.own() + 0x28)))),
            };
            ensure!((record.path(), part) == wanted, "{:x?} {part:x?}, not {wanted:x?}", record.path());
        }
        Ok(())
    }

    fn filled_with_objects(&self) -> Result<()> {
        let call = |count: u64, whose| {
            // Of the register only an int is the result.
            let result = 0xdead_beef_0000_0000 | count & 0xffff_ffff;
            let mut call = self.call(&[(Register::RAX, result)], (whose, ARRAY))?;
            call.memory.extend((0..MOST).map(|k| (ARRAY + 8 * k, object(k))));
            Ok::<_, anyhow::Error>(call)
        };
        let objects: Vec<u64> = (0..MOST).map(object).collect();
        for count in COUNTS {
            let result = (object(0), Some((Va(CACHE), 96)));
            self.filled(&call(count, self.own())?, &objects[..count as usize], result)?;
        }
        self.known(&call(3, self.own())?)?;
        for (count, whose) in [(1, 0), (1, OTHERS), (4097, self.own()), (u64::MAX, self.own())] {
            self.falls_back(&call(count, whose)?)?;
        }
        self.waits(call(PIECE + 1, self.own())?, &objects[..PIECE as usize + 1], 1)
    }

    fn filled_with_pages(&self) -> Result<()> {
        let call = |count, listed, kept| {
            let mut call = self.call(&[(Register::RAX, count)], (self.own(), kept))?;
            call.memory.extend((0..MOST).map(|k| (ARRAY + 8 * k, page(k))));
            call.memory.extend(self.list(listed));
            Ok::<_, anyhow::Error>(call)
        };
        let pages: Vec<u64> = (0..MOST).map(page).collect();
        for count in COUNTS {
            let got = &pages[..count as usize];
            self.filled(&call(count, 0, ARRAY | 1)?, got, (0, None))?;
            // All that are on the list, or the newest of these, or more than there are.
            self.filled(&call(count, count, LIST)?, got, (0, None))?;
            self.filled(&call(count, MOST, LIST)?, got, (0, None))?;
            self.filled(&call(MOST, count, LIST)?, got, (0, None))?;
            self.filled(&call(count, 0, 0)?, &[], (0, None))?;
        }
        for count in TOO_MANY {
            self.falls_back(&call(count, 0, ARRAY | 1)?)?;
        }
        self.waits(call(PIECE + 1, 0, ARRAY | 1)?, &pages[..PIECE as usize + 1], 1)?;
        self.waits(call(PIECE + 1, MOST, LIST)?, &pages[..PIECE as usize + 1], 1)
    }
}
