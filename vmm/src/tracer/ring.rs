//! The ring: events that stubs in the guest wrote down, read in the order of their positions.
//!
//! A free takes its position before the guest gives the memory back, an allocation after it was made: the order of
//! positions is that of events on any one piece of memory. A position whose slot is not filled yet is passed over: what
//! it will say has not happened yet, so nothing behind it can depend on it. What does depend on it takes its position after
//! the slot was filled, and a pass ends at the positions that were taken when it began.

use super::recorder::{Moment, Recorder};
use crate::arch::layout;
use crate::machine::{Machine, PrivatePages, TrapInstruction, TrapOutcome};
use anyhow::{Result, ensure};
use guest_profiles::hooks::Role;
use introspect::arch::Registers;
use introspect::arch::layout::{TRACER_CODE, TRACER_RING};
use introspect::hooks::record::{self, HEAD, LIMIT, Record, SLOT_LEN, SLOTS};
use introspect::hooks::{Instruction, JUMP_LEN, Plan, Stub, StubPoint, Writer};
use introspect::linux::Linux;
use introspect::memory::{Pa, Va};
use rustc_hash::FxHashSet;
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

/// Slots: what may happen until the host looks.
const COUNT: u64 = 8192;
/// Slots are given back to the guest by so many.
const BATCH: u64 = 256;
/// Bytes for stubs.
const CODE_LEN: usize = 0x1_0000;
/// Stubs begin in lines of their own.
const STUB_ALIGN: usize = 64;

/// A jump in the place of a trap.
pub struct Moved {
    /// Where it is in guest memory.
    pub at: Pa,
    /// It.
    pub jump: [u8; JUMP_LEN],
    /// What belongs there instead.
    pub original: [u8; JUMP_LEN],
}

/// What a hook's number stands for.
struct Hook {
    role: Role,
    entry: bool,
    argument: u8,
    /// Where events at a return are.
    ip: u64,
}

/// How far events were read.
struct Reading {
    /// All before were.
    tail: u64,
    /// And these.
    beyond: BTreeSet<u64>,
}

/// Stubs written so far.
#[derive(Default)]
struct Code {
    len: usize,
}

/// What `status` says of the ring.
pub struct RingStatus {
    /// Events read.
    pub events: u64,
    /// Positions given out that are not read yet.
    pub lag: u64,
    /// Exits for want of a free slot.
    pub waits: u64,
}

/// See the module.
pub struct Ring {
    recorder: Arc<Recorder>,
    writer: Writer,
    hooks: Vec<Hook>,
    slots: Arc<PrivatePages>,
    code: Arc<PrivatePages>,
    written: Mutex<Code>,
    /// Addresses of the traps in stubs.
    requests: RwLock<FxHashSet<u64>>,
    reading: Mutex<Reading>,
    events: AtomicU64,
    waits: AtomicU64,
}

impl Ring {
    /// A ring for the hooks of `plan`, in memory of its own of `machine`.
    ///
    /// # Errors
    /// The machine cannot have it.
    pub fn new(
        machine: &Machine,
        linux: &Linux,
        recorder: Arc<Recorder>,
        plan: &Plan,
        instruction: TrapInstruction,
    ) -> Result<Self> {
        ensure!(machine.has_gigabyte_pages(), "The processor has no pages of one GiB");
        let slots = Arc::new(PrivatePages::new(SLOTS as usize + COUNT as usize * SLOT_LEN)?);
        let code = Arc::new(PrivatePages::new(CODE_LEN)?);
        machine.add_private(layout::TRACER_RING, &slots)?;
        machine.add_private(layout::TRACER_CODE + TRACER_CODE.0 % GIB, &code)?;
        slots.word(LIMIT as usize).store(COUNT, Ordering::Release);
        let slide = linux.placement.slide;
        let hooks = plan.traps.iter().map(|planned| Hook {
            role: planned.role,
            entry: planned.entry,
            argument: planned.argument,
            ip: (planned.site.resume() + slide).0,
        });
        Ok(Self {
            recorder,
            writer: Writer {
                ring: TRACER_RING,
                slots: COUNT,
                trap: instruction.bytes().to_vec(),
                surroundings: linux.surroundings(),
            },
            hooks: hooks.collect(),
            slots,
            code,
            written: Mutex::default(),
            requests: RwLock::default(),
            reading: Mutex::new(Reading { tail: 0, beyond: BTreeSet::new() }),
            events: AtomicU64::new(0),
            waits: AtomicU64::new(0),
        })
    }

    /// Where stubs are: whoever stands there is at an allocator's hook.
    pub fn code(&self) -> Range<Va> {
        TRACER_CODE..TRACER_CODE + CODE_LEN as u64
    }

    /// Writes the stub of a hook.
    ///
    /// # Errors
    /// It cannot be made.
    pub(super) fn add_stub(&self, hook: u32, point: StubPoint, displaced: &[Instruction]) -> Result<Stub> {
        let mut written = lock(&self.written);
        let stub = self.writer.stub(hook, point, displaced, TRACER_CODE + written.len as u64)?;
        ensure!(written.len + stub.code.len() <= CODE_LEN, "There is no room for more stubs");
        self.code.write(written.len, &stub.code);
        written.len = (written.len + stub.code.len()).next_multiple_of(STUB_ALIGN);
        self.requests.write().unwrap_or_else(PoisonError::into_inner).insert(stub.trap.0);
        Ok(stub)
    }

    /// True for the trap of a stub that has no free slot.
    pub(super) fn is_request(&self, ip: Va) -> bool {
        self.requests.read().unwrap_or_else(PoisonError::into_inner).contains(&ip.0)
    }

    /// At such a trap: reads events until the slot is free. The vCPUs that still fill those before it need the time.
    pub(super) fn make_room(&self, registers: &mut Registers) -> TrapOutcome {
        self.waits.fetch_add(1, Ordering::Relaxed);
        self.drain();
        if registers.rax < self.limit() {
            registers.rip += self.writer.trap.len() as u64;
            return TrapOutcome::Resume;
        }
        TrapOutcome::Again
    }

    /// Reads all events that were complete when it was called.
    pub fn drain(&self) {
        let mut reading = lock(&self.reading);
        let reading = &mut *reading;
        // Nothing is behind a slot that waits to be free.
        let head = self.head().min(reading.tail.saturating_add(COUNT));
        if head == reading.tail {
            return;
        }
        for position in reading.tail..head {
            if reading.beyond.contains(&position) {
                continue;
            }
            let Some(record) = self.filled(position) else { continue };
            self.record(&record);
            if position != reading.tail {
                reading.beyond.insert(position);
                continue;
            }
            reading.tail += 1;
            while reading.beyond.remove(&reading.tail) {
                reading.tail += 1;
            }
            if reading.tail.is_multiple_of(BATCH) {
                self.give_back(reading.tail);
            }
        }
        self.give_back(reading.tail);
        self.recorder.settle(reading.tail, self.head());
    }

    /// For `status`.
    pub fn status(&self) -> RingStatus {
        let events = self.events.load(Ordering::Relaxed);
        RingStatus {
            events,
            lag: self.head().saturating_sub(events),
            waits: self.waits.load(Ordering::Relaxed),
        }
    }

    fn head(&self) -> u64 {
        self.slots.word(HEAD as usize).load(Ordering::Acquire)
    }

    fn limit(&self) -> u64 {
        self.slots.word(LIMIT as usize).load(Ordering::Relaxed)
    }

    fn give_back(&self, tail: u64) {
        self.slots.word(LIMIT as usize).store(tail + COUNT, Ordering::Release);
    }

    /// The record of a position, when it is complete.
    fn filled(&self, position: u64) -> Option<Record> {
        let at = SLOTS as usize + (position % COUNT) as usize * SLOT_LEN;
        let sequence = self.slots.word(at + record::SEQUENCE).load(Ordering::Acquire);
        if sequence != position + 1 {
            return None;
        }
        let mut record = Record([0; SLOT_LEN]);
        // The stack behind the return address is there at returns only.
        self.slots.read(at, &mut record.0[..record::STACK + 8]);
        if self.hooks.get(record.hook() as usize).is_some_and(|hook| !hook.entry) {
            let end = record::STACK + 8 * record.words();
            self.slots.read(at + record::STACK, &mut record.0[record::STACK..end]);
        }
        Some(record)
    }

    fn record(&self, record: &Record) {
        self.events.fetch_add(1, Ordering::Relaxed);
        let Some(hook) = self.hooks.get(record.hook() as usize) else {
            // The guest wrote where only stubs should.
            self.recorder.state().registry.counters.dropped += 1;
            return;
        };
        let registers = Registers {
            rip: hook.ip,
            rsp: record.word(record::RSP),
            rdi: record.word(record::RDI),
            rsi: record.word(record::RSI),
            rax: record.word(record::RAX),
            rbp: record.word(record::RBP),
            ..Registers::default()
        };
        let moment = Moment::Past(record);
        match hook.entry {
            true => self.recorder.entered(hook.role, hook.argument, &registers, moment),
            false => self.recorder.returned(hook.role, &registers, moment),
        }
    }
}

/// What one entry of the page tables' second level maps.
const GIB: u64 = 1 << 30;

/// The data behind these locks has no invariant that a panicking holder could have broken.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
