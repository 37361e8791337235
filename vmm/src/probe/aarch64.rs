//! The probe's guest on arm64: EL1 with the MMU off, every exception reported by a write to where no memory is.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use kvm_bindings::{
    KVM_ARM_VCPU_PSCI_0_2, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_USE_HW, KVM_GUESTDBG_USE_SW_BP, PSR_A_BIT,
    PSR_D_BIT, PSR_F_BIT, PSR_I_BIT, PSR_MODE_EL1h, kvm_guest_debug, kvm_userspace_memory_region,
    kvm_vcpu_init,
};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::MIN_RING0_MIPS;
use super::deadline::Deadline;
use crate::arch::{Reg, TrapInstruction, set_trap_registers, trap_registers};

/// Capabilities of this architecture that nothing runs without.
pub const REQUIRED: &[(&str, Cap)] = &[("ONE_REG", Cap::OneReg), ("ARM_PSCI_0_2", Cap::ArmPsci02)];
/// Those that help.
pub const OPTIONAL: &[(&str, Cap)] = &[("ARM_VM_IPA_SIZE", Cap::ArmVmIPASize)];

/// The guest's memory.
const MEMORY: u64 = 0x4000_0000;
const MEMORY_SIZE: u64 = 0x1_0000;
/// Its first instruction, and the vectors, which are aligned to their size (Arm ARM, VBAR_EL1).
const CODE: u64 = MEMORY;
const VECTORS: u64 = MEMORY + 0x1000;
/// Sixteen vectors, and the bytes of each.
const VECTOR_COUNT: u64 = 16;
const VECTOR_LEN: u64 = 0x80;
/// Where an exception's handler writes the number of its vector.
const EXCEPTION: u64 = 0x1000;
/// Where a guest says it is done.
const DONE: u64 = 0x2000;

/// Instructions (Arm ARM, C6.2).
mod code {
    pub const NOP: u32 = 0xd503_201f;
    /// `b .`, and to the instruction before.
    pub const STAY: u32 = 0x1400_0000;
    pub const BACK: u32 = 0x17ff_ffff;
    /// `b` to three instructions before.
    pub const FROM_START: u32 = 0x17ff_fffd;
    /// `subs w1, w1, #1; b.ne` to it.
    pub const COUNT_DOWN: [u32; 2] = [0x7100_0421, 0x54ff_ffe1];
    /// `str w0, [x27]`, which is DONE, and `[x28]`, which is EXCEPTION.
    pub const SAY_DONE: u32 = 0xb900_0360;
    pub const SAY_EXCEPTION: u32 = 0xb900_0380;

    /// `mov w0, #value`
    pub const fn set_w0(value: u16) -> u32 {
        0x5280_0000 | (value as u32) << 5
    }
}

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
    /// A breakpoint register on a `nop`, with KVM_GUESTDBG_USE_HW.
    HardwareBreakpoint,
}

impl Trap {
    /// The trap, then a jump back to it.
    fn code(self) -> [u32; 2] {
        let trap = match self {
            Self::Planted(TrapInstruction::Brk) => {
                let bytes = TrapInstruction::Brk.bytes();
                u32::from_le_bytes(bytes.try_into().expect("instructions have 4 bytes"))
            }
            Self::HardwareBreakpoint => code::NOP,
        };
        [trap, code::BACK]
    }

    fn guest_debug(self) -> kvm_guest_debug {
        let mut debug = kvm_guest_debug { control: KVM_GUESTDBG_ENABLE, ..Default::default() };
        match self {
            Self::Planted(TrapInstruction::Brk) => debug.control |= KVM_GUESTDBG_USE_SW_BP,
            Self::HardwareBreakpoint => {
                debug.control |= KVM_GUESTDBG_USE_HW;
                debug.arch.dbg_bvr[0] = CODE;
                // E, PMC for EL1 and EL0, BAS for a whole instruction (Arm ARM, DBGBCR<n>_EL1).
                debug.arch.dbg_bcr[0] = 1 | 3 << 1 | 0xf << 5;
            }
        }
        debug
    }

    /// Exception class of its exit (Arm ARM, ESR_ELx.EC).
    fn class(self) -> u32 {
        match self {
            Self::Planted(TrapInstruction::Brk) => 0x3c,
            Self::HardwareBreakpoint => 0x30,
        }
    }
}

/// Whether the general registers travel with the exit: never here.
pub fn has_sync_regs(_kvm: &Kvm) -> bool {
    false
}

/// Nanoseconds from one exit by `trap` to the next, registers read and written between them.
///
/// Errors say what came instead of the trap.
pub fn measure(kvm: &Kvm, trap: Trap, _sync_regs: bool) -> Result<u64> {
    let mut guest = Guest::new(kvm, &trap.code())?;
    guest.vcpu.set_guest_debug(&trap.guest_debug()).context("KVM_SET_GUEST_DEBUG failed")?;
    let deadline = Deadline::new(DEADLINE)?;
    guest.trap_once(trap, &deadline)?;
    let start = Instant::now();
    let mut exits = 0;
    while exits < MAX_EXITS && start.elapsed() < MEASURE_TIME {
        guest.trap_once(trap, &deadline)?;
        exits += 1;
    }
    Ok((start.elapsed() / exits.max(1)).as_nanos() as u64)
}

/// Million instructions per second of a loop of two: the best of a few tries, since the first ones pay for page faults
/// and translation, and a busy host for others.
pub fn ring0_mips(kvm: &Kvm) -> Result<f64> {
    let [count, again] = code::COUNT_DOWN;
    let mut guest = Guest::new(kvm, &[count, again, code::SAY_DONE, code::FROM_START])?;
    let deadline = Deadline::new(DEADLINE)?;
    let mut best: f64 = 0.0;
    let mut rounds = 1;
    for _ in 0..MAX_TRIES {
        // From its second round on the guest comes from the write, which KVM completes when it is entered: PC stays as it is.
        Reg::x(1).set(&guest.vcpu, rounds)?;
        let start = Instant::now();
        match guest.run(&deadline) {
            Ok(Exit::Write { at: DONE, .. }) => {}
            Ok(other) => bail!("a loop in EL1 ended with {other}"),
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
    Write { at: u64, value: u8 },
    Debug { class: u32 },
    Other(String),
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Write { at: EXCEPTION, value } => {
                write!(f, "an exception taken by the guest itself, by vector {value}")
            }
            Self::Write { at, value } => write!(f, "a write of {value:#x} to {at:#x}"),
            Self::Debug { class } => write!(f, "a debug exit of class {class:#x}"),
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
    fn new(kvm: &Kvm, code: &[u32]) -> Result<Self> {
        let vm = kvm.create_vm().context("KVM_CREATE_VM failed")?;
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(MEMORY), MEMORY_SIZE as usize)])
            .context("allocating a probe guest's memory")?;
        let region = memory.iter().next().context("a memory without regions")?;
        let slot = kvm_userspace_memory_region {
            slot: 0,
            guest_phys_addr: MEMORY,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            flags: 0,
        };
        // SAFETY: the mapping is as long as the slot says, and lives as long as the VM, in the same struct.
        unsafe { vm.set_user_memory_region(slot) }.context("KVM_SET_USER_MEMORY_REGION failed")?;
        fill(&memory, code)?;
        let vcpu = vm.create_vcpu(0).context("KVM_CREATE_VCPU failed")?;
        let mut init = kvm_vcpu_init::default();
        vm.get_preferred_target(&mut init).context("KVM_ARM_PREFERRED_TARGET failed")?;
        init.features[0] |= 1 << KVM_ARM_VCPU_PSCI_0_2;
        vcpu.vcpu_init(&init).context("KVM_ARM_VCPU_INIT failed")?;
        let state = PSR_MODE_EL1h | PSR_D_BIT | PSR_A_BIT | PSR_I_BIT | PSR_F_BIT;
        let registers = [
            (Reg::PSTATE, state.into()),
            (Reg::PC, CODE),
            (Reg::VBAR_EL1, VECTORS),
            (Reg::x(27), DONE),
            (Reg::x(28), EXCEPTION),
        ];
        registers.into_iter().try_for_each(|(register, value)| register.set(&vcpu, value))?;
        Ok(Self { vcpu, _vm: vm, _memory: memory })
    }

    /// Enters the guest until it exits.
    fn run(&mut self, deadline: &Deadline) -> Result<Exit> {
        loop {
            ensure!(!deadline.passed(), "the guest did not come back in time");
            return Ok(match self.vcpu.run() {
                Ok(VcpuExit::MmioWrite(at, data)) => {
                    Exit::Write { at, value: data.first().copied().unwrap_or(0) }
                }
                Ok(VcpuExit::Debug(debug)) => Exit::Debug { class: debug.hsr >> 26 },
                Ok(other) => Exit::Other(format!("exit {other:?}")),
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => continue,
                Err(error) => Exit::Other(format!("KVM_RUN failing ({error})")),
            });
        }
    }

    /// Runs into the trap, and moves the guest behind it.
    fn trap_once(&mut self, trap: Trap, deadline: &Deadline) -> Result<()> {
        let exit = self.run(deadline)?;
        ensure!(exit == Exit::Debug { class: trap.class() }, "the trap brought {exit}");
        let before = trap_registers(&mut self.vcpu)?;
        ensure!(before.pc == CODE, "the trap was taken with PC at {:#x}, not {CODE:#x}", before.pc);
        let mut after = before;
        after.pc += 4;
        set_trap_registers(&mut self.vcpu, &before, &after)
    }
}

/// Exception handlers and `code`.
fn fill(memory: &GuestMemoryMmap, code: &[u32]) -> Result<()> {
    let put = |at: u64, code: &[u32]| {
        let bytes: Vec<u8> = code.iter().flat_map(|word| word.to_le_bytes()).collect();
        memory.write_slice(&bytes, GuestAddress(at)).context("writing a probe guest's memory")
    };
    for vector in 0..VECTOR_COUNT {
        let handler = [code::set_w0(vector as u16), code::SAY_EXCEPTION, code::STAY];
        put(VECTORS + vector * VECTOR_LEN, &handler)?;
    }
    put(CODE, code)
}
