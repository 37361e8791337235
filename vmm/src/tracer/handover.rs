//! From traps to jumps, when the kernel's text and page tables are final.
//!
//! A jump takes a trap's place in a paused machine while nobody is inside the function: no vCPU, no task that sleeps there
//! or was interrupted there. So nobody stands between the bytes it displaces, and every event is seen once: by the trap
//! before, by the stub after. Traps and stubs work side by side for as long as it takes.

use super::breakpoint::{Breakpoints, Trap};
use super::ring::Ring;
use crate::machine::Paused;
use anyhow::{Context, Result};
use introspect::hooks::{JUMP_LEN, Jump};
use introspect::memory::{Pa, PhysicalMemory, Va};
use std::ops::Range;

/// A jump in the place of a trap.
pub struct Moved {
    /// Where it is in guest memory.
    pub at: Pa,
    /// It.
    pub jump: [u8; JUMP_LEN],
    /// What belongs there instead.
    pub original: [u8; JUMP_LEN],
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

impl Breakpoints {
    /// Hooks whose trap a jump can take the place of, and has not yet.
    pub fn to_move(&self) -> usize {
        let waits =
            |trap: &&Trap| trap.jump.is_ok() && trap.moved.get().is_none() && trap.stuck.get().is_none();
        self.traps.values().filter(waits).count()
    }

    /// Hooks whose trap a jump has taken the place of.
    pub fn moved(&self) -> usize {
        self.traps.values().filter(|trap| trap.moved.get().is_some()).count()
    }

    /// Lets jumps take the place of traps in functions that nobody is in, as `is_free` says by their names and by the
    /// bytes that a jump displaces.
    ///
    /// # Errors
    /// The page tables have no room.
    pub fn hand_over(
        &self,
        paused: &mut Paused<'_>,
        is_free: impl Fn(&str, Range<Va>) -> bool,
    ) -> Result<()> {
        let Some(ring) = self.ring() else { return Ok(()) };
        ring.map(&self.linux, paused).context("Cannot map the tracer's ring")?;
        for trap in self.traps.values() {
            let Ok(jump) = trap.jump else { continue };
            let va = jump.va() + self.linux.placement.slide;
            let done = trap.moved.get().is_some() || trap.stuck.get().is_some();
            if done || !is_free(&trap.function, va..va + jump.len() as u64) {
                continue;
            }
            if let Err(why) = self.hand_over_one(ring, paused, trap, jump) {
                let _ = trap.stuck.set(format!("{}: {why:#}", trap.function));
            }
        }
        Ok(())
    }

    /// Why traps stay that a jump should have taken the place of.
    pub fn stuck(&self) -> impl Iterator<Item = &str> {
        self.traps.values().filter_map(|trap| trap.stuck.get()).map(String::as_str)
    }

    fn hand_over_one(&self, ring: &Ring, paused: &mut Paused<'_>, trap: &Trap, jump: Jump) -> Result<()> {
        let va = jump.va() + self.linux.placement.slide;
        let at = self.linux.translate(&self.ram, va)?;
        let mut live = vec![0; jump.len()];
        self.ram.read(at, &mut live)?;
        let trap_len = self.instruction.len();
        if at == trap.at {
            live[..trap_len].copy_from_slice(&trap.original[..trap_len]);
        }
        let bytes = ring.lead_to_stub(&self.linux, trap.number, jump, &live)?;
        let original = *live.first_chunk().context("A jump needs more bytes")?;
        paused.write(trap.at, &trap.original[..trap_len])?;
        paused.write(at, &bytes)?;
        let _ = trap.moved.set(Moved { at, jump: bytes, original });
        Ok(())
    }
}
