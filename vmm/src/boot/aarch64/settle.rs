//! Where the kernel runs, which it decides itself.
//!
//! Its boot CPU runs until it calls `start_kernel`: it then has its page tables and exception vectors, and has allocated
//! nothing yet. A breakpoint stands there meanwhile; where that is in physical memory is known, as the kernel's text does not
//! move in it.

use super::Loaded;
use crate::arch::{self, Next, Platform, TrapInstruction};
use crate::machine::GuestRam;
use crate::probe::deadline::Deadline;
use anyhow::{Context, bail, ensure};
use introspect::kernel::Kernel;
use introspect::linux::Placement;
use introspect::memory::{Pa, PhysicalMemory};
use kvm_bindings::kvm_guest_debug;
use kvm_ioctls::VcpuFd;
use std::time::Duration;

/// The kernel's first C function.
const FUNCTION: &str = "start_kernel";
/// A kernel that is not there by then has failed. Under full emulation it takes seconds.
const PATIENCE: Duration = Duration::from_secs(120);

/// Runs the boot CPU as far as that, and reads where the kernel is.
///
/// # Errors
/// The kernel does not get there.
pub fn settle(
    boot: &mut VcpuFd,
    platform: &Platform,
    ram: &GuestRam,
    loaded: &Loaded,
    kernel: &Kernel,
) -> anyhow::Result<Placement> {
    let function = kernel.symbols.lookup(FUNCTION).with_context(|| format!("It has no symbol {FUNCTION}"))?;
    let segment = kernel.image.segments.first().context("It has no segment")?;
    let at = Pa(loaded.entry.0 + (function - segment.va));
    let trap = TrapInstruction::Brk.bytes();
    let mut original = [0; 4];
    ram.read(at, &mut original)?;
    ram.write(at, trap)?;
    arch::enable_traps(boot, TrapInstruction::Brk)?;
    let outcome = run(boot, platform).with_context(|| format!("It does not get as far as {FUNCTION}"));
    ram.write(at, &original)?;
    arch::synchronise_code(ram, at, original.len());
    outcome.with_context(|| arch::describe_failure(boot))?;
    boot.set_guest_debug(&kvm_guest_debug::default()).context("Cannot end guest debugging")?;
    let state = arch::cpu_state(boot, 0)?;
    ensure!(
        state.registers.pc & 0xfff == function.0 & 0xfff,
        "It stopped at {:#x}, not at {FUNCTION}",
        state.registers.pc
    );
    Placement::from_registers(kernel, &state, loaded.entry)
}

/// Until the breakpoint.
fn run(boot: &mut VcpuFd, platform: &Platform) -> anyhow::Result<()> {
    let deadline = Deadline::new(PATIENCE)?;
    loop {
        ensure!(!deadline.passed(), "it takes longer than {} s", PATIENCE.as_secs());
        let next = match boot.run() {
            Ok(exit) => platform.handle(exit),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => continue,
            Err(error) => bail!("KVM_RUN failed: {}", std::io::Error::from(error)),
        };
        match next {
            Next::Enter | Next::Checkpoint => {}
            Next::Trap(_) => return Ok(()),
            Next::Debug(status) => bail!("a debug exception, syndrome {:#x}", status.0),
            Next::End(outcome) => bail!("{outcome}"),
            Next::Fail(why) => bail!(why),
        }
    }
}
