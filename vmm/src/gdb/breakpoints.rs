//! Breakpoints that gdb sets: software ones are trap instructions in the kernel's text, hardware ones debug registers.

use super::target::{Target, is_kernels, thread};
use crate::arch::{Point, PointKind};
use crate::machine::TrapHandler;
use anyhow::{Context, Result, ensure};
use gdbstub::stub::MultiThreadStopReason;
use gdbstub::target::TargetResult;
use gdbstub::target::ext::breakpoints::{
    Breakpoints, HwBreakpoint, HwBreakpointOps, HwWatchpoint, HwWatchpointOps, SwBreakpoint, SwBreakpointOps,
    WatchKind,
};
use introspect::arch::instruction_len;
use introspect::memory::{Pa, PhysicalMemory, Va};

/// Longest instruction (Intel SDM volume 2, 2.3.11).
const LONGEST: usize = 15;

/// A software breakpoint.
pub(super) struct Planted {
    /// Where in memory, and what belongs there. Empty where a trap of the tracer stands: that one stops, too.
    pub at: Pa,
    pub original: Vec<u8>,
}

impl Target {
    fn plant(&mut self, va: Va) -> Result<()> {
        if self.planted.contains_key(&va) {
            return Ok(());
        }
        ensure!(is_kernels(va), "breakpoints are for the kernel's code, and {va} is a user address");
        let (at, code) = {
            let paused = self.parts.guest.pause()?;
            let mut code = vec![0; LONGEST];
            let read = self.read(&paused, va, &mut code, 0)?;
            code.truncate(read);
            let memory = paused.memory();
            (self.translate(&paused, &memory, va, 0).context("nothing is mapped there")?, code)
        };
        if self.parts.traps.is_site(va) {
            self.planted.insert(va, Planted { at, original: Vec::new() });
            return Ok(());
        }
        let trap = self.parts.instruction.bytes();
        let len = instruction_len(&code).with_context(|| format!("no instruction begins at {va}"))?;
        let (has, takes) = (len, trap.len());
        ensure!(
            has >= takes,
            "the instruction at {va} has {has} byte, and a trap takes {takes} on this host: take the one before it"
        );
        let mut paused = self.parts.guest.pause()?;
        let overlaps = |(other, bytes): &(Pa, Vec<u8>)| {
            other.0 < at.0 + trap.len() as u64 && at.0 < other.0 + bytes.len() as u64
        };
        ensure!(!self.hidden()?.iter().any(overlaps), "another trap stands across {va}");
        // Text is mapped in one piece; modules' only page by page.
        let last = trap.len() as u64 - 1;
        let end = self.translate(&paused, &paused.memory(), va + last, 0);
        ensure!(end == Some(at + last), "the instruction at {va} goes over the end of a page");
        let mut original = vec![0; trap.len()];
        paused.memory().read(at, &mut original)?;
        paused.write(at, trap)?;
        self.planted.insert(va, Planted { at, original });
        Ok(())
    }

    /// Puts back what was there, unless the guest has written something else meanwhile.
    pub(super) fn unplant(&mut self, va: Va) -> bool {
        let Some(planted) = self.planted.remove(&va) else { return false };
        let restored = (|| {
            let mut paused = self.parts.guest.pause()?;
            let mut there = vec![0; planted.original.len()];
            paused.memory().read(planted.at, &mut there)?;
            if self.parts.instruction.bytes() == there {
                paused.write(planted.at, &planted.original)?;
            }
            anyhow::Ok(())
        })();
        if let Err(error) = restored {
            eprintln!("kleak-vmm: warning: gdb: The breakpoint at {va} stays: {error:#}");
        }
        true
    }

    fn watch(&mut self, va: u64, len: u64, kind: PointKind) -> bool {
        let Ok(len) = u8::try_from(len) else { return false };
        let point = Point { va: Va(va), len, kind };
        let fits = point.is_possible(self.points.len());
        if self.parts.hardware && fits {
            self.points.push(point);
        }
        self.parts.hardware && fits
    }

    fn unwatch(&mut self, va: u64, len: u64, kind: PointKind) -> bool {
        let known = self
            .points
            .iter()
            .position(|point| point.va == Va(va) && u64::from(point.len) == len && point.kind == kind);
        known.map(|at| self.points.remove(at)).is_some()
    }

    /// What gdb is told of a vCPU that met a point.
    pub(super) fn at_point(&self, cpu: usize, point: usize) -> MultiThreadStopReason<u64> {
        let tid = thread(cpu);
        let watch = |kind, point: &Point| MultiThreadStopReason::Watch { tid, kind, addr: point.va.0 };
        match self.points.get(point) {
            Some(point) if point.kind == PointKind::Write => watch(WatchKind::Write, point),
            Some(point) if point.kind == PointKind::Access => watch(WatchKind::ReadWrite, point),
            _ => MultiThreadStopReason::HwBreak(tid),
        }
    }
}

fn point_kind(kind: WatchKind) -> Option<PointKind> {
    match kind {
        WatchKind::Write => Some(PointKind::Write),
        WatchKind::ReadWrite => Some(PointKind::Access),
        // The processor cannot.
        WatchKind::Read => None,
    }
}

impl Breakpoints for Target {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

impl SwBreakpoint for Target {
    fn add_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        match self.plant(Va(address)) {
            Ok(()) => Ok(true),
            Err(error) => {
                // gdb shows no reason.
                eprintln!("kleak-vmm: gdb: No breakpoint at {address:#x}: {error:#}");
                Ok(false)
            }
        }
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.unplant(Va(address)))
    }
}

impl HwBreakpoint for Target {
    fn add_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.watch(address, 1, PointKind::Execute))
    }

    fn remove_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.unwatch(address, 1, PointKind::Execute))
    }
}

impl HwWatchpoint for Target {
    fn add_hw_watchpoint(&mut self, address: u64, len: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        Ok(point_kind(kind).is_some_and(|kind| self.watch(address, len, kind)))
    }

    fn remove_hw_watchpoint(&mut self, address: u64, len: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        Ok(point_kind(kind).is_some_and(|kind| self.unwatch(address, len, kind)))
    }
}
