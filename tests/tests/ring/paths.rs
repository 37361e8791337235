//! Backtraces that stubs know: found on the stack as the table has it, and nothing read where there is no stack.

use crate::processor::Processor;
use crate::stubs::{
    CALLER, CASES, STACK, STACK_LEN, by_stub, check_result, check_result_from, processor, slot_of,
};
use anyhow::{Context, Result, ensure};
use iced_x86::{Instruction, Register};
use introspect::arch::layout::TRACER_PATHS;
use introspect::hooks::record::Record;
use introspect::hooks::{Stub, Surroundings};
use introspect::memory::Va;
use introspect::unwind::paths::{BUCKET_LEN, Onward, Paths, Place, Shared};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A small one.
pub const PLACE: Place = Place { start: TRACER_PATHS, len: 16 * BUCKET_LEN };
/// Where the stack pointer is.
const TOP: u64 = CASES[0].0;
/// Return addresses of the callers, from the second on.
const RETURNS: [u64; 4] =
    [0xffff_ffff_8120_0010, 0xffff_ffff_c012_3456, 0xffff_ffff_8140_0030, 0xffff_ffff_8150_0040];
/// Saved segments of user code and of the kernel's.
const SEGMENTS: [u64; 2] = [0x33, 0x10];

#[derive(Clone)]
struct Table(Arc<[AtomicU64]>);

impl Shared for Table {
    fn word(&self, offset: usize) -> &AtomicU64 {
        &self.0[offset / 8]
    }

    fn begun(&self) -> u64 {
        0
    }

    fn read(&self) -> u64 {
        0
    }
}

/// A stack of five frames, and what is known of each of the first four.
struct Frames {
    onward: [Onward; 4],
    end: Onward,
    /// Words of the stack.
    words: Vec<(u64, u64)>,
    /// Where the frame pointer leads, if not where its frame is.
    bp: Option<u64>,
}

/// Two frames from the stack pointer, the second with the frame pointer saved, one from that, one more.
fn frames() -> Frames {
    let frame = TOP + 0x108;
    Frames {
        onward: [
            Onward::Call { up: 0x20, saved: 0 },
            Onward::Call { up: 0x40, saved: -0x10 },
            Onward::FramedCall { up: 8, saved: -8 },
            Onward::Call { up: 0x10, saved: 0 },
        ],
        end: Onward::End,
        words: vec![
            (TOP + 0x20, RETURNS[0]),
            (TOP + 0x50, frame),
            (TOP + 0x60, RETURNS[1]),
            (frame, TOP + 0x400),
            (frame + 8, RETURNS[2]),
            (frame + 0x18, RETURNS[3]),
        ],
        bp: None,
    }
}

/// Has stubs for `at` know these return addresses, one behind the other; the number of the last.
pub fn know(
    processor: &mut Processor,
    at: u64,
    frames: impl IntoIterator<Item = (u64, Onward)>,
) -> Result<u32> {
    let table = Table((0..PLACE.len / 8).map(|_| AtomicU64::new(0)).collect());
    let mut paths = Paths::new(Box::new(table.clone()), PLACE);
    let mut number = at as u32;
    for (ip, onward) in frames {
        number = paths.add(number, Va(ip), onward).context("no room")?;
    }
    for (k, word) in table.0.iter().enumerate() {
        processor.memory.insert(PLACE.start.0 + 8 * k as u64, word.load(Ordering::Relaxed));
    }
    Ok(number)
}

impl Frames {
    /// A vCPU on them, and the number of the last of the `known` frames that are in the table.
    fn processor(&self, at: u64, around: &Surroundings, known: usize) -> Result<(Processor, u32)> {
        let mut processor = processor(CASES[0], 3, around);
        let returns = [CALLER].into_iter().chain(RETURNS);
        let onward = self.onward.into_iter().chain([self.end]);
        let number = know(&mut processor, at, returns.zip(onward).take(known))?;
        processor.memory.extend(self.words.iter().copied());
        if let Some(bp) = self.bp {
            processor.memory.insert(TOP + 0x50, bp);
        }
        Ok((processor, number))
    }
}

fn is_return((_, word): &&(u64, u64)) -> bool {
    RETURNS.contains(word)
}

/// What a stub makes of a stack.
#[derive(Debug, PartialEq)]
enum Made {
    /// It writes down the number of its end.
    Path,
    /// That of a frame before, and copies the stack from there on, at which the frame pointer is this.
    Part(u64, u64),
    /// It copies it.
    Copy,
}

/// All that a stub at a return may come upon.
pub fn check(stub: &Stub, displaced: &[Instruction], around: &Surroundings) -> Result<()> {
    let at = displaced.first().context("nothing is displaced")?.ip();
    let event = |frames: &Frames, known: usize| -> Result<Made> {
        let (before, number) = frames.processor(at, around, known)?;
        let after = by_stub(&before, stub, displaced, |_, at| unreachable!("a trap at {at}"))?;
        let slot = slot_of(&after, 3);
        let record = Record::new(&slot, |_| true);
        if let Some(path) = record.path() {
            ensure!(path == number, "path {path:#x}, not {number:#x}");
            ensure!(record.words() == 1 && record.caller().0 == CALLER, "the return address");
            return Ok(Made::Path);
        }
        let Some((part, behind)) = record.part() else {
            check_result(&record, 3, &before, CASES[0])?;
            return Ok(Made::Copy);
        };
        ensure!(part == number, "part {part:#x}, not {number:#x}");
        let from = behind.sp.0 - 8;
        ensure!(before.memory.get(&from) == Some(&behind.ip.0), "not at a return address");
        check_result_from(&record, 3, &before, CASES[0], from)?;
        Ok(Made::Part(from, behind.bp.0))
    };
    let said = |frames: &Frames, known: usize, wanted: Made, what: &str| -> Result<()> {
        let made = event(frames, known).context(what.to_owned())?;
        ensure!(made == wanted, "{what}: {made:x?}, not {wanted:x?}");
        Ok(())
    };
    said(&frames(), 5, Made::Path, "a known end")?;
    said(&frames(), 0, Made::Copy, "nothing known")?;
    let (before, _) = frames().processor(at, around, 0)?;
    let frame = TOP + 0x108;
    let saved = before.memory.get(&frame).copied().context("no saved frame pointer")?;
    let bps = [before.get(Register::RBP)?, frame, saved, saved];
    for ((known, (from, _)), bp) in (1..).zip(frames().words.iter().filter(is_return)).zip(bps) {
        said(&frames(), known, Made::Part(*from, bp), "a frame that is not known")?;
    }
    let end = frame + 0x18;
    for (segment, wanted) in SEGMENTS.into_iter().zip([Made::Path, Made::Copy]) {
        let mut user = Frames { end: Onward::User { up: 0x90 }, ..frames() };
        user.words.push((end + 0x90, segment));
        said(&user, 5, wanted, "the end at user code")?;
    }
    // A frame pointer that leads nowhere, below, to the last word of the stack and beyond it.
    let last = STACK + STACK_LEN - 8;
    for bp in [0, 7, TOP, last, last + 8, u64::MAX, u64::MAX - 7, 0x7fff_ffff_f000, 1 << 63] {
        said(&Frames { bp: Some(bp), ..frames() }, 5, Made::Copy, "a frame pointer")?;
    }
    // Frames that lead out of the stack, and past what was there.
    for up in [i16::MAX - 7, 0x2000, 0x1ff8] {
        let mut far = frames();
        far.onward[3] = Onward::Call { up, saved: -8 };
        said(&far, 5, Made::Copy, "a large frame")?;
        said(&Frames { end: Onward::User { up }, ..frames() }, 5, Made::Copy, "registers far away")?;
    }
    let mut bottom = frames();
    bottom.onward[3] = Onward::Call { up: (last - (TOP + 0x110)) as i16, saved: -8 };
    bottom.words.push((last, RETURNS[3]));
    said(&bottom, 5, Made::Path, "an end at the last word")?;
    on_the_cpus_stack(stub, displaced, around, at)
}

/// On a stack of the CPU's nothing is looked up, whatever is there.
fn on_the_cpus_stack(stub: &Stub, displaced: &[Instruction], around: &Surroundings, at: u64) -> Result<()> {
    let (mut before, _) = frames().processor(at, around, 5)?;
    let case = CASES[2];
    let other = processor(case, 3, around);
    before.set(Register::RSP, case.0)?;
    before.set(Register::RAX, case.1)?;
    before.memory.insert(case.0, other.memory[&case.0]);
    let after = by_stub(&before, stub, displaced, |_, at| unreachable!("a trap at {at}"))?;
    let slot = slot_of(&after, 3);
    let record = Record::new(&slot, |_| true);
    ensure!(record.path().is_none() && record.part().is_none(), "a path on a stack of the CPU's");
    check_result(&record, 3, &before, case)
}
