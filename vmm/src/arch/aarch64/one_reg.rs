//! Registers of a vCPU by KVM_GET_ONE_REG and KVM_SET_ONE_REG (Linux, Documentation/virt/kvm/api.rst, 4.68).

use anyhow::{Context, ensure};
use kvm_bindings::{KVM_REG_ARM_CORE, KVM_REG_ARM64, KVM_REG_ARM64_SYSREG, KVM_REG_SIZE_U64};
use kvm_ioctls::VcpuFd;

/// A register: KVM's number for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reg(u64);

/// A word of `struct kvm_regs` (arch/arm64/include/uapi/asm/kvm.h); KVM counts in halves.
const fn core(word: u64) -> Reg {
    Reg(KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE as u64 | (word * 2))
}

/// A system register, by its encoding.
const fn system(op0: u64, op1: u64, crn: u64, crm: u64, op2: u64) -> Reg {
    let encoding = op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2;
    Reg(KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM64_SYSREG as u64 | encoding)
}

impl Reg {
    /// X0 to X30.
    pub const fn x(number: usize) -> Self {
        core(number as u64)
    }

    pub const SP_EL0: Self = core(31);
    pub const PC: Self = core(32);
    pub const PSTATE: Self = core(33);
    pub const SP_EL1: Self = core(34);
    pub const ELR_EL1: Self = core(35);
    pub const SPSR_EL1: Self = core(36);

    // Arm ARM, D19.2: the encoding is in each register's description.
    pub const SCTLR_EL1: Self = system(3, 0, 1, 0, 0);
    pub const TTBR0_EL1: Self = system(3, 0, 2, 0, 0);
    pub const TTBR1_EL1: Self = system(3, 0, 2, 0, 1);
    pub const TCR_EL1: Self = system(3, 0, 2, 0, 2);
    pub const ESR_EL1: Self = system(3, 0, 5, 2, 0);
    pub const VBAR_EL1: Self = system(3, 0, 12, 0, 0);
    pub const TPIDR_EL1: Self = system(3, 0, 13, 0, 4);

    /// Its value.
    ///
    /// # Errors
    /// Names the register.
    pub fn get(self, vcpu: &VcpuFd) -> anyhow::Result<u64> {
        let mut bytes = [0; 8];
        let got = vcpu
            .get_one_reg(self.0, &mut bytes)
            .with_context(|| format!("Cannot read its register {:#x}", self.0))?;
        ensure!(got == bytes.len(), "Register {:#x} has {got} bytes", self.0);
        Ok(u64::from_le_bytes(bytes))
    }

    /// Changes it.
    ///
    /// # Errors
    /// Names the register.
    pub fn set(self, vcpu: &VcpuFd, value: u64) -> anyhow::Result<()> {
        vcpu.set_one_reg(self.0, &value.to_le_bytes())
            .with_context(|| format!("Cannot set its register {:#x}", self.0))?;
        Ok(())
    }
}
