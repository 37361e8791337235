//! The vCPUs before their first instruction.

use super::one_reg::Reg;
use super::{Gic, Platform};
use crate::boot::{Loaded, write_tree};
use crate::machine::{Config, Devices, FiveLevels, HostError, kvm_error};
use anyhow::Context;
use kvm_bindings::{
    KVM_API_VERSION, KVM_ARM_VCPU_POWER_OFF, KVM_ARM_VCPU_PSCI_0_2, PSR_A_BIT, PSR_D_BIT, PSR_F_BIT,
    PSR_I_BIT, PSR_MODE_EL1h, kvm_vcpu_init,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use std::sync::Arc;

/// Extensions that the machine cannot do without.
const NEEDED: [(Cap, &str); 8] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::OneReg, "KVM_CAP_ONE_REG"),
    (Cap::ArmPsci02, "KVM_CAP_ARM_PSCI_0_2"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::SetGuestDebug, "KVM_CAP_SET_GUEST_DEBUG"),
];

/// Checks that this KVM has all the machine needs.
///
/// # Errors
/// Names the first thing missing.
pub fn check_capabilities(kvm: &Kvm) -> Result<(), HostError> {
    if kvm.get_api_version() != KVM_API_VERSION as i32 {
        return Err(HostError::Unsupported("the stable KVM interface (API version 12)"));
    }
    match NEEDED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        Some((_, name)) => Err(HostError::Unsupported(name)),
        None => Ok(()),
    }
}

/// Levels of the page tables that the kernel is entered with: none, it makes its own.
///
/// # Errors
/// Five are asked for, which is x86-64's.
pub fn page_table_levels(_kvm: &Kvm, wanted: FiveLevels) -> Result<u8, HostError> {
    match wanted {
        FiveLevels::Always => Err(HostError::Unsupported("five levels of page tables (LA57)")),
        FiveLevels::Never | FiveLevels::WherePossible => Ok(0),
    }
}

/// True: pages of 4 KiB go with blocks of one GiB (Arm ARM, D8.3).
pub fn has_gigabyte_pages(_kvm: &Kvm) -> bool {
    true
}

/// Creates the vCPUs, the first at the kernel's entry, the others off until it starts them, then the interrupt controller,
/// which wants to know them, the tree that describes it, and the devices.
///
/// # Errors
/// What KVM refused.
pub fn assemble(
    _kvm: &Kvm,
    vm: &Arc<VmFd>,
    config: &Config<'_>,
    loaded: &Loaded,
    devices: Devices<'_>,
) -> anyhow::Result<(Platform, Vec<VcpuFd>)> {
    let vcpus = (0..config.cpus as u64).map(|id| create_vcpu(vm, id, loaded));
    let vcpus = vcpus.collect::<anyhow::Result<Vec<_>>>()?;
    let gic = Gic::of(vm);
    gic.create(vm)?;
    write_tree(devices.ram, config, loaded, gic)?;
    Ok((Platform::new(vm, devices)?, vcpus))
}

fn create_vcpu(vm: &VmFd, id: u64, loaded: &Loaded) -> anyhow::Result<VcpuFd> {
    let vcpu = vm.create_vcpu(id).map_err(kvm_error("Cannot create a virtual processor"))?;
    let mut init = kvm_vcpu_init::default();
    vm.get_preferred_target(&mut init).map_err(kvm_error("Cannot ask KVM for its processor"))?;
    init.features[0] |= 1 << KVM_ARM_VCPU_PSCI_0_2;
    if id > 0 {
        init.features[0] |= 1 << KVM_ARM_VCPU_POWER_OFF;
    }
    vcpu.vcpu_init(&init).map_err(kvm_error("Cannot set up a virtual processor"))?;
    if id == 0 {
        enter_at(&vcpu, loaded).context("Cannot set up the boot vCPU")?;
    }
    Ok(vcpu)
}

/// As the boot protocol wants it (Documentation/arch/arm64/booting.rst, "Call the kernel image"): EL1, everything masked, the
/// device tree in X0. MMU and caches are off after a reset.
fn enter_at(vcpu: &VcpuFd, loaded: &Loaded) -> anyhow::Result<()> {
    let state = PSR_MODE_EL1h | PSR_D_BIT | PSR_A_BIT | PSR_I_BIT | PSR_F_BIT;
    Reg::PSTATE.set(vcpu, state.into())?;
    Reg::PC.set(vcpu, loaded.entry.0)?;
    Reg::x(0).set(vcpu, loaded.fdt.0)?;
    (1..4).try_for_each(|number| Reg::x(number).set(vcpu, 0))
}
