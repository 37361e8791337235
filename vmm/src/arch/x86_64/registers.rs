//! Registers of a vCPU, by system call and through the page shared with KVM; breakpoints.

use super::TrapInstruction;
use crate::machine::kvm_error;
use anyhow::Context;
use introspect::arch::{CpuState, Registers};
use introspect::memory::{Pa, Va};
use kvm_bindings::{
    KVM_EXIT_INTERNAL_ERROR, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_USE_SW_BP, KVM_MP_STATE_HALTED,
    KVM_MP_STATE_RUNNABLE, Msrs, kvm_guest_debug, kvm_msr_entry, kvm_regs,
};
use kvm_ioctls::{SyncReg, VcpuFd};

/// IA32_KERNEL_GS_BASE (Intel SDM volume 4): what `swapgs` brings.
pub(super) const MSR_KERNEL_GS_BASE: u32 = 0xc000_0102;
/// Physical address bits of CR3; the others are flags and the PCID.
const CR3_ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Privilege level in a segment selector.
const SELECTOR_RPL: u16 = 3;

/// Has KVM leave the general registers in the shared page at every exit, and stop at breakpoints if those are used.
///
/// # Errors
/// When KVM cannot debug guests.
pub fn enable_traps(fd: &mut VcpuFd, instruction: TrapInstruction) -> anyhow::Result<()> {
    fd.set_sync_valid_reg(SyncReg::Register);
    if instruction == TrapInstruction::Int3 {
        let debug =
            kvm_guest_debug { control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP, ..Default::default() };
        fd.set_guest_debug(&debug).map_err(kvm_error("Cannot have breakpoints reported"))?;
    }
    Ok(())
}

/// The registers of the present exit, which come in the shared page. Only after [`enable_traps`].
///
/// # Errors
/// None here.
pub fn trap_registers(fd: &mut VcpuFd) -> anyhow::Result<Registers> {
    Ok(from_kvm(&fd.sync_regs_mut().regs))
}

/// The registers of the next entry, which go in the shared page: KVM takes them first, and then skips the `out` only if RIP
/// still is where it was at the exit.
///
/// # Errors
/// None here.
pub fn set_trap_registers(fd: &mut VcpuFd, _before: &Registers, registers: &Registers) -> anyhow::Result<()> {
    fd.sync_regs_mut().regs = to_kvm(registers);
    fd.set_sync_dirty_reg(SyncReg::Register);
    Ok(())
}

/// Where the instruction of the present exit may be: KVM leaves RIP on it where it handled the exit itself, and behind it
/// where its instruction emulator did.
pub fn trap_places(registers: &Registers, instruction: TrapInstruction) -> [Va; 2] {
    [Va(registers.rip), Va(registers.rip.wrapping_sub(instruction.len() as u64))]
}

/// Tells the guest's soft-lockup watchdog that it was paused.
pub fn resumed(fd: &VcpuFd) {
    // EINVAL when the guest has no kvm clock.
    let _ = fd.kvmclock_ctrl();
}

/// Does what the processor would have done with a trap instruction that is not ours: nothing for a port write,
/// the exception for a breakpoint. RIP stays on the `int3`: KVM steps over it while it injects.
///
/// # Errors
/// When KVM refuses the exception.
pub fn reflect(fd: &mut VcpuFd, instruction: TrapInstruction) -> anyhow::Result<()> {
    if instruction == TrapInstruction::Pio {
        return Ok(());
    }
    const BREAKPOINT: u8 = 3;
    let mut events = fd.get_vcpu_events()?;
    events.flags = 0;
    events.exception.injected = 1;
    events.exception.nr = BREAKPOINT;
    events.exception.has_error_code = 0;
    fd.set_vcpu_events(&events)?;
    Ok(())
}

/// Reads the state that a scan wants, with the vCPU outside the guest.
///
/// # Errors
/// Names the call that failed.
pub fn cpu_state(fd: &VcpuFd, index: usize) -> anyhow::Result<CpuState> {
    let mp_state = fd.get_mp_state().context("Cannot read its run state")?.mp_state;
    let online = [KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_HALTED].contains(&mp_state);
    let registers = fd.get_regs().context("Cannot read its general registers")?;
    let system = fd.get_sregs().context("Cannot read its system registers")?;
    let entry = kvm_msr_entry { index: MSR_KERNEL_GS_BASE, ..Default::default() };
    let mut msrs = Msrs::from_entries(&[entry]).context("Cannot read its KERNEL_GS_BASE")?;
    let read = fd.get_msrs(&mut msrs).context("Cannot read its KERNEL_GS_BASE")?;
    anyhow::ensure!(read == 1, "KVM does not know KERNEL_GS_BASE");
    Ok(CpuState {
        index,
        registers: from_kvm(&registers),
        root: Pa(system.cr3 & CR3_ADDRESS),
        gs_base: system.gs.base,
        kernel_gs_base: msrs.as_slice()[0].data,
        user_mode: system.cs.selector & SELECTOR_RPL == SELECTOR_RPL,
        online,
    })
}

/// True for the state after a reset, to which KVM on AMD hosts returns a vCPU that shuts down (KVM's
/// shutdown_interception): where it crashed is lost.
pub fn is_reset(state: &CpuState) -> bool {
    const RESET_RIP: u64 = 0xfff0;
    state.registers.rip == RESET_RIP && state.root == Pa(0)
}

/// What KVM says of an exit it could not handle, and all registers: for the reader of a failure.
pub fn describe_failure(fd: &mut VcpuFd) -> String {
    let mut text = String::new();
    let run = fd.get_kvm_run();
    if run.exit_reason == KVM_EXIT_INTERNAL_ERROR {
        // SAFETY: the exit reason says that this member of the union is the one filled in.
        let internal = unsafe { run.__bindgen_anon_1.internal };
        let data = &internal.data[..internal.data.len().min(internal.ndata as usize)];
        text = format!("KVM internal error {}, data {data:x?}\n", internal.suberror);
    }
    text + &describe_registers(fd)
}

fn describe_registers(fd: &VcpuFd) -> String {
    let (Ok(r), Ok(s)) = (fd.get_regs(), fd.get_sregs()) else {
        return "registers unreadable".to_owned();
    };
    let rows = [
        [("rax", r.rax), ("rbx", r.rbx), ("rcx", r.rcx), ("rdx", r.rdx)],
        [("rsi", r.rsi), ("rdi", r.rdi), ("rbp", r.rbp), ("rsp", r.rsp)],
        [("r8", r.r8), ("r9", r.r9), ("r10", r.r10), ("r11", r.r11)],
        [("r12", r.r12), ("r13", r.r13), ("r14", r.r14), ("r15", r.r15)],
        [("rip", r.rip), ("rflags", r.rflags), ("cr0", s.cr0), ("cr2", s.cr2)],
        [("cr3", s.cr3), ("cr4", s.cr4), ("efer", s.efer), ("gs", s.gs.base)],
    ];
    let row = |row: [(&str, u64); 4]| row.map(|(name, value)| format!("{name:>6} {value:016x}")).join(" ");
    rows.map(row).join("\n")
}

fn from_kvm(r: &kvm_regs) -> Registers {
    Registers {
        rax: r.rax,
        rbx: r.rbx,
        rcx: r.rcx,
        rdx: r.rdx,
        rsi: r.rsi,
        rdi: r.rdi,
        rsp: r.rsp,
        rbp: r.rbp,
        r8: r.r8,
        r9: r.r9,
        r10: r.r10,
        r11: r.r11,
        r12: r.r12,
        r13: r.r13,
        r14: r.r14,
        r15: r.r15,
        rip: r.rip,
        rflags: r.rflags,
    }
}

fn to_kvm(r: &Registers) -> kvm_regs {
    kvm_regs {
        rax: r.rax,
        rbx: r.rbx,
        rcx: r.rcx,
        rdx: r.rdx,
        rsi: r.rsi,
        rdi: r.rdi,
        rsp: r.rsp,
        rbp: r.rbp,
        r8: r.r8,
        r9: r.r9,
        r10: r.r10,
        r11: r.r11,
        r12: r.r12,
        r13: r.r13,
        r14: r.r14,
        r15: r.r15,
        rip: r.rip,
        rflags: r.rflags,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_survive_the_way_to_kvm_and_back() {
        let registers =
            Registers { rax: 1, rbx: 2, rcx: 3, rdx: 4, rsi: 5, rdi: 6, rsp: 7, rbp: 8, r8: 9, ..upper() };
        assert_eq!(from_kvm(&to_kvm(&registers)), registers);
    }

    fn upper() -> Registers {
        let zero = Registers::default();
        Registers { r9: 10, r10: 11, r11: 12, r12: 13, r13: 14, r14: 15, r15: 16, rip: 17, rflags: 2, ..zero }
    }
}
