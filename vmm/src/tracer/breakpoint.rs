//! The breakpoint tracer: traps in the guest's text, one exit each.
//!
//! The traps are written into guest memory before the kernel allocates anything and stay: the displaced
//! instructions are carried out on the vCPU's registers, so no other vCPU can slip past a lifted trap.

use super::Recorder;
use crate::arch::synchronise_code;
use crate::machine::{GuestRam, Paused, TrapHandler, TrapInstruction, TrapOutcome};
use anyhow::{Context, Result, bail};
use guest_profiles::hooks::Role;
use introspect::arch::Registers;
use introspect::hooks::{Displaced, Plan, Step};
use introspect::linux::Linux;
use introspect::memory::{Pa, PhysicalMemory, Va};
use rustc_hash::FxHashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// One planted trap.
struct Trap {
    role: Role,
    entry: bool,
    argument: u8,
    displaced: Vec<Displaced>,
    /// Run-time address where the guest goes on.
    resume: Va,
    /// Where the trap is in guest memory, and what belongs there instead.
    at: Pa,
    original: Vec<u8>,
}

/// The tracer.
pub struct Breakpoints {
    recorder: Arc<Recorder>,
    linux: Arc<Linux>,
    ram: GuestRam,
    instruction: TrapInstruction,
    traps: FxHashMap<u64, Trap>,
    hits: AtomicU64,
    rearmed: AtomicU64,
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
        for planned in &plan.traps {
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
                    role: planned.role,
                    entry: planned.entry,
                    argument: planned.argument,
                    displaced: planned.site.displaced.clone(),
                    resume: planned.site.resume() + linux.placement.slide,
                    at,
                    original: planned.site.original.clone(),
                },
            );
        }
        Ok(Self {
            recorder,
            linux,
            ram,
            instruction,
            traps,
            hits: AtomicU64::new(0),
            rearmed: AtomicU64::new(0),
        })
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

    /// What belongs where traps are now, ascending.
    ///
    /// # Errors
    /// Guest memory cannot be read.
    pub fn originals(&self) -> Result<Vec<(Pa, &[u8])>> {
        let mut originals = Vec::new();
        for trap in self
            .traps
            .values()
            .filter_map(|trap| self.is_planted(trap).map(|is| is.then_some(trap)).transpose())
        {
            let trap = trap?;
            originals.push((trap.at, &trap.original[..self.instruction.len()]));
        }
        originals.sort_unstable();
        Ok(originals)
    }

    fn is_planted(&self, trap: &Trap) -> Result<bool> {
        let want = self.instruction.bytes();
        let mut there = [0; 4];
        let there = &mut there[..want.len()];
        self.ram.read(trap.at, there)?;
        Ok(there == want)
    }

    /// Checks every site and plants lost traps again. Returns the addresses that had lost theirs.
    ///
    /// # Errors
    /// Guest memory cannot be read.
    pub fn verify(&self, paused: &mut Paused<'_>) -> Result<Vec<Va>> {
        let want = self.instruction.bytes();
        let mut lost = Vec::new();
        for (&va, trap) in &self.traps {
            if !self.is_planted(trap)? {
                lost.push(Va(va));
                paused.write(trap.at, want)?;
                synchronise_code(&self.ram, trap.at, want.len());
            }
        }
        self.rearmed.fetch_add(lost.len() as u64, Ordering::Relaxed);
        Ok(lost)
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
        self.traps.contains_key(&ip.0)
    }

    fn trap(&self, cpu: usize, registers: &mut Registers) -> TrapOutcome {
        let Some(trap) = self.traps.get(&registers.ip().0) else {
            return TrapOutcome::Foreign;
        };
        self.hits.fetch_add(1, Ordering::Relaxed);
        if trap.entry {
            self.recorder.entered(trap.role, trap.argument, registers);
        }
        if !self.step_over(trap, registers) {
            // The guest overflows its stack, or reads where nothing is: let it meet its own page fault. The site stays without a trap until
            // `verify` finds and counts it.
            let _ = self.ram.write(trap.at, &trap.original);
            synchronise_code(&self.ram, trap.at, trap.original.len());
            return TrapOutcome::Resume;
        }
        if !trap.entry {
            self.recorder.returned(trap.role, cpu, registers);
        }
        TrapOutcome::Resume
    }
}
