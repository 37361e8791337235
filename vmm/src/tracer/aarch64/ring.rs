//! The ring in the guest, which arm64 has not yet: its stubs would have to be written for it.

use crate::machine::{Machine, Paused, TrapInstruction, TrapOutcome};
use crate::tracer::{Recorder, RingStatus};
use anyhow::{Result, bail};
use guest_profiles::hooks::Role;
use introspect::arch::Registers;
use introspect::hooks::{JUMP_LEN, Jump, Plan};
use introspect::linux::Linux;
use introspect::memory::Va;
use std::sync::Arc;

/// False: there is none.
pub const HAS_RING: bool = false;

/// There is none.
pub enum Ring {}

impl Ring {
    /// None can be made.
    ///
    /// # Errors
    /// Always.
    pub fn new(
        _machine: &Machine,
        _linux: &Linux,
        _recorder: Arc<Recorder>,
        _plan: &Plan,
        _instruction: TrapInstruction,
    ) -> Result<Self> {
        bail!("It is for x86-64 only")
    }

    /// Maps the ring and the stubs in the guest.
    ///
    /// # Errors
    /// The page tables have no room.
    pub(in crate::tracer) fn map(&self, _linux: &Linux, _paused: &mut Paused<'_>) -> Result<()> {
        match *self {}
    }

    /// Writes the stub of a hook. The jump to it.
    ///
    /// # Errors
    /// It cannot be made.
    pub(in crate::tracer) fn lead_to_stub(
        &self,
        _linux: &Linux,
        _hook: u32,
        _jump: Jump,
        _live: &[u8],
    ) -> Result<[u8; JUMP_LEN]> {
        match *self {}
    }

    /// Forgets all stubs.
    pub(in crate::tracer) fn forget_stubs(&self) {
        match *self {}
    }

    /// True for a trap of a stub.
    pub(in crate::tracer) fn is_stub_trap(&self, _ip: Va) -> bool {
        match *self {}
    }

    /// At such a trap: makes room, or records the event.
    pub(in crate::tracer) fn trap(&self, _cpu: usize, _registers: &mut Registers) -> TrapOutcome {
        match *self {}
    }

    /// Before the trap at a return: a stub at the entry may have kept the array.
    pub(in crate::tracer) fn keep_array(&self, _role: Role, _registers: &Registers) {
        match *self {}
    }

    /// Reads all events that were complete when it was called.
    pub fn drain(&self) {
        match *self {}
    }

    /// For `status`.
    pub fn status(&self) -> RingStatus {
        match *self {}
    }
}
