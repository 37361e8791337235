//! The breakpoint tracer: traps in the guest's text, one exit each.
//!
//! The traps are written into guest memory before the kernel allocates anything and stay: the displaced
//! instructions are carried out on the vCPU's registers, so no other vCPU can slip past a lifted trap.

use super::handover::Place;
use super::recorder::{Moment, Recorder};
use super::ring::Ring;
use crate::arch::synchronise_code;
use crate::machine::{GuestRam, Paused, TrapHandler, TrapInstruction, TrapOutcome};
use anyhow::{Context, Result, bail};
use guest_profiles::hooks::Role;
use introspect::arch::Registers;
use introspect::hooks::{Displaced, JUMP_LEN, Jump, Plan, RETURN_IS_DISPLACED, SiteError, Step};
use introspect::linux::Linux;
use introspect::memory::{Pa, PhysicalMemory, Va};
use rustc_hash::FxHashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

/// One planted trap.
pub(super) struct Trap {
    /// Its place in the plan.
    pub number: u32,
    pub function: String,
    pub role: Role,
    pub entry: bool,
    pub argument: u8,
    displaced: Vec<Displaced>,
    /// Run-time address where the guest goes on.
    pub resume: Va,
    /// Where the trap is in guest memory, and what belongs there instead.
    pub at: Pa,
    pub original: Vec<u8>,
    /// Where a jump can take its place.
    pub jump: Result<Jump, SiteError>,
    /// Whether one has.
    pub place: Mutex<Place>,
}

/// What stands in the guest's text.
struct Planted {
    at: Pa,
    there: Vec<u8>,
    /// What belongs there instead.
    original: Vec<u8>,
}

/// The tracer.
pub struct Breakpoints {
    recorder: Arc<Recorder>,
    pub(super) linux: Arc<Linux>,
    pub(super) ram: GuestRam,
    pub(super) instruction: TrapInstruction,
    pub(super) traps: FxHashMap<u64, Trap>,
    ring: OnceLock<Arc<Ring>>,
    /// Until the kernel begins to patch its text: jumps can be taken back then. Locked while stubs are made.
    pub(super) early: Mutex<bool>,
    hits: AtomicU64,
    rearmed: AtomicU64,
    patches: Patches,
}

/// What is known of the guest's changes of its text.
#[derive(Default)]
struct Patches {
    /// So many, each with a look at every trap behind it.
    seen: AtomicU64,
    /// One overwrote traps.
    lossy: Mutex<bool>,
    changed: Condvar,
}

impl Patches {
    fn lossy(&self) -> MutexGuard<'_, bool> {
        // Nothing that could panic happens while it is held.
        self.lossy.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Breakpoints {
    /// Plants the traps of `plan`. The guest's image must be in memory, and may not have changed its text yet.
    ///
    /// # Errors
    /// The image in memory is not the one the plan was made for.
    pub fn plant(
        recorder: Arc<Recorder>,
        linux: Arc<Linux>,
        ram: GuestRam,
        plan: &Plan,
        instruction: TrapInstruction,
    ) -> Result<Self> {
        let mut traps = FxHashMap::default();
        for (number, planned) in (0..).zip(&plan.traps) {
            let va = planned.site.va + linux.placement.slide;
            let at =
                linux.translate(&ram, va).with_context(|| format!("Trap in {} at {va}", planned.function))?;
            let mut there = vec![0; planned.site.original.len()];
            ram.read(at, &mut there)?;
            if there != planned.site.original {
                bail!(
                    "Cannot trap {} at {va}: memory holds {there:02x?}, the image {:02x?}",
                    planned.function,
                    planned.site.original
                );
            }
            ram.write(at, instruction.bytes())?;
            synchronise_code(&ram, at, instruction.len());
            traps.insert(
                va.0,
                Trap {
                    number,
                    function: planned.function.clone(),
                    role: planned.role,
                    entry: planned.entry,
                    argument: planned.argument,
                    displaced: planned.site.displaced.clone(),
                    resume: planned.site.resume() + linux.placement.slide,
                    at,
                    original: planned.site.original.clone(),
                    jump: planned.jump.clone(),
                    place: Mutex::default(),
                },
            );
        }
        Ok(Self {
            recorder,
            linux,
            ram,
            instruction,
            traps,
            ring: OnceLock::new(),
            early: Mutex::new(plan.count(Role::Patching) > 0),
            hits: AtomicU64::new(0),
            rearmed: AtomicU64::new(0),
            patches: Patches::default(),
        })
    }

    /// Has events written into `ring` where a jump takes a trap's place, and looks there before each trap. Nothing may
    /// run yet.
    pub fn use_ring(&self, ring: Arc<Ring>) {
        let _ = self.ring.set(ring);
    }

    /// The ring, if one is used.
    pub fn ring(&self) -> Option<&Arc<Ring>> {
        self.ring.get()
    }

    /// Number of traps.
    pub fn count(&self) -> usize {
        self.traps.len()
    }

    /// Trap exits handled so far.
    pub fn hits(&self) -> u64 {
        self.hits.load(Ordering::Relaxed)
    }

    /// Traps that were found overwritten by the guest and planted again: events may have been missed.
    pub fn rearmed(&self) -> u64 {
        self.rearmed.load(Ordering::Relaxed)
    }

    /// How often the guest has changed its text and all traps were looked at afterwards.
    pub fn patches(&self) -> u64 {
        self.patches.seen.load(Ordering::Relaxed)
    }

    /// Waits until a change of the guest's text has overwritten traps: true, once for each. False when `timeout` passes
    /// first.
    pub fn wait_for_loss(&self, timeout: Duration) -> bool {
        let (changed, lossy) = (&self.patches.changed, self.patches.lossy());
        let waited = changed.wait_timeout_while(lossy, timeout, |lossy| !*lossy);
        std::mem::take(&mut *waited.unwrap_or_else(PoisonError::into_inner).0)
    }

    /// The guest has changed its text: looks whether all traps are still there. Others run meanwhile, so that planting them
    /// again is for a pause.
    fn patched(&self) {
        self.patches.seen.fetch_add(1, Ordering::Relaxed);
        if !self.lost().is_ok_and(|lost| lost.is_empty()) {
            *self.patches.lossy() = true;
            self.patches.changed.notify_all();
        }
    }

    /// What belongs where traps and jumps are now, ascending.
    ///
    /// # Errors
    /// Guest memory cannot be read.
    pub fn originals(&self) -> Result<Vec<(Pa, Vec<u8>)>> {
        let mut originals = Vec::new();
        for trap in self.traps.values() {
            let planted = self.planted(trap);
            if self.holds(planted.at, &planted.there)? {
                originals.push((planted.at, planted.original));
            }
        }
        originals.sort_unstable();
        Ok(originals)
    }

    /// The trap, or the jump in its place.
    fn planted(&self, trap: &Trap) -> Planted {
        let there = self.instruction.bytes();
        match &*trap.place() {
            Place::Jump(stub) => Planted {
                at: stub.at,
                there: stub.jump.to_vec(),
                original: stub.live[..stub.jump.len()].to_vec(),
            },
            _ => Planted {
                at: trap.at,
                there: there.to_vec(),
                original: trap.original[..there.len()].to_vec(),
            },
        }
    }

    fn holds(&self, at: Pa, want: &[u8]) -> Result<bool> {
        let mut there = [0; JUMP_LEN];
        let there = &mut there[..want.len()];
        self.ram.read(at, there)?;
        Ok(there == want)
    }

    /// The sites where neither trap nor jump is any more.
    ///
    /// # Errors
    /// Guest memory cannot be read.
    pub fn lost(&self) -> Result<Vec<Va>> {
        let mut lost = Vec::new();
        for (&va, trap) in &self.traps {
            let planted = self.planted(trap);
            if !self.holds(planted.at, &planted.there)? {
                lost.push(Va(va));
            }
        }
        Ok(lost)
    }

    /// Plants these sites again, but for those between whose bytes somebody stands: they stay lost until the next time.
    ///
    /// # Errors
    /// Guest memory cannot be written.
    pub fn plant_again(
        &self,
        paused: &mut Paused<'_>,
        lost: &[Va],
        is_inside: impl Fn(&Range<Va>) -> bool,
    ) -> Result<()> {
        for va in lost {
            let Some(trap) = self.traps.get(&va.0) else { continue };
            let Planted { at, there, .. } = self.planted(trap);
            let start = match (trap.is_moved(), &trap.jump) {
                (true, Ok(jump)) => jump.va() + self.linux.placement.slide,
                _ => *va,
            };
            if !is_inside(&(start..start + there.len() as u64)) {
                paused.write(at, &there)?;
                synchronise_code(&self.ram, at, there.len());
                self.rearmed.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// Carries out the displaced instructions. False when memory that they need, such as the guest's stack, is not there.
    fn step_over(&self, trap: &Trap, registers: &mut Registers) -> bool {
        let mut after = *registers;
        let mut resume = trap.resume;
        let store = |va: Va, bytes: &[u8]| {
            let place = self.linux.translate(&self.ram, va);
            place.is_ok_and(|pa| self.ram.write(pa, bytes).is_ok())
        };
        for displaced in &trap.displaced {
            let load = |va| self.linux.read_u64(&self.ram, va).ok();
            match displaced.execute(&mut after, load) {
                Some(Step::Done) => {}
                Some(Step::Store(va, value)) if store(va, &value.to_le_bytes()) => {}
                Some(Step::StorePair(va, words)) if store_pair(store, va, words) => {}
                Some(Step::Go(va)) => resume = va,
                Some(Step::Store(..) | Step::StorePair(..)) => return false,
                None => return false,
            }
        }
        after.set_ip(resume);
        *registers = after;
        true
    }
}

/// Stores two words, which may lie in different pages.
fn store_pair(store: impl Fn(Va, &[u8]) -> bool, va: Va, words: [u64; 2]) -> bool {
    store(va, &words[0].to_le_bytes()) && store(va + 8, &words[1].to_le_bytes())
}

impl TrapHandler for Breakpoints {
    fn is_site(&self, ip: Va) -> bool {
        self.traps.contains_key(&ip.0) || self.ring().is_some_and(|ring| ring.is_stub_trap(ip))
    }

    fn trap(&self, cpu: usize, registers: &mut Registers) -> TrapOutcome {
        let Some(trap) = self.traps.get(&registers.ip().0) else {
            return self.ring().map_or(TrapOutcome::Foreign, |ring| ring.trap(cpu, registers));
        };
        self.hits.fetch_add(1, Ordering::Relaxed);
        if let Some(ring) = self.ring() {
            // What happened before comes first.
            ring.drain();
        }
        match trap.role {
            Role::Patching => self.take_back(),
            Role::Patched | Role::ModuleLoad => self.patched(),
            _ => {}
        }
        let moment = Moment::Now { cpu };
        if trap.entry {
            self.recorder.entered(trap.role, trap.argument, registers, moment);
        } else if RETURN_IS_DISPLACED {
            self.recorder.returned(trap.role, registers, moment);
        }
        if !self.step_over(trap, registers) {
            // The guest overflows its stack, or reads where nothing is: let it meet its own page fault. The site stays without a trap until
            // somebody looks for lost ones.
            let _ = self.ram.write(trap.at, &trap.original);
            synchronise_code(&self.ram, trap.at, trap.original.len());
            return TrapOutcome::Resume;
        }
        if !trap.entry && !RETURN_IS_DISPLACED {
            if let Some(ring) = self.ring() {
                ring.keep_array(trap.role, registers);
            }
            self.recorder.returned(trap.role, registers, moment);
        }
        TrapOutcome::Resume
    }
}
