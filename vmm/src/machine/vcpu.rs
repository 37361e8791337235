//! One vCPU thread: run, look at the exit, decide, run again.

use super::control::{Control, Kicker, Outcome, Snapshot, Verdict};
use super::debugger::Why;
use super::recent::Recent;
use super::{TrapHandler, TrapInstruction, TrapOutcome};
use crate::arch::{self, DebugStatus, Next, Platform};
use introspect::arch::Registers;
use introspect::memory::Va;
use kvm_ioctls::VcpuFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering::SeqCst};
use std::time::Duration;

/// Exits kept for the diagnosis.
const EXITS_KEPT: usize = 8;
/// KVM_RUN gives ENOMEM when the host is short of memory for a moment: how often and how long that is waited for.
const ENOMEM_RETRIES: u32 = 100;
const ENOMEM_PAUSE: Duration = Duration::from_millis(20);

/// A trap that must wait is asked again after that.
const TRAP_PAUSE: Duration = Duration::from_micros(50);

/// A vCPU and what it needs to handle its exits.
pub(super) struct Vcpu {
    pub index: usize,
    pub fd: VcpuFd,
    pub platform: Arc<Platform>,
    pub control: Arc<Control>,
    pub traps: Option<Arc<dyn TrapHandler>>,
    pub debugger: Debugger,
}

/// What a debugger wants of a vCPU, on its own thread.
#[derive(Default)]
pub(super) struct Debugger {
    /// The instruction of traps, where a debugger may come at all.
    pub traps: Option<TrapInstruction>,
    /// The next instruction is the last one before a stop.
    step: bool,
    /// Points that the processor watches.
    points: usize,
    /// The breakpoint that the vCPU met: it goes back there, once its exit is completed.
    met: Option<Va>,
}

/// What became of one run.
enum Step {
    Enter,
    Checkpoint,
    /// This trap is to be offered again, behind a checkpoint.
    Again(TrapInstruction),
    End(Outcome),
}

impl Vcpu {
    /// The thread's body.
    pub fn run(mut self) {
        let flag: *mut u8 = &mut self.fd.get_kvm_run().immediate_exit;
        let flag = NonNull::new(flag.cast::<AtomicU8>()).expect("kvm_run is mapped");
        // SAFETY: kvm_run stays mapped until `self.fd` is dropped, which is behind `ended`.
        self.control.started(self.index, unsafe { Kicker::new(flag) });
        let mut exits = Recent::new(EXITS_KEPT);
        let mut out_of_memory = 0;
        let mut step = Step::Checkpoint;
        loop {
            match step {
                Step::Enter => {}
                Step::Checkpoint | Step::Again(_) => {
                    // SAFETY: mapped as above.
                    unsafe { flag.as_ref() }.store(0, SeqCst);
                    if let Err(error) = self.go_back() {
                        step = Step::End(Outcome::Error(format!("{error:#}")));
                        continue;
                    }
                    match self.control.checkpoint(self.index, || self.snapshot(&exits)) {
                        Verdict::Enter => {}
                        Verdict::Resume => {
                            arch::resumed(&self.fd);
                            if let Err(error) = self.obey() {
                                step = Step::End(Outcome::Error(format!("{error:#}")));
                                continue;
                            }
                        }
                        Verdict::End => break,
                    }
                }
                Step::End(outcome) => {
                    self.control.finish(outcome);
                    break;
                }
            }
            step = match step {
                Step::Again(instruction) => {
                    std::thread::sleep(TRAP_PAUSE);
                    self.trap(instruction)
                }
                _ => self.enter(&mut exits, &mut out_of_memory),
            };
        }
        self.control.ended(self.index, self.snapshot(&exits));
    }

    /// Runs the guest until its next exit and handles that.
    fn enter(&mut self, exits: &mut Recent<arch::ExitRecord>, out_of_memory: &mut u32) -> Step {
        let next = match self.fd.run() {
            Ok(exit) => {
                *out_of_memory = 0;
                exits.push(arch::ExitRecord::new(&exit));
                self.platform.handle(exit)
            }
            Err(error) => match error.errno() {
                libc::EINTR | libc::EAGAIN => return Step::Checkpoint,
                libc::ENOMEM if *out_of_memory < ENOMEM_RETRIES => {
                    *out_of_memory += 1;
                    std::thread::sleep(ENOMEM_PAUSE);
                    return Step::Checkpoint;
                }
                _ => Next::Fail(format!("KVM_RUN failed: {}", std::io::Error::from(error))),
            },
        };
        match next {
            Next::Enter => Step::Enter,
            Next::Checkpoint => Step::Checkpoint,
            Next::Trap(instruction) => self.trap(instruction),
            Next::Debug(status) => self.debug(status),
            Next::End(outcome) => Step::End(outcome),
            Next::Fail(why) => {
                let why = format!("{why} (vCPU {})\n{}", self.index, arch::describe_failure(&mut self.fd));
                Step::End(Outcome::Error(why))
            }
        }
    }

    /// Offers a trap to the handler. The hot path.
    fn trap(&mut self, instruction: TrapInstruction) -> Step {
        let found =
            arch::trap_registers(&mut self.fd).and_then(|registers| self.offer(&registers, instruction));
        match found {
            Ok(TrapOutcome::Resume) => return Step::Enter,
            Ok(TrapOutcome::Again) => return Step::Again(instruction),
            Ok(TrapOutcome::Foreign) => {}
            Err(error) => return Step::End(Outcome::Error(format!("Cannot handle a trap: {error:#}"))),
        }
        match arch::reflect(&mut self.fd, instruction) {
            Ok(()) => Step::Enter,
            Err(error) => Step::End(Outcome::Error(format!("Cannot hand a breakpoint back: {error:#}"))),
        }
    }

    /// A debug exception: a step or a point of the debugger's, or the guest's own.
    fn debug(&mut self, status: DebugStatus) -> Step {
        let why = match status.point().filter(|&point| point < self.debugger.points) {
            Some(point) => Why::Point(point),
            None if self.debugger.step => Why::Step,
            None => {
                return match arch::reflect_debug(&self.fd, status) {
                    Ok(()) => Step::Enter,
                    Err(error) => {
                        Step::End(Outcome::Error(format!("Cannot hand a debug exception back: {error:#}")))
                    }
                };
            }
        };
        self.control.stop_for_debugger(self.index, why);
        Step::Enter
    }

    /// To the breakpoint that was met: KVM has completed the trap's exit by now, and left RIP behind it.
    fn go_back(&mut self) -> anyhow::Result<()> {
        self.debugger.met.take().map_or(Ok(()), |ip| arch::set_instruction_pointer(&self.fd, ip))
    }

    /// Does what the debugger wants before the vCPU goes on.
    fn obey(&mut self) -> anyhow::Result<()> {
        let Some(traps) = self.debugger.traps else { return Ok(()) };
        let Some(orders) = self.control.take_orders(self.index) else { return Ok(()) };
        if let Some(registers) = orders.registers {
            arch::set_debug_registers(&self.fd, &registers)?;
        }
        self.debugger.step = orders.step;
        self.debugger.points = orders.points.len();
        // Behind the registers: KVM notes where the step begins.
        arch::set_debugging(&self.fd, traps, orders.step, &orders.points)
    }

    /// What the debugger, else the handler, makes of it; the guest goes on where that wants it to.
    fn offer(&mut self, before: &Registers, instruction: TrapInstruction) -> anyhow::Result<TrapOutcome> {
        let places = arch::trap_places(before, instruction);
        if self.debugger.traps.is_some()
            && let Some(ip) = places.into_iter().find(|&ip| self.control.breaks_at(ip))
        {
            self.debugger.met = Some(ip);
            self.control.stop_for_debugger(self.index, Why::Breakpoint);
            return Ok(TrapOutcome::Resume);
        }
        let Some(handler) = &self.traps else { return Ok(TrapOutcome::Foreign) };
        let Some(site) = places.into_iter().find(|&place| handler.is_site(place)) else {
            return Ok(TrapOutcome::Foreign);
        };
        let mut registers = *before;
        registers.set_ip(site);
        let outcome = handler.trap(self.index, &mut registers);
        if outcome == TrapOutcome::Resume {
            arch::set_trap_registers(&mut self.fd, before, &registers)?;
            if self.debugger.step {
                self.control.stop_for_debugger(self.index, Why::Step);
            }
        }
        Ok(outcome)
    }

    fn snapshot(&self, exits: &Recent<arch::ExitRecord>) -> Snapshot {
        Snapshot {
            state: arch::cpu_state(&self.fd, self.index).map_err(|error| format!("{error:#}")),
            debug: self
                .debugger
                .traps
                .map(|_| arch::debug_registers(&self.fd).map(Box::new).map_err(|error| format!("{error:#}"))),
            exits: exits.describe(),
        }
    }
}
