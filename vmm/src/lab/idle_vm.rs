//! A virtual machine that never runs, kept beside the job so that KVM does not patch its own code meanwhile.
//!
//! KVM keeps rare conditions in static keys, among them "some vCPU has its local APIC switched off" and "some task is a
//! vCPU": the first vCPU to be so and the last to stop rewrite the helper kernel's code. A guest does that when it brings
//! its APICs up and when it powers off, just when another vCPU executes that code all the time. QEMU before 8.1 can
//! then keep a translation of the breakpoint that stands there during the change, and the helper dies of a stray int3
//! (seen in one of ten runs with QEMU 7.2). A vCPU as created has its APIC switched off; while one is kept, the keys
//! never change.

use anyhow::{Context, Result};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

/// Holds the keys while it lives.
pub struct IdleVm {
    _vcpu: VcpuFd,
    _vm: VmFd,
}

impl IdleVm {
    /// Makes one.
    pub fn new() -> Result<Self> {
        let vm = Kvm::new().context("opening /dev/kvm")?.create_vm().context("creating the idle VM")?;
        vm.create_irq_chip().context("creating the idle VM's irqchip")?;
        let vcpu = vm.create_vcpu(0).context("creating the idle VM's vCPU")?;
        Ok(Self { _vcpu: vcpu, _vm: vm })
    }
}
