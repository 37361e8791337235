//! From traps to jumps, when the kernel's text and page tables are final.
//!
//! A jump takes a trap's place in a paused machine while nobody is inside the function: no vCPU, no task that sleeps there
//! or was interrupted there. So nobody stands between the bytes it displaces, and every event is seen once: by the trap
//! before, by the stub after. Traps and stubs work side by side for as long as it takes.

use super::breakpoint::{Breakpoints, Trap};
use super::ring::{Moved, Ring};
use crate::arch::layout;
use crate::machine::Paused;
use anyhow::{Context, Result, ensure};
use introspect::arch::gigabyte_leaf;
use introspect::arch::layout::{TRACER_CODE, TRACER_RING};
use introspect::hooks::{JUMP_LEN, Jump, StubPoint};
use introspect::memory::{PhysicalMemory, Va};
use std::ops::Range;

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
        self.map(paused).context("Cannot map the tracer's ring")?;
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
        let slide = self.linux.placement.slide;
        let va = jump.va() + slide;
        let at = self.linux.translate(&self.ram, va)?;
        let mut live = vec![0; jump.len()];
        self.ram.read(at, &mut live)?;
        let trap_len = self.instruction.len();
        if at == trap.at {
            live[..trap_len].copy_from_slice(&trap.original[..trap_len]);
        }
        let displaced = jump.displaced(&self.linux.kernel, slide, &live)?;
        let point = match jump {
            Jump::Entry { .. } => StubPoint::Entry(va + jump.len() as u64),
            Jump::Return { .. } => StubPoint::Return,
        };
        let stub = ring.add_stub(trap.number, point, &displaced)?;
        let distance = stub.start.0.wrapping_sub(va.0 + JUMP_LEN as u64).cast_signed();
        let distance = i32::try_from(distance).context("The stub is out of reach")?;
        let mut bytes = [0xe9, 0, 0, 0, 0];
        bytes[1..].copy_from_slice(&distance.to_le_bytes());
        let original = *live.first_chunk().context("A jump needs five bytes")?;
        paused.write(trap.at, &trap.original[..trap_len])?;
        paused.write(at, &bytes)?;
        let _ = trap.moved.set(Moved { at, jump: bytes, original });
        Ok(())
    }

    /// Maps the ring and the stubs in the kernel's page tables, by one entry each: a table of ours would lead the guest's own
    /// walks out of its memory.
    fn map(&self, paused: &mut Paused<'_>) -> Result<()> {
        let entries = [
            (TRACER_RING, gigabyte_leaf(layout::TRACER_RING, true)),
            (TRACER_CODE, gigabyte_leaf(layout::TRACER_CODE, false)),
        ];
        for (va, leaf) in entries {
            let (at, there) = self.linux.space.gigabyte_entry(&self.ram, va)?;
            ensure!(there == 0 || there == leaf, "The guest uses the addresses at {va}: entry {there:#x}");
            paused.write(at, &leaf.to_le_bytes())?;
        }
        Ok(())
    }
}
