//! A debugger's hold on the vCPUs: who stands still, who goes on, who takes one step, and why they stopped.
//!
//! It is one more reason to park beside pauses and holds, so that these work while a debugger has the machine: a vCPU that
//! meets a breakpoint parks all of them, as [`super::Paused`] does, and they stay parked until the debugger lets them go.

use super::TrapInstruction;
use super::control::{Control, Snapshot};
use super::guest::Guest;
use super::lock;
use crate::arch::{DebugRegisters, Point};
use anyhow::{Context, Result};
use introspect::memory::Va;
use std::collections::BTreeSet;
use std::time::Duration;

/// What a vCPU does when the debugger lets the machine go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Stands still.
    Stay,
    /// Runs.
    Run,
    /// Carries out one instruction, or those that stand where a trap is, and stops the machine.
    Step,
}

/// Why a vCPU stopped the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// It stands on a breakpoint.
    Breakpoint,
    /// It met this one of the points that the processor watches.
    Point(usize),
    /// It has made its step.
    Step,
}

/// What the debugger is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// This vCPU stopped, and with it the machine.
    Cpu(usize, Why),
    /// The machine has ended.
    Ended,
}

/// What a vCPU does before it enters the guest again.
pub(super) struct Orders {
    pub registers: Option<Box<DebugRegisters>>,
    pub step: bool,
    pub points: Vec<Point>,
}

/// The debugger's part of the machine's state.
#[derive(Default)]
pub(super) struct Debugging {
    /// The traps that stay when there is no debugger. None: the machine takes no debugger.
    pub traps: Option<TrapInstruction>,
    /// All vCPUs park.
    pub stopped: bool,
    /// By vCPU; empty: all run.
    orders: Vec<Order>,
    breakpoints: BTreeSet<Va>,
    points: Vec<Point>,
    met: Option<(usize, Why)>,
    /// Registers to be written, by vCPU.
    written: Vec<Option<Box<DebugRegisters>>>,
    /// Orders not yet picked up, by vCPU.
    fresh: Vec<bool>,
}

impl Debugging {
    /// For that many vCPUs.
    pub fn new(cpus: usize) -> Self {
        Self { written: vec![None; cpus], fresh: vec![false; cpus], ..Self::default() }
    }

    /// Whether this vCPU is to stand still.
    pub fn parks(&self, cpu: usize) -> bool {
        self.stopped || self.orders.get(cpu) == Some(&Order::Stay)
    }
}

/// A vCPU thread's side.
impl Control {
    /// Whether the vCPU stands on a breakpoint at `ip`.
    pub fn breaks_at(&self, ip: Va) -> bool {
        self.lock().debugging.breakpoints.contains(&ip)
    }

    /// The instruction of traps, where a debugger may come.
    pub fn debugged_by(&self) -> Option<TrapInstruction> {
        self.lock().debugging.traps
    }

    /// A vCPU thread has a reason to stop the machine; it parks when it enters the guest next.
    pub fn stop_for_debugger(&self, cpu: usize, why: Why) {
        let mut state = self.lock();
        state.debugging.met.get_or_insert((cpu, why));
        state.debugging.stopped = true;
        state.want_pause();
        self.changed.notify_all();
    }

    /// What the debugger wants of a vCPU that goes on, once.
    pub fn take_orders(&self, cpu: usize) -> Option<Orders> {
        let mut state = self.lock();
        let debugging = &mut state.debugging;
        std::mem::take(&mut debugging.fresh[cpu]).then(|| Orders {
            registers: debugging.written[cpu].take(),
            step: debugging.orders.get(cpu) == Some(&Order::Step),
            points: debugging.points.clone(),
        })
    }
}

/// A debugger's side.
impl Guest {
    /// Lets a debugger come to a machine whose traps are these. Before it is started.
    pub fn allow_debugger(&self, traps: TrapInstruction) {
        self.control.lock().debugging.traps = Some(traps);
    }

    /// Stops every vCPU until [`Guest::debugger_goes_on`].
    ///
    /// # Errors
    /// As [`Guest::pause`].
    pub fn debugger_stops(&self) -> Result<()> {
        let _paused = self.pause()?;
        self.control.lock().debugging.stopped = true;
        Ok(())
    }

    /// Lets the vCPUs do as ordered; none: all run, and nobody watches anything any more. They stay where they are while the
    /// machine is paused or held otherwise.
    pub fn debugger_goes_on(&self, orders: Vec<Order>, breakpoints: BTreeSet<Va>, points: Vec<Point>) {
        // Not in the middle of somebody's pause.
        let _turn = lock(&self.pausing);
        let mut state = self.control.lock();
        let debugging = &mut state.debugging;
        debugging.stopped = false;
        debugging.met = None;
        debugging.orders = orders;
        debugging.breakpoints = breakpoints;
        debugging.points = points;
        debugging.fresh.fill(true);
        drop(state);
        self.control.resume();
    }

    /// Waits until a vCPU has stopped the machine; None when `timeout` passes first.
    pub fn debugger_waits(&self, timeout: Duration) -> Option<Stop> {
        let state = self.control.lock();
        let nothing =
            |state: &mut super::control::State| state.debugging.met.is_none() && state.outcome.is_none();
        let waited = self.control.changed.wait_timeout_while(state, timeout, nothing);
        let (state, _) = waited.unwrap_or_else(std::sync::PoisonError::into_inner);
        match (state.debugging.met, &state.outcome) {
            (_, Some(_)) => Some(Stop::Ended),
            (Some((cpu, why)), None) => Some(Stop::Cpu(cpu, why)),
            (None, None) => None,
        }
    }

    /// True while a debugger keeps the machine stopped.
    pub fn debugger_has_stopped(&self) -> bool {
        self.control.lock().debugging.stopped
    }

    /// All registers of a vCPU that stands still, as they will be when it goes on.
    ///
    /// # Errors
    /// There is no such vCPU, or they could not be read.
    pub fn debug_registers(&self, cpu: usize) -> Result<DebugRegisters> {
        let state = self.control.lock();
        if let Some(Some(written)) = state.debugging.written.get(cpu) {
            return Ok((**written).clone());
        }
        let snapshot: &Snapshot = state.snapshot(cpu).with_context(|| format!("There is no vCPU {cpu}"))?;
        let registers = snapshot.debug.as_ref().with_context(|| format!("vCPU {cpu} has not run yet"))?;
        registers.as_ref().map(|registers| (**registers).clone()).map_err(|why| anyhow::anyhow!(why.clone()))
    }

    /// Changes them.
    ///
    /// # Errors
    /// There is no such vCPU.
    pub fn set_debug_registers(&self, cpu: usize, registers: DebugRegisters) -> Result<()> {
        let _turn = lock(&self.pausing);
        let mut state = self.control.lock();
        let written = state.debugging.written.get_mut(cpu);
        *written.with_context(|| format!("There is no vCPU {cpu}"))? = Some(Box::new(registers));
        Ok(())
    }
}
