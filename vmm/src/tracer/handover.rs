//! From traps to jumps, while the kernel does not patch its text.
//!
//! A jump takes a trap's place in a paused machine while nobody is inside the function: no vCPU, no task that sleeps there
//! or was interrupted there. So nobody stands between the bytes it displaces, and every event is seen once: by the trap
//! before, by the stub after. Traps and stubs work side by side for as long as it takes.
//!
//! It happens twice. Until the kernel begins to patch its text there is one CPU and one task, and what that task calls to
//! begin is none of the functions traced: so all jumps are taken back at that moment, on the one vCPU that runs, and
//! nobody is in a stub either. Once the text is final, jumps come for good.

use super::breakpoint::{Breakpoints, Trap};
use super::ring::Ring;
use crate::arch::synchronise_code;
use crate::machine::Paused;
use anyhow::{Context, Result};
use introspect::hooks::{JUMP_LEN, Jump};
use introspect::memory::{Pa, PhysicalMemory, Va};
use std::ops::Range;
use std::sync::{MutexGuard, PoisonError};

/// What is in the place of a hook.
#[derive(Default)]
pub enum Place {
    /// The trap.
    #[default]
    Trap,
    /// The trap; its stub is there.
    Ready(Stub),
    /// The jump to that stub.
    Jump(Stub),
    /// The trap, for a jump cannot be there after all.
    Stuck(String),
}

/// What a jump in the place of a trap leads to.
pub struct Stub {
    /// Where the jump belongs in guest memory.
    pub at: Pa,
    /// The jump.
    pub jump: [u8; JUMP_LEN],
    /// What belongs there instead, and is what the stub carries out in its place.
    pub live: Vec<u8>,
}

/// What `status` says of the ring.
pub struct RingStatus {
    /// Events read.
    pub events: u64,
    /// Positions given out that are not read yet.
    pub lag: u64,
    /// Exits for want of a free slot.
    pub waits: u64,
    /// Events that stubs could not write down, and trapped for.
    pub fallbacks: u64,
    /// Allocations whose backtraces stubs knew.
    pub known: u64,
}

impl Trap {
    /// What is there, locked.
    pub fn place(&self) -> MutexGuard<'_, Place> {
        // Each is whole at any time.
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True when a jump has taken its place.
    pub fn is_moved(&self) -> bool {
        matches!(*self.place(), Place::Jump(_))
    }
}

impl Breakpoints {
    /// Hooks whose trap a jump can take the place of, and has not yet.
    pub fn to_move(&self) -> usize {
        let waits =
            |trap: &&Trap| trap.jump.is_ok() && matches!(*trap.place(), Place::Trap | Place::Ready(_));
        self.traps.values().filter(waits).count()
    }

    /// Hooks whose trap a jump has taken the place of.
    pub fn moved(&self) -> usize {
        self.traps.values().filter(|trap| trap.is_moved()).count()
    }

    /// Why traps stay that a jump should have taken the place of.
    pub fn stuck(&self) -> Vec<String> {
        let why = |trap: &Trap| match &*trap.place() {
            Place::Stuck(why) => Some(why.clone()),
            _ => None,
        };
        self.traps.values().filter_map(why).collect()
    }

    /// Makes the stubs that are missing, while the guest runs. False while there can be none: before the kernel has an
    /// allocator, and so addresses that stubs rely on, and while it patches its text.
    ///
    /// # Errors
    /// Guest memory cannot be read.
    pub fn prepare(&self) -> Result<bool> {
        let Some(ring) = self.ring() else { return Ok(false) };
        let mut early = self.early();
        // However that came about unnoticed.
        *early &= !self.linux.is_final(&self.ram)?;
        if !self.is_time(*early)? {
            return Ok(false);
        }
        for trap in self.traps.values() {
            let mut place = trap.place();
            if let (Place::Trap, Ok(jump)) = (&*place, &trap.jump) {
                match self.stub(ring, trap, *jump) {
                    Ok(stub) => *place = Place::Ready(stub),
                    // It is tried again when the text is final.
                    Err(_) if *early => {}
                    Err(why) => *place = Place::Stuck(format!("{}: {why:#}", trap.function)),
                }
            }
        }
        Ok(true)
    }

    /// Lets jumps to the stubs that are there take the place of traps in functions that nobody is in, as `is_free` says by
    /// their names and by the bytes that a jump displaces. False when the kernel has begun to patch its text since they were
    /// made.
    ///
    /// # Errors
    /// The page tables have no room, or guest memory cannot be read or written.
    pub fn hand_over(
        &self,
        paused: &mut Paused<'_>,
        is_free: impl Fn(&str, Range<Va>) -> bool,
    ) -> Result<bool> {
        let Some(ring) = self.ring() else { return Ok(false) };
        if !self.is_time(*self.early())? {
            return Ok(false);
        }
        ring.map(&self.linux, paused).context("Cannot map the tracer's ring")?;
        for trap in self.traps.values() {
            let Ok(jump) = &trap.jump else { continue };
            let va = jump.va() + self.linux.placement.slide;
            if is_free(&trap.function, va..va + jump.len() as u64) {
                self.hand_over_one(paused, trap)?;
            }
        }
        Ok(true)
    }

    /// The kernel is about to patch its text: puts traps where jumps are. For the vCPU that is in a trap there, while it is
    /// the only one that runs.
    pub(super) fn take_back(&self) {
        let mut early = self.early();
        // Modules are patched, too, and much later.
        let was_early = std::mem::take(&mut *early) && self.linux.is_final(&self.ram).is_ok_and(|is| !is);
        let Some(ring) = self.ring().filter(|_| was_early) else { return };
        let mut all = true;
        for trap in self.traps.values() {
            let mut place = trap.place();
            let written = match &*place {
                Place::Jump(stub) => self.plant_trap_for(trap, stub),
                _ => Ok(()),
            };
            match written {
                Ok(()) => *place = Place::Trap,
                Err(_) => all = false,
            }
        }
        if all {
            ring.forget_stubs();
        }
    }

    fn plant_trap_for(&self, trap: &Trap, stub: &Stub) -> Result<()> {
        self.ram.write(stub.at, &stub.live[..stub.jump.len()])?;
        self.ram.write(trap.at, self.instruction.bytes())?;
        synchronise_code(&self.ram, stub.at, stub.live.len());
        Ok(())
    }

    /// True until the kernel begins to patch its text, where it can be told.
    pub fn is_early(&self) -> bool {
        *self.early()
    }

    /// That, locked. A thread that pauses the machine locks it afterwards: a vCPU may wait for it in a trap.
    fn early(&self) -> MutexGuard<'_, bool> {
        self.early.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_time(&self, early: bool) -> Result<bool> {
        if early { Ok(self.hits() > 0) } else { self.linux.is_final(&self.ram) }
    }

    /// What memory holds where a jump belongs, the trap taken out.
    fn live(&self, trap: &Trap, at: Pa, len: usize) -> Result<Vec<u8>> {
        let mut live = vec![0; len];
        self.ram.read(at, &mut live)?;
        let trap_len = self.instruction.len();
        if at == trap.at {
            live[..trap_len].copy_from_slice(&trap.original[..trap_len]);
        }
        Ok(live)
    }

    fn stub(&self, ring: &Ring, trap: &Trap, jump: Jump) -> Result<Stub> {
        let at = self.linux.translate(&self.ram, jump.va() + self.linux.placement.slide)?;
        let live = self.live(trap, at, jump.len())?;
        let jump = ring.lead_to_stub(&self.linux, trap.number, jump, &live)?;
        Ok(Stub { at, jump, live })
    }

    fn hand_over_one(&self, paused: &mut Paused<'_>, trap: &Trap) -> Result<()> {
        let mut place = trap.place();
        *place = match std::mem::take(&mut *place) {
            // The guest has changed it since: another stub is made, behind the first.
            Place::Ready(stub) if self.live(trap, stub.at, stub.live.len())? != stub.live => Place::Trap,
            Place::Ready(stub) => {
                paused.write(trap.at, &trap.original[..self.instruction.len()])?;
                paused.write(stub.at, &stub.jump)?;
                Place::Jump(stub)
            }
            other => other,
        };
        Ok(())
    }
}
