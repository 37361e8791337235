//! The probe's guest on x86-64: 64-bit ring 0, one 2 MiB page at the kernel's usual address, every exception reported
//! through a port.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use kvm_bindings::{
    KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_USE_HW_BP, KVM_GUESTDBG_USE_SW_BP, KVM_MAX_CPUID_ENTRIES,
    KVM_SYNC_X86_REGS, kvm_guest_debug, kvm_regs, kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, SyncReg, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::MIN_RING0_MIPS;
use super::deadline::Deadline;
use crate::arch::{TRAP_PORT, TrapInstruction};

/// Capabilities of this architecture that nothing runs without.
pub const REQUIRED: &[(&str, Cap)] =
    &[("SET_TSS_ADDR", Cap::SetTssAddr), ("EXT_CPUID", Cap::ExtCpuid), ("PIT2", Cap::Pit2)];
/// Those that help.
pub const OPTIONAL: &[(&str, Cap)] =
    &[("TSC_DEADLINE_TIMER", Cap::TscDeadlineTimer), ("ADJUST_CLOCK", Cap::AdjustClock)];

/// Where the guest's only page is in its virtual memory: the link address of the kernel's text (Linux,
/// Documentation/arch/x86/x86_64/mm.rst).
const BASE_VA: u64 = 0xffff_ffff_8100_0000;
/// The guest's memory, all of it one large page.
const MEMORY_SIZE: u64 = 2 << 20;

/// Places in the guest's memory.
mod layout {
    pub const PML4: u64 = 0x1000;
    pub const PDPT: u64 = 0x2000;
    pub const PD: u64 = 0x3000;
    pub const GDT: u64 = 0x4000;
    pub const IDT: u64 = 0x5000;
    /// 16 bytes per exception.
    pub const HANDLERS: u64 = 0x6000;
    pub const CODE: u64 = 0x8000;
    pub const STACK_TOP: u64 = 0xa000;
    pub const TSS: u64 = 0xb000;
}

const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
/// Exceptions get a handler each (Intel SDM volume 3, table 6-1).
const EXCEPTIONS: u64 = 32;
/// Where an exception's handler writes its vector.
const EXCEPTION_PORT: u8 = TRAP_PORT + 1;
/// Where a guest says it is done.
const DONE_PORT: u8 = TRAP_PORT + 2;

/// Exits measured at most, and for how long at most.
const MAX_EXITS: u32 = 2000;
const MEASURE_TIME: Duration = Duration::from_millis(100);
/// A round of the speed loop that long is long enough, and tries of it at most.
const LONG_ROUND: Duration = Duration::from_millis(4);
const MAX_TRIES: u32 = 10;
/// A guest that has not come back by then never will.
const DEADLINE: Duration = Duration::from_secs(5);

/// A way to leave the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trap {
    /// One that a tracer plants.
    Planted(TrapInstruction),
    /// DR0 on a `nop`, with KVM_GUESTDBG_USE_HW_BP.
    HardwareBreakpoint,
}

impl Trap {
    /// The trap, then a jump back to it.
    fn code(self) -> &'static [u8] {
        match self {
            Self::Planted(TrapInstruction::Int3) => &[0xcc, 0xeb, 0xfd],
            Self::Planted(TrapInstruction::Pio) => &[0xe6, TRAP_PORT, 0xeb, 0xfc],
            Self::HardwareBreakpoint => &[0x90, 0xeb, 0xfd],
        }
    }

    /// Bytes of the trap instruction.
    fn len(self) -> u64 {
        self.code().len() as u64 - 2
    }

    fn guest_debug(self) -> Option<kvm_guest_debug> {
        let mut debug = kvm_guest_debug { control: KVM_GUESTDBG_ENABLE, ..Default::default() };
        match self {
            Self::Planted(TrapInstruction::Pio) => return None,
            Self::Planted(TrapInstruction::Int3) => debug.control |= KVM_GUESTDBG_USE_SW_BP,
            Self::HardwareBreakpoint => {
                debug.control |= KVM_GUESTDBG_USE_HW_BP;
                debug.arch.debugreg[0] = code_va();
                // DR7: bit 10 reads as one, G0 enables DR0 for execution (Intel SDM volume 3, 17.2.4).
                debug.arch.debugreg[7] = 0x402;
            }
        }
        Some(debug)
    }
}

fn code_va() -> u64 {
    BASE_VA + layout::CODE
}

/// Whether the general registers travel with the exit.
pub fn has_sync_regs(kvm: &Kvm) -> bool {
    kvm.check_extension_int(Cap::SyncRegs) as u32 & KVM_SYNC_X86_REGS != 0
}

/// Nanoseconds from one exit by `trap` to the next, registers read and written between them.
///
/// Errors say what came instead of the trap.
pub fn measure(kvm: &Kvm, trap: Trap, sync_regs: bool) -> Result<u64> {
    let mut guest = Guest::new(kvm, trap.code())?;
    if let Some(debug) = trap.guest_debug() {
        guest.vcpu.set_guest_debug(&debug).context("KVM_SET_GUEST_DEBUG failed")?;
    }
    if sync_regs {
        guest.vcpu.set_sync_valid_reg(SyncReg::Register);
    }
    let deadline = Deadline::new(DEADLINE)?;
    guest.trap_once(trap, sync_regs, &deadline)?;
    let start = Instant::now();
    let mut exits = 0;
    while exits < MAX_EXITS && start.elapsed() < MEASURE_TIME {
        guest.trap_once(trap, sync_regs, &deadline)?;
        exits += 1;
    }
    Ok((start.elapsed() / exits.max(1)).as_nanos() as u64)
}

/// Million instructions per second of a loop of two: the best of a few tries, since the first ones pay for page faults
/// and translation, and a busy host for others.
pub fn ring0_mips(kvm: &Kvm) -> Result<f64> {
    // again: dec ecx; jnz again; out DONE_PORT, al
    let mut guest = Guest::new(kvm, &[0xff, 0xc9, 0x75, 0xfc, 0xe6, DONE_PORT])?;
    let deadline = Deadline::new(DEADLINE)?;
    let mut best: f64 = 0.0;
    let mut rounds = 1;
    for _ in 0..MAX_TRIES {
        let registers = kvm_regs { rcx: rounds, ..start_registers() };
        guest.vcpu.set_regs(&registers).context("KVM_SET_REGS failed")?;
        let start = Instant::now();
        match guest.run(&deadline) {
            Ok(Exit::Port { port: DONE_PORT, .. }) => {}
            Ok(other) => bail!("a loop in ring 0 ended with {other}"),
            // A long round under way says enough.
            Err(_) if best > 0.0 => break,
            Err(error) => return Err(error),
        }
        let elapsed = start.elapsed();
        best = best.max(2.0 * rounds as f64 / elapsed.as_secs_f64() / 1e6);
        if elapsed < LONG_ROUND {
            rounds = (rounds * 8).clamp(10_000, 1 << 30);
        } else if best >= MIN_RING0_MIPS {
            break;
        }
    }
    Ok(best)
}

/// Why the guest was left.
#[derive(Debug, PartialEq, Eq)]
enum Exit {
    Port { port: u8, value: u8 },
    Debug { exception: u32, pc: u64 },
    Other(String),
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Port { port: EXCEPTION_PORT, value: 3 } => f.write_str("a #BP taken by the guest itself"),
            Self::Port { port: EXCEPTION_PORT, value } => write!(f, "exception {value} in the guest"),
            Self::Port { port, value } => write!(f, "a write of {value:#x} to port {port:#x}"),
            Self::Debug { exception, pc } => write!(f, "a debug exit for exception {exception} at {pc:#x}"),
            Self::Other(what) => f.write_str(what),
        }
    }
}

struct Guest {
    vcpu: VcpuFd,
    // The vCPU runs on these two.
    _vm: VmFd,
    _memory: GuestMemoryMmap,
}

impl Guest {
    /// A guest that starts at `code`, all else set up.
    fn new(kvm: &Kvm, code: &[u8]) -> Result<Self> {
        let vm = kvm.create_vm().context("KVM_CREATE_VM failed")?;
        // Three pages and one, beside the memory, which Intel's VMX needs for real mode; harmless elsewhere.
        vm.set_tss_address(0xfffb_d000).context("KVM_SET_TSS_ADDR failed")?;
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY_SIZE as usize)])
            .context("allocating a probe guest's memory")?;
        let region = memory.iter().next().context("a memory without regions")?;
        let slot = kvm_userspace_memory_region {
            slot: 0,
            guest_phys_addr: 0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            flags: 0,
        };
        // SAFETY: the mapping is as long as the slot says, and lives as long as the VM, in the same struct.
        unsafe { vm.set_user_memory_region(slot) }.context("KVM_SET_USER_MEMORY_REGION failed")?;
        fill(&memory, code)?;
        let vcpu = vm.create_vcpu(0).context("KVM_CREATE_VCPU failed")?;
        // Without it KVM knows of no long mode, and may refuse the registers.
        let cpuid =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).context("KVM_GET_SUPPORTED_CPUID failed")?;
        vcpu.set_cpuid2(&cpuid).context("KVM_SET_CPUID2 failed")?;
        set_registers(&vcpu)?;
        Ok(Self { vcpu, _vm: vm, _memory: memory })
    }

    /// Enters the guest until it exits.
    fn run(&mut self, deadline: &Deadline) -> Result<Exit> {
        loop {
            ensure!(!deadline.passed(), "the guest did not come back in time");
            return Ok(match self.vcpu.run() {
                Ok(VcpuExit::IoOut(port, data)) if port < 0x100 && data.len() == 1 => {
                    Exit::Port { port: port as u8, value: data[0] }
                }
                Ok(VcpuExit::Debug(debug)) => Exit::Debug { exception: debug.exception, pc: debug.pc },
                Ok(VcpuExit::InternalError) => Exit::Other(self.internal_error()),
                Ok(other) => Exit::Other(format!("exit {other:?}")),
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => continue,
                Err(error) => Exit::Other(format!("KVM_RUN failing ({error})")),
            });
        }
    }

    fn internal_error(&mut self) -> String {
        // SAFETY: KVM filled this member of the union when the exit reason is KVM_EXIT_INTERNAL_ERROR.
        let suberror = unsafe { self.vcpu.get_kvm_run().__bindgen_anon_1.internal }.suberror;
        format!("an internal error of KVM (suberror {suberror})")
    }

    /// Runs into the trap, and moves the guest behind it.
    fn trap_once(&mut self, trap: Trap, sync_regs: bool, deadline: &Deadline) -> Result<()> {
        let exit = self.run(deadline)?;
        let expected = match trap {
            // Vector 3 is #BP, 1 is #DB.
            Trap::Planted(TrapInstruction::Int3) => Exit::Debug { exception: 3, pc: code_va() },
            Trap::HardwareBreakpoint => Exit::Debug { exception: 1, pc: code_va() },
            Trap::Planted(TrapInstruction::Pio) => Exit::Port { port: TRAP_PORT, value: 0 },
        };
        ensure!(exit == expected, "the trap brought {exit}");
        let mut registers = if sync_regs {
            self.vcpu.sync_regs().regs
        } else {
            self.vcpu.get_regs().context("KVM_GET_REGS failed")?
        };
        let behind = code_va() + trap.len();
        let fits = registers.rip == code_va()
            || (trap == Trap::Planted(TrapInstruction::Pio) && registers.rip == behind);
        ensure!(fits, "the trap was taken with RIP at {:#x}, not {:#x}", registers.rip, code_va());
        registers.rip = behind;
        if sync_regs {
            self.vcpu.sync_regs_mut().regs = registers;
            self.vcpu.set_sync_dirty_reg(SyncReg::Register);
            Ok(())
        } else {
            self.vcpu.set_regs(&registers).context("KVM_SET_REGS failed")
        }
    }
}

/// Page tables, descriptor tables, exception handlers and `code`.
fn fill(memory: &GuestMemoryMmap, code: &[u8]) -> Result<()> {
    let put = |at: u64, bytes: &[u8]| {
        memory.write_slice(bytes, GuestAddress(at)).context("writing a probe guest's memory")
    };
    // Present and writable; 0x80 makes a PD entry a 2 MiB page (Intel SDM volume 3, table 4-18).
    for (table, shift, entry) in
        [(layout::PML4, 39, layout::PDPT | 3), (layout::PDPT, 30, layout::PD | 3), (layout::PD, 21, 0x83)]
    {
        put(table + (BASE_VA >> shift & 0x1ff) * 8, &u64::to_le_bytes(entry))?;
    }
    // Flat 64-bit code and data (Intel SDM volume 3, 3.4.5).
    put(layout::GDT + u64::from(CODE_SELECTOR), &0x00af_9b00_0000_ffff_u64.to_le_bytes())?;
    put(layout::GDT + u64::from(DATA_SELECTOR), &0x00cf_9300_0000_ffff_u64.to_le_bytes())?;
    for vector in 0..EXCEPTIONS {
        let handler = layout::HANDLERS + vector * 16;
        // mov al, VECTOR; out EXCEPTION_PORT, al; hlt
        put(handler, &[0xb0, vector as u8, 0xe6, EXCEPTION_PORT, 0xf4])?;
        let offset = BASE_VA + handler;
        // A 64-bit interrupt gate (Intel SDM volume 3, figure 6-8).
        let low =
            offset & 0xffff | u64::from(CODE_SELECTOR) << 16 | 0x8e00 << 32 | (offset >> 16 & 0xffff) << 48;
        put(layout::IDT + vector * 16, &low.to_le_bytes())?;
        put(layout::IDT + vector * 16 + 8, &(offset >> 32).to_le_bytes())?;
    }
    put(layout::CODE, code)
}

/// 64-bit mode with paging, as a kernel has it.
fn set_registers(vcpu: &VcpuFd) -> Result<()> {
    let mut sregs = vcpu.get_sregs().context("KVM_GET_SREGS failed")?;
    let segment = |selector, type_| kvm_segment {
        selector,
        type_,
        limit: 0xffff_ffff,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment { l: 1, ..segment(CODE_SELECTOR, 0xb) };
    let data = kvm_segment { db: 1, ..segment(DATA_SELECTOR, 0x3) };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    // A busy 64-bit TSS: VMX refuses to enter without one.
    sregs.tr = kvm_segment {
        base: BASE_VA + layout::TSS,
        limit: 0x67,
        type_: 0xb,
        present: 1,
        ..Default::default()
    };
    (sregs.gdt.base, sregs.gdt.limit) = (BASE_VA + layout::GDT, 0x1f);
    (sregs.idt.base, sregs.idt.limit) = (BASE_VA + layout::IDT, (EXCEPTIONS * 16 - 1) as u16);
    // PG, AM, WP, NE, ET, MP, PE; PAE; LMA, LME (Intel SDM volume 3, 2.5 and 2.2.1).
    sregs.cr0 = 0x8005_0033;
    sregs.cr3 = layout::PML4;
    sregs.cr4 = 0x20;
    sregs.efer = 0x500;
    vcpu.set_sregs(&sregs).context("KVM_SET_SREGS failed")?;
    vcpu.set_regs(&start_registers()).context("KVM_SET_REGS failed")
}

fn start_registers() -> kvm_regs {
    kvm_regs { rip: code_va(), rsp: BASE_VA + layout::STACK_TOP, rflags: 2, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use crate::arch::{TrapChoice, TrapInstruction};
    use crate::probe::{Outcome, tests};

    #[test]
    fn takes_int3_where_it_works_else_a_port_write() {
        let mut probe = tests::hardware();
        assert_eq!(probe.choose(TrapChoice::Auto), Ok(TrapInstruction::Int3));
        assert_eq!(probe.choose(TrapChoice::Pio), Ok(TrapInstruction::Pio));
        let fails = |reason: &str| Outcome::Fails { reason: reason.to_owned() };
        probe.traps.insert(TrapInstruction::Int3, fails("the guest took it"));
        assert_eq!(probe.choose(TrapChoice::Auto), Ok(TrapInstruction::Pio));
        assert!(probe.choose(TrapChoice::Int3).unwrap_err().contains("the guest took it"));
        probe.traps.insert(TrapInstruction::Pio, fails("no exit"));
        let why = probe.choose(TrapChoice::Auto).unwrap_err();
        assert!(why.contains("the guest took it") && why.contains("no exit"), "{why}");
    }
}
