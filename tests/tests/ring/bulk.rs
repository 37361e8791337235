//! Stubs of calls that pass an array, carried out beside the code whose place they take.

use crate::processor::Processor;
use crate::stubs::{
    CACHE, CALLER, CASES, COUNT, HOOK, OBJECT, STACK, by_stub, check_result, is_ring, processor, slot_of,
};
use anyhow::{Context, Result, ensure};
use iced_x86::{Instruction, Register};
use introspect::arch::layout::TRACER_RING;
use introspect::hooks::record::{self, Record};
use introspect::hooks::{Stub, StubPoint, Surroundings};
use introspect::memory::Va;

/// Somebody's array.
const ARRAY: u64 = 0xffff_c900_0200_0010;
/// Words of it that one record has.
const PIECE: u64 = record::MAX_WORDS as u64 - 1;
/// Of as many as have no record, of one, of those that fill a record and one more, and of what the kernel passes at most.
const COUNTS: [u64; 6] = [0, 1, PIECE, PIECE + 1, 2 * PIECE, 512];
/// More than a stub writes down.
const TOO_MANY: [u64; 2] = [4097, u64::MAX];
/// Position of the first record.
const FIRST: u64 = 3;

/// Each stub of such a call in each state that it may meet.
pub fn check(stub: &Stub, point: StubPoint, displaced: &[Instruction], around: &Surroundings) -> Result<()> {
    ensure!(stub.fallback.is_some(), "no way out");
    match point {
        StubPoint::BulkFree(_) => check_free(stub, displaced, around),
        StubPoint::BulkAlloc(_) => check_alloc(stub, displaced, around),
        _ => check_return(stub, displaced, around),
    }
}

fn object(k: u64) -> u64 {
    OBJECT + 96 * k
}

fn pair() -> u64 {
    TRACER_RING.0 + record::array_of(CASES[0].0)
}

/// A vCPU at such a call, nothing kept for others.
fn before(around: &Surroundings) -> Processor {
    let mut processor = processor(CASES[0], FIRST, around);
    for k in 0..*COUNTS.last().unwrap() {
        processor.memory.insert(ARRAY + 8 * k, object(k));
    }
    for at in (record::ARRAYS..=record::ARRAYS + record::ARRAYS_MASK + 8).step_by(8) {
        processor.memory.insert(TRACER_RING.0 + at, 0);
    }
    processor
}

/// Words of the ring that were written.
fn ring(processor: &Processor) -> Vec<u64> {
    processor.written.iter().copied().filter(|at| is_ring(*at)).collect()
}

fn without_trap(before: &Processor, stub: &Stub, displaced: &[Instruction]) -> Result<Processor> {
    by_stub(before, stub, displaced, |_, at| panic!("a trap at {at}"))
}

/// The stub traps, with all as it was at the event, and goes on without a record.
fn falls_back(before: &Processor, stub: &Stub, displaced: &[Instruction]) -> Result<()> {
    let mut traps = 0;
    let after = by_stub(before, stub, displaced, |processor, at| {
        traps += 1;
        assert_eq!(Some(at), stub.fallback);
        assert_eq!((processor.registers, processor.flags), (before.registers, before.flags));
    })?;
    ensure!(traps == 1, "{traps} traps");
    // Comparing a word writes what was there.
    let same = ring(&after).iter().all(|at| after.memory[at] == before.memory[at]);
    ensure!(same, "written to the ring: {:x?}", ring(&after));
    Ok(())
}

/// The records of an array of `count` words from position [`FIRST`] on; how many.
fn check_pieces(after: &Processor, count: u64, has_before: bool) -> Result<u64> {
    let mut found = Vec::new();
    let pieces = count.div_ceil(PIECE);
    for position in FIRST..FIRST + pieces {
        let slot = slot_of(after, position);
        let record = Record::new(&slot, |_| false);
        ensure!(record.word(record::SEQUENCE) == position + 1 && record.hook() == HOOK, "head");
        ensure!(record.word(record::RSP) == CASES[0].0 && record.caller().0 == CALLER, "whose");
        let (before, words) = record.array().context("no record of an array")?;
        ensure!(!has_before || before == found.len() as u64, "{before} words before {}", found.len());
        found.extend(words);
    }
    ensure!(found == (0..count).map(object).collect::<Vec<_>>(), "{count} words: {found:x?}");
    Ok(pieces)
}

fn check_free(stub: &Stub, displaced: &[Instruction], around: &Surroundings) -> Result<()> {
    let call = |count: u64| {
        let mut processor = before(around);
        processor.set(Register::RSI, count)?;
        processor.set(Register::RDX, ARRAY)?;
        Ok::<_, anyhow::Error>(processor)
    };
    for count in COUNTS {
        let after = without_trap(&call(count)?, stub, displaced)?;
        let pieces = check_pieces(&after, count, false)?;
        ensure!(after.memory[&TRACER_RING.0] == FIRST + pieces, "positions of {count}");
    }
    for count in TOO_MANY {
        falls_back(&call(count)?, stub, displaced)?;
    }
    check_waits(&call(PIECE + 1)?, stub, displaced, 2)
}

/// A call that comes to the last slot asks for the next, and all `records` are written.
fn check_waits(before: &Processor, stub: &Stub, displaced: &[Instruction], records: u64) -> Result<()> {
    let mut before = before.clone();
    before.memory.insert(TRACER_RING.0 + record::LIMIT, FIRST + 1);
    let mut asked = 0;
    let after = by_stub(&before, stub, displaced, |processor, at| {
        asked += 1;
        assert_eq!(Some(at), stub.request);
        let position = processor.get(Register::RAX).unwrap();
        processor.memory.insert(TRACER_RING.0 + record::LIMIT, position + 1);
    })?;
    ensure!(asked == records - 1, "asked {asked} times for {records} records");
    ensure!(after.memory[&TRACER_RING.0] == FIRST + records && FIRST + records < COUNT, "positions");
    check_pieces(&after, PIECE + 1, false).map(|_| ())
}

fn check_alloc(stub: &Stub, displaced: &[Instruction], around: &Surroundings) -> Result<()> {
    ensure!(stub.request.is_none(), "it needs no slot");
    let call = |other: u64| {
        let mut processor = before(around);
        processor.set(Register::RCX, ARRAY)?;
        processor.memory.insert(pair(), other);
        Ok::<_, anyhow::Error>(processor)
    };
    // The pair is free; or one like it never came back.
    for other in [0, CASES[0].0] {
        let before = call(other)?;
        let after = without_trap(&before, stub, displaced)?;
        let kept = [pair(), pair() + 8].map(|at| after.memory[&at]);
        ensure!(kept == [CASES[0].0, ARRAY], "{kept:x?}");
        ensure!(ring(&after).iter().all(|at| *at == pair() || *at == pair() + 8), "written elsewhere");
    }
    falls_back(&call(STACK + 0x8000)?, stub, displaced)
}

fn check_return(stub: &Stub, displaced: &[Instruction], around: &Surroundings) -> Result<()> {
    let call = |count: u64, whose: u64| {
        let mut processor = before(around);
        processor.set(Register::RAX, count)?;
        processor.memory.insert(pair(), whose);
        processor.memory.insert(pair() + 8, ARRAY);
        Ok::<_, anyhow::Error>(processor)
    };
    let own = CASES[0].0;
    for count in COUNTS {
        // Of the register only an int is the result.
        let before = call(0xdead_beef_0000_0000 | count, own)?;
        let after = without_trap(&before, stub, displaced)?;
        ensure!(after.memory[&pair()] == 0, "the array is kept on");
        let last = FIRST + check_pieces(&after, count, true)?;
        let end = if count == 0 { last } else { last + 1 };
        ensure!(after.memory[&TRACER_RING.0] == end, "positions of {count}");
        if count > 0 {
            let slot = slot_of(&after, last);
            let record = Record::new(&slot, |_| true);
            ensure!(record.array().is_none() && record.word(record::RAX) == object(0), "the result");
            let case = (own, object(0), Some((Va(CACHE), 96)));
            check_result(&record, last, &before, case)?;
        }
    }
    for (count, whose) in [(1, 0), (1, STACK + 0x8000), (4097, own), (0xffff_ffff, own)] {
        falls_back(&call(count, whose)?, stub, displaced)?;
    }
    check_waits(&call(PIECE + 1, own)?, stub, displaced, 3)
}
