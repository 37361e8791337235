//! The guest as gdb sees it: a thread for each vCPU, its registers, and memory through its page tables.

use super::Parts;
use super::breakpoints::Planted;
use crate::arch::{DebugArch, DebugRegisters, Point};
use crate::machine::{Order, Paused};
use anyhow::{Context, Result, ensure};
use gdbstub::common::{Signal, Tid};
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::breakpoints::BreakpointsOps;
use gdbstub::target::ext::monitor_cmd::{ConsoleOutput, MonitorCmd, MonitorCmdOps};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{TargetError, TargetResult};
use introspect::arch::AddressSpace;
use introspect::memory::{PAGE_SIZE, Pa, PhysicalMemory, Va};
use std::collections::BTreeMap;

/// See the module.
pub(super) struct Target {
    pub parts: Parts,
    /// By vCPU, what it does when the machine goes on.
    orders: Vec<Option<Order>>,
    /// What those do that nothing was said of.
    others: Order,
    pub planted: BTreeMap<Va, Planted>,
    pub points: Vec<Point>,
}

/// gdb's number of a vCPU.
pub(super) fn thread(cpu: usize) -> Tid {
    Tid::MIN.saturating_add(cpu)
}

/// Whether an address is in the kernel's half, which all processes have in common.
pub(super) fn is_kernels(va: Va) -> bool {
    va.0 >> 63 == 1
}

fn cpu_of(thread: Tid) -> usize {
    thread.get() - 1
}

/// An error that gdb shows as one of memory; the session goes on.
fn fault<T, E>(_: E) -> TargetError<T> {
    TargetError::Errno(libc::EFAULT as u8)
}

impl Target {
    pub fn new(parts: Parts) -> Self {
        let cpus = parts.guest.cpu_count();
        Self {
            parts,
            orders: vec![None; cpus],
            others: Order::Run,
            planted: BTreeMap::new(),
            points: Vec::new(),
        }
    }

    /// Takes everything of the debugger's out of the guest and lets it run. All vCPUs stop for that: each has to forget what the
    /// processor watches for it.
    pub fn leave(&mut self) {
        if let Err(error) = self.parts.guest.debugger_stops() {
            eprintln!("kleak-vmm: warning: gdb: The machine does not stop: {error:#}");
        }
        let all: Vec<Va> = self.planted.keys().copied().collect();
        for va in all {
            self.unplant(va);
        }
        self.points.clear();
        self.parts.guest.debugger_goes_on(Vec::new(), Default::default(), Vec::new());
    }

    /// Physical address, for a kernel address through the kernel's own tables, else through those of a vCPU.
    pub fn translate(
        &self,
        paused: &Paused<'_>,
        memory: &impl PhysicalMemory,
        va: Va,
        cpu: usize,
    ) -> Option<Pa> {
        let linux = &self.parts.linux;
        let of_kernel = || linux.translate(memory, va).ok();
        let kernel = if is_kernels(va) { of_kernel() } else { None };
        kernel.or_else(|| {
            let root = paused.cpus().get(cpu)?.root;
            AddressSpace { root, ..linux.space }.translate(memory, va).ok()
        })
    }

    /// What memory holds that gdb is not to see: where, and what belongs there.
    pub fn hidden(&self) -> Result<Vec<(Pa, Vec<u8>)>> {
        let own = self.planted.values().map(|planted| (planted.at, planted.original.clone()));
        Ok(own.chain(self.parts.traps.originals()?).collect())
    }

    /// Reads memory as if there were no traps; the bytes up to the first that is not there.
    pub fn read(&self, paused: &Paused<'_>, va: Va, buffer: &mut [u8], cpu: usize) -> Result<usize> {
        let (memory, hidden) = (paused.memory(), self.hidden()?);
        let mut done = 0;
        while done < buffer.len() {
            let at = va + done as u64;
            let len = (PAGE_SIZE - at.0 % PAGE_SIZE).min((buffer.len() - done) as u64) as usize;
            let piece = &mut buffer[done..done + len];
            let Some(pa) = self.translate(paused, &memory, at, cpu) else { break };
            if memory.read(pa, piece).is_err() {
                break;
            }
            for (place, bytes) in &hidden {
                for (k, &byte) in bytes.iter().enumerate() {
                    let offset = (*place + k as u64).0.wrapping_sub(pa.0);
                    if let Some(shown) = usize::try_from(offset).ok().and_then(|k| piece.get_mut(k)) {
                        *shown = byte;
                    }
                }
            }
            done += len;
        }
        Ok(done)
    }

    fn write(&self, va: Va, bytes: &[u8], cpu: usize) -> Result<()> {
        let mut paused = self.parts.guest.pause()?;
        let mut pieces = Vec::new();
        let mut done = 0;
        while done < bytes.len() {
            let at = va + done as u64;
            let len = (PAGE_SIZE - at.0 % PAGE_SIZE).min((bytes.len() - done) as u64) as usize;
            let pa = self.translate(&paused, &paused.memory(), at, cpu).context("not mapped")?;
            pieces.push((pa, &bytes[done..done + len]));
            done += len;
        }
        for (trap, original) in self.hidden()? {
            let overlaps = |(pa, piece): &(Pa, &[u8])| {
                trap.0 < pa.0 + piece.len() as u64 && pa.0 < trap.0 + original.len() as u64
            };
            ensure!(!pieces.iter().any(overlaps), "a trap stands there");
        }
        pieces.into_iter().try_for_each(|(pa, piece)| paused.write(pa, piece)).context("not RAM")
    }
}

impl gdbstub::target::Target for Target {
    type Arch = DebugArch;
    type Error = anyhow::Error;

    fn base_ops(&mut self) -> BaseOps<'_, Self::Arch, Self::Error> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }

    fn support_monitor_cmd(&mut self) -> Option<MonitorCmdOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadBase for Target {
    fn read_registers(&mut self, registers: &mut DebugRegisters, tid: Tid) -> TargetResult<(), Self> {
        // Until every vCPU has parked.
        drop(self.parts.guest.pause().map_err(fault)?);
        *registers = self.parts.guest.debug_registers(cpu_of(tid)).map_err(fault)?;
        Ok(())
    }

    fn write_registers(&mut self, registers: &DebugRegisters, tid: Tid) -> TargetResult<(), Self> {
        self.parts.guest.set_debug_registers(cpu_of(tid), registers.clone()).map_err(fault)
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        let paused = self.parts.guest.pause().map_err(fault)?;
        match self.read(&paused, Va(start), data, cpu_of(tid)) {
            Ok(0) | Err(_) if !data.is_empty() => Err(fault(())),
            read => read.map_err(fault),
        }
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        self.write(Va(start), data, cpu_of(tid)).map_err(fault)
    }

    fn list_active_threads(&mut self, found: &mut dyn FnMut(Tid)) -> Result<(), Self::Error> {
        (0..self.orders.len()).for_each(|cpu| found(thread(cpu)));
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl ThreadExtraInfo for Target {
    fn thread_extra_info(&self, tid: Tid, buffer: &mut [u8]) -> Result<usize, Self::Error> {
        let text = format!("vCPU {}", cpu_of(tid));
        let len = text.len().min(buffer.len());
        buffer[..len].copy_from_slice(&text.as_bytes()[..len]);
        Ok(len)
    }
}

impl MultiThreadResume for Target {
    fn resume(&mut self) -> Result<(), Self::Error> {
        let orders = self.orders.iter().map(|order| order.unwrap_or(self.others)).collect();
        let breakpoints = self.planted.keys().copied().collect();
        self.parts.guest.debugger_goes_on(orders, breakpoints, self.points.clone());
        Ok(())
    }

    fn clear_resume_actions(&mut self) -> Result<(), Self::Error> {
        self.orders.fill(None);
        self.others = Order::Run;
        Ok(())
    }

    // A machine takes no signals: gdb sends one when it goes on from a stop that it took for one.
    fn set_resume_action_continue(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), Self::Error> {
        self.order(tid, Order::Run)
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSingleStep for Target {
    fn set_resume_action_step(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), Self::Error> {
        self.order(tid, Order::Step)
    }
}

impl MultiThreadSchedulerLocking for Target {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), Self::Error> {
        self.others = Order::Stay;
        Ok(())
    }
}

impl Target {
    fn order(&mut self, tid: Tid, order: Order) -> Result<()> {
        *self.orders.get_mut(cpu_of(tid)).with_context(|| format!("There is no thread {tid}"))? = Some(order);
        Ok(())
    }
}

impl MonitorCmd for Target {
    /// Console commands, with the replies that all surfaces give.
    fn handle_monitor_cmd(&mut self, command: &[u8], mut out: ConsoleOutput<'_>) -> Result<(), Self::Error> {
        let reply = self.parts.commands.answer(&String::from_utf8_lossy(command));
        out.write_raw(reply.body.as_bytes());
        if reply.quit {
            self.parts.commands.quit();
        }
        Ok(())
    }
}
