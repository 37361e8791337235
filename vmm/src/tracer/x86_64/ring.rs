//! The ring in the guest: its memory, its stubs, and what their records say.

use super::slots::{Slots, lock};
use crate::arch::layout;
use crate::machine::{Machine, Paused, PrivatePages, TrapInstruction, TrapOutcome};
use crate::tracer::{Moment, Recorder, RingStatus};
use anyhow::{Context, Result, ensure};
use guest_profiles::hooks::Role;
use introspect::arch::layout::{TRACER_CODE, TRACER_PATHS, TRACER_RING};
use introspect::arch::{Registers, gigabyte_leaf};
use introspect::hooks::record::{self, Record};
use introspect::hooks::{Instruction, JUMP_LEN, Jump, Plan, Stub, StubPoint, Writer};
use introspect::linux::Linux;
use introspect::memory::Va;
use introspect::unwind::Detours;
use introspect::unwind::paths::{self, Paths};
use rustc_hash::FxHashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// This architecture has one.
pub const HAS_RING: bool = true;

/// Slots: what may happen until the host looks.
const COUNT: u64 = 8192;
/// Bytes for stubs.
const CODE_LEN: usize = 0x1_0000;
/// Bytes for the backtraces that they know.
const PATHS_LEN: usize = 2 << 20;
/// Stubs begin in lines of their own.
const STUB_ALIGN: usize = 64;

/// What a hook's number stands for.
struct Hook {
    role: Role,
    entry: bool,
    argument: u8,
    /// Where events at a return are.
    ip: u64,
}

/// What a trap in a stub is for.
#[derive(Clone, Copy)]
enum StubTrap {
    /// A free slot.
    Room,
    /// An event of this hook that the stub cannot write down.
    Event(u32),
}

/// The backtraces that stubs know, and the slots that they write them to.
struct Known {
    table: Arc<PrivatePages>,
    slots: Arc<Slots>,
}

impl paths::Shared for Known {
    fn word(&self, offset: usize) -> &AtomicU64 {
        self.table.word(offset)
    }

    fn begun(&self) -> u64 {
        self.slots.head()
    }

    fn read(&self) -> u64 {
        self.slots.tail()
    }
}

/// Stubs written so far.
#[derive(Default)]
struct Code {
    len: usize,
}

/// See the module.
pub struct Ring {
    recorder: Arc<Recorder>,
    writer: Writer,
    hooks: Vec<Hook>,
    slots: Arc<Slots>,
    code: Arc<PrivatePages>,
    written: Mutex<Code>,
    /// What traps in stubs are for, by their addresses.
    stub_traps: RwLock<FxHashMap<u64, StubTrap>>,
    waits: AtomicU64,
    fallbacks: AtomicU64,
    known: AtomicU64,
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
        ensure!(linux.says_when_final(), "The kernel does not say when its text is final");
        let slots = Arc::new(Slots::new(COUNT)?);
        let table = Arc::new(PrivatePages::new(PATHS_LEN)?);
        let code = Arc::new(PrivatePages::new(CODE_LEN)?);
        machine.add_private(layout::TRACER_RING, slots.pages())?;
        machine.add_private(layout::TRACER_CODE + TRACER_CODE.0 % GIB, &code)?;
        machine.add_private(layout::TRACER_CODE + TRACER_PATHS.0 % GIB, &table)?;
        let place = paths::Place { start: TRACER_PATHS, len: PATHS_LEN };
        let surroundings = linux.surroundings(machine.ram())?;
        let shared = Known { table, slots: Arc::clone(&slots) };
        recorder.memo().share(Paths::new(Box::new(shared), place));
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
                paths: place,
                trap: instruction.bytes().to_vec(),
                surroundings,
            },
            hooks: hooks.collect(),
            slots,
            code,
            written: Mutex::default(),
            stub_traps: RwLock::default(),
            waits: AtomicU64::new(0),
            fallbacks: AtomicU64::new(0),
            known: AtomicU64::new(0),
        })
    }

    /// Maps the ring, and the stubs with what they know, in the kernel's page tables, by one entry each: a table of ours would lead the guest's own
    /// walks out of its memory.
    ///
    /// # Errors
    /// The page tables have no room.
    pub(in crate::tracer) fn map(&self, linux: &Linux, paused: &mut Paused<'_>) -> Result<()> {
        let entries = [
            (TRACER_RING, gigabyte_leaf(layout::TRACER_RING, true)),
            (TRACER_CODE, gigabyte_leaf(layout::TRACER_CODE, false)),
        ];
        for (va, leaf) in entries {
            let (at, there) = linux.space.gigabyte_entry(&paused.memory(), va)?;
            ensure!(there == 0 || there == leaf, "The guest uses the addresses at {va}: entry {there:#x}");
            paused.write(at, &leaf.to_le_bytes())?;
        }
        Ok(())
    }

    /// Writes the stub of a hook; `live` is what memory holds where the jump will be. The jump to it.
    ///
    /// # Errors
    /// It cannot be made.
    pub(in crate::tracer) fn lead_to_stub(
        &self,
        linux: &Linux,
        hook: u32,
        jump: Jump,
        live: &[u8],
    ) -> Result<[u8; JUMP_LEN]> {
        let slide = linux.placement.slide;
        let va = jump.va() + slide;
        let displaced = jump.displaced(&linux.kernel, slide, live)?;
        let role = self.hooks.get(hook as usize).context("No such hook")?.role;
        let point = StubPoint::new(role, jump, slide);
        let stub = self.add_stub(hook, point, &displaced)?;
        let distance = stub.start.0.wrapping_sub(va.0 + JUMP_LEN as u64).cast_signed();
        let distance = i32::try_from(distance).context("The stub is out of reach")?;
        let mut bytes = [0xe9, 0, 0, 0, 0];
        bytes[1..].copy_from_slice(&distance.to_le_bytes());
        Ok(bytes)
    }

    fn add_stub(&self, hook: u32, point: StubPoint, displaced: &[Instruction]) -> Result<Stub> {
        let mut written = lock(&self.written);
        let stub = self.writer.stub(hook, point, displaced, TRACER_CODE + written.len as u64)?;
        ensure!(written.len + stub.code.len() <= CODE_LEN, "There is no room for more stubs");
        self.code.write(written.len, &stub.code);
        written.len = (written.len + stub.code.len()).next_multiple_of(STUB_ALIGN);
        let traps = [(stub.request, StubTrap::Room), (stub.fallback, StubTrap::Event(hook))];
        let traps = traps.into_iter().filter_map(|(at, what)| Some((at?.0, what)));
        self.stub_traps.write().unwrap_or_else(PoisonError::into_inner).extend(traps);
        let mut modules = self.recorder.modules.write().unwrap_or_else(PoisonError::into_inner);
        modules.detours.add(&stub.detours, stub.start + stub.code.len() as u64);
        Ok(stub)
    }

    /// Forgets all stubs: no jump leads there any more, and nobody is there.
    pub(in crate::tracer) fn forget_stubs(&self) {
        lock(&self.written).len = 0;
        self.stub_traps.write().unwrap_or_else(PoisonError::into_inner).clear();
        let mut modules = self.recorder.modules.write().unwrap_or_else(PoisonError::into_inner);
        modules.detours = Detours::default();
    }

    fn stub_trap(&self, ip: Va) -> Option<StubTrap> {
        self.stub_traps.read().unwrap_or_else(PoisonError::into_inner).get(&ip.0).copied()
    }

    /// True for a trap of a stub.
    pub(in crate::tracer) fn is_stub_trap(&self, ip: Va) -> bool {
        self.stub_trap(ip).is_some()
    }

    /// At such a trap of `cpu`: makes room, or records the event.
    pub(in crate::tracer) fn trap(&self, cpu: usize, registers: &mut Registers) -> TrapOutcome {
        match self.stub_trap(Va(registers.rip)) {
            Some(StubTrap::Room) => {
                if !self.make_room(registers.rax) {
                    return TrapOutcome::Again;
                }
            }
            Some(StubTrap::Event(hook)) => self.event_now(cpu, hook, registers),
            None => return TrapOutcome::Foreign,
        }
        registers.rip += self.writer.trap.len() as u64;
        TrapOutcome::Resume
    }

    /// Has events read until the slot of `position` is free: true. The vCPUs that still fill those before it need the time.
    fn make_room(&self, position: u64) -> bool {
        self.waits.fetch_add(1, Ordering::Relaxed);
        self.slots.make_room(position, || self.drain())
    }

    /// As the trap would that the stub stands for.
    fn event_now(&self, cpu: usize, hook: u32, registers: &Registers) {
        self.fallbacks.fetch_add(1, Ordering::Relaxed);
        // What happened before comes first.
        self.drain();
        let Some(hook) = self.hooks.get(hook as usize) else { return };
        let at = Registers { rip: hook.ip, ..*registers };
        if hook.entry {
            self.recorder.entered(hook.role, hook.argument, &at, Moment::Now { cpu });
        } else {
            self.keep_array(hook.role, &at);
            self.recorder.returned(hook.role, &at, Moment::Now { cpu });
        }
    }

    /// Before the trap at a return: a stub at the entry may have kept the array.
    pub(in crate::tracer) fn keep_array(&self, role: Role, registers: &Registers) {
        if matches!(role, Role::BulkAlloc | Role::PageBulkAlloc)
            && let Some(array) = self.slots.take_array(registers.rsp)
        {
            self.recorder.pend(registers, array);
        }
    }

    /// Reads all events that were complete when it was called.
    pub fn drain(&self) {
        // The stack behind the return address is there at returns only.
        let has_stack = |hook: u32| self.hooks.get(hook as usize).is_some_and(|hook| !hook.entry);
        self.slots.drain(has_stack, |record| self.record(record));
    }

    /// For `status`.
    pub fn status(&self) -> RingStatus {
        let events = self.slots.taken();
        RingStatus {
            events,
            lag: self.slots.head().saturating_sub(events),
            waits: self.waits.load(Ordering::Relaxed),
            fallbacks: self.fallbacks.load(Ordering::Relaxed),
            known: self.known.load(Ordering::Relaxed),
        }
    }

    fn record(&self, record: &Record<'_>) {
        let Some(hook) = self.hooks.get(record.hook() as usize) else {
            // The guest wrote where only stubs should.
            self.recorder.state().registry.counters.dropped += 1;
            return;
        };
        let mut at = Registers { rip: hook.ip, rsp: record.word(record::RSP), ..Registers::default() };
        if let Some((before, words)) = record.array() {
            let has_orders = matches!(hook.role, Role::PageListFree | Role::PageBatchFree);
            let orders = if has_orders { record::ORDERS } else { 0 };
            let blocks = words.map(|word| (Va(word & !orders), word & orders));
            return self.recorder.bulk(hook.role, &at, before, blocks, record.caller());
        }
        let moment = Moment::Past(record);
        if hook.entry {
            (at.rdi, at.rsi) = (record.word(record::RDI), record.word(record::RSI));
            at.rdx = record.word(record::RDX);
            self.recorder.entered(hook.role, hook.argument, &at, moment);
        } else {
            if record.path().is_some() {
                self.known.fetch_add(1, Ordering::Relaxed);
            }
            (at.rax, at.rbp) = (record.word(record::RAX), record.word(record::RBP));
            self.recorder.returned(hook.role, &at, moment);
        }
    }
}

/// What one entry of the page tables' second level maps.
const GIB: u64 = 1 << 30;
