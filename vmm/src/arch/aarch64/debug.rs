//! What a debugger sees and sets of a vCPU: all of its registers, single steps.

use super::TrapInstruction;
use super::one_reg::Reg;
use crate::machine::kvm_error;
use anyhow::Context;
use gdbstub_arch::aarch64::reg::AArch64CoreRegs;
use introspect::memory::Va;
use kvm_bindings::{KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_SW_BP, kvm_guest_debug};
use kvm_ioctls::VcpuFd;

/// gdb's name for the architecture, and its form of the registers.
pub type DebugArch = gdbstub_arch::aarch64::AArch64;
/// All registers that gdb knows; those of the FPU are not read.
pub type DebugRegisters = AArch64CoreRegs;

/// What the processor watches an address for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PointKind {
    /// An instruction that begins there.
    Execute,
    /// Writes.
    Write,
    /// Reads and writes.
    Access,
}

/// An address that the processor watches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Point {
    /// Where.
    pub va: Va,
    /// Bytes.
    pub len: u8,
    /// For what.
    pub kind: PointKind,
}

impl Point {
    /// Whether the processor can watch it beside so many others: it is not asked to yet.
    pub fn is_possible(self, _others: usize) -> bool {
        false
    }
}

/// Syndrome of a debug exception.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DebugStatus(pub u64);

impl DebugStatus {
    /// The first of the points that were met.
    pub fn point(self) -> Option<usize> {
        None
    }
}

/// Reads all registers.
///
/// # Errors
/// Names the call that failed.
pub fn debug_registers(fd: &VcpuFd) -> anyhow::Result<DebugRegisters> {
    let mut registers = DebugRegisters::default();
    for (number, x) in registers.x.iter_mut().enumerate() {
        *x = Reg::x(number).get(fd)?;
    }
    registers.pc = Reg::PC.get(fd)?;
    registers.cpsr = Reg::PSTATE.get(fd)? as u32;
    registers.sp = stack_pointer(registers.cpsr).get(fd)?;
    Ok(registers)
}

/// Writes all registers.
///
/// # Errors
/// Names the call that failed.
pub fn set_debug_registers(fd: &VcpuFd, registers: &DebugRegisters) -> anyhow::Result<()> {
    for (number, x) in registers.x.iter().enumerate() {
        Reg::x(number).set(fd, *x)?;
    }
    Reg::PC.set(fd, registers.pc)?;
    Reg::PSTATE.set(fd, u64::from(registers.cpsr))?;
    stack_pointer(registers.cpsr).set(fd, registers.sp)
}

/// The stack pointer in use (Arm ARM, PSTATE.M: 5 is EL1h).
fn stack_pointer(pstate: u32) -> Reg {
    if pstate & 0xf == 5 { Reg::SP_EL1 } else { Reg::SP_EL0 }
}

/// Moves the program counter, with the vCPU outside the guest and no exit of it pending.
///
/// # Errors
/// Names the call that failed.
pub fn set_instruction_pointer(fd: &VcpuFd, ip: Va) -> anyhow::Result<()> {
    Reg::PC.set(fd, ip.0)
}

/// From the next entry on: one step or all, beside the breakpoints of traps.
///
/// # Errors
/// When KVM cannot debug guests.
pub fn set_debugging(
    fd: &VcpuFd,
    _traps: TrapInstruction,
    step: bool,
    _points: &[Point],
) -> anyhow::Result<()> {
    let mut debug =
        kvm_guest_debug { control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP, ..Default::default() };
    if step {
        debug.control |= KVM_GUESTDBG_SINGLESTEP;
    }
    Ok(fd.set_guest_debug(&debug).map_err(kvm_error("Cannot have the guest debugged"))?)
}

/// Debug exceptions of the guest's own do not come here: KVM leaves the guest for those of the host alone.
///
/// # Errors
/// Always.
pub fn reflect_debug(_fd: &VcpuFd, status: DebugStatus) -> anyhow::Result<()> {
    Err(anyhow::anyhow!("syndrome {:#x}", status.0)).context("A debug exception that nobody asked for")
}
