//! One vCPU thread: run, look at the exit, decide, run again.

use super::control::{Control, Kicker, Outcome, Snapshot, Verdict};
use super::recent::Recent;
use super::{TrapHandler, TrapInstruction, TrapOutcome};
use crate::arch::{self, Next, Platform};
use introspect::arch::Registers;
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

/// A vCPU and what it needs to handle its exits.
pub(super) struct Vcpu {
    pub index: usize,
    pub fd: VcpuFd,
    pub platform: Arc<Platform>,
    pub control: Arc<Control>,
    pub traps: Option<Arc<dyn TrapHandler>>,
}

/// What became of one run.
enum Step {
    Enter,
    Checkpoint,
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
                Step::Checkpoint => {
                    // SAFETY: mapped as above.
                    unsafe { flag.as_ref() }.store(0, SeqCst);
                    match self.control.checkpoint(self.index, || self.snapshot(&exits)) {
                        Verdict::Enter => {}
                        Verdict::Resume => arch::resumed(&self.fd),
                        Verdict::End => break,
                    }
                }
                Step::End(outcome) => {
                    self.control.finish(outcome);
                    break;
                }
            }
            step = self.enter(&mut exits, &mut out_of_memory);
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
            Ok(true) => return Step::Enter,
            Ok(false) => {}
            Err(error) => return Step::End(Outcome::Error(format!("Cannot handle a trap: {error:#}"))),
        }
        match arch::reflect(&mut self.fd, instruction) {
            Ok(()) => Step::Enter,
            Err(error) => Step::End(Outcome::Error(format!("Cannot hand a breakpoint back: {error:#}"))),
        }
    }

    /// Whether it was one of the handler's, and the guest goes on where that wants it to.
    fn offer(&mut self, before: &Registers, instruction: TrapInstruction) -> anyhow::Result<bool> {
        let Some(handler) = &self.traps else { return Ok(false) };
        let mut places = arch::trap_places(before, instruction).into_iter();
        let Some(site) = places.find(|&place| handler.is_site(place)) else { return Ok(false) };
        let mut registers = *before;
        registers.set_ip(site);
        if handler.trap(self.index, &mut registers) != TrapOutcome::Resume {
            return Ok(false);
        }
        arch::set_trap_registers(&mut self.fd, before, &registers)?;
        Ok(true)
    }

    fn snapshot(&self, exits: &Recent<arch::ExitRecord>) -> Snapshot {
        Snapshot {
            state: arch::cpu_state(&self.fd, self.index).map_err(|error| format!("{error:#}")),
            exits: exits.describe(),
        }
    }
}
