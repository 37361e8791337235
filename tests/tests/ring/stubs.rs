//! Every stub of every tested kernel, carried out beside the code whose place it takes.

use crate::processor::{Next, Processor};
use crate::{bulk, paths};
use anyhow::{Context, Result, bail, ensure};
use guest_profiles::hooks::{self, Role, Tracked};
use iced_x86::{Decoder, DecoderOptions, Instruction, Register};
use introspect::arch::layout::{TRACER_CODE, TRACER_RING};
use introspect::hooks::record::{self, Record, SLOT_LEN, SLOTS, Slot};
use introspect::hooks::{
    Base, IsSlab, Jump, Plan, Planned, Slabs, Stub, StubPoint, Surroundings, Writer, plan,
};
use introspect::kernel::Kernel;
use introspect::memory::Va;
use introspect::unwind::Detours;
use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;

pub const COUNT: u64 = 16;
const TASK: u64 = 0xffff_8880_0100_0000;
pub const STACK: u64 = 0xffff_c900_0001_0000;
pub const STACK_LEN: u64 = 0x4000;
const GS: u64 = 0xffff_8880_3ec0_0000;
/// Of the task that a CPU was interrupted in: its stack pointer.
const INTERRUPTED: u64 = STACK + 0x3f00;
const DIRECT_MAP: u64 = 0xffff_8880_0000_0000;
const RAM: u64 = 1 << 28;
pub const PAGES: u64 = 0xffff_ea00_0000_0000;
const PAGE_STRUCT: u64 = 64;
/// Variables that have these two.
const BASES: u64 = 0xffff_ffff_8230_0000;
pub const OBJECT: u64 = DIRECT_MAP + 0x200_0000 + 96;
pub const CACHE: u64 = DIRECT_MAP + 0x300_0000;
const JIFFIES: u64 = 0xffff_ffff_8260_5900;
/// A system-call's work: its flags, all of them set that arithmetic sets, and interrupts on.
const FLAGS: u64 = 0xad7;
pub const HOOK: u32 = 0x1234;
pub const CALLER: u64 = 0xffff_ffff_8112_3456;

/// Of the two forms that kernels have, the older one with `softirq_disable_cnt`.
fn surroundings(softirq_disable_cnt: Option<u64>) -> Surroundings {
    let is_old = softirq_disable_cnt.is_some();
    Surroundings {
        current: 0x1fbc0,
        preempt_count: 0x1fbc8,
        softirq_disable_cnt,
        comm: 0xbb0,
        pid: 0x970,
        stack: 0x20,
        stack_size: STACK_LEN,
        jiffies: Va(JIFFIES),
        slabs: Slabs {
            direct_map: if is_old { Base::Constant(Va(DIRECT_MAP)) } else { Base::Variable(Va(BASES)) },
            direct_map_len: RAM,
            page_structs: if is_old { Base::Constant(Va(PAGES)) } else { Base::Variable(Va(BASES + 8)) },
            page_struct: PAGE_STRUCT,
            compound_head: 8,
            is_slab: if is_old { IsSlab::Flag(0, 1 << 9) } else { IsSlab::Byte(0x33, 0xf5) },
            slab_cache: 0x18,
            object_size: 0x1c,
        },
        pages: bulk::pages(is_old),
    }
}

/// Where the stack pointer is on the return address, what a function returns, and the cache of that and its objects' size.
pub type Case = (u64, u64, Option<(Va, u64)>);

/// Deep in the task's stack, near its top, on a CPU's stack that an interrupt of the task began, and on another; with a
/// result that is no object, one of a slab's first page, one of its second, and one elsewhere.
pub const CASES: [Case; 4] = [
    (STACK + 0x2008, 0x70, None),
    (STACK + STACK_LEN - 0x48, OBJECT, Some((Va(CACHE), 96))),
    (GS - 0x88, OBJECT + 0x1000, Some((Va(CACHE), 96))),
    (GS - 0x2000 - 0x88, OBJECT + 0x2000, None),
];

fn writer(trap: &[u8], softirqs: Option<u64>) -> Writer {
    Writer {
        ring: TRACER_RING,
        slots: COUNT,
        paths: paths::PLACE,
        trap: trap.to_vec(),
        surroundings: surroundings(softirqs),
    }
}

/// The `struct page`s of a slab of two pages, and of another page; and its cache.
fn slab() -> impl Iterator<Item = (u64, u64)> {
    let first = PAGES + (OBJECT - DIRECT_MAP) / 0x1000 * PAGE_STRUCT;
    let empty = (first..first + 3 * PAGE_STRUCT).step_by(8).map(|at| (at, 0));
    let head = [(first, 1 << 9), (first + 0x18, CACHE), (first + 0x30, 0xf500_0000 | 7)];
    let tail = (first + PAGE_STRUCT + 8, first | 1);
    let other = (first + 2 * PAGE_STRUCT + 0x18, CACHE);
    empty.chain(head).chain([tail, other, (CACHE + 0x18, 96 << 32 | 0xbad)])
}

/// A vCPU with `rsp` on the return address and `rax` as the result, `taken` positions given out.
pub fn processor((rsp, rax, _): Case, taken: u64, around: &Surroundings) -> Processor {
    let mut memory = BTreeMap::new();
    let mut give = |start: u64, bytes: u64, value: &dyn Fn(u64) -> u64| {
        for at in (start..start + bytes).step_by(8) {
            memory.insert(at, value(at));
        }
    };
    // Own stack, and pages of CPUs' with nothing behind them.
    give(STACK, STACK_LEN, &|at| at ^ 0x5a5a);
    for end in [GS, GS - 0x2000] {
        give(end - 0x1000, 0x1000, &|at| at ^ 0xa5a5);
    }
    give(TASK, 0x2000, &|at| at.wrapping_mul(0x9e37_79b9));
    give(TRACER_RING.0, SLOTS + COUNT * SLOT_LEN as u64, &|_| 0xdead_dead_dead_dead);
    give(paths::PLACE.start.0, paths::PLACE.len as u64, &|_| 0);
    memory.insert(TRACER_RING.0 + record::HEAD, taken);
    memory.insert(TRACER_RING.0 + record::LIMIT, COUNT);
    memory.insert(TASK + around.stack, STACK);
    memory.insert(TASK + around.comm, u64::from_le_bytes(*b"exercise"));
    memory.insert(TASK + around.comm + 8, u64::from_le_bytes(*b".sh\0\0\0\0\0"));
    memory.insert(TASK + around.pid, 77);
    memory.insert(GS + around.current, TASK);
    memory.insert(GS + around.preempt_count, 0x8000_0000);
    memory.insert(JIFFIES, 0x1_0000_4321);
    memory.insert(GS - 8, INTERRUPTED);
    memory.insert(BASES, DIRECT_MAP);
    memory.insert(BASES + 8, PAGES);
    memory.extend(slab());
    memory.insert(rsp, CALLER);
    let mut registers = [0; 16];
    for (k, register) in registers.iter_mut().enumerate() {
        *register = (0x1111_1111_1111_1111 * k as u64) ^ 0x70;
    }
    let mut processor =
        Processor { registers, flags: FLAGS, gs: GS, memory, written: Vec::new(), open: false };
    processor.registers[0] = rax;
    processor.registers[Register::RSP as usize - Register::RAX as usize] = rsp;
    processor
}

/// Instructions of the kernel, one after the other, each with the stack pointer before it.
type Path = Vec<(Va, u64)>;

fn pass(path: &mut Path, place: Va, rsp: u64) {
    if path.last() != Some(&(place, rsp)) {
        path.push((place, rsp));
    }
}

/// Runs a stub until it leaves it: what whoever looks in between takes that for, and at its end where it goes on.
fn leave(processor: &mut Processor, stub: &Stub, mut trap: impl FnMut(&mut Processor, Va)) -> Result<Path> {
    let (start, code) = (stub.start.0, &stub.code);
    let mut detours = Detours::default();
    detours.add(&stub.detours, stub.start + code.len() as u64);
    let (mut ip, mut path) = (start, Path::new());
    for _ in 0..100_000 {
        let offset = ip.wrapping_sub(start) as usize;
        let rsp = processor.get(Register::RSP)?;
        if offset >= code.len() {
            pass(&mut path, Va(ip), rsp);
            return Ok(path);
        }
        let detour = detours.find(Va(ip)).with_context(|| format!("no detour at {offset:#x}"))?;
        pass(&mut path, detour.to, rsp + detour.pushed);
        let i = Decoder::with_ip(64, &code[offset..], ip, DecoderOptions::NONE).decode();
        ensure!(!i.is_invalid(), "no instruction at {offset:#x}");
        ip = match processor.step(&i).with_context(|| format!("at {offset:#x}: {:?}", i.mnemonic()))? {
            Next::On => i.next_ip(),
            Next::To(target) => target,
            Next::Trap => {
                trap(processor, Va(ip));
                i.next_ip()
            }
        };
    }
    bail!("it does not end")
}

/// The same without the stub: `displaced`, one after the other.
fn straight(processor: &mut Processor, displaced: &[Instruction]) -> Result<Path> {
    let (mut ip, mut path) = (0, Path::new());
    for i in displaced {
        pass(&mut path, Va(i.ip()), processor.get(Register::RSP)?);
        ip = match processor.step(i)? {
            Next::On => i.next_ip(),
            Next::To(target) => {
                ip = target;
                break;
            }
            Next::Trap => bail!("a trap is displaced"),
        };
    }
    pass(&mut path, Va(ip), processor.get(Register::RSP)?);
    Ok(path)
}

/// The slot of a position.
pub fn slot_of(processor: &Processor, position: u64) -> Slot {
    let at = TRACER_RING.0 + SLOTS + position % COUNT * SLOT_LEN as u64;
    std::array::from_fn(|k| AtomicU64::new(processor.memory[&(at + 8 * k as u64)]))
}

/// True for addresses of the ring.
pub fn is_ring(at: u64) -> bool {
    (TRACER_RING.0..TRACER_RING.0 + SLOTS + COUNT * SLOT_LEN as u64).contains(&at)
}

/// `before` by way of the stub, which ends as by way of the code whose place it takes: registers, flags, what whoever looks takes
/// it for, and all memory but the ring and what is below the stack pointer.
pub fn by_stub(
    before: &Processor,
    stub: &Stub,
    displaced: &[Instruction],
    trap: impl FnMut(&mut Processor, Va),
) -> Result<Processor> {
    let (mut by_stub, mut by_code) = (before.clone(), before.clone());
    let left = leave(&mut by_stub, stub, trap)?;
    let goes_on = straight(&mut by_code, displaced)?;
    ensure!(left == goes_on, "the stub goes by {left:x?}, the code by {goes_on:x?}");
    ensure!(by_stub.registers == by_code.registers, "registers: {:x?}", by_stub.registers);
    ensure!(by_stub.open == by_code.open, "written while interrupts were on");
    ensure!(by_stub.flags == by_code.flags, "flags {:#x}, not {:#x}", by_stub.flags, by_code.flags);
    let rsp = before.get(Register::RSP)?;
    let below = |at: &u64| *at < by_code.get(Register::RSP).unwrap_or(0).min(rsp) && *at >= rsp - 0x100;
    for (at, word) in &by_stub.memory {
        ensure!(
            by_code.memory[at] == *word || is_ring(*at) || below(at),
            "memory at {at:#x}: {word:#x}, not {:#x}",
            by_code.memory[at]
        );
    }
    Ok(by_stub)
}

/// The stub does what the code does whose place it takes, and besides that fills one slot, its sequence last.
fn check(
    stub: &Stub,
    point: StubPoint,
    displaced: &[Instruction],
    around: &Surroundings,
    case: Case,
) -> Result<()> {
    let before = processor(case, 3, around);
    let by_stub = by_stub(&before, stub, displaced, |_, at| unreachable!("a trap at {at}"))?;
    let ring: Vec<u64> = by_stub.written.iter().copied().filter(|at| is_ring(*at)).collect();
    let slot = TRACER_RING.0 + SLOTS + 3 * SLOT_LEN as u64;
    ensure!(ring.first() == Some(&TRACER_RING.0) && ring.last() == Some(&slot), "order: {ring:x?}");
    let inside = |at: &u64| (slot..slot + SLOT_LEN as u64).contains(at);
    ensure!(ring[1..].iter().all(inside), "written outside of the slot: {ring:x?}");
    ensure!(ring[1..ring.len() - 1].iter().all(|at| *at != slot), "published early");
    ensure!(by_stub.memory[&TRACER_RING.0] == 4, "the position is not taken");
    let is_return = point == StubPoint::Return;
    check_record(&Record::new(&slot_of(&by_stub, 3), |_| is_return), point, &before, case)
}

fn check_record(record: &Record<'_>, point: StubPoint, before: &Processor, case: Case) -> Result<()> {
    if point == StubPoint::Return {
        ensure!(record.word(record::RAX) == before.get(Register::RAX)?, "result");
        return check_result(record, 3, before, case);
    }
    check_head(record, 3, case.0)?;
    let arguments = [record::RDI, record::RSI, record::RDX].map(|at| record.word(at));
    let passed = [before.get(Register::RDI)?, before.get(Register::RSI)?, before.get(Register::RDX)?];
    ensure!(arguments == passed, "arguments");
    Ok(())
}

fn check_head(record: &Record<'_>, position: u64, rsp: u64) -> Result<()> {
    ensure!(record.word(record::SEQUENCE) == position + 1 && record.hook() == HOOK, "head of the record");
    ensure!(record.word(record::RSP) == rsp, "stack pointer");
    ensure!(record.part().is_some() || record.caller().0 == CALLER, "caller");
    Ok(())
}

/// What the record of a return says of where it was, the stack included.
pub fn check_result(record: &Record<'_>, position: u64, before: &Processor, case: Case) -> Result<()> {
    check_result_from(record, position, before, case, case.0)
}

/// The same when the stack is there `from` some place on.
pub fn check_result_from(
    record: &Record<'_>,
    position: u64,
    before: &Processor,
    case: Case,
    from: u64,
) -> Result<()> {
    let (rsp, _, cache) = case;
    check_head(record, position, rsp)?;
    ensure!(record.word(record::RBP) == before.get(Register::RBP)?, "frame pointer");
    ensure!(record.word(record::JIFFIES) == 0x1_0000_4321, "time");
    ensure!(record.task() == (*b"exercise.sh\0\0\0\0\0", 77) && record.counts().0 == 0x8000_0000, "context");
    ensure!(record.cache() == cache, "cache {:?}", record.cache());
    check_stacks(record, before, from)
}

/// The stack from `rsp` on, and the one that was interrupted.
fn check_stacks(record: &Record<'_>, before: &Processor, rsp: u64) -> Result<()> {
    let is_own = (STACK..STACK + STACK_LEN).contains(&rsp);
    let end = if is_own { STACK + STACK_LEN } else { (rsp | 0xfff) + 1 };
    let mut room = record::MAX_WORDS as u64;
    let mut parts = vec![(rsp, end)];
    parts.extend((end == GS).then_some((INTERRUPTED, STACK + STACK_LEN)));
    if is_own && (end - rsp) / 8 > room {
        // All but its outermost words, then these.
        let outermost = end - record::OUTERMOST;
        parts = vec![(rsp, rsp + 8 * (room - record::OUTERMOST_WORDS as u64)), (outermost, end)];
    }
    for (start, end) in parts {
        let words = ((end - start) / 8).min(room);
        for k in 0..words {
            let at = Va(start + 8 * k);
            ensure!(record.stack(at) == before.memory.get(&at.0).copied(), "stack at {at}");
        }
        ensure!(record.stack(Va(start + 8 * words)).is_none(), "more than {words} words of stack");
        room -= words;
    }
    ensure!(record.words() as u64 == record::MAX_WORDS as u64 - room, "{} words", record.words());
    Ok(())
}

/// A branch that is displaced goes the other way when all arguments are nothing.
fn check_null(stub: &Stub, displaced: &[Instruction], around: &Surroundings) -> Result<()> {
    let mut before = processor(CASES[1], 3, around);
    for register in [Register::RDI, Register::RSI, Register::RDX, Register::RCX] {
        before.set(register, 0)?;
    }
    by_stub(&before, stub, displaced, |_, at| unreachable!("a trap at {at}")).map(|_| ())
}

/// Where a stub has no free slot it traps, with the position in rax, and goes on as if nothing had been.
fn check_full(stub: &Stub, displaced: &[Instruction], around: &Surroundings) -> Result<()> {
    let before = processor(CASES[1], COUNT + 2, around);
    let mut asked = 0;
    let ended = by_stub(&before, stub, displaced, |processor, at| {
        asked += 1;
        assert_eq!(Some(at), stub.request);
        assert_eq!(processor.get(Register::RAX).unwrap(), COUNT + 2);
        // At first in vain, as when it was woken for nothing.
        let limit = if asked == 1 { COUNT + 2 } else { COUNT + 3 };
        processor.memory.insert(TRACER_RING.0 + record::LIMIT, limit);
    })?;
    ensure!(asked == 2, "asked {asked} times for a slot");
    let slot = slot_of(&ended, COUNT + 2);
    let sequence = Record::new(&slot, |_| false).word(record::SEQUENCE);
    ensure!(sequence == COUNT + 3, "not written down");
    Ok(())
}

/// Jumps and their stubs in the forms a running kernel has: with the image's bytes, and a return that was patched.
fn live_forms(kernel: &Kernel, jump: Jump) -> Result<Vec<Vec<u8>>> {
    let image = kernel.image.bytes_at(jump.va(), jump.len()).context("no code")?.to_vec();
    Ok(match jump {
        Jump::Entry { .. } => vec![image],
        Jump::Return { .. } => vec![image, vec![0xc3, 0xcc, 0xcc, 0xcc, 0xcc]],
    })
}

fn hook_stubs(kernel: &Kernel, planned: &Planned) -> Result<u32> {
    let Ok(jump) = planned.jump else { return Ok(0) };
    let point = StubPoint::new(planned.role, jump, 0);
    let mut stubs = 0;
    for live in live_forms(kernel, jump)? {
        let displaced = jump.displaced(kernel, 0, &live)?;
        for (trap, softirqs) in [(&[0xcc][..], None), (&[0xe6, 0xe4][..], Some(0x9a4))] {
            let writer = writer(trap, softirqs);
            let stub = writer.stub(HOOK, point, &displaced, TRACER_CODE + 64)?;
            for at in [stub.request, stub.fallback].into_iter().flatten() {
                ensure!(stub.code[(at - stub.start) as usize..].starts_with(trap), "no trap at {at}");
            }
            let around = &writer.surroundings;
            match point {
                StubPoint::Entry(_) | StubPoint::Return => {
                    ensure!(stub.request.is_some() && stub.fallback.is_none(), "traps");
                    for case in CASES {
                        check(&stub, point, &displaced, around, case)
                            .with_context(|| format!("{case:x?}"))?;
                    }
                    if point == StubPoint::Return {
                        paths::check(&stub, &displaced, around)?;
                    }
                    check_null(&stub, &displaced, around)?;
                    check_full(&stub, &displaced, around)?;
                }
                _ => bulk::check(&stub, point, &displaced, around)?,
            }
            stubs += 1;
        }
    }
    Ok(stubs)
}

/// The stubs of a kernel; and all hooks of its allocators have one.
pub fn of_kernel(image: &std::path::Path) -> Result<()> {
    let kernel = Kernel::open(image)?;
    let Plan { traps, .. } = plan(&kernel, &hooks::builtin(), &Tracked::ALL, 2);
    let (mut by_trap, mut stranded) = (Vec::new(), Vec::new());
    let mut stubs = 0;
    for planned in &traps {
        let what = || format!("{} ({})", planned.function, if planned.entry { "entry" } else { "return" });
        stubs += hook_stubs(&kernel, planned).with_context(what)?;
        if let Err(why) = &planned.jump {
            let is_host = matches!(
                planned.role,
                Role::Patching | Role::Patched | Role::ModuleLoad | Role::ModuleUnload
            );
            let list = if is_host { &mut by_trap } else { &mut stranded };
            list.push(format!("{}: {why}", what()));
        }
    }
    println!("{stubs} stubs; by trap: {by_trap:#?}");
    ensure!(stranded.is_empty(), "events of an allocator stay with traps: {stranded:#?}");
    Ok(())
}
