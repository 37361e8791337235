//! What a debugger sees and sets of a vCPU: all of its registers, single steps, the debug registers.

use super::ExitRecord;
use crate::machine::{TrapInstruction, kvm_error};
use anyhow::Context;
use gdbstub_arch::x86::reg::{X86_64CoreRegs, X86SegmentRegs, X87FpuInternalRegs};
use introspect::memory::Va;
use kvm_bindings::{
    KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP,
    KVM_GUESTDBG_USE_SW_BP, kvm_fpu, kvm_guest_debug, kvm_regs,
};
use kvm_ioctls::VcpuFd;

/// gdb's name for the architecture, and its form of the registers.
pub type DebugArch = gdbstub_arch::x86::X86_64_SSE;
/// All registers that gdb knows.
pub type DebugRegisters = X86_64CoreRegs;

/// Addresses the processor can watch (DR0 to DR3).
const DEBUG_POINTS: usize = 4;

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
    /// 1, 2, 4 or 8 bytes, aligned to that; 1 for an instruction.
    pub len: u8,
    /// For what.
    pub kind: PointKind,
}

impl Point {
    /// R/W and LEN of DR7 (Intel SDM volume 3, 17.2.4); None for a length or an address that cannot be watched.
    fn control(self) -> Option<u64> {
        let kind = match self.kind {
            PointKind::Execute if self.len != 1 => return None,
            PointKind::Execute => 0,
            PointKind::Write => 1,
            PointKind::Access => 3,
        };
        let len = match self.len {
            1 => 0,
            2 => 1,
            8 => 2,
            4 => 3,
            _ => return None,
        };
        self.va.0.is_multiple_of(u64::from(self.len)).then_some(len << 2 | kind)
    }

    /// Whether the processor can watch it beside so many others.
    pub fn is_possible(self, others: usize) -> bool {
        others < DEBUG_POINTS && self.control().is_some()
    }
}

/// DR6 of a debug exception (Intel SDM volume 3, 17.2.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DebugStatus(pub u64);

impl DebugStatus {
    /// The first of the points that were met.
    pub fn point(self) -> Option<usize> {
        (0..DEBUG_POINTS).find(|point| self.0 >> point & 1 == 1)
    }
}

/// Reads all registers.
///
/// # Errors
/// Names the call that failed.
pub fn debug_registers(fd: &VcpuFd) -> anyhow::Result<DebugRegisters> {
    let general = fd.get_regs().context("Cannot read its general registers")?;
    let system = fd.get_sregs().context("Cannot read its system registers")?;
    let fpu = fd.get_fpu().context("Cannot read its FPU registers")?;
    let r = general;
    let selector = |segment: kvm_bindings::kvm_segment| u32::from(segment.selector);
    Ok(DebugRegisters {
        regs: [
            r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp, r.rsp, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13,
            r.r14, r.r15,
        ],
        eflags: r.rflags as u32,
        rip: r.rip,
        segments: X86SegmentRegs {
            cs: selector(system.cs),
            ss: selector(system.ss),
            ds: selector(system.ds),
            es: selector(system.es),
            fs: selector(system.fs),
            gs: selector(system.gs),
        },
        st: fpu.fpr.map(|value| value[..10].try_into().expect("10 bytes")),
        fpu: X87FpuInternalRegs {
            fctrl: u32::from(fpu.fcw),
            fstat: u32::from(fpu.fsw),
            ftag: u32::from(fpu.ftwx),
            fioff: fpu.last_ip as u32,
            fooff: fpu.last_dp as u32,
            fop: u32::from(fpu.last_opcode),
            ..Default::default()
        },
        xmm: fpu.xmm.map(u128::from_le_bytes),
        mxcsr: fpu.mxcsr,
    })
}

/// Writes all registers but the segments'.
///
/// # Errors
/// Names the call that failed.
pub fn set_debug_registers(fd: &VcpuFd, registers: &DebugRegisters) -> anyhow::Result<()> {
    let [rax, rbx, rcx, rdx, rsi, rdi, rbp, rsp, r8, r9, r10, r11, r12, r13, r14, r15] = registers.regs;
    let (rip, rflags) = (registers.rip, u64::from(registers.eflags));
    let general = kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip,
        rflags,
    };
    fd.set_regs(&general).context("Cannot write its general registers")?;
    let mut fpr = [[0; 16]; 8];
    for (to, from) in fpr.iter_mut().zip(&registers.st) {
        to[..10].copy_from_slice(from);
    }
    let fpu = kvm_fpu {
        fpr,
        fcw: registers.fpu.fctrl as u16,
        fsw: registers.fpu.fstat as u16,
        ftwx: registers.fpu.ftag as u8,
        last_opcode: registers.fpu.fop as u16,
        last_ip: u64::from(registers.fpu.fioff),
        last_dp: u64::from(registers.fpu.fooff),
        xmm: registers.xmm.map(u128::to_le_bytes),
        mxcsr: registers.mxcsr,
        ..Default::default()
    };
    fd.set_fpu(&fpu).context("Cannot write its FPU registers")
}

/// Moves the instruction pointer, with the vCPU outside the guest and no exit of it pending.
///
/// # Errors
/// Names the call that failed.
pub fn set_instruction_pointer(fd: &VcpuFd, ip: Va) -> anyhow::Result<()> {
    let registers = fd.get_regs().context("Cannot read its general registers")?;
    fd.set_regs(&kvm_regs { rip: ip.0, ..registers }).context("Cannot write its general registers")
}

/// From the next entry on: one step or all, and exits at `points`, beside the breakpoints of traps.
///
/// # Errors
/// When KVM cannot debug guests.
pub fn set_debugging(
    fd: &VcpuFd,
    traps: TrapInstruction,
    step: bool,
    points: &[Point],
) -> anyhow::Result<()> {
    let mut debug = kvm_guest_debug::default();
    if traps == TrapInstruction::Int3 {
        debug.control |= KVM_GUESTDBG_USE_SW_BP;
    }
    if step {
        debug.control |= KVM_GUESTDBG_SINGLESTEP;
    }
    if !points.is_empty() {
        debug.control |= KVM_GUESTDBG_USE_HW_BP;
        // Bit 10 reads as one (Intel SDM volume 3, 17.2.4).
        debug.arch.debugreg[7] = 1 << 10;
    }
    for (n, point) in points.iter().enumerate().take(DEBUG_POINTS) {
        debug.arch.debugreg[n] = point.va.0;
        let control = point.control().unwrap_or_default();
        debug.arch.debugreg[7] |= 2 << (2 * n) | control << (16 + 4 * n);
    }
    if debug.control != 0 {
        debug.control |= KVM_GUESTDBG_ENABLE;
    }
    // A step into the handler of a timer's interrupt is not what is asked for. Kernels before 5.16 cannot say so.
    if step {
        let quiet = kvm_guest_debug { control: debug.control | KVM_GUESTDBG_BLOCKIRQ, ..debug };
        if fd.set_guest_debug(&quiet).is_ok() {
            return Ok(());
        }
    }
    Ok(fd.set_guest_debug(&debug).map_err(kvm_error("Cannot have the guest debugged"))?)
}

/// Hands a debug exception back to the guest, which has asked for it by its own trap flag or debug registers.
///
/// # Errors
/// When KVM refuses the exception.
pub fn reflect_debug(fd: &VcpuFd, status: DebugStatus) -> anyhow::Result<()> {
    let mut state = fd.get_debug_regs()?;
    state.dr6 = status.0;
    fd.set_debug_regs(&state)?;
    let mut events = fd.get_vcpu_events()?;
    events.flags = 0;
    events.exception.injected = 1;
    events.exception.nr = ExitRecord::DEBUG as u8;
    events.exception.has_error_code = 0;
    Ok(fd.set_vcpu_events(&events)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_those_the_processor_takes() {
        let point = |va, len, kind| Point { va: Va(va), len, kind };
        let table = [
            (point(0x1001, 1, PointKind::Execute), Some(0b0000)),
            (point(0x1000, 4, PointKind::Execute), None),
            (point(0x1000, 8, PointKind::Write), Some(0b1001)),
            (point(0x1004, 8, PointKind::Write), None),
            (point(0x1004, 4, PointKind::Access), Some(0b1111)),
            (point(0x1002, 2, PointKind::Write), Some(0b0101)),
            (point(0x1000, 3, PointKind::Write), None),
        ];
        for (point, control) in table {
            assert_eq!(point.control(), control, "{point:?}");
        }
    }

    #[test]
    fn status_names_the_first_point() {
        assert_eq!(DebugStatus(0xffff_0ff4).point(), Some(2));
        // A step alone (BS).
        assert_eq!(DebugStatus(0xffff_4ff0).point(), None);
    }
}
