//! Registers of a vCPU; breakpoints.

use super::TrapInstruction;
use super::one_reg::Reg;
use super::platform::CLASS_BRK;
use crate::machine::kvm_error;
use anyhow::Context;
use introspect::arch::{CpuState, Registers};
use introspect::memory::{Pa, Va};
use kvm_bindings::{
    KVM_EXIT_INTERNAL_ERROR, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_USE_SW_BP, KVM_MP_STATE_RUNNABLE, PSR_A_BIT,
    PSR_D_BIT, PSR_F_BIT, PSR_I_BIT, PSR_MODE_EL0t, PSR_MODE_EL1h, PSR_MODE_MASK, kvm_guest_debug,
};
use kvm_ioctls::VcpuFd;

/// Number of general registers.
const GENERAL: usize = 31;
/// Address bits of a TTBR (Arm ARM, TTBR1_EL1): the others are the ASID and the bit CnP.
const TTBR_ADDRESS: u64 = 0x0000_ffff_ffff_fffe;

/// Has KVM stop at breakpoints.
///
/// # Errors
/// When KVM cannot debug guests.
pub fn enable_traps(fd: &mut VcpuFd, _instruction: TrapInstruction) -> anyhow::Result<()> {
    let debug =
        kvm_guest_debug { control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP, ..Default::default() };
    Ok(fd.set_guest_debug(&debug).map_err(kvm_error("Cannot have breakpoints reported"))?)
}

/// The registers of the present exit.
///
/// # Errors
/// Names the register that KVM does not give.
pub fn trap_registers(fd: &mut VcpuFd) -> anyhow::Result<Registers> {
    general(fd)
}

/// The registers of the next entry: those that `before` has otherwise are written.
///
/// # Errors
/// Names the register that KVM does not take.
pub fn set_trap_registers(fd: &mut VcpuFd, before: &Registers, registers: &Registers) -> anyhow::Result<()> {
    let changed = |(old, new): (u64, u64), register: Reg| {
        if old == new { Ok(()) } else { register.set(fd, new) }
    };
    for number in 0..GENERAL {
        changed((before.x[number], registers.x[number]), Reg::x(number))?;
    }
    changed((before.sp, registers.sp), stack_pointer(before.pstate))?;
    changed((before.pc, registers.pc), Reg::PC)?;
    changed((before.pstate, registers.pstate), Reg::PSTATE)
}

/// Where the instruction of the present exit may be: the program counter stays on a breakpoint.
pub fn trap_places(registers: &Registers, _instruction: TrapInstruction) -> [Va; 1] {
    [Va(registers.pc)]
}

/// Nothing tells an arm64 guest that it was paused.
pub fn resumed(_fd: &VcpuFd) {}

/// Does what the processor would have done with a breakpoint that is not ours: takes the exception to EL1 (Arm ARM,
/// D1.3.1, and AArch64.TakeException in J1).
///
/// # Errors
/// When KVM refuses a register.
pub fn reflect(fd: &mut VcpuFd, _instruction: TrapInstruction) -> anyhow::Result<()> {
    /// Offsets of synchronous exceptions in the vectors, from EL1 with its own stack and from EL0.
    const FROM_EL1: u64 = 0x200;
    const FROM_EL0: u64 = 0x400;
    /// What an exception leaves of PSTATE: condition flags, DIT and PAN.
    const KEPT: u64 = 0xf000_0000 | 1 << 24 | PAN;
    const PAN: u64 = 1 << 22;
    /// SCTLR_EL1.SPAN: clear, exceptions set PAN.
    const SCTLR_SPAN: u64 = 1 << 23;
    /// ESR_EL1: the class, the length of the instruction, and the comment of a BRK (ISS 15:0).
    const CLASS_SHIFT: u64 = 26;
    const IL: u64 = 1 << 25;
    let (pc, pstate) = (Reg::PC.get(fd)?, Reg::PSTATE.get(fd)?);
    let offset = if mode(pstate) == PSR_MODE_EL0t { FROM_EL0 } else { FROM_EL1 };
    let vectors = Reg::VBAR_EL1.get(fd)?;
    let pan = if Reg::SCTLR_EL1.get(fd)? & SCTLR_SPAN == 0 { PAN } else { 0 };
    Reg::ELR_EL1.set(fd, pc)?;
    Reg::SPSR_EL1.set(fd, pstate)?;
    let comment = comment(fd);
    Reg::ESR_EL1.set(fd, u64::from(CLASS_BRK) << CLASS_SHIFT | IL | comment)?;
    let masked = PSR_D_BIT | PSR_A_BIT | PSR_I_BIT | PSR_F_BIT | PSR_MODE_EL1h;
    Reg::PSTATE.set(fd, pstate & KEPT | pan | u64::from(masked))?;
    Reg::PC.set(fd, vectors + offset)
}

/// The comment of the breakpoint of the present exit, by which the kernel tells what it is for: in the syndrome that KVM
/// reports.
fn comment(fd: &mut VcpuFd) -> u64 {
    // SAFETY: the member of the union that a debug exit fills in, and plain numbers after any other.
    let syndrome = unsafe { fd.get_kvm_run().__bindgen_anon_1.debug }.arch.hsr;
    u64::from(syndrome & 0xffff)
}

/// Reads the state that a scan wants, with the vCPU outside the guest.
///
/// # Errors
/// Names the call that failed.
pub fn cpu_state(fd: &VcpuFd, index: usize) -> anyhow::Result<CpuState> {
    let mp_state = fd.get_mp_state().context("Cannot read its run state")?.mp_state;
    let registers = general(fd)?;
    Ok(CpuState {
        index,
        registers,
        root: Pa(Reg::TTBR1_EL1.get(fd)? & TTBR_ADDRESS),
        tcr: Reg::TCR_EL1.get(fd)?,
        vbar: Reg::VBAR_EL1.get(fd)?,
        sp_el0: Reg::SP_EL0.get(fd)?,
        tpidr: Reg::TPIDR_EL1.get(fd)?,
        user_mode: mode(registers.pstate) == PSR_MODE_EL0t,
        online: mp_state == KVM_MP_STATE_RUNNABLE,
    })
}

/// KVM keeps the registers of a guest that crashes.
pub fn is_reset(_state: &CpuState) -> bool {
    false
}

/// What KVM says of an exit it could not handle, and all registers: for the reader of a failure.
pub fn describe_failure(fd: &mut VcpuFd) -> String {
    let mut text = String::new();
    let run = fd.get_kvm_run();
    if run.exit_reason == KVM_EXIT_INTERNAL_ERROR {
        // SAFETY: the exit reason says that this member of the union is the one filled in.
        let suberror = unsafe { run.__bindgen_anon_1.internal }.suberror;
        text = format!("KVM internal error {suberror}\n");
    }
    let Ok(registers) = general(fd) else { return text + "registers unreadable" };
    let system = [
        ("elr", Reg::ELR_EL1),
        ("spsr", Reg::SPSR_EL1),
        ("esr", Reg::ESR_EL1),
        ("vbar", Reg::VBAR_EL1),
        ("sctlr", Reg::SCTLR_EL1),
        ("ttbr0", Reg::TTBR0_EL1),
        ("ttbr1", Reg::TTBR1_EL1),
        ("tcr", Reg::TCR_EL1),
    ];
    let system = system.into_iter().filter_map(|(name, register)| Some((name, register.get(fd).ok()?)));
    let all: Vec<_> = registers.named().into_iter().chain(system).collect();
    let row = |row: &[(&str, u64)]| {
        row.iter().map(|(name, value)| format!("{name:>6} {value:016x}")).collect::<Vec<_>>().join(" ")
    };
    text + &all.chunks(4).map(row).collect::<Vec<_>>().join("\n")
}

fn general(fd: &VcpuFd) -> anyhow::Result<Registers> {
    let mut x = [0; GENERAL];
    for (number, value) in x.iter_mut().enumerate() {
        *value = Reg::x(number).get(fd)?;
    }
    let pstate = Reg::PSTATE.get(fd)?;
    Ok(Registers { x, sp: stack_pointer(pstate).get(fd)?, pc: Reg::PC.get(fd)?, pstate })
}

/// The mode that a state says, in the terms of SPSR_EL1.
fn mode(pstate: u64) -> u32 {
    pstate as u32 & PSR_MODE_MASK
}

/// The stack pointer in use in a state.
fn stack_pointer(pstate: u64) -> Reg {
    if mode(pstate) == PSR_MODE_EL1h { Reg::SP_EL1 } else { Reg::SP_EL0 }
}
